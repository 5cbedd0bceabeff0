"""Silent data corruption on one rank is seen, and its rank and tensor are named: by a replay, and by hashes of copies.

A run with both checks is equal to the bit to one without.
"""

import contextlib
import json
import math
import socket
from pathlib import Path

import pytest
import torch

from megachat.errors import CorruptionError
from megachat.kernels.bit_hash import bit_hash
from megachat.planning.dimensions import NORMS
from megachat.train import replicas
from megachat.train.corruption import TensorDifference, parameter_name
from megachat.train.micro_batch_replay import compare_results, replay_micro_batch, suspects
from megachat.train.replicas import compare_replicas, disagreements
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.oracle import ROWS, TOKENS
from tests.training import SMALL_VOCAB, build, random_rows, rows_of_rank, small_config, take_step, whole_state

TABLES = {
    "ngram": {"blocks": (0,), "rows": 60},
    "lookup": {"after_blocks": (1,), "rows": 400, "max_rows_per_token": 60},
}
CASES = {
    "dp2": (2, {}, TABLES | {"model": {"norm_scales": NORMS}}),
    "tp2": (
        2,
        {"tensor": 2},
        TABLES | {"model": {"kv_heads": None, "aspect_ratio": 32}, "batch": {"recompute": "block"}},
    ),
    "pp2": (2, {"pipeline": 2}, TABLES | {"precision": {"compute": "bfloat16"}}),
    "dp2 tp2 pp2": (
        8,
        {"tensor": 2, "pipeline": 2, "sequence": True},
        {"model": {"kv_heads": None, "aspect_ratio": 32}, "precision": {"compute": "bfloat16"}},
    ),
}


def step_of(training, step: int) -> torch.Tensor:
    set_schedules(training, step)
    return random_rows(step, ROWS, TOKENS, SMALL_VOCAB)


def flip(tensor: torch.Tensor, bit: int = 12) -> torch.Tensor:
    """The tensor with one bit of its middle element flipped."""
    flipped = tensor.detach().clone(memory_format=torch.contiguous_format)
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    flipped.view(-1).view(integers)[tensor.numel() // 2] ^= 1 << bit
    return flipped


@contextlib.contextmanager
def second_gradient_flipped(parameter: torch.nn.Parameter):
    """The second gradient of the parameter has one wrong bit."""
    calls = []

    def corrupt(gradient):
        calls.append(1)
        return flip(gradient) if len(calls) == 2 else None

    hook = parameter.register_hook(corrupt)
    yield
    hook.remove()


@contextlib.contextmanager
def second_activation_flipped(module: torch.nn.Module):
    """The second output of the module has one wrong bit."""
    calls = []

    def corrupt(module, inputs, output):
        calls.append(1)
        return output + (flip(output, 14) - output).detach() if len(calls) == 2 else None

    hook = module.register_forward_hook(corrupt)
    yield
    hook.remove()


def verdict(check) -> str:
    with pytest.raises(CorruptionError) as error:
        check()
    return str(error.value)


def all_checks(parallel: dict, changes: dict, folder: str):
    """(the states of a run without and with replays are equal, what each fault is said to be)"""
    config = small_config(parallel=parallel, **changes)
    plain, checked = build(config, SMALL_VOCAB), build(config, SMALL_VOCAB)
    results = []
    for training in (plain, checked):
        for step in range(2):
            rows = step_of(training, step)
            if training is checked:
                replay_micro_batch(training, rows_of_rank(training, rows), step, Path(folder))
            outcome = take_step(training, rows)
            if training is checked:
                compare_replicas(training, step + 1, Path(folder))
        results.append((outcome, whole_state(training)))
    assert not Path(folder).exists()
    (before, state), (after, same) = results
    assert before == after and all(torch.equal(state[name], same[name]) for name in state)
    rows, last = rows_of_rank(checked, step_of(checked, 2)), checked.mesh.world.rank == checked.mesh.world.size - 1
    block = next(layer for layer in checked.layers if hasattr(layer, "mlp"))
    faults = {
        "gradient": second_gradient_flipped(block.mlp.c_fc.weight),
        "scalar gradient": second_gradient_flipped(next(p for p in block.parameters() if p.numel() == 1)),
        "activation": second_activation_flipped(block.mlp.c_proj),
    }
    said = {"name": parameter_name(block.mlp.c_fc.weight)}
    for name, fault in faults.items():
        with fault if last else contextlib.nullcontext():
            said[name] = verdict(lambda: replay_micro_batch(checked, rows, 0, Path(folder)))
        checked.muon.discard_gradients()
        checked.rows.discard_gradients()
        checked.engine.adamw.discard_gradients()
    shards = [(name, weight) for name, _, weight in checked.muon.masters_and_weights()]  # none in float32
    said["shard"], weight = shards[0] if shards else ("", block.mlp.c_fc.weight.detach())
    weights = {"weight": weight, "scalar": next(p.detach() for p in block.parameters() if p.numel() == 1)}
    for name, weight in weights.items():
        before = weight.clone()
        if last:
            weight.copy_(flip(weight, 3))
        if name == "scalar" or shards or "tensor" not in parallel:  # a float32 shard exists once
            said[name] = verdict(lambda n=name: compare_replicas(checked, 10 + (n == "scalar"), Path(folder)))
        weight.copy_(before)
    calls, wait = [], checked.muon.wait_for_gather
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked.muon, "wait_for_gather", lambda: (calls.append("wait"), wait()))
        patch.setattr(replicas, "bit_hash", lambda tensor: (calls.append("hash"), bit_hash(tensor))[1])
        compare_replicas(checked, 12, Path(folder))
    assert calls[0] == "wait", "weights that still arrive from other ranks would be hashed"
    place = Path(folder) / "corruption"
    names = ("step_000000", "step_000000.3", "step_000011")
    evidence = [json.loads((place / name / "report.json").read_text()) for name in names]
    kept = torch.load(place / "step_000000" / f"rank_{checked.mesh.world.size - 1:05d}.pt", weights_only=True)
    return said, evidence, kept


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_bit_stops_the_run_and_its_rank_is_named(case, tmp_path):
    world, parallel, changes = CASES[case]
    (others, *_), *_, (said, evidence, kept) = run_ranks(all_checks, world, parallel, changes, str(tmp_path / "run"))
    assert others | {"name": "", "shard": ""} == said | {"name": "", "shard": ""}
    matrix, bad, host = said.pop("name"), world - 1, f"({socket.gethostname()}, cpu)"
    for fault in ("gradient", "scalar gradient", "activation"):
        assert f": rank {bad} {host} computed another result" in said[fault], said[fault]
    assert f"rank {bad} differs in gradient of {matrix}: 1 of" in said["gradient"]
    assert f"rank {bad} differs in gradient of resid_lambdas[" in said["scalar gradient"]
    assert evidence[0]["suspects"] == evidence[1]["suspects"] == [bad]
    (difference,) = evidence[0]["ranks"][bad]["differences"]
    first, second = (kept[side][difference["tensor"]].float() for side in ("first", "second"))
    assert difference["different"] == (first != second).sum() == 1
    assert difference["largest"] == (first - second).abs().max()
    assert kept["rows"].shape[1] == TOKENS
    if case == "dp2":  # two copies: nobody knows which one is right
        assert f"copies of {matrix} on rank 0 {host}, rank 1 {host} differ, without a majority" in said["weight"]
    else:
        assert evidence[2]["suspects"] == [bad]
    if case == "dp2 tp2 pp2":
        assert f" on rank 7 {host} differs from its copies on ranks [4, 5, 6]" in said["scalar"]
    elif case != "dp2":
        assert f"on rank 1 {host} the weights of resid_lambdas[" in said["scalar"]
    if "pp2" in case:
        what = f"the weights of {said['shard']}, shard of Muon are not their rounded masters"
        assert f"on rank {bad} {host} {what}" in said["weight"]


def report(rank: int, hashes: dict, **place) -> dict:
    return {
        "rank": rank,
        "data": rank,
        "tensor": 0,
        "pipeline": 0,
        "host": "h",
        "device": "cpu",
        "hashes": hashes,
    } | place


def test_the_minority_of_copies_is_suspected():
    three = [report(rank, {"data": {"w": 7 if rank == 1 else 5}}) for rank in range(3)]
    (entry,) = disagreements(three)
    assert entry == {"tensor": "w", "axis": "data", "hashes": {0: 5, 1: 7, 2: 5}, "suspects": [1], "decided": True}
    two_groups = [report(rank, {"data": {"w": rank}}, data=rank % 2, tensor=rank // 2) for rank in range(4)]
    assert [entry["suspects"] for entry in disagreements(two_groups)] == [[0, 1], [2, 3]]


def event(*order: int) -> dict:
    return {"order": list(order)}


@pytest.mark.parametrize(
    "events, coupled, ranks",
    [
        ({0: None, 1: None}, False, [0, 1]),  # nothing was sent
        ({0: event(0, 0, 4), 1: event(0, 0, 3)}, True, [1]),  # one stage, coupled by tables
        ({0: event(0, 0, 4), 1: event(0, 0, 3)}, False, [0, 1]),  # two data ranks that send each other nothing
    ],
)
def test_the_rank_that_sent_a_wrong_value_first_is_suspected(events, coupled, ranks):
    reports = [report(rank, {}, event=each, differences=[1]) for rank, each in events.items()]
    assert suspects(reports, coupled=coupled) == ranks


def test_a_later_stage_is_suspected_in_the_backward_pass_and_an_earlier_one_in_the_forward_pass():
    def stages(*events):
        return [report(n, {}, data=0, pipeline=n, event=each, differences=[1]) for n, each in enumerate(events)]

    assert suspects(stages(event(1, 0, 9), event(1, -1, 8)), coupled=False) == [1]
    assert suspects(stages(event(0, 0, 9), event(0, 1, 2)), coupled=False) == [0]


def test_every_bit_counts_but_for_a_tolerance():
    first = {"x": torch.tensor([1.0, -2.0, torch.nan]), "y": torch.zeros(2), "z": torch.ones(1)}
    assert compare_results(first, {name: tensor.clone() for name, tensor in first.items()}, 0.0) == []
    second = first | {"x": torch.tensor([1.0, -2.5, torch.nan]), "y": torch.tensor([0.0, -0.0])}
    del second["z"]
    assert compare_results(first, second, 0.0) == [
        TensorDifference("x", 3, 1, 0.5), TensorDifference("y", 2, 1, 0.0), TensorDifference("z", 1, 1, math.inf),
    ]  # fmt: skip
    first["x"][2] = second["x"][2] = 10.0
    assert [each.tensor for each in compare_results(first, second, 0.06)] == ["z"]
    assert [each.tensor for each in compare_results(first, second, 0.04)] == ["x", "z"]


def test_the_hash_sees_every_bit_and_every_place():
    words = torch.randn(300, dtype=torch.float64).to(torch.bfloat16)
    plain = bit_hash(words)
    for bit in range(16):
        assert bit_hash(flip(words, bit)) != plain
    assert bit_hash(words.flip(0)) != plain
    assert bit_hash(words.view(30, 10).t().contiguous().t()) == plain and bit_hash(words[:0]) == 0
