"""A run that stops and goes on equals the one that never stopped: bit for bit on as many ranks, row for row on any
number.
"""

import json
import re
import shutil

import pytest
import torch

from megachat.errors import EXIT_STATUS
from tests.runs.forked import run_forked
from tests.runs.job import (
    STEPS,
    bits_per_byte,
    checkpoint,
    checkpoints,
    command,
    different,
    facts,
    ledgers,
    losses,
    metrics,
    refused,
    train,
)
from tests.training import load_model_weights

STOP = 3  # not a step at which checkpoint.every saves


def stopped_copy(run, place, name):
    """The run folder of a run that stopped, to go on with elsewhere."""
    shutil.copytree(run, place.runs / name)
    return place.runs / name


def crash_after(run, step):
    """What a crash leaves: later checkpoints do not exist, but the metrics of the steps after `step` do, the last line
    cut short.
    """
    for name in checkpoints(run):
        if name > f"step_{step:06d}":
            shutil.rmtree(run / "checkpoints" / name)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])


def rates(run):
    """The rate multiplier of each step."""
    return [value for _, value in sorted({m["step"]: m["train/lrm"] for m in metrics(run) if "train/lrm" in m}.items())]


def check_equal(run, uninterrupted):
    """Losses and evaluations as written, weights, both optimizers, counters and the documents seen."""
    assert losses(run) == losses(uninterrupted) and losses(run, "train/loss") == losses(uninterrupted, "train/loss")
    assert bits_per_byte(run) == bits_per_byte(uninterrupted)
    final, wanted = checkpoint(run, STEPS), checkpoint(uninterrupted, STEPS)
    assert different(final, wanted) == []
    weights = load_model_weights(final)
    assert weights.keys() == load_model_weights(wanted).keys() and all(
        bool(torch.isfinite(weight).all()) for weight in weights.values()
    )
    assert ledgers(final) == ledgers(wanted) and len(ledgers(final)) == 4
    actual, expected = facts(final), facts(wanted)
    assert (actual["adamw_steps"], actual["loss_scaler"]) == (expected["adamw_steps"], expected["loss_scaler"])
    for step in {4, STEPS}:  # the first holds the evaluation that was made before the stop
        actual, expected = facts(checkpoint(run, step))["loop"], facts(checkpoint(uninterrupted, step))["loop"]
        assert actual.pop("training_s") >= 0 and actual.items() <= expected.items()


@pytest.fixture(scope="module")
def stopped(place):
    """World size -> run folder of a run that was told to stop after STOP of its steps."""
    settings = {"horizon": {"steps": STEPS, "stop_step": STOP}}
    return {world: train(place, f"stopped_{world}", world=world, config=settings) for world in (1, 2)}


def test_a_stopped_run_has_trained_on_the_schedule_of_the_whole(one, two, stopped):
    for uninterrupted, run in ((one, stopped[1]), (two, stopped[2])):
        assert losses(run) == {step: loss for step, loss in losses(uninterrupted).items() if step < STOP}
        assert rates(run) == rates(uninterrupted)[:STOP]
        assert checkpoints(run) == ["step_000002", "step_000003"]


@pytest.mark.parametrize("world", [1, 2])
def test_stop_and_go_on_is_bit_for_bit_the_same(world, one, two, stopped, place):
    run = stopped_copy(stopped[world], place, f"resumed_{world}")
    train(place, run.name, "--resume", "auto", world=world)
    check_equal(run, {1: one, 2: two}[world])
    curve = [line for line in metrics(run) if "checkpoint/total_s" not in line]
    assert [line["step"] for line in curve] == [0, 0, 1, 2, 3, 3, 4, 5, 6], (
        "one curve: the evaluations before the first step, after 3 and after 6 among six training lines"
    )
    assert curve[-1]["total_training_flops"] == max(line.get("total_training_flops", 0) for line in metrics(one))
    saves = [line for line in metrics(run) if "checkpoint/total_s" in line]
    assert len(saves) == 4 and all(0 <= line["checkpoint/blocked_s"] <= line["checkpoint/total_s"] for line in saves)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_ranks_sees_the_same_rows(before, after, one, stopped, place):
    run = stopped_copy(stopped[before], place, f"from_{before}_to_{after}")
    train(place, run.name, "--resume", "auto", world=after)
    assert ledgers(checkpoint(run, STEPS)) == ledgers(checkpoint(one, STEPS))
    assert ledgers(checkpoint(run, STEPS)) != ledgers(checkpoint(one, 4))
    assert losses(run) == pytest.approx(losses(one), rel=1e-4)
    assert bits_per_byte(run) == pytest.approx(bits_per_byte(one), rel=1e-4)
    assert facts(checkpoint(run, STEPS))["layout"]["data"] == after


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_a_crash_in_half_precision_costs_nothing_but_time(compute, place):
    # a scale that no float16 gradient survives: skipped steps and a scaler that has moved are part of what must come
    # back
    settings = {
        "precision": {"compute": compute, "loss_scale": 2.0**24, "loss_scale_window": 2},
        "evaluate": {"every": 0},
        "checkpoint": {"every": 4},
        "optimizer": {"final_lr_fraction": 0.0},
    }
    uninterrupted = train(place, f"whole_{compute}", world=2, config=settings)
    run = stopped_copy(uninterrupted, place, f"crashed_{compute}")
    crash_after(run, 4)
    train(place, run.name, "--resume", "auto", world=2, config=settings)
    check_equal(run, uninterrupted)
    # two steps of warm-up, four of warm-down: the rate would be 0 one step after the last one
    assert rates(run) == rates(uninterrupted) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    if compute == "float16":
        saved = facts(checkpoint(run, 4))
        assert saved["loop"]["skipped_steps"] > 0 and saved["loss_scaler"]["cur_scale"] != 2.0**24
        assert saved["adamw_steps"] == 4 - saved["loop"]["skipped_steps"]


def test_float16_resumes_from_another_dtype_with_the_configured_scale(one, place):
    run = stopped_copy(one, place, "to_float16")
    crash_after(run, 4)
    assert facts(checkpoint(run, 4))["loss_scaler"]["cur_scale"] == 1.0
    train(place, run.name, "--resume", "auto", config={"precision": {"compute": "float16", "loss_scale": 2.0**10}})
    assert facts(checkpoint(run, STEPS))["loss_scaler"]["cur_scale"] == 2.0**10


RESTARTS_DOCUMENTS = """
from megachat.programs import job_inputs

documents, resumes = job_inputs.resume_documents, []

def resume_documents(*given):
    resumes.append(given)
    state, notes = documents(*given)
    return (state if len(resumes) < 2 else None), notes

job_inputs.resume_documents = resume_documents
from megachat.commands.main import door
door("pretrain")()
"""


def test_a_self_test_changes_nothing_and_refuses_a_loader_that_restarts_at_the_second_resume(two, place, tmp_path):
    program = command(place, "self_tested", "--self-test")
    done = run_forked(program, world=2)
    assert done.status == 0, done.out + done.err
    assert re.search(r"self-test passed in [0-9.]+ s: 6 steps, .* with 2 resumes, are equal to the bit\n", done.out)
    check_equal(place.runs / "self_tested", two)
    (tmp_path / "broken.py").write_text(RESTARTS_DOCUMENTS)
    done = run_forked([str(tmp_path / "broken.py"), *command(place, "self_test_fails", "--self-test")[1:]])
    assert done.status == EXIT_STATUS and len(done.errors) == 1, done.err
    assert "the self-test failed: after resume 2 the loss of step 4 is " in done.errors[0]
    left = [path.name for path in place.runs.iterdir()]
    assert not any(name.endswith(".self-test") for name in left)
    assert {path.name for path in (place.runs / "self_test_fails").glob("*")} <= {"lock"}


def test_starting_over_in_the_folder_of_another_run_is_refused(one, shared_place):
    before = sorted(one.rglob("*")), (one / "metrics.jsonl").read_bytes(), (one / "config.json").read_bytes()
    error = refused(shared_place, "one")
    for fact in (str(one), "step_000006", "--resume auto", "--set run.name=NAME"):
        assert fact in error
    assert (sorted(one.rglob("*")), (one / "metrics.jsonl").read_bytes(), (one / "config.json").read_bytes()) == before


def test_resuming_a_finished_run_says_so(one, shared_place):
    before = losses(one), bits_per_byte(one)
    done = run_forked(command(shared_place, "one", "--resume", "auto"))
    assert done.status == 0 and done.err == ""
    assert (
        "nothing to do: step 6 is not before the last step 6; raise horizon.steps or horizon.stop_step to continue"
        in done.out
    )
    assert f"resumed from {checkpoint(one, 6)} at step 6" in done.out
    assert (losses(one), bits_per_byte(one)) == before


def test_a_named_checkpoint_of_another_run_can_be_gone_on_with(one, place):
    run = train(place, "branched", "--resume", str(checkpoint(one, 4)))
    assert losses(run) == {step: loss for step, loss in losses(one).items() if step >= 4}
    assert different(checkpoint(run, STEPS), checkpoint(one, STEPS)) == []


def test_old_checkpoints_are_removed_as_configured_and_writing_in_front_is_the_same(one, place):
    kept = {"checkpoint": {"every": 1, "keep_last": 2, "keep_every": 3, "background": False}}
    run = train(place, "kept", config=kept)
    assert checkpoints(run) == ["step_000003", "step_000005", "step_000006"]
    assert losses(run) == losses(one) and different(checkpoint(run, STEPS), checkpoint(one, STEPS)) == []


def test_documents_begin_anew_once_when_that_is_allowed(stopped, place):
    run = stopped_copy(stopped[2], place, "anew")
    settings = {"data": {"buffer_documents": 20, "resume": "restart"}}
    restarts = {}
    for stop_step, world in ((5, 2), (6, 1)):
        config = settings | {"horizon": {"steps": STEPS, "stop_step": stop_step}}
        done = run_forked(command(place, run.name, "--resume", "auto", config=config), world)
        assert done.status == 0, done.err
        restarts[stop_step] = [line for line in done.out.splitlines() if "documents restart" in line]
    (line,), again = restarts[5], restarts[6]
    assert (
        "documents restart from the first one at step 3 and may repeat earlier ones "
        "(data.resume=restart; the checkpoint's loader"
    ) in line
    assert again == [], "the setting is still there, but they can go on"
    (restart,) = json.loads((checkpoint(run, 6) / "loader" / "loader.json").read_text())["restarts"]
    assert restart == {"step": 3, "ledger": facts(checkpoint(run, 3))["ledger"]} and len(restart["ledger"]) == 64
