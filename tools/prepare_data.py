"""Make a data folder: parquet shards with a `text` column, the last for validation, and a manifest.

    python tools/prepare_data.py --source python --out data/python                    the source text of Python's standard library; no download
    python tools/prepare_data.py --source text --input notes/ --input book.txt --out data/mine
    python tools/prepare_data.py --source parquet --input tables/ --out data/tables
    python tools/prepare_data.py --source text --input novels=books/ --input notes=notes/ --out data/both    bits per byte of each can be told
    python tools/prepare_data.py --source climbmix --shards 170 --out data/climbmix   nanochat's data from the Hugging Face hub

Called again with the same arguments it does nothing, or finishes what was interrupted.
"""

import argparse
import platform
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.data.shards import MANIFEST  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.prepare.download import HUB_SOURCES, HubSource, download_shards  # noqa: E402
from megachat.prepare.manifest import begin_preparation, finish_preparation  # noqa: E402
from megachat.prepare.python_source import read_standard_library  # noqa: E402
from megachat.prepare.sources import find_input_files, read_parquet_files, read_text_files, write_shards  # noqa: E402

_HUB_SHARDS = 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, choices=["python", "text", "parquet", *HUB_SOURCES])
    parser.add_argument("--out", required=True, type=Path, help="the data folder to make")
    told = "text, parquet: a file or folder, or NAME=PATH to keep the source's name; may be given several times"
    parser.add_argument("--input", action="append", default=[], metavar="PATH", help=told)
    parser.add_argument(
        "--shards", type=int, help=f"train shards; one for validation is added (downloads: {_HUB_SHARDS}; else by size)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="order of the documents (not for downloads, which are shuffled already)"
    )
    parser.add_argument(
        "--document-bytes",
        type=int,
        default=4096,
        help="text, python: longer texts are cut into documents of about this size (4096)",
    )
    parser.add_argument("--base-url", help="downloads: where shard_00000.parquet and its fellows lie, for a mirror")
    parser.add_argument("--workers", type=int, default=4, help="downloads: shards at once (4)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the .parquet files in --out; whole shards of the same address are kept",
    )
    return parser


def prepare(asked: argparse.Namespace) -> dict | None:
    """Make the folder. Returns its manifest, None if it was there already."""
    for option, least in {"shards": 1, "document_bytes": 64, "workers": 1, "seed": 0}.items():
        value = getattr(asked, option)
        if value is not None and value < least:
            raise UserError(f"--{option.replace('_', '-')} is {value}: give {least} or more")
    if asked.input and asked.source not in ("text", "parquet"):
        raise UserError(f"--input is for the sources text and parquet, not {asked.source}: leave it out")
    if asked.base_url and asked.source not in HUB_SOURCES:
        raise UserError(f"--base-url is for downloads, not for source {asked.source}: leave it out")
    return _download(asked) if asked.source in HUB_SOURCES else _cut_and_shuffle(asked)


def _download(asked: argparse.Namespace) -> dict | None:
    known = HUB_SOURCES[asked.source]
    source = HubSource(asked.base_url or known.base_url, known.last_index)
    train_shards = asked.shards or _HUB_SHARDS
    if train_shards > source.last_index:
        raise UserError(
            f"{asked.source} has {source.last_index} train shards, not {train_shards}: give --shards {source.last_index} or less"
        )
    request = {"source": asked.source, "base_url": source.base_url, "shards": train_shards}
    if not begin_preparation(asked.out, request, overwrite=asked.overwrite, keep_shards=True):
        return None
    return finish_preparation(
        asked.out, request, download_shards(asked.out, source, train_shards, workers=asked.workers)
    )


def _named(inputs: list[str]) -> dict[str, list[Path]]:
    """Source name -> its paths; one source without a name where none has one."""
    found: dict[str, list[Path]] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = "", text
        found.setdefault(name, []).append(Path(path))
    if "" in found and len(found) > 1:
        raise UserError(
            f"--input {found[''][0]} has no name, but others have: give NAME=PATH for all of them, or for none"
        )
    return found


def _labelled(documents: dict[str, Iterator[str]], labels: list[str]) -> Iterator[str]:
    """All documents, source after source; the source of each goes into `labels`."""
    for name, own in documents.items():
        for document in own:
            labels.append(name)
            yield document


def _cut_and_shuffle(asked: argparse.Namespace) -> dict | None:
    labels: list[str] | None = None
    request = {"source": asked.source, "seed": asked.seed, "shards": asked.shards}
    if asked.source == "python":
        request |= {"document_bytes": asked.document_bytes, "python": platform.python_version()}
        documents = read_standard_library(asked.document_bytes)
    else:
        suffixes = (".txt", ".md") if asked.source == "text" else (".parquet",)
        named = _named(asked.input)
        files_of = {name: find_input_files(paths, suffixes) for name, paths in named.items()}
        files = find_input_files([path for paths in named.values() for path in paths], suffixes)
        if sum(map(len, files_of.values())) > len(files):
            raise UserError("two names were given for one file: give each --input once")
        inside = [path for path in files if path.resolve().is_relative_to(asked.out.resolve())]
        if inside:
            raise UserError(f"{inside[0]} lies in --out {asked.out}, where it would be replaced: give another --out")
        request |= {
            "input": [str(Path(text)) for text in asked.input],
            "input_files": len(files),
            "input_bytes": sum(path.stat().st_size for path in files),
        }
        read = read_parquet_files
        if asked.source == "text":
            request["document_bytes"] = asked.document_bytes
            read = partial(read_text_files, document_bytes=asked.document_bytes)
        if "" not in named:
            request["sources"], labels = list(named), []
        documents = _labelled({name: read(own) for name, own in files_of.items()}, labels if labels is not None else [])
    if not begin_preparation(asked.out, request, overwrite=asked.overwrite):
        return None
    return finish_preparation(asked.out, request, write_shards(asked.out, documents, asked.seed, asked.shards, labels))


@user_errors_end_the_program
def main(arguments: list[str] | None = None) -> None:
    asked = build_parser().parse_args(arguments)
    manifest = prepare(asked)
    if manifest is None:
        print(f"{asked.out} holds exactly this already: nothing to do")
        return
    shards = manifest["shards"]
    print(
        f"{asked.out}: {manifest['documents']:,} documents, {manifest['bytes'] / 1e6:,.1f} MB of text in {len(shards) - 1} train shards and "
        f"{shards[-1]['name']} for validation; see {MANIFEST}"
    )


if __name__ == "__main__":
    main()
