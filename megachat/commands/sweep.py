"""Search over settings: each trial is an ordinary run, and differences are read with their noise.

    megachat sweep --config demo --space space.json --seeds 2
    megachat sweep --config d12 --space space.json --trials 40 --storage postgresql+psycopg://host/sweeps
    megachat sweep --config demo --lr-range-test matrix

space.json names the settings that vary, with a list of values or a range:

    {"optimizer.matrix_lr": {"low": 0.005, "high": 0.08, "log": true}, "optimizer.warmdown_ratio": [0.65, 0.85]}

Lists only are tried in all combinations; with a range, Optuna's TPE chooses --trials points. First the config as it is
runs --baseline times with other seeds, at each listed size (such as model.depth): a trial is better or worse only
beyond two deviations of that. With one seed, trials that are behind end early. Run folders, study.db, sweep.json,
best.json and the picture sweep.svg are written to --out; the same command continues a sweep, and may run in several
processes at once. It needs optuna and matplotlib: pip install 'megachat[sweep]'; for PostgreSQL also
'megachat[postgresql]'.

--lr-range-test trains one run whose rates rise exponentially from step to step, until the loss diverges: a quick guess.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachat.activity import log_line
from megachat.commands.options import Parser, add_config, add_set, print_result, require_minimum
from megachat.errors import UserError
from megachat.files import check_writable, write_json
from megachat.text import text_table

if TYPE_CHECKING:
    from megachat.config import Config

SWEEP = "sweep.json"


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat sweep`."""
    add = parser.add_argument
    add_config(parser, required=True)
    add_set(parser, "a setting of all trials; repeatable")
    add("--space", type=Path, metavar="FILE", help="JSON: section.key -> list or range")
    about = (
        "a learning-rate range test of these rates, such as matrix,embedding (default all); with --space beside the "
    )
    add("--lr-range-test", nargs="?", const="", metavar="RATES", help=about + "sweep")
    add(
        "--ramp", default="0.01,100", metavar="LOW,HIGH", help="factors of the rates in a range test (default 0.01,100)"
    )
    add("--trials", type=int, help="trials in all (default: all combinations of a grid, 20 with a range)")
    add("--seeds", type=int, default=1, help="runs per trial (default 1)")
    add("--baseline", type=int, default=2, help="runs of the config as it is (default 2, at least 2)")
    add("--ranks", type=int, default=1, help="processes per run on this machine (default 1)")
    add("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs (default runs/sweep)")
    add("--storage", metavar="URL", help="database for several machines (default: study.db in --out)")
    add("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> None:
    """Runs the range test and the sweep and prints what they give."""
    require_minimum(options, seeds=1, ranks=1, baseline=2, trials=1)
    if options.space is None and options.lr_range_test is None:
        raise UserError("give --space FILE with the settings that vary, or --lr-range-test")
    test_range = _prepare_range_test(options) if options.lr_range_test is not None else None
    search = _prepare_sweep(options) if options.space else None
    check_writable(options.out / SWEEP)
    result: dict[str, Any] = {}
    lines: list[str] = []
    from megachat.studies.trials import continued_later

    with continued_later(log_line):
        if test_range:
            result["range_test"] = test_range()
        if search:
            result |= search()
    if search:
        lines += _sweep_lines(result, options.out)
    if "range_test" in result:
        from megachat.studies.range_test import range_lines

        lines += range_lines(result["range_test"], result.get("optima") or _earlier_optima(options.out))
        lines.append(f"all points are in {options.out / 'range_test.json'}, drawn in range_test.svg")
    print_result(options, result, *lines)


def _earlier_optima(out: Path) -> list[dict]:
    path = out / SWEEP
    return json.loads(path.read_bytes())["optima"] if path.exists() else []


def _prepare_range_test(options: argparse.Namespace) -> Callable[[], dict]:
    """Checks the settings and returns what trains the range test, writes its files, and returns its result."""
    from megachat.config import load_config
    from megachat.programs.explain import planned_vocabulary
    from megachat.studies.range_test import range_trial, run_range_test
    from megachat.studies.sweep_picture import draw_range_test
    from megachat.studies.trials import refuse_fixed, trainer

    refuse_fixed(options.set, ["run.name", "run.folder"], "--set")
    try:
        low, high = (float(word) for word in options.ramp.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low < high < math.inf:
        raise UserError(f"--ramp is {options.ramp!r}: give two factors above 0, the lower first, such as 0.01,100")
    trial = range_trial([word for word in options.lr_range_test.split(",") if word], low, high)
    config = load_config(options.config, [*options.set, *trial.settings])
    _check_trial(config, options.ranks, planned_vocabulary(config)[0])

    def test_range() -> dict:
        log_line(f"{trial.name}: factors {low:g} to {high:g}")
        train = trainer(options.config, options.out, options.set, ranks=options.ranks)
        result = run_range_test(train, trial, config, options.out)
        write_json(options.out / "range_test.json", result)
        _draw(lambda: draw_range_test(result, options.out / "range_test.svg"))
        return result

    return test_range


def _draw(draw: Callable[[], None]) -> None:
    try:
        draw()
    except UserError as error:  # all else is there
        log_line(f"no picture: {error}")


def _prepare_sweep(options: argparse.Namespace) -> Callable[[], dict]:
    """Checks everything and returns what runs the sweep, writes its files, and returns its result."""
    from megachat.config import load_config
    from megachat.programs.explain import planned_vocabulary
    from megachat.studies import fits, sweep, sweep_picture
    from megachat.studies.space import contexts, grid, load_space, points_to_check
    from megachat.studies.trials import QUESTION, first_seed, refuse_fixed, saved_question, trainer

    sweep.import_optuna()
    space = load_space(options.space)
    refuse_fixed(options.set, ["run.name", "run.folder"], "--set")
    saved_question(options.out, "sweep")
    resolved = load_config(options.config, options.set)
    config, first = resolved.model_dump(mode="json", exclude_defaults=True), first_seed(resolved.run.seed, options.out)
    vocab_size, _ = planned_vocabulary(resolved)
    for settings in points_to_check(space):  # an impossible point is refused before anything is trained
        try:
            _check_trial(load_config(options.config, [*options.set, *settings]), options.ranks, vocab_size)
        except UserError as error:
            problem = str(error).replace("--set: ", "")
            raise UserError(f"{options.space}, at {' '.join(settings)}: {problem}") from None
    combinations = grid(space)
    count = options.trials or (len(combinations) if combinations else 20)
    if combinations and count > len(combinations):
        raise UserError(
            f"--trials is {count}, but the grid has {len(combinations)} combinations: give fewer, or a range"
        )
    question = {"space": [dimension._asdict() for dimension in space], "config": config}

    def search() -> dict:
        storage = options.storage or f"sqlite:///{options.out / 'study.db'}"
        study = sweep.open_study(storage, sweep.study_name(options.out), space, question, seed=42)
        write_json(options.out / QUESTION, {"study": "sweep"} | question)
        train = trainer(options.config, options.out, options.set, ranks=options.ranks)
        baselines = sweep.baseline_noise(train, range(first, first + options.baseline), log_line, contexts(space))
        log_line("\n".join(_baseline_lines([noise._asdict() for noise in baselines])))
        seeds = range(first, first + options.seeds)
        sweep.run_trials(study, space, train, count, seeds=seeds, log=log_line)
        rows = sweep.sweep_rows(study, baselines)
        optima = fits.optima(rows, space)
        result = {
            "baseline": baselines[0]._asdict(),
            "baselines": [noise._asdict() for noise in baselines],
            "trials": rows,
            "optima": optima,
            "power_laws": fits.power_laws(optima),
            "importance": sweep.importance(study),
        }
        write_json(options.out / SWEEP, result)
        write_json(options.out / "best.json", sweep.best_config(json.dumps(config), rows))
        _draw(lambda: sweep_picture.draw_sweep(result, space, options.out / "sweep.svg"))
        return result

    return search


def _check_trial(config: "Config", ranks: int, vocab_size: int) -> None:
    """Raises UserError for settings that do not fit together. vocab_size: the tokenizer's, unless the config has it."""
    from megachat.planning.plan import resolve_without_text
    from megachat.schedule import check_schedule

    check_schedule(config.optimizer)
    resolve_without_text(config, ranks, config.model.vocab_size or vocab_size)


def _sweep_lines(result: dict, out: Path) -> list[str]:
    keys = list(result["trials"][0]["values"])
    rows = [("trial", *keys, "bits per byte", "seeds", "against the baseline", "the best")]
    for row in result["trials"]:
        values = (json.dumps(row["values"][key]) for key in keys)
        bpb = "-" if row["bpb"] is None else f"{row['bpb']:.4f}"
        rows.append(
            (str(row["trial"]), *values, bpb, str(len(row["seeds"])), row["verdict"], row["against_best"] or "-")
        )
    lines = text_table(rows, right=range(1, len(keys) + 3))
    lines += _baseline_lines(result["baselines"])
    for fit in result["optima"]:
        others = ", ".join(f"{key}={json.dumps(value)}" for key, value in fit["others"].items())
        interval = "not bounded by these points" if fit["low"] is None else f"{fit['low']:.4g} to {fit['high']:.4g}"
        lines.append(f"{fit['key']} is best near {fit['value']:.4g} ({interval}){f' at {others}' if others else ''}")
    for law in result["power_laws"]:
        interval = "not bounded" if law["low"] is None else f"{law['low']:.2f} to {law['high']:.2f}"
        lines.append(
            f"the best {law['key']} moves as {law['with']}^{law['exponent']:.2f} ({interval}; {law['points']} points)"
        )
    for key, share in (result["importance"] or {}).items():
        lines.append(f"importance of {key}: {100 * share:.0f} %")
    lines.append(f"the best values are in {out / 'best.json'}, all numbers in {out / 'sweep.json'}, drawn in sweep.svg")
    return lines


def _baseline_lines(baselines: list[dict]) -> list[str]:
    """Returns the baseline's means, and the smallest difference of two single runs that says anything."""
    lines = []
    for base in baselines:
        context = "".join(f" at {key}={json.dumps(value)}" for key, value in base["context"].items())
        lines.append(f"baseline {base['mean']:.4f}{context}, {base['runs']} runs")
    deviation = baselines[0]["deviation"]
    lines.append(
        f"deviation of a run {deviation:.4f}: single runs that differ by less than {2 * math.sqrt(2) * deviation:.4f} "
        "cannot be told apart"
    )
    return lines
