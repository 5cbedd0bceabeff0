"""The probe on two real ranks, with a small model and short sections."""

import json

from megachat.config import load_config
from megachat.planning.plan import resolve_plan
from megachat.planning.probe import Probe
from megachat.planning.step_time import predict_step
from megachat.programs.probe import describe_probe, measure_machine

SMALL = [
    "model.depth=2",
    "model.sequence_len=128",
    "model.head_size=32",
    "batch.tokens=512",
    "batch.micro_rows=2",
]


def test_a_probe_predicts_layouts_up_to_the_ranks_that_it_measured():
    config = load_config("configs/d4_cpu.json", SMALL)
    document = json.loads(json.dumps(measure_machine(config, 300, (2,), section_sec=0.1)))
    assert [one["ranks"] for one in document["sets"]] == [1, 2]
    step = document["step"]
    assert step["tokens"] == 512 and min(step["measured"].values()) > 0
    for phase, factor in document["factors"].items():
        assert factor == step["measured"][phase] / step["predicted"][phase]
    probe = Probe(document)
    alone = predict_step(config, resolve_plan(config, 1, 300), probe, dtype=document["dtype"])
    assert abs(alone.total / sum(step["measured"].values()) - 1) < 1e-6
    for settings in ([], ["parallel.tensor=2"], ["parallel.pipeline=2", "batch.micro_rows=1"]):
        changed = load_config("configs/d4_cpu.json", [*SMALL, *settings])
        parts = predict_step(changed, resolve_plan(changed, 2, 300), probe, dtype=document["dtype"]).parts
        assert all(seconds >= 0 for seconds in parts.values())
        assert (parts["tensor axis"] > 0) == (changed.parallel.tensor == 2)
    text = "\n".join(describe_probe(document))
    assert "predicted from the parts and measured" in text and "2 ranks" in text
