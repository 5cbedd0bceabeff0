"""A checkpoint of any layout goes on at any other: the same state to the bit, and the losses of the run that never stopped."""

import math

import pytest

from megachat.checkpoint.load import load_checkpoint
from megachat.checkpoint.save import save_checkpoint
from megachat.parallel.engine import adamw_steps
from megachat.train.state import state_pieces
from megachat.train.step import set_schedules
from megachat.train.verify import warm_up
from tests.harness import run_ranks
from tests.oracle import ROWS, TOKENS
from tests.training import SMALL_VOCAB, build, random_rows, small_config, take_step, whole_state

MODEL = {"aspect_ratio": 32, "head_size": 16, "kv_heads": 2}
LAYOUTS = {
    "one": (1, {}),
    "dp4": (4, {}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "dp2 pp3": (6, {"pipeline": 3}),
    "dp2 tp2 sequence": (4, {"tensor": 2, "sequence": True}),
}


def config_of(layout: str):
    return small_config(model=MODEL, parallel=LAYOUTS[layout][1])


def steps(training, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        set_schedules(training, step)
        losses.append(take_step(training, random_rows(step, ROWS, TOKENS, SMALL_VOCAB))[0])
    return losses


def save_and_go_on(config, folder):
    """(checkpoint after two steps, its state, the losses of the next two)."""
    training = build(config, SMALL_VOCAB)
    warm_up(training)
    steps(training, 0, 2)
    path = save_checkpoint(folder, 2, state_pieces(training, replicas=False), {}, lambda _: None, training.mesh.world)
    return path, whole_state(training), steps(training, 2, 4)


def load_and_go_on(config, path):
    training = build(config, SMALL_VOCAB)
    load_checkpoint(path, state_pieces(training))
    for counter in adamw_steps(training.engine.optimizer):
        counter.fill_(2)
    training.engine.optimizer.update_lp_params()
    training.muon.refresh_weights()
    return whole_state(training), steps(training, 2, 4)


@pytest.mark.parametrize("saved_on", ["tp2 pp2", "one", "dp2 pp3"])
def test_any_layout_goes_on_from_any_other(saved_on, tmp_path):
    path, state, losses = run_ranks(save_and_go_on, LAYOUTS[saved_on][0], config_of(saved_on), tmp_path)[0]
    assert len(state) > 60 and losses[1] < losses[0]
    for layout, (world, _) in LAYOUTS.items():
        for found, others in run_ranks(load_and_go_on, world, config_of(layout), path):
            assert found.keys() == state.keys()
            assert [name for name in state if not found[name].equal(state[name])] == [], f"{saved_on} loaded on {layout}"
            assert others == pytest.approx(losses, rel=2e-6), f"{saved_on} gone on with on {layout}"


def offered(config):
    training = build(config, SMALL_VOCAB)
    return {
        name: (shape, sum(view.numel() for _, _, view in rectangles)) for name, (shape, rectangles) in state_pieces(training, replicas=False).items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_offer_each_element_once(layout):
    counts: dict[str, int] = {}
    for each in run_ranks(offered, LAYOUTS[layout][0], config_of(layout)):
        for name, (shape, count) in each.items():
            counts[name] = counts.get(name, 0) + count - math.prod(shape) * (name not in counts)
    assert len(counts) > 60 and set(counts.values()) == {0}
