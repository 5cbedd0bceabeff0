"""Search over settings: each trial is an ordinary run, and differences are read with their noise.

    megachat sweep --config demo --space space.json --seeds 2
    megachat sweep --config d12 --space space.json --trials 40 --storage postgresql://host/sweeps

space.json names the settings that vary, with a list of values or a range:

    {"optimizer.matrix_lr": {"low": 0.005, "high": 0.08, "log": true}, "optimizer.warmdown_ratio": [0.65, 0.85]}

Lists only are tried in all combinations; with a range, Optuna's TPE chooses --trials points. First the config as it is
runs --baseline times with other seeds: a trial is better or worse only beyond two deviations of that. With one seed,
trials that are behind end early. Run folders, study.db, sweep.json and best.json are written to --out; the same command
continues a sweep, and may run in several processes at once. It needs optuna: pip install 'megachat[sweep]'.
"""

import argparse
import json
import sys
from pathlib import Path

from megachat.commands.options import Parser, add_config, add_set, require_minimum
from megachat.errors import UserError
from megachat.text import text_table


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat sweep`."""
    add = parser.add_argument
    add_config(parser, required=True)
    add_set(parser, "a setting of all trials; repeatable")
    add("--space", type=Path, required=True, metavar="FILE", help="JSON: section.key -> list or range")
    add("--trials", type=int, help="trials in all (default: all combinations of a grid, 20 with a range)")
    add("--seeds", type=int, default=1, help="runs per trial (default 1)")
    add("--baseline", type=int, default=2, help="runs of the config as it is (default 2, at least 2)")
    add("--ranks", type=int, default=1, help="processes per run on this machine (default 1)")
    add("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs (default runs/sweep)")
    add("--storage", metavar="URL", help="database for several machines (default: study.db in --out)")
    add("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> None:
    """Runs the sweep and prints its table."""
    from megachat.config import load_config
    from megachat.files import write_json
    from megachat.studies import sweep
    from megachat.studies.space import ends, grid, load_space
    from megachat.studies.trials import trainer

    require_minimum(options, seeds=1, ranks=1, baseline=2, trials=1)
    space = load_space(options.space)
    for settings in ends(space):  # an impossible value is refused before anything is trained
        load_config(options.config, [*options.set, *settings])
    config = load_config(options.config, options.set).model_dump(mode="json", exclude_defaults=True)
    combinations = grid(space)
    count = options.trials or (len(combinations) if combinations else 20)
    if combinations and count > len(combinations):
        raise UserError(
            f"--trials is {count}, but the grid has {len(combinations)} combinations: give fewer, or a range"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    question = {"space": [dimension._asdict() for dimension in space], "config": config}
    storage = options.storage or f"sqlite:///{options.out / 'study.db'}"
    study = sweep.open_study(storage, sweep.study_name(options.out), space, question, seed=42)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    train = trainer(options.config, options.out, options.set, ranks=options.ranks)
    noise = sweep.baseline_noise(train, options.baseline, log)
    log(f"baseline: {noise.mean:.4f} +- {noise.deviation:.4f} (deviation of {noise.runs} runs)")
    sweep.run_trials(study, space, train, count, seeds=options.seeds, log=log)
    rows = sweep.sweep_rows(study, noise)
    fits = sweep.optima(rows, space)
    result = {
        "baseline": noise._asdict(),
        "trials": rows,
        "optima": fits,
        "power_laws": sweep.power_laws(fits),
        "importance": sweep.importance(study),
    }
    write_json(options.out / "sweep.json", result)
    write_json(options.out / "best.json", sweep.best_config(json.dumps(config), rows))
    print(json.dumps(result, indent=1) if options.json else "\n".join(_lines(result, options.out)))


def _lines(result: dict, out: Path) -> list[str]:
    keys = list(result["trials"][0]["values"])
    rows = [("trial", *keys, "bits per byte", "seeds", "against the baseline")]
    for row in result["trials"]:
        values = (json.dumps(row["values"][key]) for key in keys)
        bpb = "-" if row["bpb"] is None else f"{row['bpb']:.4f}"
        rows.append((str(row["trial"]), *values, bpb, str(len(row["seeds"])), row["verdict"]))
    base = result["baseline"]
    lines = text_table(rows, right=range(1, len(keys) + 3))
    lines.append(f"baseline {base['mean']:.4f}, deviation of a run {base['deviation']:.4f} from {base['runs']} runs")
    for fit in result["optima"]:
        others = ", ".join(f"{key}={json.dumps(value)}" for key, value in fit["others"].items())
        interval = "not bounded by these points" if fit["low"] is None else f"{fit['low']:.4g} to {fit['high']:.4g}"
        lines.append(f"{fit['key']} is best near {fit['value']:.4g} ({interval}){f' at {others}' if others else ''}")
    for law in result["power_laws"]:
        lines.append(f"the best {law['key']} moves as {law['with']}^{law['exponent']:.2f} ({law['points']} points)")
    for key, share in (result["importance"] or {}).items():
        lines.append(f"importance of {key}: {100 * share:.0f} %")
    lines.append(f"the best values are in {out / 'best.json'}; all numbers in {out / 'sweep.json'}")
    return lines
