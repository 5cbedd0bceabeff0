"""The search of layouts: what fits, in which order, what is kept; that memory falls and costs add up; bad input."""

import json
import sys
from pathlib import Path

import pytest
import torch

from megachat.commands import main as cli
from megachat.config import config_from_values, load_config
from megachat.errors import UserError
from megachat.planning.hardware import parse_gpus
from megachat.planning.memory import FILLS, memory_of_stages
from megachat.planning.plan import resolve_plan
from megachat.planning.probe import read_probe
from megachat.planning.search import SEARCHED, free_settings, least_hardware, savings, search
from megachat.planning.stage_state import estimated_stage_state
from megachat.planning.step_time import predict_step
from megachat.programs.plan import draw_scaling
from tests.runs.job import ROOT
from tests.unit.planning.test_probe import written

SMALL = {
    "model": {"depth": 6, "vocab_size": 4096, "sequence_len": 512, "head_size": 64},
    "batch": {"tokens": 64 * 512},
    "horizon": {"steps": 50},
}
CONFIG = config_from_values(SMALL, "small")
NODE = parse_gpus("8xH100")
ALL = free_settings(set())


def test_the_list_is_ranked_fits_and_trains_the_same_batch():
    layouts = search(CONFIG, NODE, 4096, ALL, top=30)
    again = search(CONFIG, NODE, 4096, ALL, top=30)
    assert [one.settings for one in layouts.ranked] == [one.settings for one in again.ranked]
    times = [one.step.total for one in layouts.ranked]
    assert times == sorted(times) and len(times) == 30 and layouts.fitting > 30
    for one in layouts.ranked:
        assert resolve_plan(one.config, 8, 4096) == one.plan and one.plan.tokens_per_step == 64 * 512
        exact = max(stage.total for stage in memory_of_stages(one.config, one.plan, torch.bfloat16))
        assert exact == one.bytes <= FILLS * NODE.gpu.memory_bytes
        assert abs(sum(one.step.parts.values()) - one.step.total) < 1e-9
    seen = {key: {one.settings[key] for one in search(CONFIG, NODE, 4096, ALL, top=999).ranked} for key in SEARCHED}
    assert (
        seen["parallel.tensor"] == {1, 2} and seen["parallel.pipeline"] == {1, 2, 4} and len(seen["precision.fp8"]) == 2
    )


def test_what_is_set_is_kept():
    config = load_config(ROOT / "configs" / "d12.json", ["parallel.tensor=2", "batch.recompute=block"])
    fixed = {"parallel.tensor", "batch.recompute", "precision.fp8"}
    layouts = search(config, NODE, 32768, free_settings(fixed), top=99)
    assert {one.config.parallel.tensor for one in layouts.ranked} == {2}
    assert {one.config.batch.recompute for one in layouts.ranked} == {"block"}
    assert {one.config.precision.fp8 for one in layouts.ranked} == {"off"}
    assert len({one.config.batch.micro_rows for one in layouts.ranked}) > 2
    thirds = config_from_values({**SMALL, "batch": {"tokens": 512 * 96}}, "no power of two")
    tried = {
        one.plan.micro_rows for one in search(thirds, NODE, 4096, ALL, top=999).ranked if one.plan.layout.data == 8
    }
    assert tried == {1, 2, 3, 4, 6, 12}, "all divisors of a rank's 12 rows"
    both = config_from_values({**SMALL, "batch": {"micro_rows": 2, "accumulation": 4}}, "by rows")
    assert {one.plan.micro_rows for one in search(both, NODE, 4096, ALL, top=99).ranked} == {2}, "they set the batch"


@pytest.mark.parametrize("sections", [{}, {"ngram": {"blocks": [1]}}, {"lookup": {"after_blocks": [1]}}])
def test_memory_falls_with_tensor_and_pipeline_and_the_estimate_is_near(sections):
    config = config_from_values(SMALL | {"model": SMALL["model"] | {"kv_heads": 6}} | sections, "small")
    for axis in ("tensor", "pipeline"):
        totals = []
        for size in (1, 2, 3, 6):
            parallel = config.parallel.model_copy(update={axis: size})
            batch = config.batch.model_copy(update={"micro_rows": 2, "tokens": 512 * 96})
            changed = config.model_copy(update={"parallel": parallel, "batch": batch})
            plan = resolve_plan(changed, 12, 4096)
            exact = memory_of_stages(changed, plan, torch.bfloat16)
            near = memory_of_stages(changed, plan, torch.bfloat16, state_of=estimated_stage_state)
            totals.append(max(stage.total for stage in exact))
            for one, other in zip(exact, near, strict=True):
                assert one.state + one.gradients == pytest.approx(other.state + other.gradients, rel=0.02)
                assert 0.8 * one.total <= other.total <= 1.01 * one.total, "the search must not miss what fits"
        if axis == "tensor" or not sections:  # tables are divided over the data ranks of one stage only
            assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4, (axis, totals)


def test_a_config_that_is_too_large_says_what_helps():
    config = load_config(ROOT / "configs" / "d32_fp8.json")
    machine, free = parse_gpus("2xRTX-4090"), free_settings({"precision.fp8"})
    layouts = search(config, machine, 32768, free)
    assert not layouts.ranked and len(layouts.too_large) == 3
    (one,) = [one for one in layouts.too_large if one.plan.layout.tensor == 2]
    assert all(saved > 0 for _, saved in savings(one))
    least = least_hardware(config, machine, 32768, free)
    assert [one.name for one in least][0] == "2x2xRTX-4090" and least[1].gpu.memory_bytes > machine.gpu.memory_bytes
    assert all(search(config, one, 32768, free, top=1).ranked for one in least)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def run(*words: str) -> int:
    return cli._run(["plan", *words])


def test_the_command_has_the_verdict_first_and_adds_up(small, capsys, tmp_path):
    words = ["--config", small, "--gpus", "8xH100", "--price", "2.5"]
    assert run(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fits 8xH100: ") and lines[1].startswith("time: ") and lines[2].startswith("price: ")
    written = str(tmp_path / "best.json")
    assert run(*words, "--json", "--write-config", written) == 0
    values = json.loads(capsys.readouterr().out)
    best = values["layouts"][0]
    assert sum(best["parts_sec"].values()) == pytest.approx(best["step_sec"])
    assert best["price"] == pytest.approx(best["wall_hours"] * 8 * 2.5)
    assert best["price_interval"] == pytest.approx(
        [best["price"] * (1 - best["error"]), best["price"] * (1 + best["error"])]
    )
    assert [one["nodes"] for one in values["scaling"]] == [1, 2, 4, 8, 16, 32, 64]
    assert values["scaling"][0]["efficiency"] == 1 and all("reason" in one or one["cause"] for one in values["scaling"])
    hours = [one["wall_hours"] for one in values["scaling"] if "reason" not in one]
    assert len(hours) > 2
    plan = resolve_plan(load_config(written), 8, 4096)
    assert vars(plan.layout) == best["layout"] and plan.micro_rows == best["settings"]["batch.micro_rows"]
    assert run(*words, "--layout", "tp=2,dp=4", "--verbose") == 0
    out = capsys.readouterr().out
    assert "kept as set: parallel.tensor=2, parallel.pipeline=1" in out and "matrix products" in out


@pytest.fixture
def probe(tmp_path):
    return str(written(tmp_path))


def test_a_probe_plans_for_the_machine_that_it_measured(probe, capsys, tmp_path):
    words, best = (
        ["--config", "d4_cpu", "--set", "model.vocab_size=4096", "--probe", probe],
        str(tmp_path / "best.json"),
    )
    assert run(*words, "--price", "2", "--json", "--write-config", best) == 0
    values = json.loads(capsys.readouterr().out)
    first = values["layouts"][0]
    assert values["gpus"] == 2 and values["scaling"] == [] and first["error"] == 0.08, "the probe's ranks and error"
    config = load_config(best)
    plan = resolve_plan(config, 2, 4096)
    assert config.precision.compute == "bfloat16", "as measured"
    assert first["step_sec"] == pytest.approx(predict_step(config, plan, read_probe(Path(probe))).total)
    assert first["price"] == pytest.approx(first["wall_hours"] * 2), "of the CPU, not of each rank"
    assert values["gpu_bytes"] == 8 * 10**9, "ranks share the memory"
    assert run(*words, "--layout", "dp=1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fits 1 rank on a CPU: ") and "+-8% (error of the probe)" in lines[1]
    assert lines[-1] == f"speeds: {probe}" and "; predicted, not measured" in lines[1]
    assert run(*words, "--memory-gb", "0.01") == 1
    assert "plan other machines with --gpus" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--gpus", "8xH100"], "--gpus and --probe name two machines"),
        (["--gpu", "H100"], "--gpu and --probe name two machines"),
        (["--plot", "x.svg"], "--plot belongs to --gpus"),
        (["--world", "3"], "measured up to 2 ranks at a time, not 3"),
        (["--world", "2", "--layout", "dp=1"], "--layout dp=1 has 1 ranks, but --world is 2"),
        (["--memory-gb", "-1"], "--memory-gb is -1.0"),
        (["--set", "precision.compute=float32"], "was measured in bfloat16, but precision.compute is float32"),
        (["--set", "model.sequence_len=256"], "was measured with model.sequence_len=512, not 256"),
        (["--set", "precision.fp8=tensorwise"], "has no FP8"),
        (["--set", "model.depth=20"], "was measured at width 256, which predicts widths from 128 to 384"),
    ],
)
def test_what_a_probe_cannot_predict_is_one_sentence(words, fact, probe):
    with pytest.raises(UserError) as error:
        run("--config", "d4_cpu", "--set", "model.vocab_size=4096", "--probe", probe, *words)
    assert fact in str(error.value) and "\n" not in str(error.value)


def test_the_picture(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.svg"
    run("--config", small, "--gpus", "8xH100", "--plot", str(picture))
    assert "predicted seconds per step" in picture.read_text() or picture.stat().st_size > 1000
    for path in ("/proc/none/x.png", "plan.unknown"):
        with pytest.raises(UserError, match=f"--plot {path} cannot be written"):
            draw_scaling({"scaling": []}, path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'megachat\[notebook\]'"):
        run("--config", small, "--gpus", "8xH100", "--plot", str(picture))


def test_a_config_that_fits_nowhere_has_status_1_and_the_least_hardware(capsys):
    assert run("--config", "d32_fp8", "--gpus", "1xRTX-4090") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("does not fit 1xRTX-4090: ")
    assert lines[1].startswith("least hardware that would do: ") and "xRTX-4090, or 1x" in lines[1]


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--gpus", "8xH10"], "H10 is no known GPU: the near ones are H100"),
        (["--gpus", "1x29xH100"], "29 GPUs fit no layout of this config"),
        (["--gpus", "8xH100", "--price", "much"], "invalid float value: 'much'"),
        (["--gpus", "8xH100", "--price", "nan"], "--price is nan: give the price of a GPU-hour, a number above 0"),
        (["--gpus", "8xH100", "--price", "-1"], "a number above 0"),
        (["--gpus", "8xH100", "--nodes", "0"], "--nodes is 0"),
        (["--gpus", "8xH100", "--world", "8"], "--world plans one layout"),
        (["--gpus", "8xH100", "--target", "core"], "model.depth is 6"),
        (["--gpus", "8xA100", "--set", "precision.fp8=tensorwise"], "A100-80 has no FP8"),
        (["--gpus", "8xH100", "--gpu-spec", "none.json"], "none.json"),
        (["--gpus", "8xH100", "--write-config", "/proc/none/x.json"], "/proc/none/x.json"),
        (["--gpus", "8xH100", "--layout", "dp=2,tp=2"], "--layout dp=2,tp=2 has 4 ranks, but 8xH100 has 8 GPUs"),
        (["--target", "core"], "--target belongs to --gpus: give the machine, as --gpus 8xH100, or --probe FILE"),
        (["--price", "2"], "--price needs a time, and that of"),
    ],
)
def test_bad_input_is_one_sentence(words, fact, small):
    with pytest.raises(UserError) as error:
        run("--config", small, *words)
    assert fact in str(error.value) and "\n" not in str(error.value)
