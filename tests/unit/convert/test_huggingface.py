"""transformers' NanoChat: its own class and ours compute the same on each other's files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megachat.convert import huggingface
from megachat.convert import huggingface_native as native
from megachat.convert.conversion import export_checkpoint, import_checkpoint
from megachat.convert.formats import open_checkpoint
from megachat.convert.nanochat_versions import VERSIONS
from megachat.errors import UserError
from tests.unit.convert.checkpoints import (
    HUGGINGFACE,
    VOCAB_SIZE,
    as_version,
    assert_same,
    differences_between,
    left_in,
    make_run,
    tokenizer,
    tool,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("huggingface") / "run", model=HUGGINGFACE)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_checkpoint("hf", run, folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that transformers wrote, and a tokenizer of the vocabulary."""
    torch.manual_seed(3)
    config = transformers.NanoChatConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=96,
        pad_token_id=None,
    )
    model = transformers.NanoChatForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("theirs") / "hf"
    model.save_pretrained(folder)
    return folder


def test_ours_in_their_class(run, exported):
    """The logits are compared by the conversion; here that it compared them with transformers' model and is narrow."""
    certificate = json.loads((exported.parent / "hf.certificate.json").read_text())
    assert (
        certificate["passed"]
        and certificate["numbers"]["largest_logit_difference"] < 5e-5
        and certificate["numbers"]["argmax_agreement"] == 1
    )
    assert (
        certificate["versions"]["transformers"] == transformers.__version__
        and "54 padding rows" in certificate["remarks"][0]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(model).__name__ == "NanoChatForCausalLM" and model.config.vocab_size == VOCAB_SIZE
    row = torch.randint(0, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(0))
    more = model.generate(row, max_new_tokens=3, do_sample=False)
    assert more.shape[1] <= 15 and more.max() < VOCAB_SIZE


def test_the_first_nanochat_is_what_their_class_computes(tmp_path):
    """Imported from nanochat's own files of that time: the proof is transformers' model, which is that first GPT."""
    export_checkpoint("nanochat", make_run(tmp_path / "run"), tmp_path / "nanochat")
    as_version(tmp_path / "nanochat", VERSIONS[-1])
    import_checkpoint("nanochat", tmp_path / "nanochat", tmp_path / "first", fresh_optimizer=True)
    certificate = export_checkpoint("hf", tmp_path / "first", tmp_path / "hf")
    assert certificate["passed"] and certificate["numbers"]["largest_logit_difference"] < 5e-5


def test_theirs_in_ours_and_back(theirs, tmp_path, monkeypatch, capsys):
    place = make_run(tmp_path / "other") / "tokenizer"
    status, out, err = tool(monkeypatch, capsys, "from-hf", theirs, tmp_path / "run", "--tokenizer", place)
    assert status == 0 and "same argmax 100.00%" in out, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        config["model"] | {"value_embeddings": False, "lambdas": "neutral", "qk_scale": 1.0, "rotary_base": 10000.0}
        == config["model"]
    )
    assert not [entry for entry in differences_between(tmp_path / "run", theirs) if entry.kind in ("tensor", "shape")]
    status, out, err = tool(monkeypatch, capsys, "to-hf", tmp_path / "run", tmp_path / "back")
    assert status == 0, err
    assert_same(
        dict(sorted(load_file(tmp_path / "back" / "model.safetensors").items())),
        dict(sorted(load_file(theirs / "model.safetensors").items())),
    )
    ours, their = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", theirs))
    assert {key for key in ours if ours[key] != their.get(key)} == {"bos_token_id", "eos_token_id"}


def test_large_ones_are_cut_into_files(run, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
    export_checkpoint("hf", run, tmp_path / "hf")
    assert (
        len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
        and (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    )
    assert differences_between(tmp_path / "hf", exported) == []
    import_checkpoint("hf", tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize(("change", "words"), [
    ({"value_embeddings": True}, ["value embeddings"]),
    ({"qk_scale": 1.2}, ["the factor 1.2 on normed queries and keys"]),
    ({"window_pattern": "SL"}, ["attention windows of 128 tokens"]),
    ({"kv_heads": 3}, []),
    (
        {"lambdas": "learned"},
        ["smear_lambda other than 0", "resid_lambdas other than 1", "x0_lambdas other than 0"]
        + ["backout_lambda other than 0"],
    ),
])  # fmt: skip
def test_what_their_class_does_not_compute_is_known(change, words, tmp_path):
    run = make_run(tmp_path / "run", model=HUGGINGFACE | change)
    assert native.find_obstacles(open_checkpoint(run)) == words


@pytest.mark.parametrize("wrong", [{"rope_theta": 5001.0}, {"eps": 1e-3}, {"cap": 14.0}, {"swap": True}])
def test_the_check_with_their_class_finds_what_is_wrong(run, wrong, tmp_path, monkeypatch, capsys):
    """Each fact that the two architectures must share, wrong by a little in what is written."""
    written = native.config_of_dims

    def config_of_dims(dims):
        settings = written(dims)
        settings["rope_parameters"]["rope_theta"] = wrong.get("rope_theta", settings["rope_parameters"]["rope_theta"])
        return settings | {"rms_norm_eps": wrong.get("eps", 1e-5), "final_logit_softcapping": wrong.get("cap", 15.0)}

    monkeypatch.setattr(native, "config_of_dims", config_of_dims)
    monkeypatch.setitem(native.FIXED, "final_logit_softcapping", wrong.get("cap", 15.0))
    if "swap" in wrong:
        ours = [f"transformer.h.N.attn.{name}.weight" for name in ("c_q", "c_proj")]
        theirs = [native.TENSORS[name] for name in ours]
        monkeypatch.setitem(native.TENSORS, ours[0], theirs[1])
        monkeypatch.setitem(native.TENSORS, ours[1], theirs[0])
    status, _, err = tool(monkeypatch, capsys, "to-hf", run, tmp_path / "hf")
    assert (
        status == 2
        and "what was read back is not the source: largest_logit_difference is" in err
        and left_in(tmp_path) == []
    )


def edit(folder, change):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def without(folder, key):
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "is no whole safetensors file",
        ),
        (lambda f: without(f, "lm_head.weight"), "lm_head.weight is not among the weights"),
        (lambda f: edit(f, lambda settings: settings.update(num_experts=8)), "num_experts is unknown to megachat"),
        (lambda f: edit(f, lambda settings: settings.update(model_type="llama")), "a llama model"),
        (
            lambda f: edit(f, lambda settings: settings.update(hidden_act="gelu")),
            'hidden_act is "gelu", and megachat\'s model has "relu2"',
        ),
        (
            lambda f: edit(f, lambda settings: settings["rope_parameters"].update(rope_type="yarn")),
            "rotary positions of type yarn",
        ),
        (
            lambda f: edit(f, lambda settings: settings.update(intermediate_size=100)),
            "intermediate_size must be 4 x hidden_size",
        ),
        (
            lambda f: edit(f, lambda settings: settings.update(vocab_size=340)),
            "embed_tokens.weight is|lm_head.weight is",
        ),
        (lambda f: edit(f, lambda settings: settings.pop("hidden_size")), "KeyError: 'hidden_size'"),
        (lambda f: shutil.rmtree(f / "megachat_tokenizer"), "there is no tokenizer at .*megachat_tokenizer: give"),
    ],
)
def test_bad_input_is_named(exported, damage, words, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=words) as refused:
        import_checkpoint("hf", tmp_path / "hf", tmp_path / "back")
    assert "\n" not in str(refused.value) and left_in(tmp_path) == ["hf"]


def test_another_vocabulary_and_an_absent_library_are_refused(run, theirs, exported, tmp_path, monkeypatch):
    from megachat.data.tokenizer import save_tokenizer

    save_tokenizer(tmp_path / "larger", tokenizer(400), {})
    with pytest.raises(UserError, match="has 400 tokens and the model 330"):
        import_checkpoint("hf", theirs, tmp_path / "back", tokenizer=tmp_path / "larger")
    with pytest.raises(UserError, match="is not the checkpoint's tokenizer"):
        export_checkpoint("hf", run, tmp_path / "hf", tokenizer=tmp_path / "larger")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="pip install 'megachat\\[hf"):
        export_checkpoint("hf", run, tmp_path / "hf")
    assert left_in(tmp_path) == ["larger"]
