"""tools/verify.py as a user runs it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megachat.checkpoint.facts import write_facts
from megachat.checkpoint.index import read_index
from megachat.checkpoint.storage import load_checkpoint, save_rectangles
from megachat.config import load_config
from megachat.convert.architecture import weight_shapes
from megachat.errors import UserError
from megachat.files import file_sha256
from megachat.parallel.mesh import Axis
from megachat.planning.plan import resolve_plan
from megachat.programs.verify_resume import compare_resumed_run, train_to_step
from tests.runs.forked import run_forked, run_without_torchrun
from tests.runs.job import checkpoint, command, losses

TABLES = ["ngram.blocks=[0,1]", "ngram.rows=300", "ngram.storage=host", "ngram.bos=256"]
TABLES += ["lookup.after_blocks=[0]", "lookup.sample_tokens=3000"]
SMALL = ["--set", "model.sequence_len=64", "--set", "model.vocab_size=300", "--set", "model.head_size=32"]


def verify(*arguments, config="configs/d4_cpu.json", small=SMALL):
    return run_forked(["tools/verify.py", "--config", config, *small, *arguments])


def test_two_layouts_are_equal_and_certified(tmp_path):
    done = verify(
        "--depth",
        2,
        "--layout",
        "tp=2,pp=2,dp=2",
        "--layout",
        "tp=2",
        "--rows",
        2,
        "--out",
        tmp_path / "certificate.json",
    )
    assert done.status == 0, done.out + done.err
    assert (
        done.out.count("  equal: 2 steps") == 2
        and "8 ranks against one process" in done.out
        and "tolerance 1e-05" in done.out
    )
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["passed"] and [entry["layout"] for entry in certificate["layouts"]] == [
        {"data": 2, "tensor": 2, "pipeline": 2}, {"data": 1, "tensor": 2, "pipeline": 1},
    ]  # fmt: skip
    one_process = [entry for entry in certificate["layouts"][0]["compared"] if "on tensor rank" not in entry["name"]]
    assert len(one_process) == 2 * (2 + 2 * 21) and certificate["environment"]["packages"]["torch"]


def test_what_cannot_be_laid_out_is_refused_before_anything_starts(tmp_path):
    out = tmp_path / "certificate.json"
    done = verify("--layout", "tp=3", "--out", out)
    assert done.status == 2 and not out.exists()
    assert (
        done.err
        == "error: parallel.tensor is 3, which does not divide the model's 8 query heads: set parallel.tensor to 1, "
        "or to 2 on a multiple of 2 ranks\n"
    )


@pytest.fixture(autouse=True)
def jobs_are_forked(monkeypatch):
    """Also those that this process starts."""
    monkeypatch.setattr(subprocess, "run", run_without_torchrun)


@pytest.fixture(scope="module")
def resumed(place, tmp_path_factory) -> tuple[str, dict, Path, Path]:
    """(what was printed, the certificate, the folder of the runs, the config) of a resume of two data ranks by two and
    by two stages.
    """
    config = Path(command(place, "resumed")[2])
    out, kept = tmp_path_factory.mktemp("certificate") / "certificate.json", tmp_path_factory.mktemp("kept") / "runs"
    done = verify(
        "--resume",
        "--layout",
        "dp=2",
        "--onto",
        "dp=2",
        "--onto",
        "pp=2",
        "--times",
        2,
        "--rows",
        3,
        "--out",
        out,
        "--keep",
        kept,
        config=config,
        small=[word for setting in TABLES for word in ("--set", setting)],
    )
    assert done.status == 0, done.out + done.err
    return done.out, json.loads(out.read_text()), kept / "0", config


def test_a_resume_is_bit_equal_on_its_layout_and_token_equal_on_another(resumed):
    output, document, runs, _ = resumed
    assert (
        "2 ranks; depth 2" in output
        and "6 rows of 64 tokens per step; 6 steps whole, and stopped after 2 and 4" in output
    )
    assert [(entry["times"], entry["profile"]) for entry in document["resumes"]] == [(2, "strict"), (2, "standard")]
    same, other = document["resumes"]
    assert (
        document["passed"]
        and same["onto"] == same["layout"] == {"data": 2, "tensor": 1, "pipeline": 1}
        and other["onto"]["pipeline"] == 2
    )
    assert (same["verdict"], same["differences"], same["first_difference"]) == ("bit-equal", [], None)
    assert (
        other["verdict"] == "token-equal"
        and other["differences"]
        and all(entry["within"] for entry in other["differences"])
    )
    assert min(entry["step"] for entry in other["differences"]) >= 2, "what is loaded is what was saved"
    assert "  bit-equal: " in output and "rates of 0, losses within 1e-06" in output
    assert [sorted(losses(runs / name)) for name in ("whole", "half", "onto-dp2-tp1-pp1")] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1],
        [0, 1, 2, 3, 4, 5],
    ]


ALONE = Axis("world", 1, 0, None, (0,))


def changed(step_folder: Path, name: str) -> None:
    """Rewrite a checkpoint with one element of one tensor changed, all hashes right."""
    whole = {
        key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for key, entry in read_index(step_folder).items()
    }
    pieces = {
        key: (tuple(tensor.shape), [((0,) * tensor.ndim, tuple(tensor.shape), tensor)]) for key, tensor in whole.items()
    }
    load_checkpoint(step_folder, pieces)
    whole[name].view(-1)[3] += 1e-6
    for path in step_folder.glob("*.distcp"):
        path.unlink()
    save_rectangles(step_folder, pieces, ALONE)
    rehashed(step_folder)


def rehashed(step_folder: Path) -> None:
    facts = json.loads((step_folder / "checkpoint.json").read_text())
    paths = [path for path in step_folder.rglob("*") if path.is_file() and path.name != "checkpoint.json"]
    files = {
        str(path.relative_to(step_folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    del facts["sha256"]
    write_facts(step_folder, facts | {"files": files})


def copied(runs: Path, name: str, into: Path) -> Path:
    return Path(shutil.copytree(runs / name, into / name))


def order_of(config: Path) -> list[str]:
    return list(weight_shapes(resolve_plan(load_config(config), 1, 257).dims))


def test_a_momentum_changed_between_the_halves_is_named(resumed, tmp_path):
    _, _, runs, config = resumed
    half = copied(runs, "half", tmp_path)
    changed(checkpoint(half, 2), "muon/transformer.h.1.mlp.c_fc.weight/momentum")
    after = copied(tmp_path, "half", tmp_path / "after")
    train_to_step(load_config(runs / "half.json"), after, 2, 4, every=1, resume=True)
    verdict, differences = compare_resumed_run(runs / "whole", half, after, order_of(config), exact=True)
    assert (
        verdict == "different"
        and differences[0].description.startswith("muon/transformer.h.1.mlp.c_fc.weight/momentum: relative ")
        and differences[0].step == 2
    )
    # had the file been right and been read wrongly, the first step after it would tell: its own momentum, and nothing
    # before it
    verdict, differences = compare_resumed_run(runs / "whole", runs / "half", after, order_of(config), exact=True)
    assert verdict == "different" and (differences[0].step, differences[0].name) == (
        3,
        "muon/transformer.h.1.mlp.c_fc.weight/momentum",
    )
    verdict, differences = compare_resumed_run(runs / "whole", half, after, order_of(config), exact=False)
    assert verdict == "different" and differences[0].step == 2, "what is saved has no tolerance on any layout"


def test_swapped_streams_of_documents_are_named(resumed, tmp_path):
    _, _, runs, config = resumed
    half = copied(runs, "half", tmp_path)
    one, other = (checkpoint(half, 2) / "loader" / f"stream_{stream:05d}.npz" for stream in (1, 3))
    one.rename(one.with_suffix(".moved"))
    other.rename(one)
    one.with_suffix(".moved").rename(other)
    rehashed(checkpoint(half, 2))
    refused = "the job half failed: .*stream_00001.npz .*documents that do not belong to stream 1"
    with pytest.raises(UserError, match=refused):
        train_to_step(load_config(runs / "half.json"), half, 2, 4, every=1, resume=True)
    verdict, differences = compare_resumed_run(
        runs / "whole", half, runs / "onto-dp2-tp1-pp1", order_of(config), exact=True
    )
    assert verdict == "different" and differences[0].name == "loader/stream_00001.npz: ledger"
