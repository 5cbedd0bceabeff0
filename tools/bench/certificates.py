"""Walks every config of configs/README.md with its layouts on 64 and 512 ranks, and writes docs' table of certificates.

    nice python -m tools.bench.certificates --out certificates.md [--ranks 64 512] [--only d24]

A micro-batch is made as small as the rows of a data rank. If there are fewer rows than data ranks, the step is enlarged
to a row per data rank, which * marks.
"""

import argparse
import re
import sys
import time
from pathlib import Path

from megachat.config import Config, load_config
from megachat.errors import UserError
from megachat.installation import config_folder
from megachat.planning.plan import resolve
from megachat.programs.verify_dry import PEAK, verify_dry

LINE = re.compile(r"^\| \[(\w+)\]\(\1\.json\) \| (?:`--set (.+)` )?\|", re.M)
HEADER = (
    "config",
    "layout",
    "ranks",
    "rows",
    "walked",
    "calls",
    "bytes",
    "FLOPs",
    "memory",
    "peak GB",
    "seconds",
    "verdict",
)


def variants() -> list[tuple[str, tuple[str, ...]]]:
    """Returns (config, settings) of the lines in configs/README.md, each once."""
    text = (config_folder() / "README.md").read_text()
    return list(
        dict.fromkeys(
            (name, tuple(options.split(" --set ")) if options else ()) for name, options in LINE.findall(text)
        )
    )


def fitted(name: str, settings: tuple[str, ...], ranks: int) -> tuple[Config, int, str]:
    """Returns the config on so many ranks, its vocabulary, and its rows x micro-batches. Raises UserError."""
    config = load_config(config_folder() / f"{name}.json", [*settings])
    vocab_size = config.model.vocab_size or 4096
    data = ranks // (config.parallel.tensor * config.parallel.pipeline)
    one = resolve(config, config.parallel.tensor * config.parallel.pipeline, vocab_size)
    share, note = one.rows_per_step // data, ""
    changed = [*settings]
    if not share:
        share, note = 1, "*"
        changed.append(f"batch.tokens={data * one.dims.sequence_len}")
    micro_rows = min(share, one.micro_rows)
    config = load_config(config_folder() / f"{name}.json", [*changed, f"batch.micro_rows={micro_rows}"])
    return config, vocab_size, f"{micro_rows} x {share // micro_rows}{note}"


def largest_difference(rows: list[dict], kinds: tuple[str, ...]) -> str:
    """Returns the largest relative difference of what is planned, as "0.02 %"."""
    chosen = [row for row in rows if row["planned"] and row["what"] != PEAK and row["what"].startswith(kinds)]
    differences = [max(abs(row[end] / row["planned"] - 1) for end in ("least", "most")) for row in chosen]
    return f"{100 * max(differences, default=0.0):.2f} %"


def certify(name: str, settings: tuple[str, ...], ranks: int) -> list[str]:
    """Walks one layout; returns its line of the table."""
    begin = time.perf_counter()
    config, vocab_size, shape = fitted(name, settings, ranks)
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    layout = {"data": ranks // (tensor * pipeline), "tensor": tensor, "pipeline": pipeline}
    result = verify_dry(config, layout, vocab_size, every_rank=False)
    rows, calls = result["compared"], [sum(call[2] for call in each) for each in result["calls"].values()]
    communication = ("tensor", "between", "Muon", "AdamW")
    peaks = [row for row in rows if row["what"] == PEAK]
    fullest = max(peaks, key=lambda row: row["most"])
    return [
        name,
        f"dp={layout['data']},tp={tensor},pp={pipeline}" + (",sequence" if config.parallel.sequence else ""),
        str(ranks),
        shape,
        str(len(result["walked"])),
        "-".join(map(str, sorted({min(calls), max(calls)}))),
        largest_difference(rows, communication),
        largest_difference(rows, ("products",)),
        largest_difference(rows, ("memory",)),
        f"{fullest['most'] / 1e9:.1f} of {fullest['planned'] / 1e9:.1f}",
        f"{time.perf_counter() - begin:.0f}",
        "; ".join(result["problems"]) or "passed",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--only", nargs="+", help="names of configs")
    parser.add_argument("--out", type=Path, required=True, help="Markdown, extended after each layout")
    options = parser.parse_args()
    lines = []
    for name, settings in variants():
        for ranks in options.ranks if name in (options.only or [name]) else []:
            try:
                lines.append(certify(name, settings, ranks))
            except UserError as error:
                lines.append([name, " ".join(settings), str(ranks), *[""] * 8, f"refused: {error}"])
            table = [HEADER, ["---"] * len(HEADER), *lines]
            options.out.write_text("".join(f"| {' | '.join(line)} |\n" for line in table))
    return 0 if all(line[-1] == "passed" for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
