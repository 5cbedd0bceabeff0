"""A step is walked for ranks that do not exist: the code of a run, torch's fake process group, and tensors without
memory.
"""

import pytest
import torch.distributed as dist

from megachat.config import load_config
from megachat.errors import UserError
from megachat.optim import joint
from megachat.planning.layouts import parse_layout
from megachat.programs import verify_dry as dry

SMALL = "model.depth=2 model.head_size=64 model.sequence_len=128 batch.tokens=null batch.micro_rows=1".split()


def certificate(layout: str, *settings: str, every_rank: bool = True) -> dict:
    config = load_config("configs/d4_cpu.json", [*SMALL, "batch.accumulation=2", *settings])
    return dry.verify_dry(config, parse_layout(layout), 512, every_rank=every_rank)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("tp=2,pp=2", ("parallel.sequence=true", "batch.recompute=block")),
        ("tp=2,dp=2", ("lookup.after_blocks=[1]", "ngram.blocks=[1]", "precision.compute=float32")),
    ],
)
def test_the_calls_of_all_ranks_meet_and_have_the_planned_bytes(layout, settings):
    passed = certificate(layout, *settings)
    assert passed["problems"] == [] and passed["passed"]
    assert len(passed["walked"]) == 4
    names = {row["what"] for row in passed["compared"] if row["most"]}
    assert names >= {"tensor axis", "products", "between stages" if "pp" in layout else "Muon gradients"}


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
    failed = certificate("tp=2", every_rank=False)
    step_work._stages.clear()
    assert "stage 0, tensor axis: planned" in failed["problems"][0]


def test_a_rank_that_fails_is_named(monkeypatch):
    def fail(*args, **options):
        raise ValueError("planted")

    monkeypatch.setattr(joint, "all_reduce", fail)
    with pytest.raises(UserError, match=r"rank [01] of dp=2,tp=1,pp=1 failed in its step: .*planted"):
        certificate("dp=2")


def test_kinds_of_ranks():
    layout = dry.Layout(data=128, tensor=2, pipeline=2)
    kinds = {dry.representative(layout, rank) for rank in range(512)}
    assert kinds == {stage * 256 + data * 2 + tensor for stage in (0, 1) for data in (0, 1, 127) for tensor in (0, 1)}
    assert dry.coordinates(layout, 511) == (1, 127, 1) and dry.world_rank(layout, 1, 127, 1) == 511


def test_512_ranks_are_walked_on_one_machine():
    passed = certificate("pp=2,dp=256", every_rank=False)
    assert passed["passed"] and passed["walked"] == [0, 1, 255, 256, 257, 511]
