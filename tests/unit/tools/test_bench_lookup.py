"""The ablation of lookup tables: means, errors and differences by hand, its picture, runs that are not repeated, and
a plan for each variant.
"""

import json
from argparse import Namespace

import pytest

from megachat.config import load_config
from megachat.errors import UserError
from megachat.planning.plan import resolve_plan
from megachat.studies.curves import Ratio
from tests.runs.job import ROOT
from tools.bench import lookup_ablation
from tools.bench.lookup_ablation import (
    RECIPE,
    RECIPE_SIZE,
    VARIANTS,
    ablation_result,
    ablation_table,
    bench_lookup,
    settings_of,
    summarize,
    times_table,
    train_variant,
)
from tools.bench.lookup_picture import draw_curves, plot_curves
from tools.bench.recipe_ablation import bench_recipe
from tools.bench.turns import time_in_turn

FINAL = {("none", 1): 2.0, ("none", 2): 2.2, ("lzw", 1): 1.9, ("lzw", 2): 2.0}


class Panel:
    """Takes the place of matplotlib's axes: name -> places, values and errors of a curve."""

    def __init__(self):
        self.curves = {}

    def errorbar(self, *points, label, linestyle):
        self.curves[label] = points

    def set(self, **labels):
        assert labels["ylabel"] == "bits per byte"

    def legend(self, **how):
        pass


def run_of(variant: str, seed: int) -> dict:
    curve = [{"step": step, "flops": step * 1e9, "bpb": FINAL[variant, seed] + 3 / step} for step in (10, 20, 30)]
    return {
        "variant": variant,
        "seed": seed,
        "curve": curve,
        "parameters": {"total": 1000 + seed},
        "peak_bytes": 5_000_000,
    }


def arguments(folder, **changes) -> Namespace:
    given = {
        "config": str(ROOT / "configs" / "d4_cpu.json"),
        "set": ["horizon.steps=2"],
        "data": "data",
        "tokenizer": "tokenizer",
        "folder": folder and str(folder),
        "variants": "none lzw",
        "seeds": "1 2",
        "rounds": 0,
        "out": None,
    }
    return Namespace(**(given | changes))


def test_differences_are_paired_by_seed():
    times = {"step_s": 3.0, "ratio": 1.5, "ratios": [1.5] * 6, "per_token": Ratio(1.5, 1.25, 1.75)}
    variants = summarize([run_of(*key) for key in FINAL], {"lzw": times})
    assert variants["none"]["bpb"] == pytest.approx((2.2, 0.1))
    assert variants["none"]["difference"] == pytest.approx((0, 0))
    assert variants["lzw"]["difference"] == pytest.approx((-0.15, 0.05))  # -0.1 and -0.2
    assert [point["bpb"] for point in variants["lzw"]["curve"]] == pytest.approx([2.25, 2.1, 2.05])
    header, none, lzw = ablation_table(variants)
    assert (
        "-0.1500 +- 0.0500  cannot tell" in lzw
        and "1.500 (1.250 to 1.750)" in lzw
        and "+-" in none
        and header.startswith("variant")
    )
    assert times_table({"lzw": times})[1].split() == "lzw 1.500 (1.250 to 1.750) slower".split()
    assert times_table({"lzw": times | {"ratios": [1.5] * 5}})[1].endswith(")"), "too few for a verdict"
    assert ablation_result(arguments(None), [], {"lzw": times})["variants"] == {"lzw": times}, "times alone"


@pytest.mark.parametrize(
    ("spread", "verdict"), [(0.07, "better"), (0.09, "cannot tell")], ids=["4.3 errors", "less than 4.3"]
)
def test_a_difference_counts_beyond_students_interval(spread, verdict):
    differences = dict(zip((1, 2, 3), (-0.1 - spread / 2, -0.1, -0.1 + spread / 2), strict=True))
    runs = [run_of("none", 1) | {"seed": seed} for seed in differences]
    for seed, difference in differences.items():
        run = run_of("lzw", 1) | {"seed": seed}
        run["curve"] = [point | {"bpb": 2 + 3 / point["step"] + difference} for point in run["curve"]]
        runs.append(run)
    assert f"  {verdict}  " in ablation_table(summarize(runs, {}))[2]


def test_a_single_seed_has_no_error():
    variants = summarize([run_of("none", 1), run_of("lzw", 1)], {})
    assert variants["lzw"]["difference"] == (pytest.approx(-0.1), None)
    assert "-0.1000  cannot tell" in ablation_table(variants)[2]


@pytest.mark.parametrize("timed", [False, True])
def test_the_picture_has_a_curve_per_variant_and_axis(timed):
    seconds = {"none": {"step_s": 2.0, "ratio": 1.0}, "lzw": {"step_s": 3.0, "ratio": 1.5}} if timed else {}
    panels = [Panel() for _ in range(3 if timed else 2)]
    variants = summarize([run_of(*key) for key in FINAL], seconds)
    plot_curves(panels, variants)
    assert [len(panel.curves) for panel in panels] == [2] * len(panels)
    steps, bpb, errors = panels[0].curves["lzw"]
    assert steps == [20, 30] and bpb == pytest.approx([2.1, 2.05]), "of three points the first is left out"
    assert errors == pytest.approx([0.05, 0.05])
    if timed:
        assert [panels[1].curves[name][0] for name in ("none", "lzw")] == [[40, 60], [60, 90]], "seconds"
    assert panels[-1].curves["none"][0] == pytest.approx([0.02, 0.03]), "FLOPs"


def test_the_picture_is_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves(tmp_path / "curves.svg", "a < b", summarize([run_of(*key) for key in FINAL], {}))
    assert "a &lt; b" in (tmp_path / "curves.svg").read_text()


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(tmp_path, monkeypatch):
    given = arguments(tmp_path)
    for variant, seed in FINAL:
        finished = run_of(variant, seed) | {"settings": settings_of(given, variant, seed)}
        (tmp_path / f"{variant}-{seed}.json").write_text(json.dumps(finished))
    monkeypatch.setattr(lookup_ablation.subprocess, "run", None)
    result = bench_lookup(given)
    assert result["variants"]["lzw"]["difference"] == pytest.approx((-0.15, 0.05))
    with pytest.raises(UserError, match="other settings"):
        train_variant(arguments(tmp_path, set=["horizon.steps=3"]), tmp_path, "lzw", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": "none lsw"}, "has lsw, which is not one of none"),
        ({"variants": "lzw"}, "must have none"),
        ({"folder": None}, "--folder is missing"),
    ],
)
def test_refusals(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        bench_lookup(arguments(**({"folder": tmp_path} | changes)))
    with pytest.raises(UserError, match="there is nothing to do"):
        bench_recipe(arguments(tmp_path, seeds="", variants=None))


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_has_a_plan_at_depth_6(variant, tmp_path):
    given = arguments(tmp_path, set=["model.depth=6", "model.aspect_ratio=16"])
    resolve_plan(load_config(ROOT / "configs" / "d4_cpu.json", settings_of(given, variant, 1)), 1, 4096)


def test_both_is_the_sum_of_its_parts():
    assert VARIANTS["both"] == VARIANTS["lzw"] + VARIANTS["bigram-trigram"]


def test_the_larger_batch_trains_on_the_same_tokens_and_together_is_all_parts(tmp_path):
    given = arguments(tmp_path, set=["model.depth=3", *RECIPE_SIZE])
    plans = {
        name: resolve_plan(load_config(ROOT / "configs" / "d4_cpu.json", settings_of(given, name, 1)), 1, 1024)
        for name in ("none", "batch-1.5", "together")
    }
    assert len({plan.total_tokens for plan in plans.values()}) == 1, "the same rows"
    assert plans["batch-1.5"].tokens_per_step == 1.5 * plans["none"].tokens_per_step
    assert set(VARIANTS["together"]) > {setting for name in ("z-loss", "final-0") for setting in RECIPE[name]}
    assert plans["together"].dims.norm_scales == ("attention", "mlp", "query", "key") and plans["together"].dims.ngram


def test_turns_are_timed_by_the_given_clock():
    now = [0.0]

    def takes(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    assert time_in_turn({"a": takes(2), "b": takes(3)}, 2, lambda: now[0]) == {"a": [2, 2], "b": [3, 3]}
