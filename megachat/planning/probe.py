"""What `megachat probe` measured on a machine: reading its file, and speeds for predictions. Pure but for reading; no
torch.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megachat.config import Config, config_from_values
from megachat.errors import UserError
from megachat.planning.communication import Kind
from megachat.planning.hardware import Gpu, Interconnect, Machine
from megachat.planning.sizes import resolve_dimensions
from megachat.planning.speeds import visible_pairs
from megachat.planning.step_work import AttentionWork, Gemm

PROBE_FORMAT, PROBE_VERSION = "megachat probe", 1
OF_PASSES = ("matrix products", "attention", "elementwise", "head and loss")
WIDTHS = 1.0, 0.5, 1.5  # factors on the model's width at which products are measured
_NEAREST = 6  # measured shapes from which the speed of another shape is interpolated


def _speed_at(point: tuple[float, ...], measured: Sequence[tuple[tuple[float, ...], float]]) -> float:
    """Returns the speed at a point: the mean of the nearest logarithms, weighted by 1 / distance squared.

    measured: points, which are logarithms of sizes, with the logarithm of their speed.
    """
    distances = sorted((math.dist(point, other), value) for other, value in measured)[:_NEAREST]
    if distances[0][0] < 1e-9:
        exact = [value for distance, value in distances if distance < 1e-9]
        return math.exp(sum(exact) / len(exact))
    weights = [1 / distance**2 for distance, _ in distances]
    total = sum(weight * value for weight, (_, value) in zip(weights, distances, strict=True))
    return math.exp(total / sum(weights))


def _logarithms(*sizes: float) -> tuple[float, ...]:
    return tuple(math.log2(max(size, 1e-3)) for size in sizes)


def _line(points: list[list[float]], size: float) -> float:
    """Returns the seconds for a size between measured (size, seconds), on straight lines in logarithms. Below the first
    point they are constant, beyond the last proportional to the size.
    """
    inside = min(size, max(measured for measured, _ in points))
    logarithms = [(math.log(measured), math.log(seconds)) for measured, seconds in points]
    return math.exp(_between(logarithms, math.log(inside))) * (size / inside)


def _between(points: list[tuple[float, float]], at: float) -> float:
    """Returns the value at a coordinate on straight lines between points, and the nearest point's value outside."""
    coordinates, values = zip(*sorted(points), strict=True)
    return float(np.interp(at, coordinates, values))


class ProbeSpeeds:
    """Speeds that were measured with `ranks` ranks at work on one machine.

    factors: measured over predicted time of the probe's real step, "passes" (forward and backward) and "optimizer".
    overlap: share of communication that computing hides: 0 where both use the same cores.
    """

    def __init__(self, name: str, measured: dict[str, Any], factors: dict[str, float], error: float, overlap: float):
        self.name, self.error, self.overlap = name, error, overlap
        self.ranks, self._measured, self._factors = measured["ranks"], measured, factors
        self.products = measured["products"]
        # a product's speed in seconds per FLOP, by dtype
        self._products: dict[str, list] = {}
        for rows, columns, inner, dtype, seconds in measured["products"]:
            value = math.log(seconds / (2 * rows * columns * inner))
            self._products.setdefault(dtype, []).append((_logarithms(rows, columns, inner), value))
        self._attention: dict[str, list] = {"forward": [], "backward": []}
        for *shape, forward, backward in measured["attention"]:
            attention = AttentionWork._make((*shape, 1, 1))
            point = self._attention_point(attention)
            for direction, seconds in (("forward", forward), ("backward", backward)):
                self._attention[direction].append((point, math.log(seconds / self._attention_flops(attention))))
        self._polar = [(_logarithms(min(m, n), max(m, n)), math.log(sec / (m * n))) for m, n, sec in measured["polar"]]
        self._product_sec = functools.lru_cache(maxsize=4096)(self._interpolated_product)

    def factor(self, part: str) -> float:
        return self._factors.get("optimizer" if part == "optimizer" else "passes" if part in OF_PASSES else "", 1.0)

    def _interpolated_product(self, rows: int, columns: int, inner: int, dtype: str) -> float:
        known = self._products.get(dtype) or next(iter(self._products.values()))
        return 2 * rows * columns * inner * _speed_at(_logarithms(rows, columns, inner), known)

    def product(self, product: Gemm) -> float:
        return product.count * self._product_sec(*product[:4])

    @staticmethod
    def _attention_flops(attention: AttentionWork) -> float:
        return 4 * attention.rows * attention.heads * attention.head_size * visible_pairs(attention)

    @staticmethod
    def _attention_point(attention: AttentionWork) -> tuple[float, ...]:
        return _logarithms(attention.rows * attention.heads, attention.window, attention.tokens, attention.head_size)

    def attention(self, attention: AttentionWork) -> float:
        point, flops = self._attention_point(attention), self._attention_flops(attention)
        forward, backward = (
            _speed_at(point, self._attention[direction]) * flops for direction in ("forward", "backward")
        )
        return attention.forward * forward + attention.backward * backward

    def moved(self, size: float, tensor_bytes: float, kernels: float) -> float:
        curve = [(math.log(moved), per_byte) for moved, per_byte in self._measured["moved"]]
        return size * _between(curve, math.log(max(tensor_bytes, 1)))

    def streamed(self, size: float) -> float:
        return size * self._measured["streamed"]

    def logits(self, count: float, tokens: float, bytes_per_logit: float) -> float:
        curve = [(math.log(tokens), per_logit) for tokens, per_logit in self._measured["logits"]]
        return count * _between(curve, math.log(tokens))

    def polar(self, rows: int, columns: int, dtype: str) -> float:
        return rows * columns * _speed_at(_logarithms(*sorted((rows, columns))), self._polar)

    def collective(self, kind: Kind, size: float, ranks: int, stride: int, first: int = 0) -> float:
        points = self._measured["collectives"].get(kind)
        if not points:
            raise UserError(
                f"the probe has no {kind} between ranks: repeat `megachat probe` with --ranks {ranks} or more"
            )
        # measured over all ranks of the set; other numbers of ranks send the ring's share of the bytes
        return _line(points, size) * ((ranks - 1) / ranks) / ((self.ranks - 1) / self.ranks)

    def host(self, kernels: float, steps: float) -> float:
        return 0.0  # is in what was measured


class Probe(NamedTuple):
    """A probe's document. source: the file."""

    document: dict[str, Any]
    source: str = "probe"

    @property
    def name(self) -> str:
        """Returns the device's name and how many ranks were measured."""
        return f"{self.document['machine']['device']}, {self.most_ranks} ranks"

    @property
    def most_ranks(self) -> int:
        """Returns the largest number of ranks that was measured."""
        return max(one["ranks"] for one in self.document["sets"])

    @property
    def on_gpu(self) -> bool:
        """Returns whether GPUs were measured."""
        return self.document["machine"]["device_count"] > 0

    def speeds(self, world: int) -> ProbeSpeeds:
        """Returns the speeds with `world` ranks at work, from the nearest number of ranks that was measured.

        Raises UserError for more ranks than were measured.
        """
        sets = sorted(self.document["sets"], key=lambda one: one["ranks"])
        fitting = [one for one in sets if one["ranks"] >= world]
        if not fitting:
            raise UserError(
                f"{self.source} measured up to {sets[-1]['ranks']} ranks at a time, not {world}: repeat `megachat "
                f"probe` with --ranks {world}, or plan with --gpus"
            )
        document = self.document
        return ProbeSpeeds(self.name, fitting[0], document["factors"], document["error"], document["overlap"])

    def machine(self, ranks: int, memory_bytes: int | None = None) -> Machine:
        """Returns the measured machine with its best speeds. memory_bytes: of a rank; default: as recorded, on a CPU
        divided by the ranks. Raises UserError if it is not recorded.
        """
        speeds, machine, flops = self.speeds(ranks), self.document["machine"], dict[str, float]()
        if memory_bytes is None and "memory_bytes" not in machine:
            raise UserError(f"{self.source} does not record the machine's memory: give --memory-gb, or probe again")
        memory = memory_bytes or machine["memory_bytes"] // (1 if self.on_gpu else ranks)
        for rows, columns, inner, dtype, seconds in speeds.products:
            flops[dtype] = max(flops.get(dtype, 0.0), 2 * rows * columns * inner / seconds)
        link = Interconnect("measured", math.inf, 0.0)  # collectives are looked up in the measured points
        gpu = Gpu(machine["device"], memory, 1 / speeds.streamed(1), 1, flops, link, ranks, self.source)
        return Machine(gpu, 1, ranks, link)

    def config_for(self, config: Config, vocab_size: int) -> Config:
        """Returns a config with the dtype of this probe, if it leaves the dtype to the device.

        Raises UserError for a config that this probe does not predict: of another dtype, row length, head size,
        compilation or FP8, or of a width that is far from the measured one.
        """
        probed = config_from_values(self.document["config"], self.source)
        dtype, again = self.document["dtype"], "run `megachat probe` with this config"
        if config.precision.compute not in ("auto", dtype):
            raise UserError(
                f"{self.source} was measured in {dtype}, but precision.compute is {config.precision.compute}: {again}"
            )
        if config.precision.fp8 != "off" and probed.precision.fp8 == "off":
            raise UserError(f"{self.source} has no FP8, but precision.fp8 is {config.precision.fp8}: {again}")
        for section, key in (("precision", "compile"), ("model", "sequence_len"), ("model", "head_size")):
            value, measured = (getattr(getattr(one, section), key) for one in (config, probed))
            if value != measured:
                raise UserError(f"{self.source} was measured with {section}.{key}={measured}, not {value}: {again}")
        widths = [resolve_dimensions(one, vocab_size).width for one in (config, probed)]
        low, high = min(WIDTHS) * widths[1], max(WIDTHS) * widths[1]
        if not low <= widths[0] <= high:
            raise UserError(
                f"{self.source} was measured at width {widths[1]}, which predicts widths from {low:.0f} to {high:.0f}, "
                f"and this model's is {widths[0]}: {again}"
            )
        return config.changed("precision", compute=dtype)


def read_probe(path: Path) -> Probe:
    """Returns the probe in a file. Raises UserError if it cannot be read, is no probe, or is of another version."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != PROBE_FORMAT:
            raise ValueError(f"format {document['format']}")
        version = document["version"]
        if version == PROBE_VERSION:
            _check_document(document)
    except OSError as error:
        raise UserError(f"probe {path} cannot be read ({error.strerror}): run `megachat probe --out {path}`") from None
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, StopIteration) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a file of `megachat probe` ({what}): run `megachat probe` again") from None
    if version != PROBE_VERSION:
        raise UserError(
            f"{path} is of probe version {version}, but this megachat reads version {PROBE_VERSION}: run "
            "`megachat probe` again"
        )
    return Probe(document, str(path))


def _check_document(document: dict[str, Any]) -> None:
    """Raises an error for a document in which something is missing or no number: computes one speed of each kind."""
    probe = Probe(document)
    if not document["sets"]:
        raise ValueError("no measurement")
    machine, results = document["machine"], [document["error"] + 1, document["overlap"] + 1]
    results += [machine["device_count"] + 1, machine.get("memory_bytes", 1), *document["factors"].values()]
    for one in document["sets"]:
        speeds, kind = probe.speeds(one["ranks"]), one["products"][0][3]
        results += [speeds.product(Gemm(64, 64, 64, kind)), speeds.polar(64, 64, kind), speeds.streamed(1)]
        results += [speeds.moved(1, 1, 1), speeds.logits(1, 1, 1)]
        results.append(speeds.attention(AttentionWork._make((*one["attention"][0][:7], 1, 1))))
        results += [speeds.collective(kind, 1, one["ranks"], 1) for kind in one["collectives"]]
    if not document["config"]["model"] or not all(0 < result < math.inf for result in results):
        raise ValueError("a number that is not above 0")
    if not isinstance(document["dtype"] + machine["device"], str):
        raise TypeError("no dtype")
