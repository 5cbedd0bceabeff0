"""Plain safetensors and JSON: everything that a checkpoint holds, in files that any tool can read.

model-00001.safetensors and so on have the weights under nanochat's names; optimizer-00001.safetensors and so on have
"adamw/NAME/exp_avg", "muon/NAME/momentum" and the like. checkpoint_facts.json has the facts, the file of each tensor
and the SHA-256 of each file. loader/ and random/ are copied, and the tokenizer if it is available.
"""

import contextlib
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megachat.checkpoint.facts import ARCHITECTURE_VERSION, hash_files, upgrade_architecture
from megachat.convert.declaration import Export, Import
from megachat.convert.megachat import tokenizer_folders
from megachat.convert.reader import SHARD_BYTES, CheckpointReader, TensorInfo
from megachat.convert.tokenizers import find_tokenizer, load_tokenizer_of
from megachat.errors import UserError
from megachat.files import LOADER, RANDOM, TOKENIZER, path_kind, refuse_damaged, write_json

FACTS_FILE = "checkpoint_facts.json"
PLAIN_VERSION = 1
# safetensors' names -> torch's
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SAFETENSORS_DTYPES |= {"I64": "int64", "I32": "int32", "U8": "uint8"}
_COPIED = (f"{LOADER}/", f"{RANDOM}/")
_SAVED_ANEW = ("files", "sha256", "format_version", "architecture_version", "step", "tokenizer")


def is_plain(folder: Path) -> bool:
    """True for a folder that `export_plain` wrote."""
    return (folder / FACTS_FILE).is_file()


def export_plain(source: CheckpointReader, requested_tokenizer: Path | None) -> Export:
    """Everything as safetensors and JSON."""
    tokenizer = find_tokenizer(source, requested_tokenizer)
    return Export(lambda folder: write_plain(source, folder, tokenizer), open_plain)


def import_plain(source: CheckpointReader, requested_tokenizer: Path | None) -> Import:
    """The checkpoint that `export_plain` wrote out."""
    facts = {key: value for key, value in source.facts.items() if key not in _SAVED_ANEW}
    copies = tuple(name for name in source.files if name.startswith(_COPIED))
    return Import(source, facts, *load_tokenizer_of(source, requested_tokenizer), copies)


def write_plain(source: CheckpointReader, folder: Path, tokenizer: Path | None) -> None:
    """Writes the source's tensors, facts, loader and random state; tokenizer: a folder to copy. Raises OSError."""
    file_of: dict[str, str] = {}
    for kind in ("model", "optimizer"):
        names = [name for name in source.entries if name.startswith("model/") == (kind == "model")]
        for number, shard in enumerate(source.batches(names, SHARD_BYTES), start=1):
            file = f"{kind}-{number:05d}.safetensors"
            save_tensors({name.removeprefix("model/"): tensor for name, tensor in source.tensors(shard)}, folder / file)
            file_of |= dict.fromkeys(shard, file)
    for name in source.files:
        if name.startswith(_COPIED):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, folder / name)
    if tokenizer:
        shutil.copytree(tokenizer, folder / TOKENIZER, copy_function=shutil.copyfile)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in hash_files(folder, names).items()
    }
    facts = {key: value for key, value in source.facts.items() if key not in ("files", "sha256")}
    write_json(
        folder / FACTS_FILE, {"plain_version": PLAIN_VERSION, "facts": facts, "tensors": file_of, "files": files}
    )


def open_plain(folder: Path, step: int | None = None) -> CheckpointReader:
    """Opens what `write_plain` wrote. Raises UserError if anything is missing, damaged or of a newer version."""
    path = folder / FACTS_FILE
    with refuse_damaged(path, "cannot be read ({}): convert the checkpoint again"):
        document = json.loads(path.read_text(encoding="utf-8"))
        version, architecture = document["plain_version"], document["facts"].get("architecture_version", 1)
        file_of, files = dict(document["tensors"]), dict(document["files"])
        facts = document["facts"] | {"files": document["files"]}
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in (*files, *file_of.values())):
        raise UserError(f"{path} names a file outside its folder: convert the checkpoint again")
    if version > PLAIN_VERSION or architecture > ARCHITECTURE_VERSION:
        versions = f"version {version} and architecture {architecture}"
        raise UserError(f"{folder} has {versions}, newer than this version reads: update megachat")
    facts = upgrade_architecture(facts, architecture)
    name_of = {(file, name.removeprefix("model/")): name for name, file in file_of.items()}
    entries, read = open_tensors(folder, sorted(set(file_of.values())), lambda file, key: name_of.get((file, key)))
    if missing := [name for name in file_of if name not in entries]:
        raise UserError(f"{folder / file_of[missing[0]]} has no {missing[0]}: convert the checkpoint again")
    entries = {name: entries[name] for name in file_of}
    places = tokenizer_folders(folder, facts)
    return CheckpointReader("safetensors", folder, facts, entries, read, (*sorted(files), FACTS_FILE), places)


@contextlib.contextmanager
def writing(path: Path):
    """Turns what torch and safetensors raise when a file cannot be written into an OSError."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(errno.EIO, f"{path.name}: {str(error).splitlines()[0]}") from error


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file. Raises OSError."""
    with writing(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def open_tensors(
    folder: Path, files: list[str], rename: Callable[[str, str], str | None]
) -> tuple[dict[str, TensorInfo], Callable[[list[str]], dict[str, torch.Tensor]]]:
    """Returns (entries, read) for a CheckpointReader. rename: (file, key in it) -> name, or None to leave it out.

    Raises UserError for a file that is missing or damaged.
    """
    entries: dict[str, TensorInfo] = {}
    locations: dict[str, tuple[Any, str]] = {}
    for file in files:
        tensors = _open_safetensors(folder / file)
        for key in tensors.keys():
            if (name := rename(file, key)) is None:
                continue
            stored = tensors.get_slice(key)
            if (dtype := stored.get_dtype()) not in SAFETENSORS_DTYPES:
                problem = f"{folder / file} has {key} as {dtype}, which is none of {', '.join(SAFETENSORS_DTYPES)}"
                raise UserError(f"{problem}: save it in one of these")
            entries[name] = TensorInfo(tuple(stored.get_shape()), SAFETENSORS_DTYPES[dtype])
            locations[name] = tensors, key

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return {name: tensors.get_tensor(key) for name in names for tensors, key in [locations[name]]}

    return entries, read


def _open_safetensors(path: Path):
    if not path_kind(path):
        raise UserError(f"{path} is missing: copy the folder again, with all its files")
    with refuse_damaged(path, "is no whole safetensors file ({}): copy or convert it again", SafetensorError):
        return safe_open(path, framework="pt")
