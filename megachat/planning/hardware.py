"""Machines to plan for: GPUs, links and networks from hardware.json or a file of the same format. Pure but for reading
these files; no torch.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from megachat.errors import UserError

HARDWARE_FORMAT = 1  # of hardware.json
DEFAULT_NETWORK = "InfiniBand NDR"
_HARDWARE_FILE = Path(__file__).with_name("hardware.json")
_GPUS = re.compile(r"(?:(\d+)\s*x\s*)?(?:(\d+)\s*x\s*)?([A-Za-z][^x]*.*|\d{4}\D*)", re.IGNORECASE)


class Interconnect(NamedTuple):
    """What joins GPUs. bytes_per_sec: of one GPU in one direction. latency_sec: of one step of a ring."""

    name: str
    bytes_per_sec: float
    latency_sec: float


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. flops: dense peaks by dtype of the inputs ("float8" where it has FP8). link: to the others of
    its node. source: the document that the numbers are from.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_sec: float
    multiprocessors: int
    flops: Mapping[str, float]
    link: Interconnect
    gpus_per_node: int
    source: str


@dataclass(frozen=True)
class Machine:
    """Nodes with equal GPUs. network: between nodes, shared by the GPUs of a node."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network: Interconnect

    @property
    def world(self) -> int:
        """Returns the number of GPUs, which is the number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def name(self) -> str:
        """Returns the machine as parse_gpus reads it: 8xH100, 4x8xH100."""
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node}x{self.gpu.name}"

    def with_nodes(self, nodes: int) -> "Machine":
        """Returns the same machine with another number of nodes."""
        return dataclasses.replace(self, nodes=nodes)


def parse_gpus(
    text: str, *, nodes: int | None = None, network: str = DEFAULT_NETWORK, spec: Path | None = None
) -> Machine:
    """Returns the machine of "H100", "8xH100" (one node, or `nodes` of them) or "4x8xH100" (nodes x GPUs x kind).

    More GPUs than a node has are whole nodes: 16xH100 is 2x8xH100. network: between nodes. spec: a file of the format
    of hardware.json, whose entries are added to it. Raises UserError for text that is no such name, and for unknown
    kinds of GPU or network, with the near ones.
    """
    match = _GPUS.fullmatch(text.strip())
    if match is None:
        raise UserError(f"--gpus {text} is no machine: give it as 8xH100, or as 4x8xH100 for 4 nodes with 8 GPUs each")
    counts = [int(count) for count in match.groups()[:2] if count is not None]
    if not all(0 < count <= 2**20 for count in (*counts, nodes or 1)):
        raise UserError(f"--gpus {text}: give 1 to {2**20:,} nodes and GPUs per node")
    if len(counts) == 2 and nodes is not None and nodes != counts[0]:
        raise UserError(f"--gpus {text} has {counts[0]} nodes, but --nodes is {nodes}: give one of the two")
    gpus, networks = load_hardware(spec)
    gpu = _lookup(match[3], gpus, "GPU")
    per_node = counts[-1] if counts else 1
    if nodes is None and len(counts) == 1 and per_node > gpu.gpus_per_node:
        counts, left_over = [per_node // gpu.gpus_per_node, gpu.gpus_per_node], per_node % gpu.gpus_per_node
        if left_over:
            raise UserError(
                f"--gpus {text}: a node has {gpu.gpus_per_node} {gpu.name}: give a multiple of that, or nodes x GPUs "
                f"per node, as 2x{per_node // 2}x{gpu.name}"
            )
        per_node = gpu.gpus_per_node
    nodes = counts[0] if len(counts) == 2 else nodes or 1
    link, shared = _lookup(network, networks, "network")
    if shared:
        link = link._replace(bytes_per_sec=link.bytes_per_sec / per_node)
    return Machine(gpu, nodes, per_node, link)


def known_gpu(device_name: str) -> Gpu | None:
    """Returns the GPU of a name as CUDA reports it ("NVIDIA H100 80GB HBM3"), None if it is not in the data file."""
    return load_hardware()[0].get(_key(device_name))


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia "))


def _lookup(name: str, known: Mapping, what: str):
    """Returns the entry of a name. Raises UserError with the near names."""
    if (entry := known.get(_key(name))) is not None:
        return entry
    titles = {key: getattr(value, "name", None) or value[0].name for key, value in known.items()}
    near = list(dict.fromkeys(titles[key] for key in difflib.get_close_matches(_key(name), titles, 3, 0.6)))
    names = f"the near ones are {', '.join(near)}" if near else f"known are {', '.join(dict.fromkeys(titles.values()))}"
    raise UserError(
        f"{name} is no known {what}: {names}; for another one give its numbers to `megachat plan` by --gpu-spec FILE"
    )


@functools.cache
def load_hardware(spec: Path | None = None) -> tuple[Mapping[str, Gpu], Mapping[str, tuple[Interconnect, bool]]]:
    """Returns GPUs by each of their names, and networks with whether the GPUs of a node share one adapter, by name.

    Names are lower-case letters and digits. Raises UserError for a spec file that is missing, damaged or incomplete.
    """
    gpus: dict[str, Gpu] = {}
    links: dict[str, Interconnect] = {}
    networks: dict[str, tuple[Interconnect, bool]] = {}
    for path in (_HARDWARE_FILE, spec):
        if path is None:
            continue
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != HARDWARE_FORMAT:
                raise UserError(
                    f"{path} has format {document['format']}, but this version reads {HARDWARE_FORMAT}: write it again"
                )
            for name, entry in document.get("links", {}).items():
                links[name] = _link(name, entry)
            for name, entry in document.get("networks", {}).items():
                networks[_key(name)] = _link(name, entry), entry["adapters"] == "node"
            for name, entry in document.get("gpus", {}).items():
                gpu = _gpu(name, entry, links)
                gpus |= {_key(alias): gpu for alias in (name, *entry.get("names", ()))}
        except OSError as error:
            raise UserError(f"--gpu-spec {path} cannot be read ({error.strerror}): give a file") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--gpu-spec {path} is not a hardware file ({type(error).__name__}: {error}): write it as "
                f"{_HARDWARE_FILE.name} in megachat/planning"
            ) from None
    return MappingProxyType(gpus), MappingProxyType(networks)


def _link(name: str, entry: dict) -> Interconnect:
    return Interconnect(name, _positive(entry["bytes_per_sec"]), _positive(entry["latency_sec"]))


def _gpu(name: str, entry: dict, links: Mapping[str, Interconnect]) -> Gpu:
    if not entry["source"]:
        raise ValueError(f"{name} has no source")
    return Gpu(
        name=name,
        memory_bytes=int(_positive(entry["memory_bytes"])),
        memory_bytes_per_sec=_positive(entry["memory_bytes_per_sec"]),
        multiprocessors=int(_positive(entry["multiprocessors"])),
        flops=MappingProxyType({dtype: _positive(value) for dtype, value in entry["flops"].items()}),
        link=links[entry["link"]],
        gpus_per_node=int(_positive(entry["gpus_per_node"])),
        source=entry["source"],
    )


def _positive(value: float) -> float:
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value!r} is no positive number")
    return float(value)
