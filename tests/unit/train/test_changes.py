"""What a resume reports as changed, and the FLOPs of a checkpoint that did not count them."""

import dataclasses

from megachat.planning.plan import resolve_plan
from megachat.train.changes import describe_changes, saved_flops
from tests.training import SMALL, SMALL_VOCAB, small_config

FACTS = {
    "step": 5,
    "model": dataclasses.asdict(resolve_plan(small_config(), 1, SMALL_VOCAB).dims),
    "config": SMALL,
    "layout": {"data": 2, "tensor": 1, "pipeline": 1},
    "tokenizer": {"vocab_size": SMALL_VOCAB},
}


def changes(**sections) -> list[str]:
    config = small_config(**sections)
    return describe_changes(FACTS, config, resolve_plan(config, 1, SMALL_VOCAB))


def test_each_changed_rate_schedule_horizon_and_batch_is_a_line():
    lines = changes(optimizer={"matrix_lr": 0.01, "warmup_steps": 3}, horizon={"steps": 30}, batch={"tokens": 320})
    assert all(line.startswith("changed since the checkpoint: ") for line in lines)
    named = {line.split(": ")[1].split(" was ")[0]: line for line in lines}
    for name in ("optimizer.matrix_lr", "optimizer.warmup_steps", "horizon.steps", "batch.tokens", "steps (derived)"):
        assert name in named
    assert "optimizer.warmup_steps was 2 and is 3" in named["optimizer.warmup_steps"]
    assert "tokens_per_step (derived) was 1920 and is 320" in named["tokens_per_step (derived)"]
    assert "matrix rate (derived)" in named and "embedding rate (derived)" not in named


def test_other_ranks_or_a_pause_are_no_change():
    assert changes() == changes(horizon={"steps": 20, "stop_step": 7}, log={"every": 3}) == []


def test_a_checkpoint_of_unknown_settings_reports_nothing():
    for facts in ({}, FACTS | {"config": {"model": {"odd": 1}}}, FACTS | {"layout": None}):
        assert describe_changes(facts, small_config(), resolve_plan(small_config(), 1, SMALL_VOCAB)) == []


def test_flops_of_an_early_checkpoint_are_of_its_batch():
    plan = resolve_plan(small_config(batch={"tokens": 320}), 1, SMALL_VOCAB)
    assert saved_flops(FACTS, plan) == plan.flops_per_token * 1920 * 5
    assert saved_flops({"step": 5}, plan) == plan.flops_per_token * 320 * 5
