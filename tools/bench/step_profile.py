"""Measures where the time of a training step goes, on random rows. With several ranks, the first rank's time is shown.

On a CPU, a moment belongs to the innermost part that the training thread is in. On a GPU, it belongs to the part that
launched the running kernel. The rest is the host gap, so that the parts add up to the step.
"""

import bisect
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import OPTIMIZER_ALLGATHER_TIMER  # noqa: E402
from deepspeed.utils.timer import NoopTimer  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from megachat.config import load_config  # noqa: E402
from megachat.device import dtype_name  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.files import write_atomically  # noqa: E402
from megachat.job.join import end_collectives, start_mesh  # noqa: E402
from megachat.job.launch import bootstrap_environment, choose_device  # noqa: E402
from megachat.job.local_ranks import (  # noqa: E402
    rank_parser,
    require_ranks,
    run_with_torchrun,
    set_options,
)
from megachat.kernels.choice import describe_kernels  # noqa: E402
from megachat.parallel.progress import PROFILE_PREFIX, profile_range  # noqa: E402
from megachat.planning.layouts import parse_layout  # noqa: E402
from megachat.planning.plan import resolve_plan  # noqa: E402
from megachat.train.build import Run, build_training_model  # noqa: E402
from megachat.train.step import train_step  # noqa: E402
from tools.bench.profile_picture import draw_profile  # noqa: E402

STEP, WARM_UP, SHOWN = "training step", 2, 15
GAP, OTHER = "host gap", "other"
PARTS = {
    "forward": "forward pass and loss, with the backward pass of lm_head",
    "backward": "backward pass, including recomputation",
    "reduce": "gradients between ranks: launched, waited for, averaged",
    "norm": "the gradient norm and its collective",
    "optimizer": "Muon, AdamW, and what Muon sends between ranks",
    "gather": "new weights to all ranks: launched, waited for",
    "stages": "activations and gradients between pipeline stages",
    "data": "rows, and their way to the device",
    OTHER: "kernels launched outside all parts",
    GAP: "the rest: time in no part (CPU), or without a running kernel (GPU)",
}
_LAUNCHES, _KERNELS = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")


class Segment(NamedTuple):
    """A span in microseconds of the trace's clock, and its part."""

    begin: float
    end: float
    part: str


def innermost_parts(ranges: list[Segment], begin: float, end: float) -> list[Segment]:
    """Covers begin to end: each moment has the innermost of the nested ranges, or GAP."""
    segments: list[Segment] = []
    stack, now = [(end, GAP)], begin

    def until(moment: float) -> None:
        nonlocal now
        if moment > now:
            segments.append(Segment(now, moment, stack[-1][1]))
            now = moment

    for range_begin, range_end, name in sorted(ranges, key=lambda one: (one.begin, -one.end)):
        low, high = max(range_begin, begin), min(range_end, end)
        if low >= high:
            continue
        while stack[-1][0] <= low:
            until(stack[-1][0])
            stack.pop()
        until(low)
        stack.append((min(high, stack[-1][0]), name))
    while stack:
        until(stack[-1][0])
        stack.pop()
    return segments


def running_kernels(kernels: list[Segment], begin: float, end: float) -> list[Segment]:
    """Covers begin to end: each moment has the running kernel that began first, or GAP."""
    segments: list[Segment] = []
    now = begin
    for low, high, name in sorted(kernels):
        low, high = max(low, now), min(high, end)
        if low >= high:
            continue
        segments += [Segment(now, low, GAP)] if low > now else []
        segments.append(Segment(low, high, name))
        now = high
    return segments + ([Segment(now, end, GAP)] if end > now else [])


def segments_of_steps(events: list[dict]) -> list[list[Segment]]:
    """Returns the segments of each step. events: "traceEvents" of a torch.profiler trace."""
    complete = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in complete if event.get("cat") == "user_annotation"]
    launched_by = {
        event["args"]["correlation"]: event
        for event in complete
        if event.get("cat") in _LAUNCHES and "correlation" in event["args"]
    }
    kernels = [event for event in complete if event.get("cat") in _KERNELS]
    steps = []
    for step in sorted((mark for mark in marks if mark["name"] == STEP), key=lambda mark: mark["ts"]):
        begin, end, threads = step["ts"], step["ts"] + step["dur"], {}
        for mark in marks:
            if mark["name"].startswith(PROFILE_PREFIX):
                threads.setdefault(mark["tid"], []).append(
                    Segment(mark["ts"], mark["ts"] + mark["dur"], mark["name"].removeprefix(PROFILE_PREFIX))
                )
        by_thread = {thread: innermost_parts(ranges, begin, end) for thread, ranges in threads.items()}
        main = by_thread.get(step["tid"], [Segment(begin, end, GAP)])
        if not kernels:
            steps.append(main)
            continue
        attributed = []
        for kernel in kernels:
            launch = launched_by.get(kernel["args"].get("correlation"))
            # the backward pass of a GPU launches from autograd's threads, where not every part has a mark
            part = _part_at(by_thread.get(launch["tid"], []), launch["ts"]) if launch else GAP
            if launch and part == GAP:
                part = _part_at(main, launch["ts"])
            attributed.append(Segment(kernel["ts"], kernel["ts"] + kernel["dur"], OTHER if part == GAP else part))
        steps.append(running_kernels(attributed, begin, end))
    return steps


def _part_at(segments: list[Segment], moment: float) -> str:
    index = bisect.bisect_right(segments, moment, key=lambda segment: segment.begin) - 1
    return segments[index].part if index >= 0 and moment <= segments[index].end else GAP


class _Timers(NoopTimer):
    """Marks ZeRO's gather of the weights through DeepSpeed's timers, because no separate function does the gather."""

    class _Gather(NoopTimer.Timer):
        def start(self):
            self.mark = profile_range("gather")
            self.mark.__enter__()

        def stop(self, **settings):
            self.mark.__exit__(None, None, None)

    def __init__(self):
        super().__init__()
        self._gather = self._Gather()

    def __call__(self, name):
        return self._gather if name == OPTIMIZER_ALLGATHER_TIMER else super().__call__(name)


def operators(profiled: profile, steps: int, step_us: float) -> list[dict]:
    """Returns the operators with the most self time, on the GPU if there is one, else on the CPU."""
    times = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    entries = [
        entry
        for entry in profiled.key_averages()
        if entry.device_type == DeviceType.CPU and not entry.key.startswith((PROFILE_PREFIX, STEP))
    ]
    entries = sorted(entries, key=lambda entry: -getattr(entry, times))[:SHOWN]
    return [
        {
            "name": entry.key,
            "ms": getattr(entry, times) / steps / 1000,
            "share": getattr(entry, times) / steps / step_us,
            "calls": entry.count / steps,
        }
        for entry in entries
    ]


def measure(config_path: str, settings: list[str], vocab_size: int, rounds: int, out: str | None) -> dict:
    """Profiles `rounds` steps and returns this rank's result; rank 0 draws the picture `out`. All ranks call it."""
    device = choose_device(bootstrap_environment())
    config = load_config(config_path, settings)
    mesh = start_mesh(config, device)
    plan = resolve_plan(config, mesh.world.size, config.model.vocab_size or vocab_size)
    training = build_training_model(config, plan, mesh, torch.ones(plan.dims.vocab_size, dtype=torch.int64))
    generator = torch.Generator().manual_seed(mesh.data.rank)
    rows = torch.randint(
        0, plan.dims.vocab_size, (plan.micro_rows * plan.accumulation, plan.dims.sequence_len + 1), generator=generator
    )
    run = Run(**vars(training), folder=Path(), tokenizer=None, loader=itertools.repeat(rows), bundle=None)
    run.engine.adamw.timers = _Timers()
    plain = [train_step(run, 0).seconds for _ in range(WARM_UP + rounds)][WARM_UP:]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        for _ in range(rounds):
            with record_function(STEP):
                train_step(run, 0)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        steps = segments_of_steps(json.loads(trace.read_text())["traceEvents"])
    durations = [step[-1].end - step[0].begin for step in steps]
    step_us = statistics.mean(durations)
    parts = {
        name: sum(one.end - one.begin for step in steps for one in step if one.part == name) / rounds for name in PARTS
    }
    facts = {
        "depth": plan.dims.depth,
        "width": plan.dims.width,
        "rows_of": plan.dims.sequence_len,
        "micro_rows": plan.micro_rows,
    }
    facts |= {
        "micro_batches": plan.accumulation,
        "compute": dtype_name(run.compute_dtype),
        "steps": rounds,
    }
    facts |= {
        "ranks": {"data": mesh.data.size, "tensor": mesh.tensor.size, "pipeline": mesh.pipeline.size},
        "rank": mesh.world.rank,
    }
    facts |= {"threads": torch.get_num_threads(), "chosen": describe_kernels(config, run.kernels, plan)}
    result = {"facts": facts, "step_ms": step_us / 1000, "step_ms_without_profiler": 1000 * statistics.median(plain)}
    result["parts"] = {name: {"ms": us / 1000, "share": us / step_us} for name, us in parts.items()}
    result["operators"] = operators(profiled, rounds, step_us)
    if out and mesh.world.rank == 0:
        middle = steps[durations.index(sorted(durations)[len(durations) // 2])]
        title = f"A training step: depth {plan.dims.depth}, {plan.rows_per_step} rows of {plan.dims.sequence_len}"
        title += f", {facts['compute']}"
        write_atomically(Path(out), draw_profile(title, result["parts"], middle).encode())
        result["picture"] = out
    return result


def profile_table(result: dict) -> str:
    """Returns the result as text. Parts without time are left out."""
    lines = [f"{'part':<12}{'ms':>10}{'share':>8}"]
    for name, part in result["parts"].items():
        if part["ms"]:
            lines.append(f"{name:<12}{part['ms']:>10.1f}{part['share']:>8.1%}  {PARTS[name]}")
    plain = result["step_ms_without_profiler"]
    lines += [
        f"{'step':<12}{result['step_ms']:>10.1f}{1:>8.1%}  without the profiler {plain:.1f} ms",
        "",
        f"{'operator, self time':<44}{'ms':>10}",
    ]
    lines[-1] += f"{'share':>8}{'calls':>8}"
    for one in result["operators"]:
        lines.append(f"{one['name'][:42]:<44}{one['ms']:>10.1f}{one['share']:>8.1%}{one['calls']:>8.0f}")
    return "\n".join(lines)


def bench_profile(arguments) -> dict:
    """Measures the parts of a training step and its longest operators, in milliseconds. Draws a picture with --out."""
    if arguments.out and not Path(arguments.out).resolve().parent.is_dir():
        raise UserError(f"the folder of --out {arguments.out} does not exist: create it first")
    sizes = parse_layout(arguments.layout)
    settings = (
        [*arguments.set, f"parallel.tensor={sizes['tensor']}", f"parallel.pipeline={sizes['pipeline']}"]
        if arguments.layout != "dp=1"
        else arguments.set
    )
    ranks = sizes["data"] * sizes["tensor"] * sizes["pipeline"]
    if ranks == 1:
        result = measure(arguments.config, settings, arguments.vocab_size, arguments.rounds, arguments.out)
    else:
        program = [
            __file__,
            "--config",
            arguments.config,
            "--vocab-size",
            str(arguments.vocab_size),
            "--rounds",
            str(arguments.rounds),
        ]
        program += [*(["--out", arguments.out] if arguments.out else []), *set_options(settings)]
        result = json.loads(run_with_torchrun("the ranks", ranks, program).strip().splitlines()[-1])
    print(profile_table(result), file=sys.stderr)
    return {"what": "milliseconds of a training step, by parts"} | result


@user_errors_end_the_program
def main() -> None:
    parser = rank_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--out")
    arguments = parser.parse_args()
    result = measure(arguments.config, arguments.set, arguments.vocab_size, arguments.rounds, arguments.out)
    if result["facts"]["rank"] == 0:
        print(json.dumps(result), flush=True)
    end_collectives()


if __name__ == "__main__":
    require_ranks("profile")
    main()
