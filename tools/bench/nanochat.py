"""Measures nanochat's own model and optimizer, imported from a clone. Nothing in megachat needs nanochat.

Sides take their steps in turn: nanochat with each number of rows per pass, and megachat with each dtype, compiled and
not, on one process and in a layout.
"""

import argparse
import contextlib
import functools
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from megachat.activity import log_line
from megachat.config import load_config
from megachat.device import choose_compute_dtype, dtype_name
from megachat.errors import UserError
from megachat.optim.matrix import Matrix
from megachat.planning.dimensions import scaling_parameters
from megachat.planning.layouts import parse_layout
from megachat.planning.plan import Plan, resolve_plan
from tools.bench.turns import compare_rates

# The part of a step that begins with a note of megachat's schedule; other notes begin no part
PARTS = {
    "loading a micro-batch": "forward",
    "forward": "forward",
    "backward": "backward",
    "reducing AdamW's gradients": "optimizer",
    "optimizer step": "optimizer",
}
Parts = dict[str, list[dict[str, float]]]  # by side, for each round: the seconds of each part of a step
_PEAK_SIDE, _PEAK_PRODUCTS = 1024, 4  # matrix products that measure the peak: their sides, and how many in a round
_EXPECTED_SHARE = 0.5  # of the peak that a step is expected to reach, to choose its tokens
_STEPS_SHARE = 0.6  # of the time limit that steps may take; building and compiling take the rest


def require_clone(folder: str | None) -> None:
    """Raises UserError if `folder` is not a clone of nanochat."""
    if not folder:
        raise UserError("this measurement requires a clone of nanochat, but --nanochat is not given: give its folder")
    if not (Path(folder) / "nanochat" / "gpt.py").is_file():
        raise UserError(
            f"--nanochat {folder} is not a clone of nanochat: it has no nanochat/gpt.py; give a clone's folder"
        )


def open_nanochat(clone: str | None) -> tuple[ModuleType, ModuleType]:
    """Returns nanochat's modules gpt and flash_attention. Raises UserError without a clone or a required package."""
    require_clone(clone)
    if clone not in sys.path:
        sys.path.insert(0, clone)
    try:
        return importlib.import_module("nanochat.gpt"), importlib.import_module("nanochat.flash_attention")
    except ImportError as error:
        raise UserError(
            f"nanochat in {clone} cannot be imported ({error}): install the packages in its pyproject.toml"
        ) from error


def build_nanochat(clone: str, plan: Plan, pattern: str, device: torch.device, *, fp8: bool = False):
    """Returns nanochat's GPT of the plan's shapes, its compiled form and optimizer, as scripts/base_train.py does."""
    gpt, _ = open_nanochat(clone)
    dims = plan.dims
    sizes = {"n_layer": dims.depth, "n_head": dims.heads, "n_kv_head": dims.kv_heads, "n_embd": dims.width}
    sizes |= {"sequence_len": dims.sequence_len, "vocab_size": dims.vocab_size}
    with torch.device("meta"), contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
        model = gpt.GPT(gpt.GPTConfig(window_pattern=pattern, **sizes))
    model.to_empty(device=device)
    model.init_weights()
    if fp8:
        from nanochat.fp8 import Float8LinearConfig, convert_to_float8_training

        def fits(module, name) -> bool:
            sides = (getattr(module, "in_features", 0), getattr(module, "out_features", 0))
            return isinstance(module, torch.nn.Linear) and min(sides) >= 128 and not any(side % 16 for side in sides)

        convert_to_float8_training(
            model, config=Float8LinearConfig.from_recipe_name("tensorwise"), module_filter_fn=fits
        )
    with contextlib.redirect_stdout(sys.stderr):
        optimizer = model.setup_optimizer()
    return model, torch.compile(model, dynamic=False), optimizer


def seconds_now() -> float:
    """Returns the clock of all measurements here: processor time with one thread, which other work on the machine
    disturbs less, else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class PartClock:
    """Divides the time of a step among its parts: each moment belongs to the part that was entered last."""

    def __init__(self, clock: Callable[[], float] = seconds_now):
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Begins a step with its forward pass."""
        self.seconds = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        self._part, self._since = "forward", self._clock()

    def enter(self, part: str) -> None:
        """Ends the current part and begins another."""
        now = self._clock()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def set(self, seconds: dict[str, float]) -> None:
        """Replaces the parts of the current step by those that another process measured."""
        self.seconds, self._since = seconds, self._clock()

    def note(self, text: str, *, waits: bool = False) -> None:
        """Takes the place of the note of megachat's progress recorder."""
        if text in PARTS:
            self.enter(PARTS[text])


def accumulate(
    run, rows: torch.Tensor, micro_rows: int, device: torch.device, enter: Callable[[str], object] = lambda part: None
) -> torch.Tensor:
    """Runs the passes of a step's rows, int64 [count, tokens + 1], `micro_rows` at a time. Returns the last loss.

    enter: called with "forward" and "backward" before each of these passes.
    """
    parts = rows.split(micro_rows)
    for part in parts:
        enter("forward")
        part = part.to(device)
        loss = run(part[:, :-1].contiguous(), part[:, 1:].contiguous())
        enter("backward")
        (loss / len(parts)).backward()
    return loss.detach()


def row_counts(text: str, rows_per_step: int) -> list[int]:
    """Parses --nanochat-rows. Raises UserError for numbers that do not divide the rows of a step."""
    counts = [int(word) if word.isdigit() else 0 for word in text.split()]
    if not counts or any(count < 1 or rows_per_step % count for count in counts):
        raise UserError(f"--nanochat-rows {text!r} must be divisors of the {rows_per_step} rows of a step, as '1 2 4'")
    return counts


def nanochat_steps(
    clone: str, counts: list[int], plan: Plan, pattern: str, clock: PartClock
) -> tuple[dict[str, Callable], int]:
    """Returns {side: function that takes a step} for each number of rows per pass, and the FLOPs of Muon's products."""
    from megachat.programs.probe_step import random_rows  # imports DeepSpeed, which tools/bench/gpu.py must not

    device, rows = torch.device("cpu"), random_rows(plan)
    model, run, optimizer = build_nanochat(clone, plan, pattern, device)

    def step(count: int) -> None:
        accumulate(run, rows, count, device, clock.enter).item()
        clock.enter("optimizer")
        optimizer.step()
        model.zero_grad(set_to_none=True)

    muon = [group["params"] for group in optimizer.param_groups if group["kind"] == "muon"]
    flops = sum(Matrix("", tuple(parameter.shape), 0).flops for parameters in muon for parameter in parameters)
    return {f"nanochat, {count} rows at a time": functools.partial(step, count) for count in counts}, flops


def products_per_sec(dtype: torch.dtype) -> float:
    """Returns the FLOPs per second of the fastest of some products of large square matrices."""
    left, right = (torch.randn(_PEAK_SIDE, _PEAK_SIDE).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(_PEAK_PRODUCTS):
        begin = seconds_now()
        torch.mm(left, right)
        seconds.append(seconds_now() - begin)
    return 2 * _PEAK_SIDE**3 / min(seconds)


def tokens_that_fit(plan: Plan, seconds: float, flops_per_sec: list[float]) -> int:
    """Returns the plan's tokens per step, or these divided by a power of two, at least one micro-batch.

    One step at each of the peak rates is expected to take at most `seconds` together.
    """
    tokens, least = plan.tokens_per_step, plan.micro_rows * plan.dims.sequence_len
    per_token = sum(plan.flops_per_token / (_EXPECTED_SHARE * rate) for rate in flops_per_sec)
    while tokens % (2 * least) == 0 and tokens * per_token > seconds:
        tokens //= 2
    return tokens


def tokens_within(arguments: argparse.Namespace, plan: Plan, dtypes: list[torch.dtype]) -> int:
    """Returns the tokens of a step with which a step per dtype in each round is expected to end within the time
    limit."""
    seconds = 60 * (arguments.minutes or 10) * _STEPS_SHARE / (arguments.rounds + 1)
    peaks = {dtype: products_per_sec(dtype) for dtype in dtypes}
    tokens = tokens_that_fit(plan, seconds, [peaks[dtype] for dtype in dtypes])
    if tokens < plan.tokens_per_step:
        log_line(f"steps of {tokens} tokens instead of {plan.tokens_per_step}, to end within the time limit")
    return tokens


def time_parts(
    actions: dict[str, Callable], rounds: int, end: float, clock: PartClock, peaks: dict[torch.dtype, float]
) -> Parts:
    """Runs a step of each side in turn, and raises `peaks` to the fastest products between the rounds.

    The first round compiles and warms up; it is not counted. end: time.monotonic() when the last round should have
    ended; one is counted in any case.
    """
    parts: Parts = {name: [] for name in actions}
    for number in range(rounds + 1):
        begin = time.monotonic()
        for name, action in actions.items():
            clock.restart()
            action()
            clock.enter("forward")
            if number:
                parts[name].append(clock.seconds)
            else:
                log_line(f"{name}: first step took {sum(clock.seconds.values()):.1f} s")
        for dtype in peaks:
            peaks[dtype] = max(peaks[dtype], products_per_sec(dtype))
        took = time.monotonic() - begin
        left = end - time.monotonic()
        if number:
            left = min(left, (rounds - number) * took)
            each = "; ".join(f"{name} {1e3 * sum(times[-1].values()):.0f} ms" for name, times in parts.items())
            log_line(f"round {number} of {rounds}: {each}; at most {max(0, left):.0f} s left")
            if took > end - time.monotonic():
                break
    return parts


def megachat_sides(arguments: argparse.Namespace, computes_in: torch.dtype) -> dict[str, torch.dtype]:
    """Returns {side: dtype}: first nanochat's dtype, then the config's if it chooses another."""
    requested = load_config(arguments.config, arguments.set).precision.compute
    chosen, _ = choose_compute_dtype(requested, torch.device("cpu"))
    return {
        f"megachat, {dtype_name(dtype)}{compiled}": dtype
        for dtype in dict.fromkeys((computes_in, chosen))
        for compiled in (", compiled", "")
    }


def plan_side(arguments: argparse.Namespace, changes: list[str], sizes: dict[str, int] | None = None):
    """Returns the config with the changes of a side and its plan. sizes: of its layout, one process by default."""
    sizes = sizes or parse_layout("dp=1")
    axes = [f"parallel.{axis}={sizes[axis]}" for axis in ("tensor", "pipeline")]
    config = load_config(arguments.config, [*arguments.set, *axes, *changes])
    return config, resolve_plan(config, math.prod(sizes.values()), config.model.vocab_size or arguments.vocab_size)


def side_settings(dtypes: dict[str, torch.dtype], tokens: int) -> dict[str, list[str]]:
    """Returns the settings of each of megachat_sides. tokens: per step."""
    return {
        side: [
            f"precision.compute={dtype_name(dtype)}",
            f"precision.compile={str('compiled' in side).lower()}",
            f"batch.tokens={tokens}",
        ]
        for side, dtype in dtypes.items()
    }


def bench_nanochat(arguments: argparse.Namespace) -> dict:
    """Measures tokens per second of whole training steps on this CPU, of megachat and of nanochat at the same shapes.

    First both compute in nanochat's dtype: float32 on a CPU, or the one in NANOCHAT_DTYPE. If the config chooses
    another, megachat also computes in that. nanochat is compiled, as its script does; megachat both ways. With
    --layout, megachat also runs on as many ranks with one thread each; nanochat has one process on a CPU. Steps have
    fewer tokens than the config's if the time limit is too short for them.
    """
    from tools.bench.rank_steps import waiting_ranks  # this and the next import DeepSpeed
    from tools.bench.step import build_steps

    sizes = parse_layout(arguments.layout)
    ranks = math.prod(sizes.values())
    clock = PartClock(seconds_now if ranks == 1 else time.perf_counter)
    end = time.monotonic() + 60 * (arguments.minutes or 10)
    computes_in: torch.dtype = open_nanochat(arguments.nanochat)[0].COMPUTE_DTYPE
    dtypes = megachat_sides(arguments, computes_in)
    config, plan = plan_side(arguments, [])
    counts = row_counts(arguments.nanochat_rows or str(plan.micro_rows), plan.rows_per_step)
    tokens = tokens_within(arguments, plan, [computes_in] * len(counts) + list(dtypes.values()) * min(2, ranks))
    settings = side_settings(dtypes, tokens)
    in_layout = {f"{side}, {arguments.layout}": settings[side] for side in dtypes if ranks > 1}
    dtypes |= {f"{side}, {arguments.layout}": dtype for side, dtype in dtypes.items()}
    # what does not fit is refused before anything is built
    sides = {side: plan_side(arguments, changes) for side, changes in settings.items()}
    for changes in in_layout.values():
        plan_side(arguments, changes, sizes)
    _, plan = next(iter(sides.values()))
    counts = row_counts(" ".join(map(str, counts)), plan.rows_per_step)  # of a step that may have become shorter
    actions, muon_flops = nanochat_steps(arguments.nanochat, counts, plan, config.model.window_pattern, clock)
    dtypes |= dict.fromkeys(actions, computes_in)
    peaks = dict.fromkeys(dtypes.values(), 0.0)  # each round raises them
    actions |= build_steps(sides, note=clock.note)
    with waiting_ranks(arguments, in_layout, clock) as actions_in_layout:
        parts = time_parts(actions | actions_in_layout, arguments.rounds, end, clock, peaks)
    facts = {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "nanochat_computes_in": str(computes_in),
        "rows_at_a_time": plan.micro_rows,
        "tokens_per_step": plan.tokens_per_step,
    }
    return {"what": "training step, tokens per second"} | facts | summarize(parts, plan, dtypes, peaks, muon_flops)


def summarize(
    parts: Parts, plan: Plan, dtypes: dict[str, torch.dtype], peaks: dict[torch.dtype, float], muon_flops: int
) -> dict:
    """Returns each side's tokens per second, median milliseconds by part, and share of the products' peak.

    The share is the time that the products of linear layers, head and Muon would take at the peak, over the step's.
    The loss and the backward pass of lm_head belong to megachat's forward pass.
    """
    seconds = {side: [sum(one.values()) for one in rounds] for side, rounds in parts.items()}
    best = min(
        (side for side in parts if side.startswith("nanochat")), key=lambda side: statistics.median(seconds[side])
    )
    result = {"baseline": best, "products_gflops_per_sec": {str(dtype): rate / 1e9 for dtype, rate in peaks.items()}}
    for side, rates in compare_rates(seconds, best, plan.tokens_per_step).items():
        medians = {part: 1e3 * statistics.median(one[part] for one in parts[side]) for part in parts[side][0]}
        flops = 6 * scaling_parameters(plan.dims) * plan.tokens_per_step + muon_flops
        share = flops / peaks[dtypes[side]] / statistics.median(seconds[side])
        result[side] = rates | {
            "ms": {part: round(ms, 1) for part, ms in medians.items()},
            "share_of_peak": round(share, 3),
        }
    return result
