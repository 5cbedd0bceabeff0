"""Try a change at growing depths, cheapest first: does it help, and does the gain last?

    megachat ladder --config d12 --set optimizer.warmdown_ratio=0.85 --depths 12,20,24 --seeds 2
    megachat ladder --config demo --set optimizer.muon_multiplier=flipped --depths 2,3,4

Each depth is a rung: the config as it is and with the change, --seeds runs of each. The verdict of a rung is that of
`megachat compare`. The ladder ends after a verdict in --stop-at. Run folders, logs and ladder.json are written to
--out; the same command continues a ladder that was ended.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from megachat.commands.options import Parser, add_config, add_set, require_minimum
from megachat.errors import UserError
from megachat.text import text_table

_VERDICTS = ("worse", "cannot tell", "better")


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat ladder`."""
    add = parser.add_argument
    add_config(parser, required=True)
    add_set(parser, "the change; repeatable")
    add("--both", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting of both sides; repeatable")
    add("--depths", required=True, help="depths of the rungs, such as 12,20,24")
    add("--seeds", type=int, default=1, help="runs of each side at each rung (default 1; 2 or more give error bars)")
    add(
        "--stop-at", default="worse", help="verdicts that end the ladder: worse (default), 'cannot tell', both, or none"
    )
    add("--ranks", type=int, default=1, help="processes per run on this machine (default 1)")
    add("--out", type=Path, default=Path("runs/ladder"), help="folder of the runs (default runs/ladder)")
    add("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> None:
    """Climbs the ladder and prints its table."""
    from megachat.config import load_config
    from megachat.files import write_json
    from megachat.studies.ladder import climb, compute_multiplier, ladder_rows
    from megachat.studies.trials import trainer

    require_minimum(options, seeds=1, ranks=1)
    depths, stop_at = _depths(options.depths), _stop_at(options.stop_at)
    if not options.set:
        raise UserError("a ladder compares a config with a change of it: give the change with --set")
    for depth in depths:  # a wrong setting is reported before anything is trained
        load_config(options.config, [*options.both, *options.set, f"model.depth={depth}"])
    options.out.mkdir(parents=True, exist_ok=True)
    _check_same_study(options)
    train = trainer(options.config, options.out, options.both, ranks=options.ranks)
    rungs = climb(
        train, options.set, depths, seeds=options.seeds, stop_at=stop_at, log=lambda line: print(line, file=sys.stderr)
    )
    rows, multiplier = ladder_rows(rungs), compute_multiplier(rungs)
    result = {"change": options.set, "seeds": options.seeds, "rungs": rows, "compute_multiplier": multiplier}
    write_json(options.out / "ladder.json", result)
    print(json.dumps(result, indent=1) if options.json else "\n".join(_lines(result)))


def _depths(text: str) -> list[int]:
    try:
        depths = sorted({int(depth) for depth in text.split(",")})
    except ValueError:
        depths = []
    if not depths or depths[0] < 1:
        raise UserError(f"--depths is {text!r}: give depths of 1 or more, such as 2,3,4")
    return depths


def _stop_at(text: str) -> list[str]:
    words = [] if text == "none" else [word.strip() for word in text.split(",")]
    if wrong := [word for word in words if word not in _VERDICTS]:
        raise UserError(f"--stop-at is {text!r}: {wrong[0]!r} is none of {', '.join(_VERDICTS)}, or none")
    return words


def _check_same_study(options: argparse.Namespace) -> None:
    """Writes the study's question, or raises UserError if the folder has another one."""
    from megachat.files import write_json

    question = {"config": options.config, "change": options.set, "both": options.both}
    path = options.out / "question.json"
    if path.exists() and (saved := json.loads(path.read_bytes())) != question:
        settings = shlex.join(saved["change"])
        raise UserError(f"{options.out} has the ladder of {saved['config']} with {settings}: give another --out")
    write_json(path, question)


def _lines(result: dict) -> list[str]:
    rows = [("depth", "base", "change", "gain", "steps", "time", "FLOPs", "verdict")]
    for row in result["rungs"]:
        ratios = ("-" if row[axis] is None else f"{row[axis]:.3f}" for axis in ("steps", "seconds", "flops"))
        values = (f"{row[key]:.4f}" for key in ("base", "change"))
        rows.append((str(row["depth"]), *values, f"{row['gain']:+.4f}", *ratios, row["verdict"]))
    lines = text_table(rows, right=range(7))
    lines.append(
        "base, change, gain: bits per byte at the end; steps, time, FLOPs: what the change needs, relative to base"
    )
    if multiplier := result["compute_multiplier"]:
        doubt = ", two rungs: a guess" if multiplier["rungs"] == 2 else f", residual {multiplier['residual']:.4f}"
        lines.append(f"compute multiplier over {multiplier['rungs']} rungs: {multiplier['value']:.3f}{doubt}")
    if result["seeds"] == 1:
        lines.append("one run per side and rung: the noise from run to run is not known; --seeds 2 or more show it")
    return lines
