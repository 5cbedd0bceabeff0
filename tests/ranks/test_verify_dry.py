"""A step is walked for ranks that do not exist: the code of a run, torch's fake process group, and tensors without
memory.
"""

import json

import pytest
import torch.distributed as dist

from megachat.config import load_config
from megachat.errors import UserError
from megachat.optim import joint
from megachat.planning.call_order import Call
from megachat.planning.dimensions import NORMS
from megachat.planning.layouts import parse_layout
from megachat.programs import verify_dry as dry

SMALL = "model.depth=2 model.head_size=64 model.sequence_len=128 batch.tokens=null batch.micro_rows=1".split()
REDUCED = ("model.depth=8", "batch.tokens=null", "batch.accumulation=1")
TABLES = (
    *("lookup.after_blocks=[1]", "lookup.rows=40000", "lookup.max_rows_per_token=60"),
    *("ngram.blocks=[0,1]", "ngram.rows=50000", f"model.norm_scales={json.dumps(NORMS)}"),
)


def certificate(layout: str, *settings: str, every_rank: bool = True) -> dict:
    config = load_config("configs/d4_cpu.json", [*SMALL, "batch.accumulation=2", *settings])
    return dry.verify_dry(config, parse_layout(layout), 512, every_rank=every_rank)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("tp=2,pp=2", ("parallel.sequence=true", "batch.recompute=block", "precision.fp8=tensorwise")),
        ("tp=2,dp=2", ("lookup.after_blocks=[1]", "ngram.blocks=[1]", "precision.compute=float32")),
    ],
)
def test_the_calls_of_all_ranks_meet_and_have_the_planned_bytes(layout, settings):
    passed = certificate(layout, *settings)
    assert passed["problems"] == [] and passed["passed"]
    assert len(passed["walked"]) == 4
    names = {row["what"] for row in passed["compared"] if row["most"]}
    assert names >= {"tensor axis", "products", "between stages" if "pp" in layout else "Muon gradients"}
    assert names >= {"memory: state", "memory: gradients", "memory: activations", "memory: peak"}
    assert all(row["allowed"][0] <= row["least"] <= row["most"] <= row["allowed"][1] for row in passed["compared"])
    state = [row for row in passed["compared"] if row["what"] == "memory: state"]
    assert all(row["planned"] == row["most"] for row in state), "of the fullest rank, to the byte"


@pytest.mark.parametrize(
    ("name", "layout", "settings"),
    [
        ("d12", "dp=1", TABLES),
        ("d24_fp8", "tp=2", ("parallel.sequence=true", "batch.recompute=selective")),
        ("d24_fp8", "pp=2", ("batch.micro_rows=8", "batch.accumulation=2")),
    ],
)
def test_a_step_of_a_config_holds_what_is_counted(name, layout, settings):
    """tools/bench/certificates.py walks all files in configs/ on 64 and 512 ranks."""
    config = load_config(f"configs/{name}.json", [*REDUCED, *settings])
    result = dry.verify_dry(config, parse_layout(layout), 32768, every_rank=False)
    assert result["problems"] == []


def test_a_collective_that_one_rank_leaves_out_is_named(monkeypatch):
    real = joint.all_reduce
    monkeypatch.setattr(joint, "all_reduce", lambda *args, **names: dist.get_rank() == 1 or real(*args, **names))
    failed = certificate("dp=2", every_rank=True)
    assert not failed["passed"]
    assert "rank 0 waits" in failed["problems"][0] and "gradient norm" in failed["problems"][0]


def test_a_wrong_plan_is_named(monkeypatch):
    from megachat.planning import step_work

    step_work._stages.clear()
    monkeypatch.setattr(step_work, "_tensor_collectives", lambda *args: ())
    real = dry.planned_memory
    monkeypatch.setattr(dry, "planned_memory", lambda *args: {kind: 1.2 * size for kind, size in real(*args).items()})
    failed = certificate("tp=2", every_rank=False)
    step_work._stages.clear()
    problems = [problem.split(": planned")[0] for problem in failed["problems"]]
    kinds = ("tensor axis", "memory: state", "memory: gradients", "memory: activations")
    assert problems == [f"stage 0, {kind}" for kind in kinds], "a peak below the plan is none"


def test_a_rank_that_fails_is_named(monkeypatch):
    def fail(*args, **options):
        raise ValueError("planted")

    monkeypatch.setattr(joint, "all_reduce", fail)
    with pytest.raises(UserError, match=r"rank 0 of dp=1,tp=1,pp=1 failed in its step: .*planted"):
        certificate("dp=1")


def test_what_is_allowed():
    row = {"stage": 0, "what": "memory: state", "planned": 1e10, "least": 9.91e9, "most": 1.009e10, "rank": 0}
    low, high = dry.allowed("memory: state", 1e10)
    assert dry.problem(row) is None and low == 9.9e9 - dry.UNPLANNED_BYTES and high == 1.01e10 + dry.UNPLANNED_BYTES
    below, above = row | {"least": 9.8e9}, row | {"most": 1.02e10}
    assert dry.problem(below) == "stage 0, memory: state: planned 10.000 GB, but rank 0 has 9.800 GB"
    assert dry.problem(below | {"what": dry.PEAK}) is None
    far_below = above | {"what": dry.PEAK, "least": 1e9}
    assert "10.200 GB" in str(dry.problem(far_below)), "what is too much is named, not what is farther below"


def test_kinds_of_ranks():
    layout = dry.Layout(data=128, tensor=2, pipeline=2)
    kinds = {dry.representative(layout, rank) for rank in range(512)}
    assert kinds == {stage * 256 + data * 2 + tensor for stage in (0, 1) for data in (0, 1, 127) for tensor in (0, 1)}
    assert dry.coordinates(layout, 511) == (1, 127, 1) and dry.world_rank(layout, 1, 127, 1) == 511
    sent = Call("send", "pipeline", (2, 258), 8, "bfloat16", "stream", peer=258)  # of rank 2: the second data rank
    (moved,) = dry.transferred(layout, [sent], 101)
    assert moved == sent._replace(ranks=(101, 357), peer=357)


def test_128_ranks_are_walked_on_one_machine():
    """DeepSpeed slices by data rank, so a rank of 512 takes three times as long."""
    passed = certificate("dp=128", every_rank=False)
    assert passed["passed"] and passed["walked"] == [0, 1, 127]
