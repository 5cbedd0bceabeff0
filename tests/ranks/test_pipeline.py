"""The pipeline axis under DeepSpeed's engine.

Numbers name the traps of DeepSpeed's pipeline that each test guards against.
"""

import dataclasses
from datetime import timedelta

import numpy as np
import pytest
import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.evals.engine_model import EngineModel
from megachat.evals.generation import generate
from megachat.parallel.build import PIPELINE_SETTINGS, start_collectives
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import build_mesh
from megachat.place import place_of
from megachat.planning.plan import resolve_plan
from megachat.programs.verify_layout import warm_up
from megachat.train.stage import build_stage
from megachat.train.step import set_schedules
from tests.harness import RankError, run_ranks
from tests.oracle import ROWS, TOKENS
from tests.training import SMALL_VOCAB, build, random_rows, small_config, take_step, whole_state

GQA = {"aspect_ratio": 32, "head_size": 16, "kv_heads": 2}


def hooks_of_a_step(config):
    training = build(config, SMALL_VOCAB)
    counts = {}
    for parameter in training.layers.parameters():
        key = place_of(parameter).name, place_of(parameter).block
        counts[key] = 0

        def count(_, key=key):
            counts[key] += 1

        parameter.register_post_accumulate_grad_hook(count)
    take_step(training, random_rows(0, ROWS, TOKENS, SMALL_VOCAB))
    groups = [group["name"] for group in training.engine.adamw.param_groups]
    return counts, groups, training.plan.accumulation


def test_every_gradient_hook_fires_once_a_micro_batch_on_stages_with_unlike_groups():
    """Traps 5 and 9: one backward over all tensors of a stage's output; no collective a group."""
    answers = run_ranks(hooks_of_a_step, 3, small_config(parallel={"pipeline": 3}))
    assert len({tuple(groups) for _, groups, _ in answers}) == 3, (
        "the stages have the same groups, so this shows nothing"
    )
    for counts, _, accumulation in answers:
        assert set(counts.values()) == {accumulation} and accumulation == 12


def test_the_override_is_what_deepspeed_calls_and_its_defaults_are_off():
    """Traps 10, 11 and 13."""
    assert Engine._INSTRUCTION_MAP[schedule.BackwardPass] is not PipelineEngine._INSTRUCTION_MAP[schedule.BackwardPass]
    pipeline = PIPELINE_SETTINGS["pipeline"]
    assert pipeline == {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}


def evaluate_between(config, evaluates: bool):
    training = build(config, SMALL_VOCAB)
    warm_up(training)
    outcomes = []
    for step in range(3):
        set_schedules(training, step)
        outcomes.append(take_step(training, random_rows(step, ROWS, TOKENS, SMALL_VOCAB))[0])
        if evaluates:
            rows = random_rows(step, 8, 91, SMALL_VOCAB)[training.mesh.data.rank :: training.mesh.data.size]
            validation = ValidationRows(iter(rows.split(1)), 7, 1, training.mesh)
            outcomes[-1] = outcomes[-1], bits_per_byte(training.engine, validation, training.mesh)
            ids = [np.arange(3 + step), np.arange(20) * 3]
            outcomes[-1] += (
                generate(EngineModel(training.engine, training.mesh, training.plan.dims, multiple=2), ids, tokens=6),
            )
    return outcomes, whole_state(training)


LAYOUTS = [
    (2, {"pipeline": 2}),
    (2, {"tensor": 2}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    (4, {"pipeline": 2}),
]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_evaluating_and_sampling_other_shapes_between_steps_changes_nothing_and_is_right(world, parallel):
    """Trap 12: the buffers between stages have the shape of the first batch that they saw."""
    config = small_config(model=GQA, parallel=parallel)
    without = run_ranks(evaluate_between, world, config, False)
    with_both = run_ranks(evaluate_between, world, config, True)
    ((alone, _),) = run_ranks(evaluate_between, 1, small_config(model=GQA), True)
    for (plain, state), (outcomes, state_after) in zip(without, with_both, strict=True):
        assert [loss for loss, _, _ in outcomes] == plain
        assert all(torch.equal(state[name], state_after[name]) for name in state)
        assert [tokens for _, _, tokens in outcomes] == [tokens for _, _, tokens in alone]
        assert [bpb for _, bpb, _ in outcomes] == pytest.approx([bpb for _, bpb, _ in alone], rel=2e-6)


class NotedWait:
    """In the place of a gather under way: writes down when it is waited for."""

    def __init__(self, events: list, blocks: set[int]):
        self.events, self.blocks = events, blocks

    def wait(self) -> None:
        self.events.append(("wait", self.blocks))


def order_of_waits(config):
    training = build(config, SMALL_VOCAB)
    take_step(training, random_rows(0, ROWS, TOKENS, SMALL_VOCAB))
    events = []
    for bucket in training.muon._buckets:
        bucket.gather = NotedWait(
            events, {training.muon.plan.matrices[index].block for index in bucket.layout.matrices}
        )
    for layer in training.layers:
        block = place_of(next(layer.parameters())).block
        layer.register_forward_pre_hook(lambda _, inputs, block=block: events.append(("forward", block)))
    rows = random_rows(1, 12, TOKENS, SMALL_VOCAB)[training.mesh.data.rank :: training.mesh.data.size]
    training.engine.evaluate([(rows[:1, :-1], rows[:1, 1:])])
    return events, [matrix.block for matrix in training.muon.plan.matrices]


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"pipeline": 2}), (2, {"tensor": 2})])
def test_a_layer_waits_for_the_gather_of_its_matrices_before_it_runs(world, parallel):
    for events, blocks in run_ranks(order_of_waits, world, small_config(model=GQA, parallel=parallel)):
        forwards = [block for kind, block in events if kind == "forward"]
        assert set(blocks) <= set(forwards)
        for block in set(blocks):
            before = events[: events.index(("forward", block))]
            assert any(kind == "wait" and block in waited for kind, waited in before if kind == "wait"), (
                f"block {block} runs with old weights"
            )


def build_with_a_hole(config):
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"), pipeline=config.parallel.pipeline)
    plan = resolve_plan(config, mesh.world.size, SMALL_VOCAB)
    build_stage(config, dataclasses.replace(plan, stages=((0, 2), (3, 5))), mesh, torch.float32)


def test_stages_that_are_not_the_model_are_refused():
    with pytest.raises(
        RankError, match=r"the pipeline stages \(\(0, 2\), \(3, 5\)\) together are not the model: they have"
    ):
        run_ranks(build_with_a_hole, 2, small_config(parallel={"pipeline": 2}))
