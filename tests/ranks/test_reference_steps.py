"""Ten further steps of nanochat's checkpoint through the engine, on one rank and on two: its losses and weights."""

import pytest

from tests import reference
from tests.harness import run_ranks
from tests.training import build, load_whole_state, take_step, whole_state


def ten_steps() -> tuple[list[float], dict[str, float]]:
    training = build(reference.config(), reference.VOCAB_SIZE)
    load_whole_state(training, reference.state(), adamw_step=reference.FIRST_STEP)
    training.muon.set_hyper(lr=0.02, weight_decay=0.28, momentum=0.95)
    losses = [take_step(training, reference.rows(reference.FIRST_STEP + step))[0] for step in range(10)]
    return losses, {
        name[6:]: tensor.norm().item() for name, tensor in whole_state(training).items() if name.startswith("model/")
    }


@reference.needs_reference
@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_weight_norms_are_nanochats(world):
    expected = reference.expected()
    for losses, norms in run_ranks(ten_steps, world):
        assert losses == pytest.approx(expected["train_losses_steps_20_to_29"], rel=1e-4)
        assert norms.keys() == expected["weight_norms_after_step_29"].keys()
        for name, norm in expected["weight_norms_after_step_29"].items():
            assert norms[name] == pytest.approx(norm, rel=1e-4), name
