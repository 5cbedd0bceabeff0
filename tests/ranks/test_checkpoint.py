"""Any number of ranks reads a checkpoint that any number of ranks wrote, and all ranks fail together."""

import os
import resource
from pathlib import Path

import pytest
import torch

from megachat.checkpoint.facts import read_facts
from megachat.checkpoint.resume import newest_complete
from megachat.checkpoint.save import save_checkpoint
from megachat.checkpoint.storage import load_checkpoint
from megachat.errors import UserError
from megachat.train.state import state_pieces
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.training import SMALL_VOCAB, build, load_model_weights, random_rows, small_config, take_step, whole_state

ROWS, TOKENS = 12, 161


def note_rank(folder: Path) -> None:
    (folder / f"rank_{os.environ['RANK']}").write_text("mine")


def trained(config, steps):
    training = build(config, SMALL_VOCAB)
    for step in range(steps):
        set_schedules(training, step)
        take_step(training, random_rows(step, ROWS, TOKENS, SMALL_VOCAB))
    return training


def train_and_save(folder, *configs):
    """Return for each config the path of its checkpoint and the state in it."""
    answers = []
    for number, config in enumerate(configs):
        training = trained(config, 2)
        path = save_checkpoint(
            folder / str(number), 2, state_pieces(training), {"note": "by the test"}, note_rank, training.mesh.world
        )
        answers.append((path, whole_state(training)))
    return answers


def load(*configs_and_paths):
    """Return the states that result from loading into tensors of NaN."""
    answers = []
    for config, path in configs_and_paths:
        training = build(config, SMALL_VOCAB)
        pieces = state_pieces(training)
        with torch.no_grad():
            for _, rectangles in pieces.values():
                for _, _, view in rectangles:
                    view.fill_(torch.nan)
        load_checkpoint(path, pieces)
        answers.append(whole_state(training))
    return answers


def test_four_ranks_write_and_any_number_reads(tmp_path):
    configs = [small_config(precision={"compute": compute}) for compute in ("bfloat16", "float32")]
    (saved, *others) = run_ranks(train_and_save, 4, tmp_path, *configs)
    assert [path for path, _ in saved] == [tmp_path / "0" / "step_000002", tmp_path / "1" / "step_000002"]
    assert all([path for path, _ in other] == [path for path, _ in saved] for other in others)
    for world in (1, 2, 3):
        for loaded_states in run_ranks(load, world, *zip(configs, [path for path, _ in saved], strict=True)):
            for (_, state), loaded in zip(saved, loaded_states, strict=True):
                assert loaded.keys() == state.keys() and len(state) > 40
                assert [name for name in state if not torch.equal(loaded[name], state[name])] == [], f"on {world} ranks"
    for path, state in saved:
        each = [*(f"__{rank}_0.distcp" for rank in range(4)), *(f"rank_{rank}" for rank in range(4)), "tensors.json"]
        assert sorted(read_facts(path)["files"]) == each and read_facts(path)["note"] == "by the test"
        weights = load_model_weights(path)  # in this process, which belongs to no group
        assert {f"model/{name}" for name in weights} == {name for name in state if name.startswith("model/")}
        assert all(torch.equal(weight, state[f"model/{name}"]) for name, weight in weights.items())
        assert list(load_model_weights(path, ["lm_head.weight"])) == ["lm_head.weight"]


def test_one_rank_writes_and_four_read(tmp_path):
    config = small_config()
    (((path, state),),) = run_ranks(train_and_save, 1, tmp_path, config)
    for (loaded_states,) in run_ranks(load, 4, (config, path)):
        assert [name for name in state if not torch.equal(loaded_states[name], state[name])] == []


def load_others(path, *configs):
    message = []
    for config in configs:
        training = build(config, SMALL_VOCAB)
        with pytest.raises(UserError) as error:
            load_checkpoint(path, state_pieces(training))
        message.append(str(error.value))
    return message


def test_another_model_is_refused(tmp_path):
    (((path, _),),) = run_ranks(train_and_save, 1, tmp_path, small_config())
    wider, deeper = small_config(model={"aspect_ratio": 32}), small_config(model={"depth": 4, "aspect_ratio": 12})
    for shapes, names in run_ranks(load_others, 2, path, wider, deeper):
        for fact in (f"{path} has model/transformer.h.0.mlp.c_fc.weight", "[192, 48]", "[384, 96]", "use the config"):
            assert fact in shapes
        # every other block has value embeddings, counted from the last one: the deeper model has them in other blocks
        assert names.startswith(f"{path} has no tensor model/transformer.h.1.attn.ve_gate.weight: ")
        assert "another model" in names and "use the config" in names


def save_three_times(folder, breaks):
    """Save, fail because of `breaks` on rank 1, and save again; returns the error and the files after it."""
    training = trained(small_config(), 1)
    pieces, world = state_pieces(training), training.mesh.world
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_rank_files(path: Path) -> None:
        if world.rank == 1 and breaks == "rank files":
            (path / "no" / "such" / "folder").write_text("")
        if world.rank == 1 and breaks == "tensors":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))

    save_checkpoint(folder, 1, pieces, {}, note_rank, world)
    try:
        save_checkpoint(folder, 2, pieces, {}, write_rank_files, world)
        message = None
    except UserError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    left = sorted(path.name for path in folder.iterdir())
    save_checkpoint(folder, 3, pieces, {}, note_rank, world)
    return message, left


@pytest.mark.parametrize(
    ("breaks", "reason"), [("rank files", "No such file or directory"), ("tensors", "File too large")]
)
def test_one_rank_that_cannot_write_makes_all_ranks_raise(breaks, reason, tmp_path):
    answers = run_ranks(save_three_times, 3, tmp_path, breaks)
    for message, left in answers:
        assert message == answers[0][0], "all ranks say the same"
        assert (
            message.startswith(f"checkpoint {tmp_path / 'step_000002'} could not be saved by rank 1: ")
            and reason in message
        )
        assert "earlier checkpoints are untouched" in message
        assert left == ["step_000001"]
    assert newest_complete(tmp_path) == (tmp_path / "step_000003", [])


def save_where_no_folder_can_be(folder):
    training = build(small_config(), SMALL_VOCAB)
    with pytest.raises(UserError) as message:
        save_checkpoint(folder / "file" / "checkpoints", 1, state_pieces(training), {}, note_rank, training.mesh.world)
    return str(message.value)


def test_a_folder_that_cannot_be_made_is_reported_by_all_ranks(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for message in run_ranks(save_where_no_folder_can_be, 2, tmp_path):
        assert "could not be saved by rank 0: " in message and "Not a directory" in message


def save_large(config, folder):
    training = build(config, SMALL_VOCAB)
    path = save_checkpoint(folder, 0, state_pieces(training), {}, lambda _: None, training.mesh.world)
    return path, dict(training.plan.parameters)


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_a_checkpoint_holds_no_byte_twice(compute, tmp_path):
    """Master and two moments for AdamW's parameters, master and momentum for Muon's; the weights are among these."""
    config = small_config(
        model={"depth": 4, "aspect_ratio": 48, "head_size": 64, "kv_heads": None}, precision={"compute": compute}
    )
    path, parameters = run_ranks(save_large, 2, config, tmp_path)[0]
    least = 8 * parameters["matrices"] + 12 * (parameters["total"] - parameters["matrices"])
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert least > 10e6
    assert least < size < 1.03 * least, f"{size} bytes where {least} are needed"
