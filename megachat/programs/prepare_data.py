"""Makes a data folder: what `megachat data` does."""

import argparse
import hashlib
import platform
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megachat.activity import announced, counted
from megachat.data.shards import MANIFEST
from megachat.data.texts import BadTexts
from megachat.errors import UserError
from megachat.files import file_sha256
from megachat.prepare.download import HUB_SOURCES, HubSource, download_shards, shard_names
from megachat.prepare.manifest import begin_preparation, finish_preparation, is_prepared
from megachat.prepare.python_source import read_standard_library
from megachat.prepare.sources import find_input_files, read_parquet_files, read_text_files, write_shards

_HUB_SHARDS = 8


def prepare(options: argparse.Namespace) -> dict | None:
    """Makes the folder. Returns its manifest, or None if the folder already holds this data."""
    if options.input and options.source not in ("text", "parquet"):
        raise UserError(f"--input is for the sources text and parquet, not {options.source}: leave it out")
    if options.base_url and options.source not in HUB_SOURCES:
        raise UserError(f"--base-url is for downloads, not for source {options.source}: leave it out")
    try:
        return _download(options) if options.source in HUB_SOURCES else _prepare_local(options)
    except OSError as error:
        raise UserError(
            f"{error.filename or options.out} cannot be read or written ({error.strerror or error}): "
            "free space or change its permissions, and run the same command again"
        ) from None


def _download(options: argparse.Namespace) -> dict | None:
    hub = HUB_SOURCES[options.source]
    source = HubSource(options.base_url or hub.base_url, hub.last_index)
    train_shards = options.shards or _HUB_SHARDS
    if train_shards > source.last_index:
        raise UserError(
            f"{options.source} has {source.last_index} train shards, not {train_shards}: "
            f"give --shards {source.last_index} or less"
        )
    request = {"source": options.source, "base_url": source.base_url, "shards": train_shards}
    names = shard_names(source, train_shards)
    if is_prepared(options.out, request, overwrite=options.overwrite, names=names):
        return None
    begin_preparation(options.out, request, keep_shards=True)
    entries = download_shards(options.out, source, train_shards, workers=options.workers)
    return finish_preparation(options.out, request, entries)


def _counted(files: list[Path], activity: str) -> Iterator[Path]:
    """Yields the files and shows how many of their bytes are done."""
    sizes = {path: path.stat().st_size for path in files}
    return counted(files, activity, sum(sizes.values()), "B", sizes.__getitem__)


def _paths_by_name(inputs: list[str]) -> dict[str, list[Path]]:
    """Return source name -> paths; the name is "" if no input has one."""
    paths: dict[str, list[Path]] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = "", text
        paths.setdefault(name, []).append(Path(path))
    if "" in paths and len(paths) > 1:
        raise UserError(
            f"--input {paths[''][0]} has no name, but others have: give NAME=PATH for all of them, or for none"
        )
    return paths


def _concatenate(documents: dict[str, Iterator[str]], labels: list[str]) -> Iterator[str]:
    """Yield all documents, one source after another, and append the source of each to `labels`."""
    for name, documents_of_source in documents.items():
        for document in documents_of_source:
            labels.append(name)
            yield document


def _prepare_local(options: argparse.Namespace) -> dict | None:
    labels: list[str] | None = None
    bad_texts = BadTexts(options.on_bad_text, "give --on-bad-text skip", log=print)
    request = {"source": options.source, "seed": options.seed, "shards": options.shards}
    if options.source == "python":
        request |= {"document_bytes": options.document_bytes, "python": platform.python_version()}
        documents = read_standard_library(options.document_bytes)
    else:
        suffixes = (".txt", ".md") if options.source == "text" else (".parquet",)
        paths = _paths_by_name(options.input)
        files_by_name = {name: find_input_files(inputs, suffixes) for name, inputs in paths.items()}
        files = find_input_files([path for inputs in paths.values() for path in inputs], suffixes)
        if sum(map(len, files_by_name.values())) > len(files):
            raise UserError("a file has two names: give each --input once")
        inside = [path for path in files if path.resolve().is_relative_to(options.out.resolve())]
        if inside:
            raise UserError(
                f"{inside[0]} is inside --out {options.out}, where it would be replaced: give another --out"
            )
        hashes = map(file_sha256, _counted(files, "hashing the input"))
        request |= {
            "input": [str(Path(text)) for text in options.input],
            "input_files": len(files),
            "input_bytes": sum(path.stat().st_size for path in files),
            "input_sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        }
        if bad_texts.policy != "refuse":
            request["on_bad_text"] = bad_texts.policy
        read = partial(read_parquet_files, bad_texts=bad_texts)
        if options.source == "text":
            request["document_bytes"] = options.document_bytes
            read = partial(read_text_files, document_bytes=options.document_bytes, bad_texts=bad_texts)
        if "" not in paths:
            request["sources"], labels = list(paths), []
        readers = {
            name: read(_counted(of_source, f"reading {name or 'the input'}"))
            for name, of_source in files_by_name.items()
        }
        documents = _concatenate(readers, labels if labels is not None else [])
    if is_prepared(options.out, request, overwrite=options.overwrite):
        return None
    # Called when the whole input was read, so that a bad input changes nothing.
    begin = partial(begin_preparation, options.out, request)
    with announced("reading and shuffling the text"):
        entries = write_shards(options.out, documents, options.seed, options.shards, labels, before_writing=begin)
    return finish_preparation(options.out, request, entries, bad_texts.count)


def make_data_folder(options: argparse.Namespace) -> None:
    """Makes the folder and prints what it holds. options: of `megachat data`."""
    manifest = prepare(options)
    if manifest is None:
        print(f"{options.out} already holds exactly this data: nothing to do")
        return
    shards = manifest["shards"]
    if manifest.get("skipped_texts"):
        print(f"{manifest['skipped_texts']:,} texts that are not UTF-8 were left out")
    print(
        f"{options.out}: {manifest['documents']:,} documents, {manifest['bytes'] / 1e6:,.1f} MB of text in "
        f"{len(shards) - 1} train shards and {shards[-1]['name']} for validation; see {MANIFEST}"
    )
