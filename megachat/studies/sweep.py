"""A sweep: trials over a space, each an ordinary run or one per seed, sampled and pruned by Optuna, and read with their
noise. The only module that imports optuna.
"""

import fcntl
import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megachat.errors import UserError, summary
from megachat.studies.runs import RunRecord
from megachat.studies.space import Dimension, grid
from megachat.studies.trials import Train, Trial

METRIC = "val/bpb"
_FIRST_SEED = 42
_HEARTBEAT_S = 30  # a process that is silent for four of them has died, and its trial is tried again


def import_optuna() -> Any:
    """Returns optuna, quiet. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("sweeps need optuna, which is not installed: pip install 'megachat[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of heartbeats
    return optuna


def open_study(storage: str, name: str, space: Sequence[Dimension], question: dict[str, Any], *, seed: int) -> Any:
    """Creates or continues an Optuna study. All lists are tried as a grid; ranges are sampled by TPE.

    storage: any URL that Optuna takes. question: what the study asks; a study of the same name with another one is
    refused with UserError, and so is a database that cannot be opened.
    """
    optuna = import_optuna()
    try:
        backend = optuna.storages.RDBStorage(
            storage,
            heartbeat_interval=_HEARTBEAT_S,
            grace_period=4 * _HEARTBEAT_S,
            heartbeat_stale_trial_callback=_try_again,
        )
        study = optuna.create_study(
            storage=backend,
            study_name=name,
            direction="minimize",
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
            load_if_exists=True,
        )
    except Exception as error:  # of any database driver
        raise UserError(f"the study's database {storage} cannot be opened ({summary(error)})") from None
    if storage.startswith("sqlite:///"):
        study.ask = _one_at_a_time(study.ask, Path(storage.removeprefix("sqlite:///") + ".lock"))
    saved = study.user_attrs.get("question")
    if saved is None:
        study.set_user_attr("question", question)
        for values in grid(space) or ():
            study.enqueue_trial({key: json.dumps(value) for key, value in values.items()}, skip_if_exists=True)
    elif saved != json.loads(json.dumps(question)):
        raise UserError(f"{storage} has a study {name} of another space or config: give another --out or --storage")
    return study


def _one_at_a_time(ask: Callable, lock: Path) -> Callable:
    """Returns `ask` for one process at a time: SQLite locks no rows, so two could take the same waiting trial."""

    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return ask(*args, **kwargs)

    return locked


def _try_again(study: Any, trial: Any) -> None:
    """Queues the values of a trial that failed or whose process died; its run folders are continued."""
    number = trial.user_attrs.get("continues", trial.number)
    study.enqueue_trial(trial.params, user_attrs={"continues": number})


def run_trials(
    study: Any, space: Sequence[Dimension], train: Train, count: int, *, seeds: int, log: Callable[[str], object]
) -> None:
    """Trains until the study has `count` ended trials; other processes may work on the same study.

    A trial's value is the mean of the last bits per byte over the seeds. With one seed a trial that is behind the
    median of the others at the same step is ended early.
    """
    optuna = import_optuna()
    ended, combinations = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED), grid(space)

    def objective(trial: Any) -> float:
        values = {dimension.key: _suggest(trial, dimension) for dimension in space}
        number = trial.user_attrs.get("continues", trial.number)
        settings = tuple(f"{key}={json.dumps(value)}" for key, value in values.items())
        lasts = []
        for seed in range(_FIRST_SEED, _FIRST_SEED + seeds):
            name = f"trial_{number:04d}" + (f"_s{seed}" if seeds > 1 else "")
            log(f"{name}: {' '.join(settings)}")
            try:
                run = train(Trial(name, (*settings, f"run.seed={seed}")), _pruning(trial) if seeds == 1 else None)
            except BaseException:
                _try_again(study, trial)
                raise
            if run.state != "finished":
                raise optuna.TrialPruned
            lasts.append(last_value(run))
            trial.set_user_attr("lasts", lasts)
        return statistics.fmean(lasts)

    while True:
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        if sum(state in ended for state in states) >= count:
            break
        if combinations and optuna.trial.TrialState.WAITING not in states:
            break  # another process has the last ones
        study.optimize(objective, n_trials=1)


def _suggest(trial: Any, dimension: Dimension) -> Any:
    if dimension.values:
        return json.loads(trial.suggest_categorical(dimension.key, [json.dumps(value) for value in dimension.values]))
    if dimension.whole:
        step = int(dimension.step or 1)
        return trial.suggest_int(dimension.key, int(dimension.low), int(dimension.high), log=dimension.log, step=step)
    return trial.suggest_float(dimension.key, dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def _pruning(trial: Any) -> Callable[[RunRecord], bool]:
    reported: set[int] = set()

    def watch(run: RunRecord) -> bool:
        for line in run.lines:
            # what an untrained model has says nothing about a trial
            if METRIC in line and line["step"] > 0 and line["step"] not in reported:
                reported.add(line["step"])
                trial.report(line[METRIC], line["step"])
        return bool(reported) and trial.should_prune()

    return watch


def last_value(run: RunRecord) -> float:
    """Returns a run's last bits per byte. Raises UserError if it has none."""
    values = run.values(METRIC)
    if not values:
        raise UserError(f"{run.folder} has no {METRIC}: set evaluate.every so that a trial is evaluated")
    return values[-1]


# ---- reading a sweep


class Noise(NamedTuple):
    """The baseline: the config as it is, with several seeds. deviation: of one run."""

    mean: float
    deviation: float
    runs: int


def baseline_noise(train: Train, runs: int, log: Callable[[str], object]) -> Noise:
    """Trains the config as it is with `runs` seeds, at least two, and returns mean and deviation of the last values."""
    lasts = []
    for seed in range(_FIRST_SEED, _FIRST_SEED + runs):
        log(f"baseline_s{seed}: the config as it is")
        lasts.append(last_value(train(Trial(f"baseline_s{seed}", (f"run.seed={seed}",)), None)))
    return Noise(statistics.fmean(lasts), statistics.stdev(lasts), runs)


def sweep_rows(study: Any, noise: Noise) -> list[dict[str, Any]]:
    """Returns the ended trials as JSON values, best first: values, bits per byte, and the verdict against the baseline:
    better or worse only beyond two deviations of the difference.
    """
    rows = []
    for trial in study.get_trials(deepcopy=False):
        lasts = trial.user_attrs.get("lasts", [])
        if trial.state.name not in ("COMPLETE", "PRUNED"):
            continue
        row = {
            "trial": trial.number,
            "values": _values(trial),
            "bpb": trial.value,
            "seeds": lasts,
            "verdict": "ended early",
        }
        if trial.value is not None and trial.state.name == "COMPLETE":
            limit = 2 * noise.deviation * math.sqrt(1 / len(lasts) + 1 / noise.runs)
            difference = trial.value - noise.mean
            row["verdict"] = "cannot tell" if abs(difference) <= limit else "better" if difference < 0 else "worse"
        rows.append(row)
    return sorted(rows, key=lambda row: (row["verdict"] == "ended early", row["bpb"] or math.inf))


def _values(trial: Any) -> dict[str, Any]:
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in trial.params.items()}


class Optimum(NamedTuple):
    """The lowest point of a quadratic in the logarithm of a setting, and its 95 % interval (None: not bounded)."""

    value: float
    low: float | None
    high: float | None
    points: int


def fit_optimum(values: Sequence[float], results: Sequence[float]) -> Optimum | None:
    """Returns where a parabola through (log value, result) is lowest; None with fewer than four points or three
    different values, for values that are not above 0, or if the parabola has no lowest point inside or near the range.

    The interval is that of the delta method with the residuals' deviation.
    """
    import numpy as np

    from megachat.studies.curves import student_95

    if len(values) < 4 or len(set(values)) < 3 or min(values) <= 0:
        return None
    x = np.log(np.array(values, dtype=np.float64))
    center = x.mean()
    design = np.stack([(x - center) ** 2, x - center, np.ones_like(x)], 1)
    y = np.array(results, dtype=np.float64)
    (a, b, _), *_ = np.linalg.lstsq(design, y, rcond=None)
    if a <= 0:
        return None
    lowest = -b / (2 * a)
    if not x.min() - center - 1 <= lowest <= x.max() - center + 1:
        return None
    freedom = len(values) - 3
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    covariance = np.linalg.inv(design.T @ design) * float(residual @ residual) / freedom
    slope = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
    width = student_95(freedom) * math.sqrt(float(slope @ covariance @ slope))
    bounded = width < x.max() - x.min()
    low, high = (math.exp(center + lowest + sign * width) if bounded else None for sign in (-1, 1))
    return Optimum(math.exp(center + lowest), low, high, len(values))


def optima(rows: Sequence[Mapping[str, Any]], space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Returns the fitted optimum of each numeric setting, for each combination of the other settings."""
    fitted = []
    ended = [row for row in rows if row["verdict"] != "ended early"]
    for dimension in space:
        others: dict[str, list[Mapping[str, Any]]] = {}
        for row in ended:
            rest = json.dumps({key: value for key, value in row["values"].items() if key != dimension.key})
            others.setdefault(rest, []).append(row)
        for rest, group in others.items():
            points = [(row["values"][dimension.key], last) for row in group for last in row["seeds"] or [row["bpb"]]]
            if not all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in points):
                continue
            if optimum := fit_optimum([value for value, _ in points], [last for _, last in points]):
                fitted.append({"key": dimension.key, "others": json.loads(rest), **optimum._asdict()})
    return fitted


def power_laws(fits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns how the optimum of a setting moves with another one, by a line through the logarithms of three optima or
    more: {"key", "with", "exponent", "points"}.
    """
    import numpy as np

    laws = []
    for key in dict.fromkeys(fit["key"] for fit in fits):
        mine = [fit for fit in fits if fit["key"] == key and len(fit["others"]) == 1]
        for other in {name for fit in mine for name in fit["others"]}:
            points = [(fit["others"][other], fit["value"]) for fit in mine if other in fit["others"]]
            numbers = [x for x, _ in points if isinstance(x, int | float) and not isinstance(x, bool) and x > 0]
            if len(set(numbers)) >= 3 and len(numbers) == len(points):
                logs = np.log(np.array(points, dtype=np.float64))
                exponent = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
                laws.append({"key": key, "with": other, "exponent": exponent, "points": len(points)})
    return laws


def importance(study: Any) -> dict[str, float] | None:
    """Returns each setting's share in the results' variance (PED-ANOVA); None with one setting or under 10 trials."""
    optuna = import_optuna()
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(complete) < 10 or len(complete[0].params) < 2:
        return None
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def best_config(config_text: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the study's config with the values of the best trial."""
    values = json.loads(config_text)
    for name, value in rows[0]["values"].items():
        section, key = name.split(".")
        values.setdefault(section, {})[key] = value
    return values


def study_name(folder: Path) -> str:
    """Returns the study's name: its folder's."""
    return folder.resolve().name
