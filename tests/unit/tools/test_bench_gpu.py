"""The GPU matrix without a GPU: its cases, its report, its command and its refusals."""

import argparse
import json
import subprocess

import pytest
import torch

from megachat.errors import UserError
from megachat.planning.plan import resolve_plan
from tests.gpu.missing import missing
from tests.harness import run_ranks
from tests.limits import limit_s
from tests.runs.job import ROOT
from tools.bench import gpu as bench
from tools.bench.gpu import ABOUT, VOCAB, bench_gpu, case_config, case_vocabulary, cases
from tools.bench.gpu_report import BEGIN, END, build_report, checks_summary, gpu_facts, judge_goals, label, write_report

WHERE = {
    "commit": "0123456789",
    "uncommitted_changes": True,
    "device": "H200",
    "gpus": ["NVIDIA H200, 580.1, 143771 MiB"],
    "cuda": "13.0",
}
WHERE |= {"cudnn": 91900, "packages": {"torch": "2.11.0", "transformer-engine": None}}
NUMBERS = {
    "peak_memory_bytes": 2**34,
    "mfu": 0.56,
    "optimizer_share_at_reference_batch": 0.021,
    "attention": "te",
    "chosen": [],
}
LOG = "....s\nSKIPPED [1] x: 3 passed in words\n2 failed, 40 passed, 11 skipped in 100.1s\nand a line more"


def measured(name: str, rate: float, depth: int = 24, **more) -> dict:
    return {"case": {"linears": name, "attention": "auto", "depth": depth}, "tokens_per_sec": rate} | NUMBERS | more


def test_every_case_is_a_run_that_fits():
    named = cases("clone")
    assert len({label(case) for case in named}) == len(named)
    for case in named:
        if "recipe" in case:
            plan = resolve_plan(case_config(case), 1, case_vocabulary(case))
            assert plan.accumulation == 2 and plan.dims.depth == case["depth"] and case["attention"] == "auto"
        elif "path" not in case and case["linears"] != "attention":
            plan = resolve_plan(case_config(case), 1, VOCAB)
            assert plan.tokens_per_step == (2**14 if "micro_rows" in case else 2**16)
    assert {case["linears"] for case in named} - {case["linears"] for case in cases(None)} == {
        "nanochat",
        "nanochat fp8",
    }


def test_the_recipes_of_the_speedrun_are_among_the_cases_beside_nanochats():
    recipes = {label(case): case for case in cases("clone") if "recipe" in case}
    assert list(recipes) == [
        "d24, recipe, attention auto, recipe speedrun_run6",
        "d22, recipe, attention auto, recipe speedrun_public",
        "d22, recipe, attention auto, recipe speedrun",
        "d22, nanochat fp8, attention auto, recipe speedrun_public, micro_rows 16",
    ]
    config = case_config(recipes["d22, recipe, attention auto, recipe speedrun"])
    assert (config.batch.micro_rows, config.precision.fp8, bool(config.ngram.blocks)) == (32, "tensorwise", True)
    theirs = next(case for name, case in recipes.items() if "nanochat" in name)
    assert case_config(theirs).batch.micro_rows == 16 and case_vocabulary(theirs) == 49152
    assert case_vocabulary(recipes["d24, recipe, attention auto, recipe speedrun_run6"]) == VOCAB
    entry = {"case": theirs, "tokens_per_sec": 1.0} | NUMBERS
    assert "| d22, recipe speedrun_public, micro_rows 16 | nanochat fp8 |" in build_report([entry], WHERE, ABOUT, LOG)


def test_the_tables_stand_between_the_markers_and_the_numbers_beside_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    layers = {"te": {"S": 0.0012, "L": 0.0034}, "flex": {"problem": "a | b"}}
    results = [
        measured("torch compiled", 100_000.0),
        measured("te tensorwise", 120_000.0),
        {"case": {"linears": "attention", "attention": "auto", "depth": 24}, "layers": layers, "rows": 16},
        {"case": {"linears": "te blockwise", "attention": "auto", "depth": 24}, "failed": "RuntimeError: no"},
        {
            "case": {"linears": "torch compiled", "attention": "sdpa", "depth": 24, "pattern": "L"},
            "left_out": "no time was left",
        },
    ]
    write_report(page, build_report(results, WHERE, ABOUT, LOG), {"found": results})
    text = page.read_text()
    assert text.startswith(
        f"before\n{BEGIN}\nCommit 0123456 with changes, NVIDIA H200, 580.1, 143771 MiB; CUDA 13.0, cuDNN 91900, "
        "torch 2.11.0. bf"
    )
    assert text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "| d24 | te tensorwise | te | 120,000 | 1.20 | 56.0% | 16.0 GiB | 2.1% |" in text
    assert (
        "| d24 | te blockwise | auto | RuntimeError: no | | | | |".replace("| |", "|  |").replace("| |", "|  |") in text
    )
    assert "| d24, pattern L | torch compiled | sdpa | no time was left |" in text
    assert "| te | 1.20 ms | 3.40 ms |" in text and "| flex | a / b |  |" in text
    assert "Checks of tests/gpu: 2 failed, 40 passed, 11 skipped." in text
    assert json.loads((tmp_path / "page_gpu.json").read_text()) == {"found": results}
    page.write_text("no markers")
    with pytest.raises(UserError, match="lacks the lines"):
        write_report(page, "", {})


def test_what_was_to_be_reached_is_judged():
    def judgments(results):
        return [(value, reached) for _, value, reached in judge_goals(results)]

    assert judgments([]) == [("not measured", "unknown")] * 6
    theirs = measured("nanochat", 90_000.0, peak_memory_bytes=2**34 * 2, attention="sdpa")
    results = [
        measured("torch compiled", 100_000.0),
        measured("torch tensorwise", 120_000.0),
        theirs,
        measured("te tensorwise", 90_000.0),
    ]
    results += [measured("torch compiled", 400_000.0, 12), measured("te tensorwise", 300_000.0, 12)]
    rates = [
        ("56.0%", "yes"),
        ("1.11 times; its attention was sdpa", "yes"),
        ("1.20 times", "yes"),
        ("0.75 times", "unknown"),
    ]
    assert judgments(results) == [*rates, ("0.50", "yes"), ("2.1%", "yes")]
    worse = {"mfu": 0.5, "peak_memory_bytes": 2**34 * 2, "optimizer_share_at_reference_batch": 0.04}
    results[:2] = [measured("torch compiled", 98_000.0, **worse), measured("torch tensorwise", 100_000.0)]
    assert [reached for _, reached in judgments(results)] == ["no", "no", "no", "unknown", "no", "no"]
    results[0]["case"]["pattern"] = "L"  # another model
    assert judgments(results)[0] == ("not measured", "unknown")
    assert checks_summary(LOG) == "2 failed, 40 passed, 11 skipped" and checks_summary("..") == "not finished"


def test_a_case_is_measured_in_a_process_and_what_fails_says_why(monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    monkeypatch.setattr(bench, "__file__", str(program))
    program.write_text(
        "import json, sys; print('noise'); depth = json.loads(sys.argv[1])['depth'];"
        "print(json.dumps({'depth': depth, 'mfu': 1, 'tokens_per_sec': 2}))"
    )
    assert bench.measure_all(cases(None)[:1], 1)[0] == {
        "case": cases(None)[0],
        "depth": 24,
        "mfu": 1,
        "tokens_per_sec": 2,
    }
    program.write_text(
        "import sys; print('torch.OutOfMemoryError: all is full', file=sys.stderr);"
        "print('[rank0] ended', file=sys.stderr); sys.exit(1)"
    )
    assert bench.measure_all(cases(None)[:1], 1)[0]["failed"] == "torch.OutOfMemoryError: all is full"
    program.write_text("import time; time.sleep(60)")
    counts: list[int] = []
    results = bench.measure_all(cases(None)[:2], 0.005, lambda so_far: counts.append(len(so_far)))
    assert [entry["left_out"] for entry in results] == ["no time was left"] * 2 and counts == [1, 2]


def measured_small() -> dict:
    bench.VOCAB, bench.SEQUENCE, bench.WARM_UP, bench.TIMED, bench.BATCH = 256, 64, 1, 2, {2: (1, 2)}
    bench.LINEARS["torch tensorwise"]["compile"] = False
    return bench.measure({"linears": "torch tensorwise", "attention": "auto", "depth": 2})


@pytest.mark.slow
def test_the_steps_of_a_case_are_measured():
    """On the CPU, of a small model: every part of a case but the GPU."""
    (result,) = run_ranks(measured_small, 1)
    assert (
        len(result["step_s"]) == 2
        and len(result["optimizer_s"]) == 3
        and 0 < result["optimizer_share_at_reference_batch"] < 1
    )
    assert (
        result["attention"] == "sdpa"
        and result["mfu"] is None
        and any("fp8 tensorwise by torch" in line for line in result["chosen"])
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="this machine has no CUDA device"):
        bench_gpu(argparse.Namespace())
    facts = gpu_facts()
    assert facts["gpus"] is None and facts["packages"]["torch"] and facts["packages"]["flash-attn-4"] is None

    def said(*arguments):
        done = subprocess.run(
            ["bash", "tests/run_gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=limit_s()
        )
        assert done.returncode == 2 and not done.stdout
        return done.stderr

    assert (
        said() == "error: this machine has no NVIDIA GPU, which these tests are for: "
        "run them on one, or bash tests/run.sh here\n"
    )
    assert "--minutes 1.5 is no whole number" in said("--minutes", "1.5") and "unknown option --fast" in said(
        "--fast", "1"
    )
    assert "--part both is neither checks nor performance" in said("--part", "both")
    assert "--wheels nowhere is no folder" in said("--wheels", "nowhere")


def test_what_has_to_be_installed():
    assert missing() == []
    everything = missing(lambda module: False)
    assert "deepspeed==0.19.8" in everything and "hjson" in everything and len(everything) > 15
    assert missing(lambda module: module != "hjson") == ["hjson"]
