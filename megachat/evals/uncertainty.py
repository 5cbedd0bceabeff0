"""How sure a CORE value is, and a difference of two: error from the examples, by bootstrap, and from run to run, as measured.

A task's accuracy is a mean over its examples; another set of examples of the same kind would give another one. The bootstrap (Efron 1979) draws
examples with replacement, within each task, RESAMPLES times. Training the same recipe again with other random numbers gives another model: seven
runs of nanochat's fourth record had CORE values with a standard deviation of RUN_DEVIATION (https://github.com/karpathy/nanochat, leaderboard).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RUN_DEVIATION = 0.0052  # of CORE over its 22 tasks
CORE_TASK_COUNT = 22
GPT2_CORE = 0.256525  # GPT-2 XL's, which the speedrun has to exceed
CONFIDENCE = 0.95
SIGMAS = NormalDist().inv_cdf(
    (1 + CONFIDENCE) / 2
)  # how many deviations a two-sided statement of that confidence takes
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean of centered accuracies with its deviations. examples: by bootstrap; runs: of the mean over the runs given; both: combined."""

    value: float
    examples: float
    runs: float
    tasks: Mapping[str, float]  # each task's value
    task_examples: Mapping[str, float]  # and its bootstrap deviation

    @property
    def both(self) -> float:
        return math.hypot(self.examples, self.runs)


@dataclass(frozen=True)
class TaskScores:
    """A task's examples, right or not, over one run or several. right: [runs, examples] bool. baseline: the accuracy of guessing."""

    right: np.ndarray
    baseline: float


def run_deviation(tasks: int) -> float:
    """The run-to-run deviation of a mean over fewer tasks than CORE's, if tasks moved independently and alike; nobody has measured it."""
    return RUN_DEVIATION * math.sqrt(CORE_TASK_COUNT / tasks)


def estimate(tasks: Mapping[str, TaskScores], *, seed: int = 0) -> Estimate:
    """The mean over tasks and runs of the centered accuracy, (accuracy - baseline) / (1 - baseline), with its error.

    The runs saw the same examples: these are drawn for all runs together, so that more runs do not make their error smaller.
    """
    rng, values, draws = np.random.default_rng(seed), {}, {}
    for label, task in tasks.items():
        scale = 1 - task.baseline
        mean = task.right.mean(axis=0)
        values[label] = (mean.mean() - task.baseline) / scale
        draws[label] = _resampled(mean, rng) / scale
    runs = min(len(task.right) for task in tasks.values())
    return _summary(values, draws, run_deviation(len(tasks)) / math.sqrt(runs))


def estimate_difference(
    first: Mapping[str, TaskScores],
    second: Mapping[str, TaskScores],
    *,
    same_examples: Mapping[str, bool],
    same_weights: bool,
    seed: int = 0,
) -> Estimate:
    """first - second, of the same tasks.

    same_examples: by task, whether both sides answered the very same examples. Then each example's difference is drawn (a paired bootstrap):
    what is hard for both cancels. same_weights: both sides are one set of weights, so that no run-to-run deviation is added.
    """
    rng, values, draws = np.random.default_rng(seed), {}, {}
    for label, one in first.items():
        other, scale = second[label], 1 - one.baseline
        means = one.right.mean(axis=0), other.right.mean(axis=0)
        values[label] = (means[0].mean() - means[1].mean()) / scale
        if same_examples[label]:
            draws[label] = _resampled(means[0] - means[1], rng) / scale
        else:
            draws[label] = (_resampled(means[0], rng) - _resampled(means[1], rng)) / scale
    runs = [min(len(task.right) for task in side.values()) for side in (first, second)]
    between = 0.0 if same_weights else run_deviation(len(first)) * math.sqrt(1 / runs[0] + 1 / runs[1])
    return _summary(values, draws, between)


def _summary(values: dict[str, float], draws: dict[str, np.ndarray], runs: float) -> Estimate:
    mean = np.mean(list(draws.values()), axis=0)
    each = {label: float(draw.std(ddof=1)) for label, draw in draws.items()}
    values = {label: float(value) for label, value in values.items()}
    return Estimate(sum(values.values()) / len(values), float(mean.std(ddof=1)), runs, values, each)


def _resampled(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means [RESAMPLES] of as many examples drawn with replacement. Examples of one score are alike: how many of each score are drawn is a
    multinomial number, so that the work depends on the number of different scores (2 for one run), not on the examples."""
    found, counts = np.unique(scores, return_counts=True)
    return rng.multinomial(len(scores), counts / len(scores), size=RESAMPLES) @ found / len(scores)


@dataclass(frozen=True)
class Verdict:
    """word: "above", "below" or "cannot tell". more_runs: how many would tell, where it is the latter; None where no number would."""

    word: str
    more_runs: int | None
    text: str


def judge_against(found: Estimate, runs: int, *, against: float = GPT2_CORE) -> Verdict:
    """Is the recipe's mean CORE above `against`? found: from `runs` runs of it.

    The mean of n runs lies d = value - against away, with the deviation s(n) = sqrt(examples^2 + one_run^2 / n): runs average out, the examples
    are the same in all of them. It is told at |d| >= SIGMAS * s(n). If it is not, and the mean stays where it is, the least n for which it is
    is  n = one_run^2 / ((d / SIGMAS)^2 - examples^2), rounded up, and n - runs are more. Where |d| <= SIGMAS * examples no n is enough: then
    the examples decide, and the runs that would tell for these very examples, n = (SIGMAS * one_run / d)^2, are named instead.
    """
    distance, one_run = abs(found.value - against), found.runs * math.sqrt(runs)
    word = "above" if found.value > against else "below"
    if distance >= SIGMAS * found.both:
        return Verdict(word, 0, word)
    room = (distance / SIGMAS) ** 2 - found.examples**2
    if room > 0:
        more = _more(one_run**2 / room, runs)
        return Verdict("cannot tell", more, f"cannot tell: {_runs(more)}")
    if distance == 0:
        return Verdict("cannot tell", None, "cannot tell: it is that value, and no number of runs would")
    more = _more((SIGMAS * one_run / distance) ** 2, runs)
    told = f"{_runs(more)} would for these very examples" if more else f"{word} for these very examples"
    return Verdict("cannot tell", None, f"cannot tell: {told}, no number of runs for others like them")


def _more(needed: float, runs: int) -> int:
    return max(0, math.ceil(needed - 1e-9) - runs)


def _runs(count: int) -> str:
    return f"{count:,} more run{'s' * (count != 1)}"


def score_tasks(
    results: Sequence[Mapping[str, Sequence[bool]]], baselines: Mapping[str, float]
) -> dict[str, TaskScores]:
    """By task, of one evaluation or several that answered the same examples. results: label -> right, one mapping an evaluation."""
    return {
        label: TaskScores(np.array([run[label] for run in results], dtype=bool), baselines[label])
        for label in results[0]
    }
