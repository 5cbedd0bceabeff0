"""nanochat's checkpoint, imported as a user does it, goes on: with nanochat's own losses, and from the command line."""

import json

import pytest

from megachat.checkpoint.facts import read_facts
from megachat.checkpoint.storage import load_checkpoint
from megachat.train.state import state_pieces
from tests import reference
from tests.harness import run_ranks
from tests.runs.forked import run_forked
from tests.runs.job import Place, checkpoint, losses, make_place
from tests.training import build, take_step, whole_state
from tests.unit.convert.checkpoints import STEP, make_run

TOOL = ["tools/convert_checkpoint.py"]


def converted(*arguments) -> str:
    done = run_forked([*TOOL, *arguments])
    assert done.status == 0, done.err
    return done.out


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return make_place(tmp_path_factory.mktemp("convert"))


def ten_steps(saved):
    """The steps of tests/ranks/test_reference_steps.py, but from the imported checkpoint's files."""
    training = build(reference.config(), reference.VOCAB_SIZE)
    load_checkpoint(saved, state_pieces(training))
    for counter in training.engine.adamw.step_counters():
        counter.fill_(read_facts(saved)["adamw_steps"])
    training.engine.adamw.refresh_weights()
    training.muon.refresh_weights()
    training.muon.set_hyper(lr=0.02, weight_decay=0.28, momentum=0.95)
    train_losses = [take_step(training, reference.rows(reference.FIRST_STEP + step))[0] for step in range(10)]
    return train_losses, {
        name[6:]: tensor.norm().item() for name, tensor in whole_state(training).items() if name.startswith("model/")
    }


@reference.needs_reference
def test_ten_steps_from_the_imported_checkpoint_are_nanochats(tmp_path):
    converted("from-nanochat", reference.FOLDER, tmp_path / "run")
    expected = reference.expected()
    for train_losses, norms in run_ranks(ten_steps, 2, checkpoint(tmp_path / "run", 20)):
        assert train_losses == pytest.approx(expected["train_losses_steps_20_to_29"], rel=1e-6)
        assert norms == pytest.approx(expected["weight_norms_after_step_29"], rel=1e-4)


def test_an_imported_run_goes_on_and_on(place, tmp_path):
    """Through nanochat's files of two ranks, then two starts: the first reads the documents from the first one and says
    so, the second goes on.
    """
    source = make_run(tmp_path / "source", model={"kv_heads": None, "sequence_len": 64})
    converted("to-nanochat", source, tmp_path / "nanochat", "--ranks", "2")
    run = place.runs / "imported"
    assert "the loader starts at the first ones" in converted("from-nanochat", tmp_path / "nanochat", run)
    start = [
        "launch/pretrain.py",
        "--config",
        run / "config.json",
        "--resume",
        "auto",
        "--set",
        f"data.folder={place.data}",
    ]
    start += [
        "--set",
        "data.streams=2",
        "--set",
        "evaluate.tokens=128",
        "--set",
        "evaluate.every=0",
        "--set",
        "precision.compute=float32",
    ]

    def train(stop: int) -> str:
        done = run_forked([*start, "--set", f"horizon.stop_step={stop}"])
        assert done.status == 0, done.out + done.err
        return done.out

    first = train(STEP + 2)
    assert (
        f"resumed from {checkpoint(run, STEP)} at step {STEP}" in first
        and f"documents restart from the first one at step {STEP}" in first
    )
    second = train(STEP + 4)
    assert (
        f"resumed from {checkpoint(run, STEP + 2)} at step {STEP + 2}" in second and "documents restart" not in second
    )
    assert list(losses(run)) == list(range(STEP, STEP + 4))
    facts = json.loads((checkpoint(run, STEP + 4) / "checkpoint.json").read_text())
    assert facts["step"] == facts["adamw_steps"] == STEP + 4 and "imported" not in facts
    output = converted("to-nanochat", run, tmp_path / "again")
    assert "logit difference 0.00e+00" in output and (tmp_path / "again" / f"optim_{STEP + 4:06d}_rank0.pt").is_file()


def test_the_tool_says_what_is_wrong_in_one_line(tmp_path):
    done = run_forked([*TOOL, "from-nanochat", tmp_path, tmp_path / "new"])
    assert (
        done.status == 2
        and len(done.errors) == 1
        and done.err == done.errors[0] + "\n"
        and not list(tmp_path.iterdir())
    )
