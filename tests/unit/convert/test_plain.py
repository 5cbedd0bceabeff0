"""safetensors and JSON: everything there and back, and nothing left of a conversion that fails."""

import json
import resource
import shutil
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megachat.convert import plain
from megachat.convert.conversion import export_checkpoint, import_checkpoint
from megachat.data.tokenizer import load_tokenizer
from megachat.errors import UserError
from tests.unit.convert.checkpoints import (
    HUGGINGFACE,
    STEP,
    differences_between,
    left_in,
    make_run,
    step_folder,
    tokenizer,
    tool,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("plain") / "run", parts=2)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "plain"
    export_checkpoint("safetensors", run, folder)
    return folder


def test_everything_comes_back(run, exported, tmp_path, monkeypatch, capsys):
    status, out, _ = tool(monkeypatch, capsys, "from-safetensors", exported, tmp_path / "runs" / "back")
    assert status == 0 and "logit difference 0.00e+00" in out
    back = tmp_path / "runs" / "back"
    notes = {entry.name for entry in differences_between(run, back)}
    assert notes == {"layout.data", "config.run.name", "config.run.folder", "config.data.tokenizer"} - {"layout.data"}
    assert load_tokenizer(back / "tokenizer").fingerprint == tokenizer().fingerprint
    config = json.loads((back / "config.json").read_text())
    assert config["run"] == {"name": "back", "folder": str(tmp_path / "runs")} and config["horizon"] == {"steps": 20}
    for name in ("loader/stream_00001.npz", "loader/loader.json", "random/rank_00000.npz"):
        assert (step_folder(back) / name).read_bytes() == (step_folder(run) / name).read_bytes()
    assert tool(monkeypatch, capsys, "verify", back)[0] == 0
    alone = tmp_path / f"step_{STEP:06d}"
    import_checkpoint("safetensors", exported, alone)
    assert not any(entry.counts for entry in differences_between(alone, run))
    assert left_in(tmp_path) == ["runs", alone.name, f"{alone.name}.certificate.json"] and left_in(
        tmp_path / "runs"
    ) == [
        "back",
        "back.certificate.json",
    ]


@pytest.mark.parametrize(
    ("section", "tables", "shapes", "refusal"),
    [
        (
            "ngram",
            {"blocks": [0, 2], "rows": 50, "width": 12},
            {"ngram.2.3.weight": (50, 12), "ngram.0.2.up.weight": (16, 12)},
            "n-gram values, which nanochat does not",
        ),
        (
            "lookup",
            {"after_blocks": [1], "rows": 700, "tied": False},
            {"lookup.1.keys.weight": (700, 48), "lookup.1.values.weight": (700, 48)},
            "lookup layers, which nanochat does not",
        ),
    ],
)
def test_tables_come_back_and_nanochat_refuses_them(section, tables, shapes, refusal, tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "runs" / "tables", model=HUGGINGFACE, **{section: tables})
    export_checkpoint("safetensors", run, tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model-00001.safetensors")
    assert {name: weights[name].shape for name in shapes} == shapes
    status, out, _ = tool(monkeypatch, capsys, "from-safetensors", tmp_path / "plain", tmp_path / "runs" / "back")
    assert status == 0 and "logit difference 0.00e+00" in out  # the logits of this model see the tables
    assert not any(entry.counts for entry in differences_between(run, tmp_path / "runs" / "back"))
    assert json.loads((tmp_path / "runs" / "back" / "config.json").read_text())[section] == tables
    status, _, error = tool(monkeypatch, capsys, "to-nanochat", run, tmp_path / "refused")
    assert status == 2 and refusal in error and len(error.splitlines()) == 1
    assert left_in(tmp_path) == ["plain", "plain.certificate.json", "runs"]


def test_the_files_are_plain(run, exported):
    weights = load_file(exported / "model-00001.safetensors")
    assert weights["transformer.h.1.attn.c_k.weight"].shape == (16, 48)
    with safe_open(exported / "optimizer-00001.safetensors", framework="np") as file:
        assert (
            "muon/transformer.h.1.attn.c_k.weight/momentum" in file.keys()
            and "adamw/lm_head.weight/exp_avg_sq" in file.keys()
        )
    certificate = json.loads((exported.parent / "plain.certificate.json").read_text())
    assert (
        certificate["passed"]
        and certificate["numbers"]["largest_logit_difference"] == 0
        and certificate["tensors"]["different"] == 0
    )
    assert certificate["target"]["files"].keys() == {
        str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()
    }
    assert (
        certificate["source"]["files"]["__0_0.distcp"]
        and certificate["target"]["folder"] == str(exported)
        and certificate["tolerance"]
        and certificate["versions"]["torch"]
    )


def test_large_ones_are_cut_into_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "SHARD_BYTES", 100_000)
    export_checkpoint("safetensors", run, tmp_path / "plain")
    assert len(list((tmp_path / "plain").glob("model-*.safetensors"))) > 2
    import_checkpoint("safetensors", tmp_path / "plain", tmp_path / "back")
    assert not any(entry.counts for entry in differences_between(tmp_path / "back", run))


def test_a_conversion_that_goes_wrong_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def spoiled(tensors, path):
        for name in list(tensors):
            if name == "transformer.h.0.attn.c_q.weight":
                tensors[name] = tensors[name].T.contiguous()
        save_file(tensors, path)

    monkeypatch.setattr(plain, "save_file", lambda tensors, path, metadata: spoiled(tensors, path))
    status, _, err = tool(monkeypatch, capsys, "to-safetensors", run, tmp_path / "new" / "plain")
    assert status == 2 and "tensor model/transformer.h.0.attn.c_q.weight: relative" in err and left_in(tmp_path) == []


def test_a_rename_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def rename(self, target):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", rename)
        with pytest.raises(UserError, match="could not be written .Read-only file system."):
            export_checkpoint("safetensors", run, tmp_path / "plain")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "source"), [("to-safetensors", "run"), ("to-nanochat", "run"), ("from-safetensors", "exported")]
)
def test_a_full_disk_is_reported_and_nothing_is_left(command, source, request, tmp_path, monkeypatch, capsys):
    source = request.getfixturevalue(source)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))  # a file cannot grow beyond it, as on a full disk
    try:
        status, _, err = tool(monkeypatch, capsys, command, source, tmp_path / "new" / "there")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert status == 2 and "could not be" in err and len(err.splitlines()) == 1 and left_in(tmp_path) == [], err
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    status, _, err = tool(monkeypatch, capsys, command, source, tmp_path / "new" / "there")
    assert status == 2 and "MB and" in err and "has 0.1 MB free" in err and left_in(tmp_path) == [], err


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: cut(folder / "model-00001.safetensors"),
            "model-00001.safetensors is no whole safetensors file",
        ),
        (
            lambda folder: flip(folder / "optimizer-00001.safetensors"),
            "optimizer-00001.safetensors does not match its SHA-256",
        ),
        (lambda folder: (folder / "optimizer-00001.safetensors").unlink(), "optimizer-00001.safetensors is missing"),
        (lambda folder: (folder / "loader" / "stream_00000.npz").unlink(), "loader/stream_00000.npz is missing"),
        (lambda folder: cut(folder / "checkpoint_facts.json"), "checkpoint_facts.json cannot be read"),
        (lambda folder: rewrite(folder, lambda saved: saved.update(plain_version=9)), "version 9"),
        (
            lambda folder: rewrite(folder, lambda saved: saved["facts"]["model"].update(experts=8)),
            "has experts, which this version does not know",
        ),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
        (
            lambda folder: rewrite(folder, lambda saved: saved["files"].update({"loader/../../evil": {"bytes": 1}})),
            "names a file outside its folder",
        ),
    ],
)
def test_bad_input_is_named(exported, damage, words, tmp_path, monkeypatch, capsys):
    shutil.copytree(exported, tmp_path / "plain")
    damage(tmp_path / "plain")
    status, _, err = tool(monkeypatch, capsys, "from-safetensors", tmp_path / "plain", tmp_path / "back")
    assert status == 2 and words in err and len(err.splitlines()) == 1, err
    assert left_in(tmp_path) == ["plain"]


def rewrite(folder, change):
    saved = json.loads((folder / "checkpoint_facts.json").read_text())
    change(saved)
    (folder / "checkpoint_facts.json").write_text(json.dumps(saved))


def test_targets_and_sources_that_do_not_fit(run, exported, tmp_path):
    (tmp_path / "there").mkdir()
    for convert, source, target, words in (
        (export_checkpoint, run, tmp_path / "there", "there exists"),
        (import_checkpoint, exported, tmp_path / "there", "there exists"),
        (import_checkpoint, exported, tmp_path / "step_000008", "is not step_000007"),
        (import_checkpoint, run, tmp_path / "new", "megachat, not safetensors"),
        (export_checkpoint, exported, tmp_path / "new", "safetensors, not megachat"),
    ):
        with pytest.raises(UserError, match=words):
            convert("safetensors", source, target)
    with pytest.raises(UserError, match="no tokenizer at"):
        import_checkpoint("safetensors", exported, tmp_path / "new", tokenizer=tmp_path)
    assert left_in(tmp_path) == ["there"]
