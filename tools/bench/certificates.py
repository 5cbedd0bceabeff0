"""Walks every config of configs/README.md with its layouts on 64 and 512 ranks: the certificates of docs/planning.md.

    python tools/bench/certificates.py --out certificates.json [--ranks 64 512] [--only d24 d12]

FILE is written after each layout, and a table beside it, certificates.md. Another call goes on where one was ended;
what is in FILE is not walked again, but compared with the plan of now.

A micro-batch is made as small as the rows of a data rank. If there are fewer rows than data ranks, the step is enlarged
to a row per data rank, which * marks.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

from megachat.activity import ProgressBar
from megachat.config import Config, load_config
from megachat.errors import UserError
from megachat.files import write_atomically, write_json
from megachat.installation import config_folder, git
from megachat.planning.plan import resolve_plan
from megachat.programs.verify_dry import PEAK, allowed, planned_of_stage, problem, setup, verify_dry
from megachat.text import number_ranges

LINE = re.compile(r"^\| \[(\w+)\]\(\1\.json\) \| (?:`--set (.+)` )?\|", re.M)
HEADER = "config|layout|ranks|rows|walked|calls|bytes|FLOPs|memory|peak GB|seconds|verdict".split("|")
COMMUNICATION = ("tensor", "between", "Muon", "AdamW")


def variants(names: list[str] | None) -> list[tuple[str, list[str]]]:
    """Returns (config, settings) of the lines in configs/README.md, each once; names: of these configs, in this order.

    Raises UserError for a name without a line.
    """
    lines = list(dict.fromkeys(LINE.findall((config_folder() / "README.md").read_text())))
    known = list(dict.fromkeys(name for name, _ in lines))
    if unknown := set(names or []).difference(known):
        raise UserError(f"--only {' '.join(unknown)}: configs/README.md has {', '.join(known)}")
    return [
        (name, options.split(" --set ") if options else [])
        for chosen in names or known
        for name, options in lines
        if name == chosen
    ]


def fitted(name: str, settings: list[str], ranks: int) -> tuple[Config, int, str]:
    """Returns the config on so many ranks, its vocabulary, and its rows x micro-batches. Raises UserError."""
    config = load_config(config_folder() / f"{name}.json", settings)
    vocab_size = config.model.vocab_size or 4096
    data = ranks // (config.parallel.tensor * config.parallel.pipeline)
    one = resolve_plan(config, config.parallel.tensor * config.parallel.pipeline, vocab_size)
    share, note = one.rows_per_step // data, ""
    changed = [*settings]
    if not share:
        share, note = 1, "*"
        changed.append(f"batch.tokens={data * one.dims.sequence_len}")
    micro_rows = min(share, one.micro_rows)
    config = load_config(config_folder() / f"{name}.json", [*changed, f"batch.micro_rows={micro_rows}"])
    return config, vocab_size, f"{micro_rows} x {share // micro_rows}{note}"


def certify(name: str, settings: list[str], ranks: int) -> dict:
    """Walks one layout; returns its certificate, with what is needed to find it again."""
    entry = {"config": name, "settings": settings, "ranks": ranks, "commit": git("rev-parse", "HEAD")}
    begin = time.perf_counter()
    try:
        config, vocab_size, shape = fitted(name, settings, ranks)
        tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
        layout = {"data": ranks // (tensor * pipeline), "tensor": tensor, "pipeline": pipeline}
        result = verify_dry(config, layout, vocab_size, every_rank=False)
    except UserError as error:
        return entry | {"problems": [f"not walked: {error}"]}
    return entry | result | {"rows": shape, "seconds": round(time.perf_counter() - begin)}


def replanned(entry: dict) -> dict:
    """Returns a certificate with what was walked, compared with the plan of now."""
    if "compared" not in entry:
        return entry
    config, vocab_size, _ = fitted(entry["config"], entry["settings"], entry["ranks"])
    config, plan = setup(config, entry["layout"], vocab_size)
    planned = [planned_of_stage(config, plan, stage) for stage in range(plan.layout.pipeline)]
    rows = []
    for row in entry["compared"]:
        size = planned[row["stage"]][row["what"]]
        rows.append(row | {"planned": size, "allowed": allowed(row["what"], size)})
    unmet = [each for each in entry["problems"] if not each.startswith("stage ")]
    return entry | {"compared": rows, "problems": [*unmet, *filter(None, map(problem, rows))]}


def largest_difference(rows: list[dict], kinds: tuple[str, ...]) -> str:
    """Returns the largest relative difference of what is planned, as "0.02 %"."""
    chosen = [row for row in rows if row["planned"] and row["what"] != PEAK and row["what"].startswith(kinds)]
    differences = [max(abs(row[end] / row["planned"] - 1) for end in ("least", "most")) for row in chosen]
    return f"{100 * max(differences, default=0.0):.2f} %"


def table_line(entry: dict) -> list[str]:
    """Returns a certificate as a line of the table."""
    verdict = "; ".join(entry["problems"]) or "passed"
    if "compared" not in entry:
        return [entry["config"], " ".join(entry["settings"]), str(entry["ranks"]), *[""] * 8, verdict]
    rows, layout = entry["compared"], entry["layout"]
    calls = [sum(call[2] for call in each) for each in entry["calls"].values()]
    other = [setting for setting in entry["settings"] if not setting.startswith(("parallel.", "batch.micro_rows="))]
    fullest = max((row for row in rows if row["what"] == PEAK), key=lambda row: row["most"])
    return [
        entry["config"],
        ", ".join(["dp={data},tp={tensor},pp={pipeline}".format(**layout), *other]),
        str(entry["ranks"]),
        entry["rows"],
        str(len(entry["walked"])),
        number_ranges(sorted(set(calls))),
        largest_difference(rows, COMMUNICATION),
        largest_difference(rows, ("products",)),
        largest_difference(rows, ("memory",)),
        f"{fullest['most'] / 1e9:.1f} of {fullest['planned'] / 1e9:.1f}",
        str(entry["seconds"]),
        verdict,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--only", nargs="+", metavar="CONFIG", help="names of configs, in the order of the walks")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON; extended after each layout")
    options = parser.parse_args()
    entries = [replanned(entry) for entry in json.loads(options.out.read_text())] if options.out.exists() else []
    made = {(entry["config"], *entry["settings"], entry["ranks"]) for entry in entries}
    wanted = [(name, settings, ranks) for ranks in options.ranks for name, settings in variants(options.only)]
    left = [(name, settings, ranks) for name, settings, ranks in wanted if (name, *settings, ranks) not in made]
    with ProgressBar("certificates", len(wanted), "") as bar:
        bar.skip(len(wanted) - len(left))
        for number in range(len(left) + 1):
            write_json(options.out, entries)
            lines = [HEADER, ["---"] * len(HEADER), *map(table_line, entries)]
            table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
            write_atomically(options.out.with_suffix(".md"), table.encode())
            if number < len(left):
                entries.append(certify(*left[number]))
                bar.update(1)
    return 0 if all(not entry["problems"] for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
