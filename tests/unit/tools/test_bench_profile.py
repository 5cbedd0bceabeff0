"""The profile: every moment of a step has one part, on a CPU and, from made-up traces, on a GPU; the picture."""

import argparse
import json
from xml.etree import ElementTree

import pytest

from megachat.errors import UserError
from megachat.parallel.progress import PROFILE_PREFIX
from tests.harness import run_ranks
from tests.runs.forked import run_forked
from tools.bench.profile_picture import draw_profile, join_spans
from tools.bench.step_profile import (
    GAP,
    OTHER,
    PARTS,
    STEP,
    Segment,
    bench_profile,
    innermost_parts,
    measure,
    profile_table,
    running_kernels,
    segments_of_steps,
)

TINY = (
    "model.depth=2",
    "model.aspect_ratio=16",
    "model.head_size=16",
    "model.sequence_len=32",
    "batch.tokens=128",
    "batch.micro_rows=2",
)
SVG = "{http://www.w3.org/2000/svg}"


def covers(segments, begin, end):
    assert segments[0].begin == begin and segments[-1].end == end
    assert all(
        one.end == other.begin and one.begin < one.end for one, other in zip(segments, segments[1:], strict=False)
    )
    return segments


def test_each_moment_belongs_to_the_innermost_part():
    ranges = [
        Segment(10, 50, "a"),
        Segment(20, 30, "b"),
        Segment(30, 40, "c"),
        Segment(32, 34, "b"),
        Segment(60, 99, "d"),
        Segment(-9, 0, "e"),
    ]
    segments = covers(innermost_parts(ranges, 0, 80), 0, 80)
    expected = [
        (0, 10, GAP),
        (10, 20, "a"),
        (20, 30, "b"),
        (30, 32, "c"),
        (32, 34, "b"),
        (34, 40, "c"),
        (40, 50, "a"),
        (50, 60, GAP),
        (60, 80, "d"),
    ]
    assert segments == expected
    assert innermost_parts([], 1, 3) == [(1, 3, GAP)]
    assert innermost_parts([Segment(0, 5, "a"), Segment(0, 2, "b"), Segment(2, 5, "c")], 0, 5) == [
        (0, 2, "b"),
        (2, 5, "c"),
    ], "all of it is in others"


def test_each_moment_belongs_to_the_kernel_that_began_first():
    kernels = [Segment(5, 15, "a"), Segment(8, 12, "b"), Segment(14, 20, "c"), Segment(30, 45, "d")]
    assert covers(running_kernels(kernels, 0, 40), 0, 40) == [
        (0, 5, GAP),
        (5, 15, "a"),
        (15, 20, "c"),
        (20, 30, GAP),
        (30, 40, "d"),
    ]
    assert running_kernels([], 1, 3) == [(1, 3, GAP)]


def event(category, name, thread, begin, end, **arguments):
    return {"ph": "X", "cat": category, "name": name, "tid": thread, "ts": begin, "dur": end - begin, "args": arguments}


def test_kernels_have_the_part_that_launched_them():
    def mark(name, thread, begin, end):
        return event("user_annotation", name, thread, begin, end)

    trace = [
        mark(STEP, 1, 100, 200),
        mark(PROFILE_PREFIX + "forward", 1, 105, 110),
        mark(PROFILE_PREFIX + "backward", 1, 110, 150),
        mark(PROFILE_PREFIX + "reduce", 2, 120, 125),
    ]
    trace += [
        event("gpu_user_annotation", PROFILE_PREFIX + "forward", 7, 130, 190),
        {"ph": "M", "name": "process_name"},
    ]
    launches = {
        1: (1, 107, 140, 150),
        2: (2, 115, 150, 155),
        3: (2, 121, 155, 160),
        4: (1, 160, 170, 180),
    }  # the second and third by autograd's thread
    for number, (thread, at, begin, end) in launches.items():
        trace += [event("cuda_runtime", "cudaLaunchKernel", thread, at, at + 1, correlation=number)]
        trace += [event("kernel", "gemm", 7, begin, end, correlation=number)]
    trace += [
        event("gpu_memcpy", "Memcpy", 7, 185, 190, correlation=99),
        event("kernel", "of no step", 7, 300, 400, correlation=1),
    ]
    (step,) = segments_of_steps(trace)
    expected = [
        (100, 140, GAP),
        (140, 150, "forward"),
        (150, 155, "backward"),
        (155, 160, "reduce"),
        (160, 170, GAP),
        (170, 180, OTHER),
    ]
    assert covers(step, 100, 200) == [*expected, (180, 185, GAP), (185, 190, OTHER), (190, 200, GAP)]


def test_what_cannot_be_distinguished_is_drawn_as_one():
    assert join_spans([(0, 1), (1.1, 2), (5, 6), (6.29, 7), (8, 9)]) == [(0, 2), (5, 7), (8, 9)]
    parts = {name: {"ms": 0.0, "share": 0.0} for name in PARTS} | {
        "forward": {"ms": 4.0, "share": 0.5},
        GAP: {"ms": 4.0, "share": 0.5},
    }
    root = ElementTree.fromstring(draw_profile("a < b & c", parts, [(0.0, 4000.0, "forward"), (4000.0, 8000.0, GAP)]))
    assert [box.get("data-part") for box in root.iter(f"{SVG}rect") if box.get("class") == "part"] == ["forward", GAP]
    assert [box.get("data-part") for box in root.iter(f"{SVG}g")] == ["forward", GAP] and root.find(
        f"{SVG}text"
    ).text == "a < b & c"


def profiled(out: str) -> dict:
    return measure("configs/d2_cpu.json", [*TINY, "precision.compute=bfloat16"], 300, 2, out)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.slow
def test_the_parts_of_real_steps(ranks, tmp_path):
    out = tmp_path / "picture.svg"
    results = run_ranks(profiled, ranks, str(out))
    assert ["picture" in result for result in results] == [True, False][:ranks]
    for result in results:
        assert set(result["parts"]) == set(PARTS)
        busy = {name for name, part in result["parts"].items() if part["ms"] > 0}
        assert busy == set(PARTS) - {"stages", OTHER}
        assert sum(part["ms"] for part in result["parts"].values()) == pytest.approx(result["step_ms"], rel=1e-6)
        assert sum(part["share"] for part in result["parts"].values()) == pytest.approx(1, rel=1e-6)
        calls = {entry["name"]: entry["calls"] for entry in result["operators"]}
        assert "aten::mm" in calls and not any(name.startswith((PROFILE_PREFIX, STEP)) for name in calls)
        assert (
            result["facts"]["ranks"] == {"data": ranks, "tensor": 1, "pipeline": 1}
            and result["facts"]["compute"] == "bfloat16"
        )
        shown = profile_table(result)
        assert all((f"\n{name} " in shown) == (name in busy) for name in PARTS) and "aten::mm" in shown
    root = ElementTree.parse(out).getroot()
    legend = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "legend"]
    assert [text.rsplit(" ", 3)[0] for text in legend] == list(PARTS)
    bar = [box for box in root.iter(f"{SVG}rect") if box.get("class") == "part"]
    assert sum(float(box.get("width")) for box in bar) == pytest.approx(840, abs=0.1)


def test_words_of_the_command_line():
    with pytest.raises(UserError, match="--out nowhere/picture.svg does not exist"):
        bench_profile(argparse.Namespace(rounds=1, out="nowhere/picture.svg"))


@pytest.mark.slow
def test_a_layout_is_started_from_the_command_line():
    line = [
        "tools/bench.py",
        "--profile",
        "--config",
        "configs/d2_cpu.json",
        "--vocab-size",
        "300",
        "--rounds",
        "1",
    ]
    line += ["--layout", "pp=2", *(word for setting in TINY for word in ("--set", setting))]
    done = run_forked(line)
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert (
        result["bench"] == "profile"
        and result["facts"]["ranks"] == {"data": 1, "tensor": 1, "pipeline": 2}
        and result["parts"]["stages"]["ms"] > 0
    )
    assert "without the profiler" in done.err
