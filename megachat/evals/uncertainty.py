"""Estimates the error of a CORE value, or of a difference of two, and compares it with GPT-2's value.

Two errors are combined. Examples: other examples of the same kind would give other accuracies. The bootstrap (Efron
1979) measures this by drawing each task's examples with replacement, RESAMPLES times. Runs: the same recipe trained
with other random numbers gives another model. Seven runs of nanochat's fourth record have CORE values with standard
deviation RUN_DEVIATION (https://github.com/karpathy/nanochat, leaderboard).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from megachat.text import plural

RUN_DEVIATION = 0.0052  # of CORE over its 22 tasks
CORE_TASK_COUNT = 22
GPT2_CORE = 0.256525  # GPT-2 XL's value, which the speedrun has to exceed
CONFIDENCE = 0.95
SIGMAS = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # standard deviations of a two-sided interval with that confidence
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean of centered accuracies with its standard deviations: from the examples (bootstrap) and from run to run.

    task_values, task_errors: each task's centered accuracy and its bootstrap deviation.
    """

    value: float
    example_error: float
    run_error: float
    task_values: Mapping[str, float]
    task_errors: Mapping[str, float]

    @property
    def error(self) -> float:
        return math.hypot(self.example_error, self.run_error)

    def deviation_json(self) -> dict[str, float]:
        return {"examples": self.example_error, "runs": self.run_error, "both": self.error}


@dataclass(frozen=True)
class TaskScores:
    """One task's answers over one or several runs. right: [runs, examples] bool. baseline: the accuracy of guessing."""

    right: np.ndarray
    baseline: float


def score_tasks(
    results: Sequence[Mapping[str, Sequence[bool]]], baselines: Mapping[str, float]
) -> dict[str, TaskScores]:
    """Returns label -> scores. results: per run, label -> one bool per example; all runs have the same examples."""
    return {
        label: TaskScores(np.array([run[label] for run in results], dtype=bool), baselines[label])
        for label in results[0]
    }


def run_deviation(tasks: int) -> float:
    """Returns the run-to-run deviation of a mean over `tasks` tasks.

    Only CORE's deviation was measured. Others are scaled as if all tasks varied independently and by the same amount.
    """
    return RUN_DEVIATION * math.sqrt(CORE_TASK_COUNT / tasks)


def estimate(tasks: Mapping[str, TaskScores], *, seed: int = 0) -> Estimate:
    """Estimates the centered accuracy, (accuracy - baseline) / (1 - baseline), averaged over tasks and runs.

    All runs answered the same examples, so a bootstrap draw applies to all runs at once: more runs do not reduce the
    examples' error.
    """
    rng, values, draws = np.random.default_rng(seed), {}, {}
    for label, task in tasks.items():
        scale = 1 - task.baseline
        mean = task.right.mean(axis=0)
        values[label] = (mean.mean() - task.baseline) / scale
        draws[label] = _bootstrap_means(mean, rng) / scale
    return _combine_tasks(values, draws, run_deviation(len(tasks)) / math.sqrt(_count_runs(tasks)))


def estimate_difference(
    first: Mapping[str, TaskScores],
    second: Mapping[str, TaskScores],
    *,
    same_examples: Mapping[str, bool],
    same_weights: bool,
) -> Estimate:
    """Estimates first - second over the same tasks.

    same_examples: per task, whether both sides answered exactly the same examples. If so, the bootstrap draws each
    example's difference (paired bootstrap), so that an example's difficulty cancels. same_weights: both sides evaluate
    the same weights; the run-to-run error is then 0.
    """
    rng, values, draws = np.random.default_rng(0), {}, {}
    for label in first:
        scale = 1 - first[label].baseline
        left, right = (side[label].right.mean(axis=0) for side in (first, second))
        values[label] = (left.mean() - right.mean()) / scale
        if same_examples[label]:
            draws[label] = _bootstrap_means(left - right, rng) / scale
        else:
            draws[label] = (_bootstrap_means(left, rng) - _bootstrap_means(right, rng)) / scale
    run_error = run_deviation(len(first)) * math.sqrt(1 / _count_runs(first) + 1 / _count_runs(second))
    return _combine_tasks(values, draws, 0.0 if same_weights else run_error)


def _count_runs(tasks: Mapping[str, TaskScores]) -> int:
    return min(len(task.right) for task in tasks.values())


def _combine_tasks(values: dict[str, float], draws: dict[str, np.ndarray], run_error: float) -> Estimate:
    mean = np.mean(list(draws.values()), axis=0)
    errors = {label: float(draw.std(ddof=1)) for label, draw in draws.items()}
    values = {label: float(value) for label, value in values.items()}
    return Estimate(sum(values.values()) / len(values), float(mean.std(ddof=1)), run_error, values, errors)


def _bootstrap_means(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the means [RESAMPLES] of len(scores) examples drawn with replacement.

    Examples with equal scores are interchangeable. It suffices to draw how often each distinct score occurs, a
    multinomial number, so the cost depends on the number of distinct scores (2 for one run), not on the number of
    examples.
    """
    distinct, counts = np.unique(scores, return_counts=True)
    return rng.multinomial(len(scores), counts / len(scores), size=RESAMPLES) @ distinct / len(scores)


@dataclass(frozen=True)
class Verdict:
    """A comparison with a fixed value. word: "above", "below" or "cannot tell".

    more_runs: how many more runs would decide it; 0 if it is decided, None if no number of runs would.
    """

    word: str
    more_runs: int | None
    text: str


def judge_against(recipe: Estimate, runs: int) -> Verdict:
    """Decides whether the mean CORE of a recipe, estimated from `runs` runs of it, is above GPT-2's.

    The mean of n runs has distance d = value - GPT2_CORE and deviation s(n) = sqrt(example_error^2 + one_run^2 / n).
    More runs reduce the run-to-run error only. It is decided if |d| >= SIGMAS * s(n). Otherwise, if the mean stayed
    where it is, the smallest n that decides is n = one_run^2 / ((d / SIGMAS)^2 - example_error^2), rounded up. If |d|
    <= SIGMAS * example_error no n is enough. The text then gives the number of runs that would decide for exactly these
    examples, n = (SIGMAS * one_run / d)^2.
    """
    distance, one_run = abs(recipe.value - GPT2_CORE), recipe.run_error * math.sqrt(runs)
    word = "above" if recipe.value > GPT2_CORE else "below"
    if distance >= SIGMAS * recipe.error:
        return Verdict(word, 0, word)
    if distance == 0:
        return Verdict("cannot tell", None, "cannot tell: the values are equal, no number of runs would decide")

    def more_runs(needed: float) -> tuple[int, str]:
        count = max(0, math.ceil(needed - 1e-9) - runs)
        return count, f"{plural(count, 'more run')} needed"

    room = (distance / SIGMAS) ** 2 - recipe.example_error**2
    if room > 0:
        count, text = more_runs(one_run**2 / room)
        return Verdict("cannot tell", count, f"cannot tell: {text}")
    count, text = more_runs((SIGMAS * one_run / distance) ** 2)
    same_examples = f"{text if count else word} for these examples"
    return Verdict("cannot tell", None, f"cannot tell: {same_examples}, no number of runs decides for others like them")
