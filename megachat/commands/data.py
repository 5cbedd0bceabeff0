"""Make a data folder: parquet shards with a `text` column, the last one for validation, and a manifest.

The source text of Python's standard library, without a download:
    megachat data --source python --out data/python
Text files, or parquet files with a `text` column:
    megachat data --source text --input notes/ --input book.txt --out data/mine
    megachat data --source parquet --input tables/ --out data/tables
Several named sources, so that an evaluation can show bits per byte of each:
    megachat data --source text --input novels=books/ --input notes=notes/ --out data/both
nanochat's data from the Hugging Face hub:
    megachat data --source climbmix --shards 170 --out data/climbmix

The same command again does nothing, or finishes a preparation that was interrupted.
"""

import argparse
from pathlib import Path

from megachat.commands.options import Parser, require_minimum

HUBS = ("climbmix", "fineweb-edu")  # of megachat.prepare.download


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat data`."""
    add = parser.add_argument
    add("--source", required=True, choices=["python", "text", "parquet", *HUBS], help="where the text is from")
    add("--out", required=True, type=Path, help="the data folder to make")
    inputs = "text, parquet: a file or folder, or NAME=PATH to record the source's name; can be repeated"
    add("--input", action="append", default=[], metavar="PATH", help=inputs)
    shards = "train shards; one for validation is added (default: 8 for downloads, otherwise by size)"
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


def run(options: argparse.Namespace) -> None:
    """Makes the data folder."""
    require_minimum(options, shards=1, document_bytes=64, workers=1, seed=0)
    from megachat.programs.prepare_data import make_data_folder

    make_data_folder(options)
