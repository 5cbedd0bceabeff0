"""Make a data folder: parquet shards with a `text` column, the last one for validation, and a manifest.

The source text of Python's standard library, without a download:
    python tools/prepare_data.py --source python --out data/python
Text files, or parquet files with a `text` column:
    python tools/prepare_data.py --source text --input notes/ --input book.txt --out data/mine
    python tools/prepare_data.py --source parquet --input tables/ --out data/tables
Several named sources, so that an evaluation can show bits per byte of each:
    python tools/prepare_data.py --source text --input novels=books/ --input notes=notes/ --out data/both
nanochat's data from the Hugging Face hub:
    python tools/prepare_data.py --source climbmix --shards 170 --out data/climbmix

The same command again does nothing, or finishes a preparation that was interrupted.
"""

import argparse
import hashlib
import platform
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.data.shards import MANIFEST  # noqa: E402
from megachat.data.texts import BadTexts  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.files import file_sha256  # noqa: E402
from megachat.prepare.download import HUB_SOURCES, HubSource, download_shards, shard_names  # noqa: E402
from megachat.prepare.manifest import begin_preparation, finish_preparation, is_prepared  # noqa: E402
from megachat.prepare.python_source import read_standard_library  # noqa: E402
from megachat.prepare.sources import find_input_files, read_parquet_files, read_text_files, write_shards  # noqa: E402

_HUB_SHARDS = 8
_MINIMUM = {"shards": 1, "document_bytes": 64, "workers": 1, "seed": 0}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", required=True, choices=["python", "text", "parquet", *HUB_SOURCES], help="where the text is from")
    add("--out", required=True, type=Path, help="the data folder to make")
    inputs = "text, parquet: a file or folder, or NAME=PATH to record the source's name; can be repeated"
    add("--input", action="append", default=[], metavar="PATH", help=inputs)
    shards = f"train shards; one for validation is added (default: {_HUB_SHARDS} for downloads, otherwise by size)"
    add("--shards", type=int, help=shards)
    add("--seed", type=int, default=0, help="order of the documents (default 0); downloads are already shuffled")
    longest = "text, python: longer texts are cut into documents of about this size (default 4096)"
    add("--document-bytes", type=int, default=4096, help=longest)
    add("--base-url", help="downloads: the address of a mirror that has shard_00000.parquet and the others")
    add("--workers", type=int, default=4, help="downloads: shards at the same time (default 4)")
    overwrite = "replace the .parquet files in --out; complete shards from the same address are kept"
    bad = "text, parquet: refuse texts that are not UTF-8, or skip them, counted (default refuse)"
    add("--on-bad-text", choices=["refuse", "skip"], default="refuse", help=bad)
    add("--overwrite", action="store_true", help=overwrite)
    return parser


def prepare(options: argparse.Namespace) -> dict | None:
    """Make the folder. Returns its manifest, or None if the folder already holds this data."""
    for option, minimum in _MINIMUM.items():
        value = getattr(options, option)
        if value is not None and value < minimum:
            raise UserError(f"--{option.replace('_', '-')} is {value}: give {minimum} or more")
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
        request |= {
            "input": [str(Path(text)) for text in options.input],
            "input_files": len(files),
            "input_bytes": sum(path.stat().st_size for path in files),
            "input_sha256": hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest(),
        }
        if bad_texts.policy != "refuse":
            request["on_bad_text"] = bad_texts.policy
        read = partial(read_parquet_files, bad_texts=bad_texts)
        if options.source == "text":
            request["document_bytes"] = options.document_bytes
            read = partial(read_text_files, document_bytes=options.document_bytes, bad_texts=bad_texts)
        if "" not in paths:
            request["sources"], labels = list(paths), []
        readers = {name: read(files_of_source) for name, files_of_source in files_by_name.items()}
        documents = _concatenate(readers, labels if labels is not None else [])
    if is_prepared(options.out, request, overwrite=options.overwrite):
        return None
    # Called when the whole input was read, so that a bad input changes nothing.
    begin = partial(begin_preparation, options.out, request)
    entries = write_shards(options.out, documents, options.seed, options.shards, labels, before_writing=begin)
    return finish_preparation(options.out, request, entries, bad_texts.count)


@user_errors_end_the_program
def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
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


if __name__ == "__main__":
    main()
