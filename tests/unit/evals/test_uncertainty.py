"""The bootstrap against the formula of a mean's deviation and repeated experiments; the verdict against its formula."""

import math

import numpy as np
import pytest

from megachat.evals.uncertainty import (
    GPT2_CORE,
    RUN_DEVIATION,
    SIGMAS,
    Estimate,
    TaskScores,
    estimate,
    estimate_difference,
    judge_against,
    run_deviation,
    score_tasks,
)

SEVEN_RUNS = [0.25373, 0.2584, 0.25489, 0.2568, 0.25732, 0.26765, 0.25119]
SIZES, BASELINES, CHANCES = (32, 300, 1000, 5000), (0.0, 0.25, 0.5, 0.4), (0.1, 0.4, 0.7, 0.5)


def drawn(rng, runs: int = 1) -> dict[str, TaskScores]:
    """Draws answers of a model that is right with each task's probability."""
    tasks = {}
    for number, (size, baseline, chance) in enumerate(zip(SIZES, BASELINES, CHANCES, strict=True)):
        tasks[f"task {number}"] = TaskScores(rng.random((runs, size)) < chance, baseline)
    return tasks


def analytic(tasks: dict[str, TaskScores]) -> tuple[dict[str, float], float]:
    each = {}
    for label, task in tasks.items():
        scores = task.right.mean(axis=0)
        each[label] = scores.std() / math.sqrt(len(scores)) / (1 - task.baseline)
    return each, math.sqrt(sum(value**2 for value in each.values())) / len(each)


def test_the_run_deviation_is_that_of_the_seven_runs():
    assert np.std(SEVEN_RUNS, ddof=1) == pytest.approx(RUN_DEVIATION, abs=5e-5)
    assert run_deviation(22) == RUN_DEVIATION and run_deviation(7) == pytest.approx(RUN_DEVIATION * math.sqrt(22 / 7))


@pytest.mark.parametrize("runs", [1, 3])
def test_the_bootstrap_gives_the_deviation_of_a_mean(runs):
    tasks = drawn(np.random.default_rng(1), runs)
    result, (each, mean) = estimate(tasks, seed=2), analytic(tasks)
    assert result.value == pytest.approx(
        np.mean([(task.right.mean() - task.baseline) / (1 - task.baseline) for task in tasks.values()]), abs=1e-12
    )
    assert result.task_errors == pytest.approx(each, rel=0.03) and result.example_error == pytest.approx(mean, rel=0.03)
    assert result.run_error == pytest.approx(run_deviation(4) / math.sqrt(runs)) and result.error == pytest.approx(
        math.hypot(result.example_error, result.run_error)
    )
    assert estimate(tasks, seed=2) == result and estimate(tasks, seed=3).example_error != result.example_error


def test_intervals_contain_the_truth_with_their_confidence():
    rng = np.random.default_rng(5)
    truth = np.mean([(chance - baseline) / (1 - baseline) for chance, baseline in zip(CHANCES, BASELINES, strict=True)])
    hits = [abs((result := estimate(drawn(rng))).value - truth) < SIGMAS * result.example_error for _ in range(400)]
    assert 0.91 < np.mean(hits) < 0.98  # 0.95 with a deviation of 0.011 for 400 draws


def test_a_paired_difference_cancels_the_difficulty_of_examples():
    rng = np.random.default_rng(7)
    first = drawn(rng)
    flipped = {
        label: TaskScores(task.right ^ (rng.random(task.right.shape) < 0.02), task.baseline)
        for label, task in first.items()
    }
    same, other = dict.fromkeys(first, True), dict.fromkeys(first, False)
    paired = estimate_difference(first, flipped, same_examples=same, same_weights=True)
    unpaired = estimate_difference(first, flipped, same_examples=other, same_weights=True)
    assert paired.value == unpaired.value
    assert paired.example_error < unpaired.example_error / 3 and paired.run_error == 0
    expected = {
        label: np.std(one.right.astype(int) - flipped[label].right) / math.sqrt(one.right.size) / (1 - one.baseline)
        for label, one in first.items()
    }
    assert paired.task_errors == pytest.approx(expected, rel=0.05)
    assert unpaired.example_error == pytest.approx(math.hypot(analytic(first)[1], analytic(flipped)[1]), rel=0.03)
    result = estimate_difference(drawn(rng, 2), drawn(rng, 3), same_examples=same, same_weights=False)
    assert result.run_error == pytest.approx(run_deviation(4) * math.sqrt(1 / 2 + 1 / 3))


def of(value: float, examples: float, runs: int = 1) -> Estimate:
    return Estimate(value, examples, RUN_DEVIATION / math.sqrt(runs), {}, {})


def test_verdicts():
    assert (
        judge_against(of(GPT2_CORE + 0.03, 0.005), 1).text == "above"
        and judge_against(of(GPT2_CORE - 0.03, 0.005), 1).text == "below"
    )
    edge = SIGMAS * math.hypot(0.001, RUN_DEVIATION)
    assert (
        judge_against(of(GPT2_CORE + edge + 1e-9, 0.001), 1).word == "above"
        and judge_against(of(GPT2_CORE - edge + 1e-9, 0.001), 1).word == "cannot tell"
    )
    for value, runs in ((GPT2_CORE + 0.004, 1), (GPT2_CORE - 0.004, 2), (GPT2_CORE + 0.004, 5)):
        more = judge_against(of(value, 0.001, runs), runs).more_runs
        assert judge_against(of(value, 0.001, runs + more), runs + more).word != "cannot tell" and more > 0
        assert judge_against(of(value, 0.001, runs + more - 1), runs + more - 1).word == "cannot tell"
    assert judge_against(of(GPT2_CORE + 0.004, 0.001), 1).text == "cannot tell: 8 more runs needed"
    hopeless = judge_against(of(GPT2_CORE + 0.01, 0.006), 1)
    assert hopeless.more_runs is None and hopeless.text == (
        "cannot tell: 1 more run needed for these examples, no number of runs decides for others like them"
    )
    assert (
        judge_against(of(GPT2_CORE + 0.02, 0.03), 1).text
        == "cannot tell: above for these examples, no number of runs decides for others like them"
    )
    assert judge_against(of(GPT2_CORE, 0.006), 1).more_runs is None


def test_answers_become_scores():
    result = score_tasks([{"a": (True, False)}, {"a": [True, True]}], {"a": 0.25})
    assert result["a"].right.tolist() == [[True, False], [True, True]] and result["a"].baseline == 0.25
