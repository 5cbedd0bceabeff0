"""What `megachat probe` does: measures the parts of a training step on this machine, with every number of ranks that is
requested, and one real step, and writes them for predictions (megachat/planning/probe.py).
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megachat.config import Config, load_config
from megachat.device import DTYPES, choose_compute_dtype, dtype_name, memory_bytes, seconds_of, this_device
from megachat.files import check_writable, write_json
from megachat.job.join import end_collectives, start_mesh
from megachat.job.launch import bootstrap_environment, choose_device, describe_environment
from megachat.job.local_ranks import run_local_ranks
from megachat.kernels.choice import choose_kernels
from megachat.kernels.cross_entropy import capped_cross_entropy
from megachat.kernels.fp8 import apply_fp8
from megachat.model.gpt import LOGIT_CAP, build_layers
from megachat.model.parameters import initialize
from megachat.optim.muon import orthogonalization_dtype, second_moment_shape, update_direction, update_scales
from megachat.planning.dimensions import MLP_RATIO, Dimensions, linear_shapes
from megachat.planning.plan import Plan, resolve_without_text
from megachat.planning.probe import PROBE_FORMAT, PROBE_VERSION, WIDTHS, Probe
from megachat.planning.step_work import ITEMSIZE, Gemm, block_work, head_work
from megachat.programs.probe_step import calibrate, measure_step
from megachat.programs.verify import vocabulary_without_text
from megachat.train.build import build_training_model
from megachat.train.compiled import apply_compile
from megachat.train.stage import model_options

ROWS = 1.0, 0.5, 2.0, 0.25  # factors on rows per micro-batch
COLLECTIVE_BYTES = 1 << 12, 1 << 16, 1 << 20, 1 << 23
SECTION_SEC = 8.0  # at most for each section of one number of ranks: what is measured first matters most
ACTION_SEC = 0.02  # for one shape, after its first call
REAL_STEPS = 6
MOST_MICRO_BATCHES = 4  # of the real step
STREAM_ELEMENTS = 1 << 24


class Clock:
    """Times actions on a device, and ends a section when its time is over."""

    def __init__(self, device: torch.device, section_sec: float):
        self.device, self._section_sec, self._end = device, section_sec, math.inf

    def section(self) -> None:
        """Begins a section."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        self._end = time.perf_counter() + self._section_sec

    @property
    def over(self) -> bool:
        """Whether the section's time is over. Ranks that communicate in a section must not ask."""
        return time.perf_counter() > self._end

    def seconds(self, action: Callable[[], object], most_sec: float = ACTION_SEC, repeats: int = 0) -> float:
        """Returns the least seconds of an action after its first call, of at least three calls or `repeats`: other
        processes only add time."""
        action()
        times: list[float] = []
        while len(times) < (repeats or 3) or (not repeats and sum(times) < most_sec):
            times.append(seconds_of(action, self.device))
        return min(times)


def probe_rank(config: Config, vocab_size: int, section_sec: float) -> dict[str, Any]:
    """Measures on this rank, while all ranks of the job do the same; returns a set of the probe's document."""
    device = choose_device(bootstrap_environment())
    mesh = start_mesh(config, device)
    plan = real_step_plan(config, vocab_size)
    dtype, _ = choose_compute_dtype(config.precision.compute, device)
    clock, ranks = Clock(device, section_sec), mesh.world.size
    attend = choose_kernels(config, plan, device).attention.attend
    measured: dict[str, Any] = {"ranks": ranks, "threads": torch.get_num_threads()}
    measured["products"] = _measure_products(clock, config, plan, dtype)
    measured["attention"] = _attention(clock, plan, dtype, attend)
    measured["streamed"] = _streamed(clock)
    measured["polar"] = _polar(clock, plan.dims, orthogonalization_dtype(dtype))
    measured |= {"moved": [[1.0, 0.0]], "logits": [[1.0, 0.0]], "collectives": {}}
    known = _speeds(measured)
    measured["moved"] = _blocks(clock, config, plan, dtype, known)
    known = _speeds(measured)
    measured["logits"] = _heads(clock, config, plan, dtype, known)
    if ranks > 1:
        measured["collectives"] = _collectives(clock, dtype)
    else:
        training = build_training_model(config, plan, mesh, torch.ones(vocab_size, dtype=torch.int64))
        measured["step"] = measure_step(training, REAL_STEPS)
    end_collectives()
    return measured


def real_step_plan(config: Config, vocab_size: int) -> Plan:
    """Returns the plan of the real step: one rank, micro-batches of the config's size, few of them."""
    plan = resolve_without_text(config, 1, vocab_size)
    count = min(MOST_MICRO_BATCHES, plan.accumulation)
    return dataclasses.replace(
        plan,
        accumulation=count,
        rows_per_step=count * plan.micro_rows,
        tokens_per_step=count * plan.micro_rows * plan.dims.sequence_len,
    )


def _speeds(measured: dict[str, Any]):
    document = {"machine": {"device": ""}, "sets": [measured], "factors": {}, "error": 0.0, "overlap": 0.0}
    return Probe(document).speeds(measured["ranks"])


def _random_input(clock: Clock, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=clock.device).to(dtype)


def _row_counts(plan: Plan) -> list[int]:
    return list(dict.fromkeys(max(1, round(factor * plan.micro_rows)) for factor in ROWS))


def _measure_products(clock: Clock, config: Config, plan: Plan, dtype: torch.dtype) -> list[list]:
    """Measures the products of the passes of linears, as [rows, columns, inner, dtype, seconds]."""
    shapes: dict[Gemm, None] = {}
    name = dtype_name(dtype)
    kinds = [name, *(["float8"] if config.precision.fp8 != "off" else [])]
    for factor in WIDTHS:
        for tensor in (1, 2) if factor == 1 else (1,):
            width = max(1, round(plan.dims.heads * factor)) * plan.dims.head_size
            weights = {(width // tensor, width), (width, width // tensor)}
            weights |= {(MLP_RATIO * width // tensor, width), (width, MLP_RATIO * width // tensor)}
            weights |= {*linear_shapes(plan.dims, tensor).values()} if factor == 1 else set()
            weights.add((plan.dims.padded_vocab // tensor, width))
            for rows in _row_counts(plan):
                tokens = rows * plan.dims.sequence_len
                for kind in kinds:
                    for out, into in sorted(weights):
                        for shape in ((tokens, out, into), (tokens, into, out), (out, into, tokens)):
                            shapes[Gemm(*shape, kind)] = None
    clock.section()
    results: list[list] = []
    for product in shapes:
        if results and clock.over:
            break
        results.append([*product[:4], clock.seconds(_product_action(clock, product))])
    return results


def _product_action(clock: Clock, product: Gemm) -> Callable[[], object]:
    rows, columns, inner, kind, _ = product
    if kind == "float8":
        left, right = (
            _random_input(clock, size, inner, dtype=torch.bfloat16).to(torch.float8_e4m3fn) for size in (rows, columns)
        )
        one = torch.ones((), device=clock.device)
        return lambda: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    dtype = DTYPES[kind]
    if inner > max(rows, columns):  # the gradient of a weight: both factors have the tokens as rows
        left, right = (_random_input(clock, inner, size, dtype=dtype) for size in (rows, columns))
        return lambda: torch.mm(left.t(), right)
    left, right = _random_input(clock, rows, inner, dtype=dtype), _random_input(clock, columns, inner, dtype=dtype)
    return lambda: torch.mm(left, right.t())


def _attention(clock: Clock, plan: Plan, dtype: torch.dtype, attend: Callable) -> list[list]:
    """Measures attention, as [rows, tokens, heads, kv_heads, head_size, window, dtype, forward and backward
    seconds]."""
    dims, results = plan.dims, list[list]()
    shares = dict.fromkeys((dims.heads, max(1, dims.heads // 2), dims.heads + max(1, dims.heads // 2)))
    clock.section()
    for heads in shares:
        kv_heads = max(1, heads * dims.kv_heads // dims.heads)
        kv_heads = kv_heads if heads % kv_heads == 0 else heads
        for rows in _row_counts(plan):
            for window in sorted(set(dims.windows)):
                if results and clock.over:
                    return results
                shapes = [(rows, dims.sequence_len, count, dims.head_size) for count in (heads, kv_heads, kv_heads)]
                inputs = [_random_input(clock, *shape, dtype=dtype).requires_grad_() for shape in shapes]
                output = attend(*inputs, window)
                gradient = torch.randn_like(output)

                def both(inputs=inputs, window=window, gradient=gradient):
                    return torch.autograd.grad(attend(*inputs, window), inputs, gradient)

                forward = clock.seconds(functools.partial(attend, *inputs, window))
                backward = max(clock.seconds(both) - forward, forward)
                kind = dtype_name(dtype)
                shape = [rows, dims.sequence_len, heads, kv_heads, dims.head_size, window, kind]
                results.append([*shape, forward, backward])
    return results


def _streamed(clock: Clock) -> float:
    """Returns the seconds per byte of adding large float32 tensors."""
    clock.section()
    total, other = (torch.ones(STREAM_ELEMENTS, device=clock.device) for _ in range(2))
    return clock.seconds(lambda: total.add_(other), 0.2) / (12 * STREAM_ELEMENTS)


def _polar(clock: Clock, dims: Dimensions, dtype: torch.dtype) -> list[list]:
    """Measures the orthogonalization of matrices with its scales, as [rows, columns, seconds]."""
    results: list[list] = []
    clock.section()
    for factor in WIDTHS:
        width = max(1, round(dims.heads * factor)) * dims.head_size
        for shape in ((width, width), (MLP_RATIO * width, width)):
            if results and clock.over:
                return results
            update = _random_input(clock, *shape, dtype=dtype)
            moment = torch.ones(second_moment_shape(shape), device=clock.device)
            beta2 = torch.tensor(0.9, device=clock.device)

            def orthogonalize(update=update, moment=moment, beta2=beta2):
                return update_scales(update_direction(update), moment, beta2)

            with torch.no_grad():
                results.append([*shape, clock.seconds(orthogonalize)])
    return results


def _blocks(clock: Clock, config: Config, plan: Plan, dtype: torch.dtype, known) -> list[list]:
    """Measures whole blocks and returns, without their products and attention, [bytes of the stream, seconds per byte
    that elementwise kernels move]."""
    plain = config.changed("batch", recompute="none")
    dims = dataclasses.replace(plan.dims, lookup=None, ngram=None)
    kernels = choose_kernels(plain, plan, clock.device)
    layers = build_layers(dims, model_options(plain, dtype, kernels.attention.attend)).to(clock.device)
    initialize(layers, 0)
    for parameter in layers.parameters():
        if dtype == torch.bfloat16 and parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype)
    if kernels.fp8:
        apply_fp8(list(layers), kernels.fp8)
    if config.precision.compile:
        apply_compile(layers)
    layers.train()
    name, curve = dtype_name(dtype), list[list]()
    clock.section()
    for rows in _row_counts(plan)[: 1 if config.precision.compile else None]:
        if curve and clock.over:
            break
        there = dataclasses.replace(plan, dims=dims, micro_rows=rows)
        seconds = expected = moved = 0.0
        for block in range(min(2, dims.depth)):  # one of them has a value embedding
            work = block_work(plain, there, block, name)
            table = dims.padded_vocab * dims.kv_width if dims.has_value_embedding(block) else 0
            seconds += clock.seconds(_block_action(clock, layers[1 + block], there, dtype), 0.3)
            expected += sum(map(known.product, work.products)) + sum(map(known.attention, work.attention))
            expected += known.streamed(2 * ITEMSIZE[name] * table)
            moved += work.moved
        stream = rows * dims.sequence_len * dims.width * ITEMSIZE[name]
        curve.append([stream, max(seconds - expected, 0.05 * seconds) / moved])
    return curve


def _block_action(clock: Clock, block: nn.Module, plan: Plan, dtype: torch.dtype) -> Callable[[], object]:
    shape = plan.micro_rows, plan.dims.sequence_len, plan.dims.width
    x, x0 = (_random_input(clock, *shape, dtype=dtype).requires_grad_() for _ in range(2))
    ids = torch.randint(0, plan.dims.vocab_size, shape[:2], device=clock.device)
    gradient = torch.randn_like(x)

    def action():
        outputs = [tensor for tensor in block((x, x0, ids)) if tensor.requires_grad]
        torch.autograd.backward(outputs, [gradient] * len(outputs))
        for leaf in (x, x0, *block.parameters()):
            leaf.grad = None

    return action


def _heads(clock: Clock, config: Config, plan: Plan, dtype: torch.dtype, known) -> list[list]:
    """Measures head and loss and returns, without their products, [tokens, seconds per logit]."""
    dims, name, curve = plan.dims, dtype_name(dtype), list[list]()
    table = torch.randn(dims.padded_vocab, dims.width, device=clock.device).mul_(0.02).requires_grad_()
    clock.section()
    for rows in _row_counts(plan):
        if curve and clock.over:
            break
        there = dataclasses.replace(plan, micro_rows=rows)
        hidden = _random_input(clock, rows * dims.sequence_len, dims.width, dtype=dtype).requires_grad_()
        targets = torch.randint(0, dims.vocab_size, (rows * dims.sequence_len,), device=clock.device)

        def action(hidden=hidden, targets=targets):
            capped_cross_entropy(hidden, table, targets, dims.vocab_size, LOGIT_CAP).backward()
            hidden.grad = table.grad = None

        seconds = clock.seconds(action, 0.2)
        work = head_work(config, there, name)
        expected = sum(known.product(product._replace(dtype=name)) for product in work.products)
        curve.append([rows * dims.sequence_len, max(seconds - expected, 0.05 * seconds) / work.logits])
    return curve


def _collectives(clock: Clock, dtype: torch.dtype) -> dict[str, list[list]]:
    """Measures collectives over all ranks, as {kind: [bytes of the whole tensor, seconds]}."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    results: dict[str, list[list]] = {}
    clock.section()
    for size in COLLECTIVE_BYTES:
        count = max(ranks, size // dtype.itemsize // ranks * ranks)
        whole, other = (torch.ones(count, dtype=dtype, device=clock.device) for _ in range(2))
        shard = torch.ones(count // ranks, dtype=dtype, device=clock.device)

        def send(whole=whole):
            if rank == 0:
                dist.send(whole, 1)
                dist.recv(whole, 1)
            elif rank == 1:
                dist.recv(whole, 0)
                dist.send(whole, 0)

        actions: dict[str, Callable] = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "reduce_scatter": lambda whole=whole, shard=shard: dist.reduce_scatter_tensor(shard, whole),
            "all_gather": lambda whole=whole, shard=shard: dist.all_gather_into_tensor(whole, shard),
            "all_to_all": lambda whole=whole, other=other: dist.all_to_all_single(other, whole),
            "send": send,
        }
        for kind, action in actions.items():
            seconds = clock.seconds(action, repeats=9) / (2 if kind == "send" else 1)
            results.setdefault(kind, []).append([whole.nbytes, seconds])
    return results


def measure_machine(
    config: Config, vocab_size: int, ranks: Iterable[int], section_sec: float = SECTION_SEC
) -> dict[str, Any]:
    """Returns the probe's document. ranks: numbers of ranks to measure with; 1 is among them, for the real step."""
    device, given = this_device(), (config, vocab_size, section_sec)
    sets = [run_local_ranks(probe_rank, count, *given, preload=[__name__])[0] for count in sorted({1, *ranks})]
    plan = real_step_plan(config, vocab_size)
    dtype = dtype_name(choose_compute_dtype(config.precision.compute, device)[0])
    document: dict[str, Any] = {
        "format": PROBE_FORMAT,
        "version": PROBE_VERSION,
        "machine": describe_environment(device) | {"memory_bytes": memory_bytes(device, 1)},
        "config": config.model_dump(mode="json"),
        "vocab_size": vocab_size,
        "dtype": dtype,
        "sets": sets,
        "overlap": 1.0 if device.type == "cuda" else 0.0,
    }
    document |= {"factors": {}, "error": 0.0}
    calibrate(document, config, plan, sets[0]["step"])
    return document


def describe_probe(document: dict[str, Any]) -> list[str]:
    """Returns lines for people: what was measured, and the error of the prediction from the parts."""
    step, lines = document["step"], []
    for one in document["sets"]:
        best = max(2 * math.prod(row[:3]) / row[4] for row in one["products"])
        lines.append(
            f"{one['ranks']} ranks, {one['threads']} threads each: products up to {best / 1e9:,.0f} GFLOP/s per rank, "
            f"memory {1e-9 / one['streamed']:.1f} GB/s"
        )
        for kind, points in one["collectives"].items():
            size, seconds = points[-1]
            lines[-1] += f", {kind} {1000 * points[0][1]:.2f} ms and {size / seconds / 1e9:.2f} GB/s"
    total, expected = sum(step["measured"].values()), sum(step["predicted"].values())
    lines.append(f"a step of {step['tokens']:,} tokens, predicted from the parts and measured:")
    for phase, title in (("passes", "forward and backward"), ("optimizer", "optimizer")):
        predicted, measured = step["predicted"][phase], step["measured"][phase]
        lines.append(
            f"  {title:<22}{1000 * predicted:>9.1f} ms{1000 * measured:>9.1f} ms  {predicted / measured - 1:+.1%}"
        )
    lines.append(f"  {'step':<22}{1000 * expected:>9.1f} ms{1000 * total:>9.1f} ms  {expected / total - 1:+.1%}")
    lines.append(f"predictions with this probe are corrected by these errors and state +-{document['error']:.0%}")
    return lines


def probe_this_machine(options: argparse.Namespace) -> dict[str, Any]:
    """Measures this machine, writes the document and returns it. options: of `megachat probe`."""
    config = load_config(options.config, options.set)
    check_writable(options.out)
    count = torch.cuda.device_count() or 2
    begin = time.perf_counter()
    document = measure_machine(config, vocabulary_without_text(config), options.ranks or (1, count))
    write_json(options.out, document)
    print("\n".join([*describe_probe(document), f"{options.out} written in {time.perf_counter() - begin:.0f} s"]))
    return document
