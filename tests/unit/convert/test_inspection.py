"""inspect and verify: what is told of a checkpoint, and that every kind of damage is named."""

import json
import shutil

import pytest
import torch

from megachat.checkpoint.facts import hash_files, write_facts
from megachat.convert.formats import open_checkpoint
from megachat.errors import UserError
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.programs.generate import load_model
from megachat.train import weights
from tests.unit.convert.checkpoints import STEP, left_in, make_run, step_folder, tool


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("inspection") / "run", parts=2)


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return step_folder(tmp_path / "run")


def test_inspect_tells_what_it_is(run, monkeypatch, capsys):
    status, out, _ = tool(monkeypatch, capsys, "inspect", run, "--json")
    report = json.loads(out)
    assert status == 0 and (report["form"], report["facts"]["step"], report["folder"]) == (
        "megachat",
        STEP,
        str(step_folder(run)),
    )
    assert report["tensors"]["model/lm_head.weight"] == {"shape": [384, 48], "dtype": "float32"}
    assert report["ledger"]["combined"] == report["facts"]["ledger"] and report["ledger"]["streams"].keys() == {
        "0",
        "1",
    }
    status, summary, _ = tool(monkeypatch, capsys, "inspect", step_folder(run))
    for words in ("megachat, ", "depth ", f"{STEP} steps", "data 2 x tensor 1", " model, ", "2 streams"):
        assert words in summary, words
    assert len(summary.splitlines()) < 12 and summary.endswith("--verbose shows all of it\n")
    status, out, _ = tool(monkeypatch, capsys, "inspect", step_folder(run), "--verbose")
    assert out.startswith(summary.removesuffix("--verbose shows all of it\n"))
    lines = out.splitlines()
    for words in (
        'layout: {"data": 2',
        "format_version: 2",
        "architecture_version: 2",
        "ledger of stream 1: ",
        f"ledger of all streams: {report['facts']['ledger']}",
    ):
        assert any(words in line for line in lines), words
    assert any(line.split() == ["model/lm_head.weight", "float32", "[384,", "48]"] for line in lines)
    assert sum("SHA-256" in line for line in lines) == len(report["files"])


def test_a_whole_one_is_good(run, monkeypatch, capsys):
    status, out, err = tool(monkeypatch, capsys, "verify", run)
    assert status == 0 and out.startswith(f"good: step_{STEP:06d}: ") and not err


def resaved(folder, change):
    """checkpoint.json as saving would write it over changed files: only what the files say can give them away."""
    facts = json.loads((folder / "checkpoint.json").read_text())
    facts.pop("sha256")
    tensors = json.loads((folder / "tensors.json").read_text())
    change(tensors, facts)
    (folder / "tensors.json").write_text(json.dumps(tensors))
    for name, digest in hash_files(folder, facts["files"]).items():
        facts["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    write_facts(folder, facts)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: flip(folder / "__0_0.distcp"), ["__0_0.distcp does not match its SHA-256"]),
        (
            lambda folder: (folder / "loader" / "stream_00001.npz").write_bytes(b"x"),
            ["loader/stream_00001.npz has 1 bytes, not"],
        ),
        (lambda folder: (folder / "random" / "rank_00000.npz").unlink(), ["random/rank_00000.npz is missing"]),
        (
            lambda folder: [flip(folder / "tensors.json"), (folder / "loader" / "loader.json").unlink()],
            ["loader/loader.json is missing", "tensors.json does not match"],
        ),
        (lambda folder: flip(folder / "checkpoint.json"), ["checkpoint.json"]),
        (lambda folder: (folder / "checkpoint.json").unlink(), ["no checkpoint.json"]),
    ],
)
def test_each_bad_file_is_named(copy, damage, words, monkeypatch, capsys):
    damage(copy)
    status, _, err = tool(monkeypatch, capsys, "verify", copy)
    assert status == 2 and all(line.startswith("error: ") for line in err.splitlines())
    assert len(err.splitlines()) == len(words) and all(word in err for word in words), err


def drop_piece(tensors, _):
    tensors["model/lm_head.weight"]["pieces"].pop()


def overlap(tensors, _):
    pieces = tensors["model/lm_head.weight"]["pieces"]
    pieces[1] |= {"offset": [pieces[1]["offset"][0] - 1, 0]}


def outside_file(tensors, _):
    tensors["model/lm_head.weight"]["pieces"][0]["at"] = 10**9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_piece, "model/lm_head.weight has 9,216 of its 18,432 elements"),
        (overlap, "model/lm_head.weight has rectangles that overlap"),
        (outside_file, "model/lm_head.weight has a rectangle outside the file"),
        (
            lambda tensors, _: tensors.pop("muon/transformer.h.0.attn.c_q.weight/momentum"),
            "c_q.weight/momentum is missing",
        ),
        (
            lambda tensors, _: tensors.update(more=tensors.pop("model/lm_head.weight")),
            "more is no tensor of this architecture",
        ),
        (lambda _, facts: facts.update(ledger="0" * 64), "other documents than the ledger in checkpoint.json"),
        (lambda _, facts: facts["model"].update(vocab_size=400), "is [384, 48], not [448, 48]"),
        (
            lambda _, facts: facts["model"].update(depth=True),
            "lacks sizes of its model (a size is no positive integer)",
        ),
        (lambda _, facts: facts["model"].update(depth=10**9), "do not fit together"),
        (lambda _, facts: facts["model"].update(width=64), "heads and width, do not fit together"),
        (lambda _, facts: facts["model"].update(experts=8), "has experts, which this version does not know"),
    ],
)
def test_holes_overlaps_and_other_tensors_are_reported(copy, change, words, monkeypatch, capsys):
    resaved(copy, change)
    status, _, err = tool(monkeypatch, capsys, "verify", copy)
    assert status == 2 and words in err, err


def nan_in(name):
    def change(tensors):
        tensors[name].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])

    return change


@pytest.mark.parametrize("name", ["model/lm_head.weight", "muon/transformer.h.0.attn.c_q.weight/momentum"])
def test_numbers_that_are_not_finite_are_reported(name, tmp_path, monkeypatch, capsys):
    """verify names the tensor, conversions say that the source has them, and nothing is left of a conversion."""
    run = make_run(tmp_path / "runs" / "run", change=nan_in(name))
    words = f"{name} has 3 elements that are NaN or infinite"
    for command in (["verify", run], ["to-nanochat", run, tmp_path / "new"], ["to-safetensors", run, tmp_path / "new"]):
        status, _, err = tool(monkeypatch, capsys, *command)
        assert status == 2 and len(err.splitlines()) == 1 and f": {words}" in err, err
    assert left_in(tmp_path) == ["runs"]


def test_a_model_of_numbers_that_are_not_finite_generates_nothing(tmp_path):
    """It is not evaluated either."""
    run = make_run(tmp_path / "run", change=nan_in("model/lm_head.weight"))
    reader = open_checkpoint(run)
    with pytest.raises(UserError, match="lm_head.weight has 3 elements that are NaN or infinite: its training had div"):
        weights._load_weights(reader, placed_parameters(build_layers(reader.dims, ModelOptions())))
    with pytest.raises(UserError, match="lm_head.weight has 3 elements that are NaN or infinite: its training had div"):
        load_model(open_checkpoint(run), "float32")
