"""Do the collectives of all ranks meet? On sequences written by hand."""

import torch

from megachat.config import Config
from megachat.planning.call_order import Call, find_mismatch, planned_bytes, sums, walked_bytes
from megachat.planning.manifest import muon_partition
from megachat.planning.plan import resolve_plan
from megachat.planning.stage_state import stage_parameters


def all_reduce(axis: str, *ranks: int, size: int = 8, dtype: str = "float32", name: str = "sum") -> Call:
    return Call("all_reduce", axis, ranks, size, dtype, name)


def message(kind: str, peer: int, size: int = 8) -> Call:
    return Call(kind, "world", (0, 1), size, "bfloat16", kind, peer)


def test_groups_that_meet_in_one_order_pass():
    rows = {rank: [all_reduce("tensor", rank // 2 * 2, rank // 2 * 2 + 1)] for rank in range(4)}
    columns = {rank: [all_reduce("data", rank % 2, rank % 2 + 2)] for rank in range(4)}
    assert find_mismatch({rank: [*rows[rank], *columns[rank], *rows[rank]] for rank in range(4)}) is None


def test_two_groups_in_different_order_are_a_deadlock():
    calls = {
        rank: [all_reduce("data", 0, 1, name="gradients"), all_reduce("world", 0, 1, name="norm")] for rank in (0, 1)
    }
    calls[1].reverse()
    problem = find_mismatch(calls)
    assert problem and "deadlock" in problem and "rank 0" in problem and "norm" in problem and "gradients" in problem


def test_a_rank_that_leaves_out_a_call_is_named():
    calls = {rank: [all_reduce("world", 0, 1, 2)] for rank in range(3)} | {1: []}
    problem = find_mismatch(calls)
    assert problem and "for rank 1, which has finished its step" in problem


def test_different_sizes_dtypes_and_kinds_are_named():
    first = all_reduce("world", 0, 1)
    for field, other in {
        "bytes": all_reduce("world", 0, 1, size=16),
        "dtype": all_reduce("world", 0, 1, dtype="bfloat16"),
        "kind": first._replace(kind="all_gather"),
    }.items():
        problem = find_mismatch({0: [first], 1: [other]})
        assert problem and f"different {field}" in problem and "ranks 0 and 1" in problem


def test_messages_between_stages_meet_in_their_direction():
    forward = {0: [message("send", 1), message("receive", 1)], 1: [message("receive", 0), message("send", 0)]}
    assert find_mismatch(forward) is None
    both_send = {0: [message("send", 1), message("receive", 1)], 1: [message("send", 0), message("receive", 0)]}
    assert "deadlock" in str(find_mismatch(both_send))
    assert "different bytes" in str(find_mismatch({0: [message("send", 1)], 1: [message("receive", 0, size=16)]}))


def test_an_all_to_all_must_send_what_is_expected():
    def exchange(received: tuple[int, ...], sent: tuple[int, ...]) -> list[Call]:
        return [Call("all_to_all", "stage", (0, 1), 4 * sum(sent), "float32", "rows", None, received, sent)]

    assert find_mismatch({0: exchange((1, 2), (1, 3)), 1: exchange((3, 4), (2, 4))}) is None
    problem = find_mismatch({0: exchange((1, 2), (1, 3)), 1: exchange((2, 4), (2, 4))})
    assert problem and "rank 0 sends 3 elements to rank 1, which expects 2" in problem


def test_bytes_are_summed_by_purpose():
    calls = [
        all_reduce("tensor", 0, 1),
        message("send", 1),
        all_reduce("data", 0, 1, name="Muon bucket 0, gradients"),
        Call("all_gather", "data", (0, 1), 32, "float32", "optimizer step"),
    ]
    totals = {name: size for name, size in walked_bytes(calls).items() if size}
    assert totals == {"tensor axis": 8, "between stages": 8, "Muon gradients": 8, "AdamW weights": 32}
    assert sums(calls)["data", "all_gather"] == (1, 32)


def test_the_padding_of_shards_is_planned():
    """A small model on many ranks: every bucket is divided into equal shards, so what is sent is larger than it."""
    config = Config.model_validate(
        {
            "model": {"depth": 3, "head_size": 32, "sequence_len": 64},
            "batch": {"tokens": 500 * 64, "micro_rows": 1},
            "horizon": {"steps": 1},
            "evaluate": {"tokens": 500 * 64},
            "precision": {"compute": "bfloat16"},
        }
    )
    plan = resolve_plan(config, 500, 512)
    parameters = stage_parameters(plan.dims, plan.stages[0], torch.bfloat16)
    partition = muon_partition(config.optimizer.muon_multiplier, plan.layout, parameters)
    sent = 2 * sum(500 * bucket.shard_size for bucket in partition.buckets)
    assert planned_bytes(config, plan, 0)["Muon gradients"] == sent > 2.01 * partition.elements
