"""nanochat's files: those it wrote come back equal, and optimizer state of any number of ranks is cut as nanochat cuts
it.
"""

import json
import math
import os
import shutil

import pytest
import torch

from megachat.config import load_config
from megachat.convert.conversion import export_checkpoint, import_checkpoint
from megachat.convert.formats import open_checkpoint
from megachat.convert.megachat import open_megachat
from megachat.convert.nanochat import open_nanochat
from megachat.convert.nanochat_versions import VERSIONS
from megachat.convert.proof import compare_logits
from megachat.errors import UserError
from megachat.planning.plan import resolve_plan
from megachat.prepare.tokenizer_training import import_nanochat
from tests import reference
from tests.unit.convert.checkpoints import (
    HUGGINGFACE,
    STEP,
    VOCAB_SIZE,
    as_version,
    assert_same,
    differences_between,
    edit_meta,
    edit_optimizer,
    left_in,
    loaded,
    make_run,
    pointer,
    step_folder,
    tokenizer,
    tool,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("nanochat") / "run")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Ranks -> folder."""
    folder = tmp_path_factory.mktemp("exported")
    for ranks in (1, 2, 3):
        export_checkpoint("nanochat", run, folder / str(ranks), ranks=ranks)
    return {ranks: folder / str(ranks) for ranks in (1, 2, 3)}


@reference.needs_reference
def test_what_nanochat_wrote_comes_back_file_by_file(tmp_path, monkeypatch, capsys):
    assert tool(monkeypatch, capsys, "from-nanochat", reference.FOLDER, tmp_path / "run")[0] == 0
    assert tool(monkeypatch, capsys, "to-nanochat", tmp_path / "run", tmp_path / "back")[0] == 0
    for name in ("model_000020.pt", "optim_000020_rank0.pt", "tokenizer/token_bytes.pt"):
        written, wanted = loaded(tmp_path / "back" / name), loaded(reference.FOLDER / name)
        assert_same(
            dict(written) if isinstance(written, dict) else written,
            dict(wanted) if isinstance(wanted, dict) else wanted,
            name,
        )
    assert json.loads((tmp_path / "back" / "meta_000020.json").read_text()) == json.loads(
        (reference.FOLDER / "meta_000020.json").read_text()
    )
    pickles = [
        (folder / "tokenizer" / "tokenizer.pkl").read_bytes() for folder in (tmp_path / "back", reference.FOLDER)
    ]
    assert pickles[0] == pickles[1]
    assert differences_between(tmp_path / "run", reference.FOLDER) == []


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_are_cut_as_nanochat_cuts_them(run, exported, ranks):
    """The rule of nanochat's optim.py, said once more: _reduce_adamw and _compute_muon."""
    model = loaded(exported[ranks] / f"model_{STEP:06d}.pt")
    weights = {id_: name for id_, name in enumerate(parameter_order(model))}
    for rank in range(ranks):
        saved = loaded(exported[ranks] / f"optim_{STEP:06d}_rank{rank}.pt")
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        assert numbers == list(range(len(model)))
        for group in saved["param_groups"]:
            if group["kind"] == "adamw":
                for number in group["params"]:
                    shape, state = model[weights[number]].shape, saved["state"][number]
                    shard = shape if ranks == 1 or shape.numel() < 1024 else (shape[0] // ranks, *shape[1:])
                    assert state["step"] == STEP and state["exp_avg"].shape == state["exp_avg_sq"].shape == shard
            else:
                shape, count = model[weights[group["params"][0]]].shape, len(group["params"])
                chunk = -(-count // ranks)
                state = saved["state"][group["params"][0]]
                assert state["momentum_buffer"].shape == (chunk, *shape)
                assert state["second_momentum_buffer"].shape == (
                    (chunk, shape[0], 1) if shape[0] >= shape[1] else (chunk, 1, shape[1])
                )
                owned = min(chunk, max(0, count - rank * chunk))
                assert not state["momentum_buffer"][owned:].any() and all(
                    part.any() for part in state["momentum_buffer"][:owned]
                )
        assert saved["state"].keys() == {
            number
            for group in saved["param_groups"]
            for number in (group["params"] if group["kind"] == "adamw" else group["params"][:1])
        }


def parameter_order(model):
    """Names in the order of nanochat's param_groups: setup_optimizer in its gpt.py."""
    names = ["lm_head.weight", "transformer.wte.weight", *(name for name in model if name.startswith("value_embeds."))]
    names += ["resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda"]
    matrices = [name for name in model if name.startswith("transformer.h.")]
    return names + [
        name
        for shape in sorted({model[name].shape for name in matrices})
        for name in matrices
        if model[name].shape == shape
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_of_any_number_of_ranks_come_back(run, exported, ranks, tmp_path):
    certificate = import_checkpoint("nanochat", exported[ranks], tmp_path / "back")
    assert certificate["passed"] and len(certificate["source"]["files"]) == 2 + ranks
    assert {entry.name for entry in differences_between(tmp_path / "back", run) if entry.counts} == {
        "loss_scaler.cur_scale"
    }
    whole = {name: tensor for name, tensor in open_nanochat(exported[1]).tensors()}
    for name, tensor in open_nanochat(exported[ranks]).tensors():
        assert torch.equal(tensor, whole[name]), name


def test_the_settings_come_along(run, exported, tmp_path):
    import_checkpoint("nanochat", exported[1], tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["batch"] == {"tokens": 640, "micro_rows": 2} and config["horizon"]["steps"] == 20
    assert (
        config["optimizer"]["warmup_steps"] == 3
        and config["model"]["window_pattern"] == "SL"
        and config["model"]["kv_heads"] == 1
    )
    groups = loaded(exported[1] / f"optim_{STEP:06d}_rank0.pt")["param_groups"]
    batch = (640 / 2**19) ** 0.5
    assert groups[0]["initial_lr"] == pytest.approx(0.008 * batch * (48 / 768) ** -0.5) and groups[4][
        "initial_lr"
    ] == pytest.approx(0.5 * batch)
    assert groups[5]["lr"] == groups[5]["initial_lr"] == 0.2 and groups[0]["betas"] == (
        0.8,
        0.96,
    )  # step 6 of 20 is between warm-up and warm-down
    plan = resolve_plan(load_config(run / "config.json"), 1, VOCAB_SIZE)
    assert groups[-1]["momentum"] == pytest.approx(0.85 + 6 / 400 * 0.12)
    assert groups[-1]["weight_decay"] == pytest.approx(plan.weight_decay * 0.5 * (1 + math.cos(math.pi * 6 / 20)))
    assert rates_of(tmp_path / "back") == pytest.approx(rates_of(run), rel=1e-9)
    meta = json.loads((exported[1] / f"meta_{STEP:06d}.json").read_text())
    assert (meta["val_bpb"], meta["loop_state"]["min_val_bpb"], meta["dataloader_state_dict"]) == (2.5, 2.25, None)
    assert import_nanochat(exported[1] / "tokenizer").fingerprint == tokenizer().fingerprint


def rates_of(run):
    plan = resolve_plan(load_config(run / "config.json"), 1, VOCAB_SIZE)
    return dict(plan.rates) | {"weight_decay": plan.weight_decay}


def test_tables_in_bfloat16(run, tmp_path):
    certificate = export_checkpoint("nanochat", run, tmp_path / "nanochat", tables="bfloat16")
    model, state = (
        loaded(tmp_path / "nanochat" / name) for name in (f"model_{STEP:06d}.pt", f"optim_{STEP:06d}_rank0.pt")
    )
    assert {name for name, tensor in model.items() if tensor.dtype == torch.bfloat16} == {
        "transformer.wte.weight",
        "value_embeds.0.weight",
        "value_embeds.2.weight",
    }
    assert state["state"][1]["exp_avg"].dtype == torch.bfloat16 and state["state"][0]["exp_avg"].dtype == torch.float32
    assert (
        0 < certificate["numbers"]["largest_logit_difference"] < 0.25
        and "rounded to bfloat16" in certificate["remarks"][0]
    )
    import_checkpoint("nanochat", tmp_path / "nanochat", tmp_path / "back")
    export_checkpoint("nanochat", tmp_path / "back", tmp_path / "again", tables="bfloat16")
    assert_same(dict(loaded(tmp_path / "again" / f"model_{STEP:06d}.pt")), dict(model))


def test_without_optimizer_state_a_fresh_optimizer_must_be_requested(exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "weights")
    (tmp_path / "weights" / f"optim_{STEP:06d}_rank0.pt").unlink()
    with pytest.raises(UserError, match="no optimizer state of step 7"):
        import_checkpoint("nanochat", tmp_path / "weights", tmp_path / "back")
    import_checkpoint("nanochat", tmp_path / "weights", tmp_path / "back", fresh_optimizer=True)
    import_checkpoint("nanochat", exported[1], tmp_path / "left", fresh_optimizer=True)
    for run in tmp_path / "back", tmp_path / "left":
        facts = json.loads((step_folder(run) / "checkpoint.json").read_text())
        assert facts["adamw_steps"] == 0 and facts["step"] == STEP
        assert not any(
            tensor.any() for name, tensor in open_megachat(step_folder(run)).tensors() if not name.startswith("model/")
        )


@pytest.mark.parametrize("version", VERSIONS[1:], ids=lambda version: version.dates)
def test_older_versions_load_as_what_they_are(version, exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "in")
    model = as_version(tmp_path / "in", version)
    with pytest.raises(UserError, match=f"of a nanochat {version.dates}, whose optimizer cannot be continued"):
        import_checkpoint("nanochat", tmp_path / "in", tmp_path / "run")
    certificate = import_checkpoint("nanochat", tmp_path / "in", tmp_path / "run", fresh_optimizer=True)
    assert any(version.dates in remark and "without effect" in remark for remark in certificate["remarks"])
    back = open_checkpoint(tmp_path / "run")
    constants = {"rotary_base": 100_000.0, "qk_scale": 1.2, "value_embeddings": True, "lambdas": "learned"}
    for name, value in (constants | version.constants).items():
        assert getattr(back.dims, name) == value, name
    tensors = dict(back.tensors())
    neutral = {"resid_lambdas": 1.0, "x0_lambdas": 0.0, "smear_lambda": 0.0, "backout_lambda": 0.0}
    for name in neutral.keys() & set(version.absent):
        assert (tensors[f"model/{name}"] == neutral[name]).all()
    for name, tensor in model.items():
        whole = tensors[f"model/{name}"]
        assert torch.equal(whole[: len(tensor)], tensor) and not whole[len(tensor) :].any()
    plan = resolve_plan(load_config(tmp_path / "run" / "config.json"), 1, VOCAB_SIZE)
    assert plan.rates["smear"] == 0  # the neutral values stay
    certificate = export_checkpoint("nanochat", tmp_path / "run", tmp_path / "out")
    assert f"written as a nanochat {version.dates} has it, without the optimizer's state" in certificate["remarks"]
    out = loaded(tmp_path / "out" / f"model_{STEP:06d}.pt")
    assert out.keys() == model.keys() and all(torch.equal(out[name][: len(model[name])], model[name]) for name in model)


def edit_model(folder, change):
    path = folder / f"model_{STEP:06d}.pt"
    model = dict(loaded(path))
    change(model)
    torch.save(model, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.update(v0_lambdas=torch.zeros(3)), "is of a nanochat of 2026-01-16, which has value emb"),
        (
            lambda model: model.update({"transformer.h.2.attn.ve_gate.weight": torch.zeros(1, 32)}),
            "is of a nanochat from 2026-01-16 to 2026-03-09, which has gates of 32 channels",
        ),
        (lambda model: model.pop("resid_lambdas"), "resid_lambdas is missing"),
        (lambda model: model.update(engram=torch.zeros(3)), "engram is no tensor of this architecture"),
    ],
)
def test_versions_that_cannot_be_computed_are_named(change, words, exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "in")
    edit_model(tmp_path / "in", change)
    with pytest.raises(UserError, match=words):
        import_checkpoint("nanochat", tmp_path / "in", tmp_path / "run", fresh_optimizer=True)


def test_short_windows_of_an_older_version_are_refused(exported, tmp_path):
    """Half of 160 tokens, where megachat's model has 128."""
    shutil.copytree(exported[1], tmp_path / "in")
    version = VERSIONS[2]
    as_version(tmp_path / "in", version, pattern="SL")
    with pytest.raises(UserError, match=f"a nanochat {version.dates}, which has short windows of 80 tokens"):
        open_nanochat(tmp_path / "in")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "meta_000007.json").unlink(), "meta_000007.json cannot be read"),
        (
            lambda f: (f / "model_000007.pt").unlink(),
            "is not a complete checkpoint: it has no checkpoint.json .* model_NNNNNN.pt .nanochat.",
        ),
        (lambda f: (f / "optim_000007_rank0.pt").unlink(), "but not optim_000007_rank0.pt"),
        (lambda f: (f / "optim_000007_rank1.pt").unlink(), "another number of ranks"),
        (
            lambda f: (f / "model_000007.pt").write_bytes((f / "model_000007.pt").read_bytes()[:9000]),
            "model_000007.pt is refused: it is damaged",
        ),
        (lambda f: torch.save({"x": Attack(f / "executed")}, f / "model_000007.pt"), "model_000007.pt is refused"),
        (
            lambda f: torch.save({"x": Attack(f / "executed")}, f / "optim_000007_rank1.pt"),
            "optim_000007_rank1.pt is refused",
        ),
        (lambda f: torch.save([1], f / "optim_000007_rank1.pt"), "holds a list"),
        (lambda f: torch.save({"x": 1}, f / "model_000007.pt"), "model_000007.pt has x as int, and not as a tensor of"),
        (
            lambda f: torch.save({"x": torch.zeros(1, dtype=torch.complex64)}, f / "model_000007.pt"),
            "has x as complex64, and not as a tensor of float64",
        ),
        (lambda f: pointer(f / "model_000007.pt"), "model_000007.pt is a Git LFS pointer, not the file itself: run"),
        (lambda f: pointer(f / "optim_000007_rank1.pt"), "optim_000007_rank1.pt is a Git LFS pointer"),
        (lambda f: pointer(f / "meta_000007.json"), "meta_000007.json is a Git LFS pointer"),
        (lambda f: pointer(f / "tokenizer" / "tokenizer.pkl"), "tokenizer.pkl is a Git LFS pointer"),
        (
            lambda f: edit_optimizer(f, 0, lambda saved: saved["param_groups"][0].update(initial_lr=-1.0)),
            "has a rate or a decay that is negative",
        ),
        (
            lambda f: edit_meta(f, lambda meta: meta["model_config"].update(n_layer=True)),
            "meta_000007.json does not give the model's sizes",
        ),
        (lambda f: edit_meta(f, lambda meta: meta["model_config"].update(n_expert=8)), "model_config has n_expert"),
        (
            lambda f: edit_meta(f, lambda meta: meta["model_config"].update(n_layer=4)),
            "is not of the model that meta_000007.json describes",
        ),
        (lambda f: edit_meta(f, lambda meta: meta.pop("model_config")), "meta_000007.json .*KeyError: 'model_config'"),
        (
            lambda f: edit_meta(f, lambda meta: meta["model_config"].update(vocab_size=340)),
            "the tokenizer in .* has 330 tokens and the model 340",
        ),
        (
            lambda f: edit_optimizer(f, 1, lambda saved: saved["state"][0].update(step=8)),
            "steps differ between parameters or ranks",
        ),
        (
            lambda f: edit_optimizer(f, 1, lambda saved: saved["state"][5]["exp_avg"].add_(1)),
            "different values in exp_avg of x0_lambdas",
        ),
        (lambda f: edit_optimizer(f, 0, lambda saved: saved["param_groups"].pop()), "other parameter groups"),
        (lambda f: edit_optimizer(f, 0, lambda saved: saved["state"].pop(2)), "is no optimizer state of nanochat's"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "there is no tokenizer at"),
    ],
)
def test_bad_input_is_named_and_nothing_is_executed(exported, damage, words, tmp_path):
    shutil.copytree(exported[2], tmp_path / "in" / "nanochat")
    damage(tmp_path / "in" / "nanochat")
    with pytest.raises(UserError, match=words) as refused:
        import_checkpoint("nanochat", tmp_path / "in" / "nanochat", tmp_path / "back")
    assert (
        "\n" not in str(refused.value)
        and left_in(tmp_path) == ["in"]
        and not (tmp_path / "in" / "nanochat" / "executed").exists()
    )


def test_what_nanochat_cannot_hold_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="384 rows of its tables evenly, and 5 ranks cannot"):
        export_checkpoint("nanochat", run, tmp_path / "nanochat", ranks=5)
    other = make_run(tmp_path / "runs" / "other", model=HUGGINGFACE)
    with pytest.raises(UserError, match="rotary_base 5000.0, and nanochat computes 100000.0"):
        export_checkpoint("nanochat", other, tmp_path / "nanochat")
    with pytest.raises(UserError, match="has no nanochat checkpoint of step 3: it has steps 7"):
        export_checkpoint("nanochat", run, tmp_path / "nanochat")
        import_checkpoint("nanochat", tmp_path / "nanochat", tmp_path / "back", step=3)
    assert left_in(tmp_path) == ["nanochat", "nanochat.certificate.json", "runs"]


def test_learned_scales_of_norms_are_refused_unless_all_are_one(tmp_path):
    def ones(tensors):
        for name, tensor in tensors.items():
            if name.startswith("model/") and name.endswith("_scale"):
                tensor.fill_(1.0)

    scales = {"norm_scales": ["mlp", "query", "key"]}
    learned = make_run(tmp_path / "runs" / "learned", model=scales)
    with pytest.raises(UserError, match="learned scales of norms .*_scale is not 1.*nanochat does not have: convert"):
        export_checkpoint("nanochat", learned, tmp_path / "nanochat")
    run = make_run(tmp_path / "runs" / "one", model=scales, change=ones, optimizer={"qk_clip": 90.0})
    export_checkpoint("nanochat", run, tmp_path / "nanochat")
    import_checkpoint("nanochat", tmp_path / "nanochat", tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    assert back.dims.norm_scales == () and not any(name.endswith("_scale") for name in back.entries)
    assert load_config(tmp_path / "back" / "config.json").model.norm_scales == ()


def test_the_proof_sees_a_model_that_differs(exported):
    """The numbers themselves: a logit moved by 0.5 at one place of two."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    moved = logits + torch.tensor([[0.0, 0.0, 0.0], [2.5, 0.0, 0.0]])
    numbers = compare_logits(lambda: lambda row: logits, lambda: lambda row: moved, [torch.zeros(1, 2)])
    p, q = logits[1].softmax(0), moved[1].softmax(0)
    assert numbers["largest_logit_difference"] == 2.5 and numbers["argmax_agreement"] == 0.5
    assert numbers["mean_kl_nats"] == pytest.approx((p * (p / q).log()).sum().item() / 2, rel=1e-5)
