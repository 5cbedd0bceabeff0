"""The memory estimate against what ranks really hold: weights, optimizer state and gradients to the byte, and what
autograd keeps.
"""

import gc
import re

import pytest
import torch

from megachat.config import Config
from megachat.errors import UserError
from megachat.kernels.fp8 import Fp8Choice, apply_fp8
from megachat.model.gpt import Block, ModelOptions, Rotary
from megachat.model.ngram import NgramHashes
from megachat.planning.memory import FILLS, describe_memory, head_chunk_bytes, kept_bytes_per_block, memory_of_stages
from megachat.planning.memory_advice import check_state_fits, lighter_settings, memory_warning
from megachat.planning.plan import resolve_plan, resolve_without_text
from megachat.programs.walk_memory import LiveBytes
from tests.harness import run_ranks
from tests.training import SMALL_VOCAB, build, random_rows, rows_of_rank, small_config, take_step

LOOKUP = {"after_blocks": (1,), "rows": 400, "max_rows_per_token": 60}
MODEL = {"depth": 4, "aspect_ratio": 32, "head_size": 16, "kv_heads": 4, "sequence_len": 256, "window_pattern": "L"}


class Kept:
    """A tensor that autograd keeps. `count` gets the bytes of all storages kept at a time, except those in `apart`."""

    def __init__(self, tensor: torch.Tensor, apart: set[int], count: dict):
        storage = tensor.untyped_storage()
        self.tensor, self.count, self.storage, self.bytes = tensor, count, storage.data_ptr(), storage.nbytes()
        if self.storage not in apart and self._add(1) == 1:
            count["now"] += self.bytes
            count["most"] = max(count["most"], count["now"])

    def _add(self, by: int) -> int:
        self.count[self.storage] = self.count.get(self.storage, 0) + by
        return self.count[self.storage]

    def __del__(self):
        if self.storage in self.count and self._add(-1) == 0:
            self.count["now"] -= self.bytes


def storages(tensors) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def held(config) -> tuple[int, dict[str, int]]:
    """Returns (this rank's stage, the bytes that it holds by use, in a step and after it)."""
    training = build(config, SMALL_VOCAB)
    zero, muon, plan = training.engine.adamw, training.muon, training.plan
    actual, count = {}, {"now": 0, "most": 0}

    # called when all gradients exist; AdamW gradients that another rank updates are already freed
    def count_gradients() -> None:
        parameters = [parameter for group in zero.bit16_groups for parameter in group]
        given = [parameter.grad_accum for parameter in parameters if parameter.grad_accum is not None]
        assert given and all(tensor.dtype == torch.float32 for tensor in given)
        actual["gradients"] = sum(storages(bucket.gradients for bucket in muon._buckets).values()) + sum(
            4 * one.numel() for one in parameters
        )

    parameters = list(training.layers.parameters())
    apart = set(storages([*parameters, *training.layers.buffers()]))
    rows = random_rows(0, plan.rows_per_step, plan.dims.sequence_len + 1, SMALL_VOCAB)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Kept(tensor, apart, count), lambda kept: kept.tensor):
        take_step(training, rows, inspect_gradients=count_gradients)
    weights = storages(parameters)
    masters = storages([*(bucket.master for bucket in muon._buckets), *zero.single_partition_of_fp32_groups])
    moments = [
        zero.optimizer.state[flat][kind]
        for flat in zero.single_partition_of_fp32_groups
        for kind in ("exp_avg", "exp_avg_sq")
    ]
    moments += [*(bucket.momentum for bucket in muon._buckets), *muon._second_moment.values()]
    actual |= {
        "weights": sum(weights.values()),
        "masters": sum(masters[place] for place in masters.keys() - weights.keys()),
    }
    actual |= {"moments": sum(storages(moments).values()), "activations": count["most"]}
    assert len(rows_of_rank(training, rows)) == plan.micro_rows * plan.accumulation
    return training.mesh.pipeline.rank, actual


def held_at_the_loss(config) -> int:
    """Returns the bytes of all new tensors when the first micro-batch has its loss: those kept for backward or for
    recomputing.
    """
    training = build(config, SMALL_VOCAB)
    plan, actual = training.plan, []

    def alive() -> dict[int, int]:
        gc.collect()  # what is garbage lies there until the collector comes by, which depends on what else was made
        return storages(thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta)

    rows = random_rows(0, plan.rows_per_step, plan.dims.sequence_len + 1, SMALL_VOCAB)
    before = alive()
    training.engine.module.loss_fn.register_forward_hook(
        lambda *_: actual.append({**alive(), **dict.fromkeys(before, 0)})
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor,), lambda kept: kept[0]):
        take_step(training, rows)
    return sum(actual[0].values())


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.slow
def test_what_is_computed_again_is_not_kept(recompute):
    batch = {"tokens": 256 * 24, "micro_rows": 4, "recompute": recompute}
    config = small_config(model=MODEL | {"depth": 6}, batch=batch, parallel={"tensor": 2, "sequence": True})
    (stage,) = estimate(config, 2)
    for actual in run_ranks(held_at_the_loss, 2, config):
        assert 0.97 * actual <= stage.activations <= 1.06 * actual


def estimate(config, world: int, dtype: torch.dtype = torch.float32):
    return memory_of_stages(config, resolve_without_text(config, world, SMALL_VOCAB), dtype, on_gpu=False)


@pytest.mark.parametrize(
    ("world", "parallel", "settings"),
    [
        (1, {}, {}),
        (1, {}, {"precision": {"compute": "bfloat16"}}),
        (2, {"tensor": 2, "sequence": True}, {}),
        (4, {"tensor": 2}, {}),
        (4, {"tensor": 2, "pipeline": 2}, {"lookup": LOOKUP}),
        (3, {"pipeline": 3}, {}),
        (4, {"pipeline": 2}, {"precision": {"compute": "bfloat16"}}),
    ],
)
@pytest.mark.slow
def test_the_estimate_is_what_ranks_hold(world, parallel, settings):
    config = small_config(
        **({"model": MODEL, "parallel": parallel, "batch": {"tokens": 256 * 24, "micro_rows": 2}} | settings)
    )
    dtype = getattr(torch, config.precision.compute)
    stages = estimate(config, world, dtype)
    most = [dict.fromkeys(("weights", "masters", "moments", "gradients", "activations"), 0) for _ in stages]
    for stage, actual in run_ranks(held, world, config):
        most[stage] = {kind: max(before, actual[kind]) for kind, before in most[stage].items()}
    for stage, actual in zip(stages, most, strict=True):
        exact = ("weights", "masters", "moments", "gradients")
        assert {kind: getattr(stage, kind) for kind in exact} == {kind: actual[kind] for kind in exact}
        if dtype == torch.float32:  # in bfloat16 a CPU's norms keep float32 copies, which a GPU's do not
            assert actual["activations"] <= stage.activations <= 1.06 * actual["activations"], stage


@pytest.mark.slow
def test_fp8_keeps_a_byte_for_each_number():
    """Compares the difference that the recipe makes: a CPU's norms are the same with and without it."""
    config = small_config(model=MODEL, batch={"tokens": 256 * 8, "micro_rows": 2}, precision={"compute": "bfloat16"})
    fp8 = config.model_copy(
        update={"precision": config.precision.model_copy(update={"fp8": "tensorwise", "fp8_head": False})}
    )
    (_, plain), (_, rounded) = (run_ranks(held, 1, one)[0] for one in (config, fp8))
    (in_bf16,), (in_fp8,) = estimate(config, 1, torch.bfloat16), estimate(fp8, 1, torch.bfloat16)
    assert in_fp8.activations != in_bf16.activations
    assert (
        abs((rounded["activations"] - plain["activations"]) - (in_fp8.activations - in_bf16.activations))
        < 0.03 * plain["activations"]
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("block", [0, 1, 2])  # the second has a value embedding, the third a lookup layer
@pytest.mark.parametrize(
    ("ngram", "fp8"),
    [
        ({}, "off"),
        ({"blocks": (0, 1), "rows": 50}, "off"),
        ({"blocks": (0, 1), "rows": 50, "width": 12}, "off"),
        ({"blocks": (0, 1), "rows": 50, "width": 128}, "tensorwise"),
    ],
)
def test_a_block_keeps_what_is_estimated(block, recompute, ngram, fp8):
    """Compares with torch's allocations before and after a forward pass."""
    sections = {"lookup": LOOKUP | {"after_blocks": (2,)}, "ngram": ngram}
    wide = {} if fp8 == "off" else {"aspect_ratio": 64, "head_size": 64}  # smaller products are not in FP8
    config = small_config(model=MODEL | wide, batch={"tokens": 256 * 2}, **sections)
    dims = resolve_without_text(config, 1, SMALL_VOCAB).dims
    options = ModelOptions(recompute=recompute)
    made = Block(dims, options, Rotary(dims, options), block, NgramHashes(dims.ngram) if dims.ngram else None)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    factors = 0 if fp8 == "off" else 8 * apply_fp8([made], Fp8Choice(fp8, "torch", ""))
    x, ids = torch.randn(2, 256, dims.width, requires_grad=True), torch.randint(0, SMALL_VOCAB, (2, 256))
    with LiveBytes() as live:
        result = made((x, x, ids))
        kept = live.now
    estimated = kept_bytes_per_block(dims, block, ids.numel(), itemsize=4, fp8=fp8, recompute=recompute)
    indices = 8 * 4 * (ids.numel() + SMALL_VOCAB) if dims.has_lookup(block) else 0  # by which tokens are grouped
    mask = 2 * ids.numel() if dims.has_ngram(block) else 0  # of rows that are none, in tables that are not divided
    assert 0 <= kept - result[0].nbytes + x.nbytes - mask - estimated <= indices + factors


def test_a_run_that_does_not_fit_is_warned_about_with_what_helps():
    config = small_config(model=MODEL, batch={"tokens": 256 * 24, "micro_rows": 8})
    plan = resolve_plan(config, 1, SMALL_VOCAB)
    (stage,) = memory_of_stages(config, plan, torch.float32)
    assert memory_warning(config, plan, torch.float32, 2 * stage.total) is None
    warning = memory_warning(config, plan, torch.float32, stage.total // 2)
    assert re.match(r"WARNING: .* 0\.1 GB, but the device has 0\.1 GB", warning), warning
    assert re.search(r": set batch\.micro_rows=2 \([\d.]+ MB\)", warning), warning
    warning = memory_warning(config, plan, torch.float32, stage.state)
    assert "not enough alone is batch.micro_rows=1 (" in warning and warning.endswith("use more ranks")
    for rows, fits in ((4, False), (2, True)):
        less = config.model_copy(update={"batch": config.batch.model_copy(update={"micro_rows": rows})})
        assert (
            memory_warning(less, resolve_plan(less, 1, SMALL_VOCAB), torch.float32, stage.total // 2) is None
        ) == fits
    twelve = small_config(model=MODEL, batch={"tokens": 256 * 24, "micro_rows": 12})
    plan = resolve_plan(twelve, 1, SMALL_VOCAB)
    fewer = [value for _, key, value in lighter_settings(twelve, plan) if key == "micro_rows"]
    assert fewer == [6, 4, 3, 2, 1], "all divisors, also where the batch is no power of two"
    assert describe_memory([stage], 80_000_000_000).endswith("; the device has 80.0 GB")
    check_state_fits([stage], stage.state)
    with pytest.raises(UserError, match=r"need ([\d.]+ MB) per rank on stage 0, but the device has \1: .*model.depth"):
        check_state_fits([stage], stage.state - 1)


def test_the_head_takes_smaller_chunks_where_the_run_fits_only_with_them():
    """A wide vocabulary and one short row, so that the head and not a block has the most workspace."""
    config = small_config(model=MODEL, batch={"tokens": 256 * 24, "micro_rows": 24})
    plan = resolve_plan(config, 1, 49152)

    def total(**how):
        return max(stage.total for stage in memory_of_stages(config, plan, torch.float32, **how))

    def chosen(settings=config, **how):
        return head_chunk_bytes(settings, plan, torch.float32, **how) >> 20

    largest = total()
    assert chosen() == chosen(device_bytes=10**12) == 256 and chosen(on_gpu=False) == 8
    least = config.model_copy(update={"precision": config.precision.model_copy(update={"head_chunk_mb": 16})})
    (smallest,) = memory_of_stages(least, plan, torch.float32)
    assert largest - smallest.total == 2 * (240 << 20) + (240 << 20) * 4 // 2, "logits twice, and in the compute dtype"
    for chunk in (128, 64, 32, 16):
        needed = largest - 4 * ((256 - chunk) << 20)
        device = int(needed / FILLS) + 2
        assert chosen(device_bytes=device) == chunk and total(device_bytes=device) == needed
    assert chosen(device_bytes=smallest.total) == 256, "no chunk helps"
    assert chosen(least, on_gpu=False) == chosen(least) == chosen(least, device_bytes=10**12) == 16


def test_the_public_recipe_fits_a_gpu_of_80_gb_with_32_rows():
    """Depth 22, vocabulary 49,152, 32 rows of 2,048: the logits of a micro-batch would be 12.9 GB, a chunk is 0.27."""
    sections = {"model": {"depth": 22}, "batch": {"tokens": 2**20, "micro_rows": 32, "recompute": "selective"}}
    for fp8 in ("off", "tensorwise"):
        config = Config.model_validate(sections | {"precision": {"compute": "bfloat16", "fp8": fp8}})
        plan = resolve_plan(config, 8, 49152)
        (stage,) = memory_of_stages(config, plan, torch.bfloat16, device_bytes=80 * 10**9)
        assert stage.total < FILLS * 80e9, fp8
        assert head_chunk_bytes(config, plan, torch.bfloat16, device_bytes=80 * 10**9) == 256 << 20, (
            "and is the default"
        )


def test_a_graph_of_the_update_keeps_its_memory():
    config = small_config(model=MODEL, batch={"tokens": 256 * 24, "micro_rows": 2})
    graph = config.model_copy(update={"precision": config.precision.model_copy(update={"optimizer_graph": True})})
    plain, kept = (
        memory_of_stages(one, resolve_plan(one, 1, SMALL_VOCAB), torch.float32)[0] for one in (config, graph)
    )
    assert kept.total - plain.total >= 24 * 128 * 512 and kept.state == plain.state
