"""FP8, go or no-go: planted products, losses and step times have known verdicts; the products are measured for real."""

import dataclasses
import json
import math

import pytest
import torch

from megachat.commands import main as cli
from megachat.config import Config
from megachat.errors import UserError
from megachat.installation import config_path
from megachat.kernels.fp8 import Fp8Choice
from megachat.planning.plan import resolve_without_text
from megachat.programs import fp8_check
from megachat.studies.curves import interval_of_ratios, median_ratio
from megachat.studies.fp8 import (
    MatrixTime,
    advice,
    check_lines,
    gate_result,
    matrix_row,
    settings_time,
    time_to_equal_loss,
    verdict_of,
    verdict_of_products,
)
from megachat.studies.runs import load_run
from megachat.studies.trials import Diverged
from tests.unit.studies.test_runs import make_run

ROUNDS = (0.98, 1.0, 1.02, 1.01, 0.99, 1.0, 1.0)


def matrix(name, factor, count=1, seconds=1.0):
    """A kind of matrix that FP8 makes `factor` times as fast; 0: it is not covered."""
    plain = [seconds * each for each in ROUNDS]
    return MatrixTime(name, 256, 256, count, plain, [each / factor for each in plain] if factor else [])


def planted(folder, *, base=2.5, dt=0.5, speed=1.0, raw=None):
    """A run whose last losses are `base` nats, whose steps take `dt` seconds and which learns `speed` times as fast."""
    run = load_run(make_run(folder, speed=speed))
    lines = []
    for line in run.lines:
        more = {"train/loss": base, "train/dt": dt} if "train/loss" in line else {}
        lines.append(line | more | ({"train/loss_raw": raw} if more and raw else {}))
    return dataclasses.replace(run, lines=lines)


def test_advice_names_what_settings_can_do():
    gains, loses, head = matrix("mlp.c_fc", 1.5, 4), matrix("attn.c_q", 0.5, 4), matrix("lm_head", 1.2)
    gate = matrix("attn.ve_gate", 0)
    assert [matrix_row(each)["advice"] for each in (gains, loses, gate)] == ["convert", "keep", "not covered"]
    mixed, of_head, times = advice([gains, loses, gate, head], "tensorwise")
    assert mixed.startswith("convert mlp.c_fc, keep attn.c_q: no setting does that") and "1.33 times" in mixed
    assert of_head == "lm_head: precision.fp8_head=true" and times.endswith("fastest: off")
    assert advice([gains, head], "blockwise")[0] == "convert all of mlp.c_fc: precision.fp8=blockwise"
    assert advice([loses, matrix("lm_head", 0.9)], "tensorwise")[:2] == [
        "keep all of attn.c_q: precision.fp8=off",
        "lm_head: precision.fp8_head=false, if precision.fp8 is on at all",
    ]
    assert settings_time([gains, loses, gate, head]) == pytest.approx(
        {"off": 10.0, "fp8": 4 / 1.5 + 8 + 2, "fp8 with fp8_head": 4 / 1.5 + 8 + 1 + 1 / 1.2}
    )
    assert not MatrixTime("noisy", 1, 1, 1, ROUNDS, [*ROUNDS[:-2], 0.5, 1.5]).gains


def test_intervals_of_paired_ratios_and_of_medians():
    """Seven pairs: the median lies between the least and the largest with 98 %; of 20, between the 6th and the 15th."""
    assert interval_of_ratios([3, 1, 2, 4, 5, 6, 7]) == (4, 1, 7)
    assert interval_of_ratios(list(range(1, 21))) == (10.5, 6, 15)
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        one, other = (torch.randn(40, generator=generator).mul(0.1).exp().mul(scale).tolist() for scale in (1.0, 1.3))
        ratio = median_ratio(one, other)
        covered += ratio.low <= 1.3 <= ratio.high
    assert 0.88 * 200 <= covered <= 0.99 * 200


def test_a_step_that_is_faster_and_learns_as_much_is_a_go(tmp_path):
    base = planted(tmp_path / "base", base=2.5, dt=0.5)
    fp8 = planted(tmp_path / "fp8", base=2.502, dt=0.4)
    gate = gate_result(base, fp8, 0.0025, planted(tmp_path / "seed", base=2.52))
    assert gate["passed"] and gate["difference"] == pytest.approx(0.0008) and gate["noise"] == pytest.approx(0.008)
    equal = time_to_equal_loss(base, fp8)
    assert (equal["steps"].value, equal["time"].value) == pytest.approx((1.0, 0.8))
    verdict, why = verdict_of(gate, equal)
    assert verdict == "go" and "0.80 times the time" in why and "1.000 of the steps" in why


def test_each_way_to_a_no_go(tmp_path):
    base = planted(tmp_path / "base")
    slower = planted(tmp_path / "slower", dt=0.45, speed=0.7)
    verdict, why = verdict_of(gate_result(base, slower, 0.0025, None), time_to_equal_loss(base, slower))
    assert verdict == "no-go" and "1.29 times the time" in why, "faster steps that learn less"
    worse = planted(tmp_path / "worse", base=2.52, dt=0.1)
    verdict, why = verdict_of(gate_result(base, worse, 0.0025, None), time_to_equal_loss(base, worse))
    assert (verdict, "+0.800% off" in why) == ("no-go", True)
    verdict, why = verdict_of(gate_result(base, base, 0.0025, None), time_to_equal_loss(base, base))
    assert verdict == "no-go" and why.endswith("that it is faster is not shown")
    lost = planted(tmp_path / "lost", base=math.nan)
    assert verdict_of(gate_result(base, lost, 0.0025, None), {}) == ("no-go", "a loss is no number")
    raw = planted(tmp_path / "raw", base=9.0, raw=2.5)
    assert gate_result(base, raw, 0.0025, None)["difference"] == 0, "the moving average is not compared"


def test_the_products_of_a_config_are_measured_as_a_rank_holds_them():
    values = {
        "model": {"depth": 2, "aspect_ratio": 128, "head_size": 64, "sequence_len": 64, "window_pattern": "L"},
        "batch": {"tokens": 128, "micro_rows": 1},
        "horizon": {"steps": 2},
        "parallel": {"tensor": 2},
    }
    config = Config.model_validate(values)
    plan = resolve_without_text(config, 2, 512)
    cpu, choice = torch.device("cpu"), Fp8Choice("tensorwise", "torch", "")
    measured = {each.name: each for each in fp8_check.measure_matrices(config, plan, choice, cpu, torch.float32, 3)}
    assert (measured["mlp.c_fc"].rows, measured["mlp.c_fc"].columns, measured["mlp.c_fc"].count) == (512, 256, 2)
    assert (measured["lm_head"].rows, measured["lm_head"].count) == (256, 1)
    assert {name for name, each in measured.items() if each.fp8} == {
        *("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head")
    }
    assert all(len(each.plain) == 3 and min(each.plain) > 0 for each in measured.values()) and len(measured) > 7


def test_products_alone_are_a_go_only_beyond_their_interval():
    noisy = MatrixTime("mlp.c_fc", 1, 1, 1, [1.0] * 7, [0.5, 0.9, 0.9, 0.9, 1.2, 1.2, 0.9])
    verdict, why = verdict_of_products([noisy])
    assert verdict == "no-go" and "0.90 times as long (0.50 to 1.20); that it is faster is not shown" in why
    assert verdict_of_products([matrix("mlp.c_fc", 1.5), matrix("attn.ve_gate", 0)])[0] == "go"
    slower = [matrix("mlp.c_fc", 0.5), matrix("lm_head", 0.9)]
    assert verdict_of_products(slower)[0] == "no-go" and "1.50 times" in verdict_of_products(slower)[1]


def test_divergence_is_a_no_go_and_a_decided_head_is_kept(tmp_path, monkeypatch):
    question = fp8_check.Fp8Question(
        config_path("d4_cpu"), ["model.vocab_size=4096"], "tensorwise", 9, 1, 0.01, 3, 1, tmp_path
    )
    gains = {"head": 1.5}
    monkeypatch.setattr(fp8_check, "measure_matrices", lambda *_: [matrix("a", 1.2), matrix("lm_head", gains["head"])])
    seen = []

    def train(trial, watch=None):
        seen.append(trial)
        if trial.name == "fp8":
            raise Diverged("step 40: the loss is nan", planted(tmp_path / "runs" / f"{len(seen)}" / "fp8"))
        return planted(tmp_path / "runs" / f"{len(seen)}" / trial.name)

    monkeypatch.setattr(fp8_check, "trainer", lambda *_, **__: train)
    result = fp8_check.fp8_check(question)
    assert (result["verdict"], result["fp8_head"]) == ("no-go", True) and "FP8 diverged at step 40" in result["why"]
    assert check_lines(result)[-1].startswith("no-go: FP8 diverged at step 40")
    gains["head"] = 0.5
    assert fp8_check.fp8_check(question)["fp8_head"] is True
    assert "precision.fp8_head=true" in seen[-1].settings, "not what is measured now"
    narrow = dataclasses.replace(question, settings=[*question.settings, "model.aspect_ratio=16", "model.head_size=16"])
    monkeypatch.setattr(fp8_check, "measure_matrices", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match="would change nothing: no matrix of width 64"):
        fp8_check.fp8_check(dataclasses.replace(narrow, out=tmp_path / "other"))


def test_turns_give_every_action_its_rounds():
    calls = []
    seconds = fp8_check.time_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], 4, torch.device("cpu"), 0)
    assert [len(each) for each in seconds] == [4, 4] and "".join(calls[4:]) == "abababab"


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--gate", "2"], "--gate is 2"),
        (["--rounds", "1"], "--rounds is 1"),
        (["--steps", "-1"], "--steps is -1"),
        (["--set", "run.name=mine"], "--set has run.name, which this study sets for each of its runs: leave it out"),
        (["--set", "horizon.steps=20"], "--set has horizon.steps, which this study sets"),
    ],
)
def test_mistakes(words, problem):
    with pytest.raises(UserError, match=problem):
        cli.start("fp8-check", ["--config", "d4_cpu", *words], "megachat")


def test_the_folder_of_another_check_is_refused_and_the_text_shows_all(tmp_path):
    question = fp8_check.Fp8Question(config_path("d4_cpu"), [], "tensorwise", 9, 1, 0.01, 3, 1, tmp_path / "out")
    fp8_check.check_question(question)
    fp8_check.check_question(dataclasses.replace(question, gate=0.02))
    with pytest.raises(UserError, match=r"runs of another check \(steps 9\): give another --out"):
        fp8_check.check_question(dataclasses.replace(question, steps=10))
    with pytest.raises(UserError, match=r"runs of another check \(values "):
        fp8_check.check_question(dataclasses.replace(question, settings=["optimizer.matrix_lr=0.5"]))
    with pytest.raises(UserError, match=r"runs of another check \(ranks 1\)"):
        fp8_check.check_question(dataclasses.replace(question, ranks=2))
    assert fp8_check.check_question(question) is None and fp8_check.check_question(question, True)
    assert fp8_check.check_question(question) is True, "decided once"
    saved = json.loads((question.out / "question.json").read_text())
    assert saved["study"] == "fp8-check" and saved["fp8_head"] is True
    (question.out / "question.json").write_text(json.dumps(saved | {"study": "ladder"}))
    with pytest.raises(UserError, match="has the runs of ladder, not of fp8-check: give another --out"):
        fp8_check.check_question(question)
    base, fp8 = planted(tmp_path / "base"), planted(tmp_path / "fp8", dt=0.9)
    matrices = [matrix("mlp.c_fc", 0.5), matrix("attn.ve_gate", 0)]
    gate, equal = gate_result(base, fp8, 0.0025, base), time_to_equal_loss(base, fp8)
    verdict, why = verdict_of(gate, equal)
    result = {"dtype": "bfloat16", "device": "a CPU", "tokens": 64, "backend": "fp8 by torch", "gate": gate}
    result |= {"matrices": [matrix_row(each) for each in matrices], "advice": advice(matrices, "tensorwise")}
    text = "\n".join(check_lines(result | {"verdict": verdict, "why": why}))
    assert "256 x 256" in text and "0.50  0.50 to 0.50  keep" in text and "gate 0.25%: passed" in text
    assert text.splitlines()[-1].startswith("no-go: FP8 needs 1.80 times the time") and json.dumps(result)
