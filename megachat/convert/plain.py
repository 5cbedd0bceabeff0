"""Plain safetensors and JSON: everything that a checkpoint holds, in files that any tool can read.

`model-00001.safetensors` and so on have the weights under nanochat's names, `optimizer-00001.safetensors` and so on `adamw/NAME/exp_avg`,
`muon/NAME/momentum` and their like; `checkpoint_facts.json` has the facts, the file of each tensor and the SHA-256 of each file; `loader/` and
`random/` are copied, and the tokenizer where it is found.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megachat.checkpoint.facts import ARCHITECTURE_VERSION, hash_files
from megachat.convert.conversion import writing
from megachat.convert.opened import Entry, Opened, files_below
from megachat.errors import UserError
from megachat.files import write_json

FACTS_FILE = "checkpoint_facts.json"
VERSION = 1
SHARD_BYTES = 2 << 30
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}
_OWN_FACTS = ("files", "sha256")  # of the checkpoint's own files


def write_plain(source: Opened, folder: Path, tokenizer: Path | None) -> None:
    """Write the source's tensors, facts, loader and random state into `folder`; tokenizer: a folder to copy. Raises OSError."""
    placed: dict[str, str] = {}
    for kind in ("model", "optimizer"):
        names = [name for name in source.entries if name.startswith("model/") == (kind == "model")]
        for number, shard in enumerate(shards_of(source, names, SHARD_BYTES), start=1):
            file = f"{kind}-{number:05d}.safetensors"
            save_tensors({key_of(name): tensor for name, tensor in source.tensors(shard)}, folder / file)
            placed |= dict.fromkeys(shard, file)
    for name in source.files:
        if name.startswith(("loader/", "random/")):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, folder / name)
    if tokenizer:
        shutil.copytree(tokenizer, folder / "tokenizer", copy_function=shutil.copyfile)
    names = files_below(folder)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in hash_files(folder, names).items()
    }
    facts = {key: value for key, value in source.facts.items() if key not in _OWN_FACTS}
    write_json(folder / FACTS_FILE, {"plain_version": VERSION, "facts": facts, "tensors": placed, "files": files})


def key_of(name: str) -> str:
    """A tensor's name in the files: weights without the prefix."""
    return name.removeprefix("model/")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file."""
    with writing(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def shards_of(source: Opened, names: list[str], most_bytes: int) -> list[list[str]]:
    """The names in their order, in lists of `most_bytes` of tensors at most, or of one."""
    shards: list[list[str]] = []
    filled = 0
    for name in names:
        if not shards or filled + source.entries[name].bytes > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += source.entries[name].bytes
    return shards


def open_plain(folder: Path) -> Opened:
    """What `write_plain` wrote. Raises UserError for what is missing, damaged or of a newer version."""
    path = folder / FACTS_FILE
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        version, architecture = told["plain_version"], told["facts"].get("architecture_version", 1)
        facts, placed, files = told["facts"] | {"files": told["files"]}, dict(told["tensors"]), dict(told["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): convert the checkpoint again"
        ) from None
    if version > VERSION or architecture > ARCHITECTURE_VERSION:
        raise UserError(
            f"{folder} is of version {version} and architecture {architecture}, newer than this version reads: update megachat"
        )
    keys = {(file, key_of(name)): name for name, file in placed.items()}
    entries, read = open_tensors(folder, sorted(set(placed.values())), lambda file, key: keys.get((file, key)))
    if missing := [name for name in placed if name not in entries]:
        raise UserError(f"{folder / placed[missing[0]]} has no {missing[0]}: convert the checkpoint again")
    return Opened(
        "safetensors", folder, facts, {name: entries[name] for name in placed}, read, (*sorted(files), FACTS_FILE)
    )


def open_tensors(folder: Path, files: list[str], rename):
    """(entries, read) as `Opened` has them, of safetensors files. rename: (file, key in it) -> name, or None to leave it out.

    Raises UserError for a file that is missing or damaged.
    """
    entries: dict[str, Entry] = {}
    where: dict[str, tuple[str, str]] = {}
    for file in files:
        with _opened(folder / file) as tensors:
            for key in tensors.keys():
                name, described = rename(file, key), tensors.get_slice(key)
                if name is not None:
                    dtype = described.get_dtype()
                    if dtype not in DTYPES:
                        raise UserError(
                            f"{folder / file} has {key} as {dtype}, which is none of {', '.join(DTYPES)}: save it in one of these"
                        )
                    entries[name], where[name] = Entry(tuple(described.get_shape()), DTYPES[dtype]), (file, key)

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        found = {}
        for file in dict.fromkeys(where[name][0] for name in names):
            with _opened(folder / file) as tensors:
                found |= {name: tensors.get_tensor(where[name][1]) for name in names if where[name][0] == file}
        return {name: found[name] for name in names}

    return entries, read


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the folder again, with all its files") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): copy or convert it again") from None
