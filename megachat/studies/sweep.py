"""A sweep: trials over a space, each an ordinary run or one per seed, sampled and pruned by Optuna, and read with their
noise. The only module that imports optuna.
"""

import contextlib
import fcntl
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megachat.activity import hours_minutes
from megachat.errors import UserError, summary
from megachat.studies.runs import RunRecord
from megachat.studies.space import Dimension, grid
from megachat.studies.trials import Diverged, Train, Trial, as_settings

METRIC = "val/bpb"
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
    with _one_at_a_time(storage):
        try:
            study = _create(storage, name, seed)
        except Exception as error:  # of any database driver
            raise UserError(f"the study's database {storage} cannot be opened ({summary(error)})") from None
        trials, saved = study.get_trials(deepcopy=False), study.user_attrs.get("question")
        if saved is None:
            if trials:
                raise UserError(f"the study {name} in {storage} is none of megachat's: give another --out or --storage")
            study.set_user_attr("question", question)
            for values in grid(space) or ():
                study.enqueue_trial({key: json.dumps(value) for key, value in values.items()}, skip_if_exists=True)
        elif saved != json.loads(json.dumps(question)):
            raise UserError(f"{storage} has a study {name} of another space or config: give another --out or --storage")
    ask = study.ask

    def ask_alone(*args: Any, **kwargs: Any) -> Any:
        with _one_at_a_time(storage):
            return ask(*args, **kwargs)

    study.ask = ask_alone
    return study


def _create(storage: str, name: str, seed: int) -> Any:
    optuna = import_optuna()
    for attempts_left in (2, 1, 0):
        try:
            backend = optuna.storages.RDBStorage(
                storage,
                heartbeat_interval=_HEARTBEAT_S,
                grace_period=4 * _HEARTBEAT_S,
                heartbeat_stale_trial_callback=_try_again,
            )
            return optuna.create_study(
                storage=backend,
                study_name=name,
                direction="minimize",
                sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
                load_if_exists=True,
            )
        except Exception:
            if not attempts_left or storage.startswith("sqlite:"):
                raise
            time.sleep(1)  # another process may be making the same tables
    raise AssertionError


@contextlib.contextmanager
def _one_at_a_time(storage: str) -> Iterator[None]:
    """Lets one process at a time use an SQLite file: it locks no rows, so two could take the same waiting trial."""
    if not storage.startswith("sqlite:///"):
        yield
        return
    try:
        file = Path(storage.removeprefix("sqlite:///") + ".lock").open("a")
    except OSError as error:
        raise UserError(f"the study's database {storage} cannot be opened ({summary(error)})") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_again(study: Any, trial: Any) -> None:
    """Queues the values of a trial that failed or whose process died; its run folders are continued."""
    number = trial.user_attrs.get("continues", trial.number)
    study.enqueue_trial(trial.params, user_attrs={"continues": number})


def run_trials(
    study: Any,
    space: Sequence[Dimension],
    train: Train,
    count: int,
    *,
    seeds: Sequence[int],
    log: Callable[[str], object],
) -> None:
    """Trains until the study has `count` ended trials; other processes may work on the same study.

    A trial's value is the mean of the last bits per byte over the seeds; one whose loss is no number has none. With one
    seed a trial that is behind the median of the others at the same step is ended early.
    """
    optuna = import_optuna()
    combinations, begin, done = grid(space), time.monotonic(), 0

    def objective(trial: Any) -> float:
        values = {dimension.key: _suggest(trial, dimension) for dimension in space}
        number = trial.user_attrs.get("continues", trial.number)
        lasts, settings = [], as_settings(values)
        for seed in seeds:
            name = f"trial_{number:04d}" + (f"_s{seed}" if len(seeds) > 1 else "")
            log(f"{name}: {' '.join(settings)}")
            try:
                run = train(Trial(name, (*settings, f"run.seed={seed}")), _pruning(trial) if len(seeds) == 1 else None)
            except Diverged as error:
                log(f"{name}: {error}")
                trial.set_user_attr("diverged", True)
                raise optuna.TrialPruned from None
            except BaseException:
                _try_again(study, trial)
                raise
            if run.state != "finished":
                raise optuna.TrialPruned
            lasts.append(last_value(run))
            trial.set_user_attr("lasts", lasts)
        return statistics.fmean(lasts)

    while (ended := len(_ended(study, distinct=combinations is not None))) < count:
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        if combinations and optuna.trial.TrialState.WAITING not in states:
            break  # another process has the last ones
        if done:
            left = hours_minutes((time.monotonic() - begin) / done * (count - ended))
            log(f"{ended} of {count} trials ended; eta {left} with this process alone")
        study.optimize(objective, n_trials=1)
        done += 1


def _ended(study: Any, *, distinct: bool) -> list[Any]:
    """Returns the trials with a result. distinct: one of each values: two processes that make a study at the same time
    may both fill its queue."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED")]
    return list({json.dumps(trial.params): trial for trial in trials}.values()) if distinct else trials


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
    """The baseline: the config as it is, in a context of the space, with several seeds. deviation: of one run."""

    mean: float
    deviation: float
    runs: int
    context: Mapping[str, Any] = {}

    def verdict(self, difference: float, *runs: int) -> str:
        """Returns better or worse for a difference of bits per byte beyond two of its deviations, else cannot tell.
        runs: of each of the means."""
        limit = 2 * self.deviation * math.sqrt(sum(1 / count for count in runs))
        return "cannot tell" if abs(difference) <= limit else "better" if difference < 0 else "worse"


def baseline_noise(
    train: Train,
    seeds: Sequence[int],
    log: Callable[[str], object],
    contexts: Sequence[Mapping[str, Any]] = ({},),
) -> list[Noise]:
    """Trains the config as it is with the seeds, at least two, in each context of the space (see space.contexts),
    and returns the means of the last values. The deviation is that within all contexts.
    """
    means: list[float] = []
    variances: list[float] = []
    for number, context in enumerate(contexts):
        lasts, settings = [], as_settings(context)
        for seed in seeds:
            name = "baseline" + (f"_{number}" if context else "") + f"_s{seed}"
            log(f"{name}: the config as it is{''.join(f', {setting}' for setting in settings)}")
            lasts.append(last_value(train(Trial(name, (*settings, f"run.seed={seed}")), None)))
        means.append(statistics.fmean(lasts))
        variances.append(statistics.variance(lasts))
    deviation = math.sqrt(statistics.fmean(variances))
    return [Noise(mean, deviation, len(seeds), context) for mean, context in zip(means, contexts, strict=True)]


def sweep_rows(study: Any, baselines: Sequence[Noise]) -> list[dict[str, Any]]:
    """Returns the ended trials as JSON values, best first: values, bits per byte, and two verdicts.

    verdict: against the baseline of its context; against_best: against the best trial of its context. Better or worse
    only beyond two deviations of the difference.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, dict[str, Any]] = {}
    for trial in sorted(_ended(study, distinct=False), key=lambda trial: (trial.value is None, trial.value)):
        lasts, values = trial.user_attrs.get("lasts", []), _values(trial)
        row = {"trial": trial.number, "values": values, "bpb": trial.value, "seeds": lasts}
        row |= {"verdict": "diverged" if trial.user_attrs.get("diverged") else "ended early", "against_best": None}
        if trial.value is not None and trial.state.name == "COMPLETE":
            noise = next(one for one in baselines if one.context.items() <= values.items())
            row["verdict"] = noise.verdict(trial.value - noise.mean, len(lasts), noise.runs)
            first = best.setdefault(json.dumps(noise.context), row)
            difference = trial.value - first["bpb"]
            row["against_best"] = "best" if first is row else noise.verdict(difference, len(lasts), len(first["seeds"]))
        rows.append(row)
    return sorted(rows, key=lambda row: (row["against_best"] is None, row["bpb"] or math.inf))


def _values(trial: Any) -> dict[str, Any]:
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in trial.params.items()}


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
