"""What a user gets wrong: exit status 2, one sentence that says what to change, no traceback, and no run folder."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megachat.data.tokenizer import Tokenizer, save_tokenizer
from tests.limits import limit_s
from tests.runs.forked import run_forked
from tests.runs.job import checkpoint, command, different, finish, launched, losses, refused
from tests.runs.warm import Launcher

# name -> (arguments; {folder} stands for the inputs of this module, {one} for a finished run; what the sentence must
# say)
CASES = {
    "no_data": (
        ["--set", "data.folder={folder}/none"],
        ["the data folder {folder}/none does not exist", "`megachat data"],
    ),
    "empty_data": (
        ["--set", "data.folder={folder}/empty"],
        ["{folder}/empty has no .parquet file", "`megachat data"],
    ),
    "not_parquet": (
        ["--set", "data.folder={folder}/not_parquet"],
        ["{folder}/not_parquet/shard_00001.parquet is not a parquet file"],
    ),
    "no_text": (
        ["--set", "data.folder={folder}/no_text"],
        ["no_text/shard_00001.parquet has no `text` column (it has body)"],
    ),
    "cut_data": (
        ["--set", "data.folder={folder}/cut_data"],
        ["{folder}/cut_data/shard_00001.parquet", "truncated after 1,000 bytes"],
    ),
    "few_documents": (
        ["--set", "data.folder={folder}/few_documents"],
        ["the validation shard", "has 2 documents, fewer than 4 packing streams", "set data.streams to 2"],
    ),
    "no_validation_text": (
        ["--set", "data.folder={folder}/no_validation_text"],
        ["{folder}/no_validation_text/shard_00002.parquet has no text at all, only null or empty documents"],
    ),
    "little_validation_text": (
        ["--set", "data.folder={folder}/little_validation_text"],
        ["shard_00002.parquet has no text for 3 of 4 packing streams, only null or empty documents: put more text in"],
    ),
    "no_tokenizer": (
        ["--set", "data.tokenizer={folder}/none"],
        ["no tokenizer at {folder}/none", "`megachat tokenizer`"],
    ),
    "other_vocabulary": (
        ["--set", "model.vocab_size=300"],
        ["model.vocab_size is 300 but the tokenizer in", "has 265 tokens"],
    ),
    "unknown_key": (["--set", "model.dept=3"], ["unknown key model.dept; did you mean model.depth?"]),
    "wrong_type": (["--set", "model.depth=two"], ['model.depth is "two" but should be a valid integer']),
    "batch": (
        ["--set", "batch.tokens=400"],
        ["a step of 400 tokens is 6.25 rows of 64", "set batch.tokens to 384 (6 rows) or 448 (7 rows)"],
    ),
    "tensor": (
        ["--set", "parallel.tensor=2"],
        ["parallel.tensor 2 x parallel.pipeline 1 does not divide the 1 rank", "start 2 ranks"],
    ),
    "wandb": (
        ["--set", "log.wandb=offline"],
        ['log.wandb is "offline" but wandb is not installed: pip install wandb, or set log.wandb=off'],
    ),
    "no_checkpoint": (
        ["--resume", "{folder}/none"],
        ["--resume {folder}/none: there is no such folder; give auto"],
    ),
    "other_depth": (
        ["--resume", "{one}/checkpoints/step_000004", "--set", "model.depth=3"],
        ["another model: depth 2 (configured: 3), "],
    ),
    "other_tokenizer": (
        ["--resume", "{one}/checkpoints/step_000004", "--set", "data.tokenizer={folder}/other_tokenizer"],
        [
            "step_000004 was trained with another tokenizer (265 tokens, fingerprint ",
            "set data.tokenizer to the one it was trained with",
        ],
    ),
    "other_streams": (
        ["--resume", "{one}/checkpoints/step_000004", "--set", "data.streams=2"],
        ["packing streams (data.streams) 4", "has 2"],
    ),
    "cut_checkpoint": (
        ["--resume", "{folder}/cut/step_000004"],
        ["{folder}/cut/step_000004 is incomplete: __0_0.distcp has 1000 bytes, not ", "--resume auto"],
    ),
    "damaged_index": (["--resume", "{folder}/damaged/step_000004"], ["{folder}/damaged/step_000004", "tensors.json"]),
    "run_folder": (
        ["--set", "run.folder={folder}/nothing/wandb.py"],
        [
            (
                "the run folder {folder}/nothing/wandb.py/run_folder cannot be read (Not a directory): correct the "
                "path, a part of it is no folder, or set run.folder to another path"
            )
        ],
    ),
    "missing_loader": (
        ["--resume", "{folder}/missing/step_000004"],
        ["is incomplete: loader/stream_00002.npz is missing"],
    ),
}


def write_inputs(folder: Path, place, one) -> None:
    (folder / "empty").mkdir()
    for name in ("not_parquet", "no_text", "cut_data", "few_documents", "no_validation_text", "little_validation_text"):
        shutil.copytree(place.data, folder / name)
    (folder / "not_parquet" / "shard_00001.parquet").write_text("the old river\n" * 100)
    pq.write_table(pa.table({"body": ["the old river"] * 10}), folder / "no_text" / "shard_00001.parquet")
    os.truncate(folder / "cut_data" / "shard_00001.parquet", 1000)
    pq.write_table(pa.table({"text": ["the old river"] * 2}), folder / "few_documents" / "shard_00002.parquet")
    for name, texts in {"no": [None, ""] * 5, "little": ["", "the old river", None, ""]}.items():
        table = pa.table({"text": pa.array(texts, pa.string())})
        pq.write_table(table, folder / f"{name}_validation_text" / "shard_00002.parquet")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    save_tokenizer(folder / "other_tokenizer", Tokenizer(ranks), {"source": "tests"})
    for name in ("cut", "damaged", "missing"):
        shutil.copytree(checkpoint(one, 4), folder / name / "step_000004")
    os.truncate(folder / "cut" / "step_000004" / "__0_0.distcp", 1000)
    index = folder / "damaged" / "step_000004" / "tensors.json"
    index.write_bytes(b"\0" * index.stat().st_size)
    (folder / "missing" / "step_000004" / "loader" / "stream_00002.npz").unlink()
    (folder / "nothing").mkdir()
    (folder / "nothing" / "wandb.py").write_text("raise ImportError('not here')\n")  # also where it is installed


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, place, one):
    """name -> how the program ended."""
    folder = tmp_path_factory.mktemp("bad")
    write_inputs(folder, place, one)

    def end(name):
        arguments = [argument.format(folder=folder, one=one) for argument in CASES[name][0]]
        return run_forked(command(place, name, *arguments), variables={"PYTHONPATH": str(folder / "nothing")})

    return folder, {name: end(name) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_reported_in_one_sentence(name, mistakes, place, one):
    folder, ended = mistakes
    done = ended[name]
    assert done.status == 2, f"ended with {done.status}:\n{done.out}\n{done.err}"
    assert len(done.errors) == 1 and done.err == done.errors[0] + "\n", done.err
    assert done.out == ""
    for part in CASES[name][1]:
        assert part.format(folder=folder, one=one) in done.err
    assert not (place.runs / name).exists()


def test_several_mistakes_are_reported_at_once(place):
    done = run_forked(command(place, "several", "--set", "model.dept=3", "--set", "run.seed=-1", "--set", "depth=3"))
    assert done.status == 2 and len(done.errors) == len(done.err.splitlines()) == 3, done.err


def test_a_config_that_is_no_json_names_the_line(place):
    path = place.runs / "broken.json"
    path.write_text('{"model": {"depth": 2},\n "batch": }\n')
    done = run_forked([command(place, "unused")[0], "--config", str(path)])
    assert (done.status, done.err) == (2, f"error: {path}: not JSON at line 2 column 11: Expecting value\n")


def test_two_ranks_tell_a_mistake_once(place):
    # rank 1 waits until the launcher ends it, however long that takes
    patient = {"TESTS_FIRST": f"from megachat import errors; errors._OTHER_RANKS_WAIT_S = {limit_s()}"}
    line = launched("deepspeed", 2, command(place, "twice", "--set", "data.folder=nowhere"))
    done = finish(Launcher(line, patient))
    assert done.status == 2
    assert done.errors == [
        "error: the data folder nowhere does not exist: create it with `megachat data --source KIND --out nowhere`"
    ]
    assert "Traceback" not in done.out + done.err and not (place.runs / "twice").exists()


def test_a_batch_for_other_ranks_is_refused_with_the_nearest(place):
    done = run_forked(command(place, "uneven", "--set", "batch.tokens=448"), 2)
    assert done.status == 2 and len(done.errors) == 1
    assert (
        "a step of 448 tokens is 7 rows of 64, which 2 data-parallel ranks x 1 rows per micro-batch cannot share evenly"
        in done.err
    )
    assert "set batch.tokens to 384 (6 rows) or 512 (8 rows)" in done.err


def test_auto_passes_over_a_checkpoint_that_was_cut_short(one, place):
    run = place.runs / "fallback"
    shutil.copytree(one, run)
    os.truncate(checkpoint(run, 6) / "__0_0.distcp", 1000)
    done = run_forked(command(place, "fallback", "--resume", "auto"))
    assert done.status == 0 and done.err == ""
    assert f"{checkpoint(run, 6)} is incomplete: __0_0.distcp has 1000 bytes" in done.out
    assert f"resumed from {checkpoint(run, 4)} at step 4" in done.out
    assert losses(run) == losses(one) and different(checkpoint(run, 6), checkpoint(one, 6)) == []


def test_auto_with_nothing_complete_is_refused(one, place):
    run = place.runs / "nothing_left"
    shutil.copytree(checkpoint(one, 4), checkpoint(run, 4))
    (checkpoint(run, 4) / "checkpoint.json").write_text(json.dumps({"format_version": 99, "files": {}}))
    error = refused(place, "nothing_left", "--resume", "auto")
    assert (
        error.startswith(f"{run} holds no complete checkpoint to resume from: ")
        and "newer than this program's" in error
    )


def test_more_ranks_than_the_rows_allow(place, two):
    """A resume at a number of ranks that does not divide the batch is refused with numbers that do, and the run stays
    as it is.
    """
    before = sorted(two.rglob("*"))
    done = run_forked(command(place, "two", "--resume", "auto"), 4)
    assert [line for line in done.errors if "4 data-parallel ranks" in line] == done.errors and len(done.errors) == 1
    assert sorted(two.rglob("*")) == before


def test_world_without_a_dry_run_is_refused(place):
    done = run_forked(command(place, "world", "--world", "3"))
    assert (
        done.status == 2 and "error: --world is the number of ranks" in done.err and not (place.runs / "world").exists()
    )
