"""Try a change at growing depths, cheapest first: does it help, and does the gain last?

    megachat ladder --config d12 --set optimizer.warmdown_ratio=0.85 --depths 12,20,24 --seeds 2
    megachat ladder --config demo --set optimizer.muon_multiplier=flipped --depths 2,3,4

Each depth is a rung: the config as it is and with the change, --seeds runs of each. Before it starts, FLOPs, hours and
price of each rung are planned (--dry-run stops there). The verdict of a rung is that of `megachat compare`. The ladder
ends after a verdict in --stop-at. Run folders, logs and ladder.json are written to --out; the same command continues a
ladder that was ended. --base takes the baseline's runs of another ladder, so that a second change costs half.
"""

import argparse
import shlex
from pathlib import Path

from megachat.activity import log_line
from megachat.commands.options import Parser, add_config, add_set, print_result, require_minimum
from megachat.commands.pretrain import check_price
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
    add("--base", type=Path, metavar="FOLDER", help="--out of a ladder of the same config: its baselines are used")
    add("--gpu", metavar="KIND", help="kind of GPU, such as H100, to plan hours for (default: this machine's)")
    add(
        "--probe", type=Path, metavar="FILE", help="file of `megachat probe`, to plan hours for the machine it measured"
    )
    add("--price", type=float, help="of a GPU-hour (with a probe of a CPU: of its hour), to plan the price")
    add("--dry-run", action="store_true", help="print the plan of the rungs, and stop")
    add("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> None:
    """Climbs the ladder and prints its table."""
    from megachat.config import load_config
    from megachat.files import check_writable, write_json
    from megachat.programs.dry_run import Hardware
    from megachat.programs.ladder_plan import plan_lines, plan_rungs
    from megachat.studies.ladder import climb, compute_multiplier, ladder_rows
    from megachat.studies.trials import continued_later, first_seed, refuse_fixed, trainer

    require_minimum(options, seeds=1, ranks=1)
    check_price(options.price)
    depths, stop_at = _depths(options.depths), _stop_at(options.stop_at)
    if not options.set:
        raise UserError("a ladder compares a config with a change of it: give the change with --set")
    refuse_fixed(options.set, ["run", "model.depth"], "--set")
    refuse_fixed(options.both, ["run.name", "run.folder", "model.depth"], "--both")
    for depth in depths:  # a wrong setting is reported before anything is trained
        load_config(options.config, [*options.both, *options.set, f"model.depth={depth}"])
    if load_config(options.config, options.both) == load_config(options.config, [*options.both, *options.set]):
        raise UserError(f"{shlex.join(options.set)} is what the config has already: give a change with --set")
    first = first_seed(load_config(options.config, options.both).run.seed, options.base or options.out)
    seeds = range(first, first + options.seeds)
    hardware = Hardware(gpu=options.gpu, probe=options.probe, price=options.price)
    plan = plan_rungs(
        options.config, options.both, options.set, depths, seeds=seeds, ranks=options.ranks, hardware=hardware
    )
    if options.dry_run:
        return print_result(options, {"plan": plan}, *plan_lines(plan))
    values = load_config(options.config, options.both).model_dump(mode="json", exclude_defaults=True)
    _check_base(options, values)
    check_writable(options.out / "ladder.json")
    _check_same_study(options, values)

    log_line("\n".join(plan_lines(plan)))
    train, train_base = (
        trainer(options.config, folder, options.both, ranks=options.ranks)
        for folder in (options.out, options.base or options.out)
    )
    flops = {row["depth"]: row["flops"] for row in plan}
    with continued_later(log_line):
        rungs = climb(
            train,
            options.set,
            depths,
            seeds=seeds,
            stop_at=stop_at,
            log=log_line,
            train_base=train_base,
            flops=flops,
        )
    rows, multiplier = ladder_rows(rungs), compute_multiplier(rungs)
    result = {"change": options.set, "seeds": options.seeds, "plan": plan, "rungs": rows}
    result["compute_multiplier"] = multiplier
    write_json(options.out / "ladder.json", result)
    print_result(options, result, *_ladder_lines(result))


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


def _check_base(options: argparse.Namespace, values: dict) -> None:
    """Raises UserError if --base is no folder of a ladder of the same config."""
    if options.base is None:
        return
    from megachat.studies.trials import saved_question

    try:
        saved = saved_question(options.base, "ladder")
    except UserError as error:
        raise UserError(f"--base {error}".replace("another --out", "the --out of a ladder")) from None
    if saved is None:
        raise UserError(f"--base {options.base} has no ladder: give the --out of one")
    if saved.get("values") != values:
        raise UserError(f"--base {options.base} has the ladder of another config or --both: leave --base out")


def _check_same_study(options: argparse.Namespace, values: dict) -> None:
    """Writes the study's question, or raises UserError if the folder has another one."""
    from megachat.files import write_json
    from megachat.studies.trials import QUESTION, saved_question

    question = {
        "study": "ladder",
        "config": options.config,
        "values": values,
        "change": options.set,
        "both": options.both,
    }
    saved = saved_question(options.out, "ladder")
    if saved and any(saved.get(key, question[key]) != question[key] for key in ("values", "change")):
        settings = shlex.join(saved.get("change", []))
        raise UserError(f"{options.out} has the ladder of {saved.get('config')} with {settings}: give another --out")
    write_json(options.out / QUESTION, question)


def _ladder_lines(result: dict) -> list[str]:
    rows = [("depth", "base", "change", "gain", "steps", "time", "FLOPs", "verdict")]
    for row in result["rungs"]:
        ratios = ("-" if row[axis] is None else f"{row[axis]:.3f}" for axis in ("steps", "seconds", "flops"))
        change, gain = ("-", "-") if row["change"] is None else (f"{row['change']:.4f}", f"{row['gain']:+.4f}")
        rows.append((str(row["depth"]), f"{row['base']:.4f}", change, gain, *ratios, row["verdict"]))
    lines = text_table(rows, right=range(7))
    for row in result["rungs"]:
        if None not in row["core"]:
            lines.append("depth {}: CORE {:.4f}, with the change {:.4f}".format(row["depth"], *row["core"]))
    lines.append(
        "base, change, gain: bits per byte at the end; steps, time, FLOPs: what the change needs, relative to base"
    )
    if multiplier := result["compute_multiplier"]:
        doubt = ", two rungs: a guess" if multiplier["rungs"] == 2 else f", residual {multiplier['residual']:.4f}"
        lines.append(f"compute multiplier over {multiplier['rungs']} rungs: {multiplier['value']:.3f}{doubt}")
    if result["seeds"] == 1:
        lines.append("one run per side and rung: the noise from run to run is not known; --seeds 2 or more show it")
    return lines
