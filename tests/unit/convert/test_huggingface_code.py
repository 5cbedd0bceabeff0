"""Models that transformers has no class for: the folder with megachat's code, as a user of transformers loads it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megachat.convert import huggingface
from megachat.convert.architecture import build_model
from megachat.convert.conversion import export_checkpoint, import_checkpoint
from megachat.convert.formats import open_checkpoint
from megachat.convert.huggingface_tokenizer import write_tokenizer
from megachat.convert.proof import megachat_logits
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.evals.generation import LocalModel, generate
from megachat.prepare.tokenizer_training import train_tokenizer
from tests.limits import limit_s
from tests.unit.convert.checkpoints import VOCAB_SIZE, left_in, make_run, tokenizer, tool

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

SHARED = Path(__file__).resolve().parents[4] / "shared"
# Everything that transformers' class lacks, at once; with the default model also windows, GQA and value embeddings
LOOKUP = {"after_blocks": [0, 1], "rows": 700, "tied": False, "score_scale": "sqrt"}
NGRAM = {"blocks": [0, 2], "rows": 50, "width": 12}
SCALES = {"norm_scales": ["embedding", "attention", "mlp", "query", "key", "final"]}
# What a user does on a machine without megachat: prints the ids of a text, of its greedy continuation, and logits
USER = """
import json, sys
sys.modules["megachat"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("the cat and <|bos|> I'll", return_tensors="pt")
more = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1)
torch.manual_seed(1)
sampled = model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=0.8, top_k=50, eos_token_id=-1)
logits = model(**inputs).logits
assert logits.dtype == torch.float32
print()
print(json.dumps([inputs["input_ids"].tolist(), more.tolist(), sampled.tolist(), logits[0, -1].tolist()]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    def around_one(tensors):
        for name in tensors:
            if name.startswith("model/") and name.endswith("_scale"):
                tensors[name] += 1.0

    folder = tmp_path_factory.mktemp("huggingface") / "run"
    return make_run(folder, change=around_one, lookup=LOOKUP, ngram=NGRAM, model=SCALES)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_checkpoint("hf", run, folder)
    return folder


@pytest.fixture(scope="module")
def model(exported):
    return transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()


def row(tokens: int, seed: int = 0) -> torch.Tensor:
    """A row with a document's begin inside."""
    ids = torch.randint(0, VOCAB_SIZE, (1, tokens), generator=torch.Generator().manual_seed(seed))
    ids[0, tokens // 2] = tokenizer().bos
    return ids


def test_the_certificate_is_of_their_process(exported):
    certificate = json.loads((exported.parent / "hf.certificate.json").read_text())
    assert certificate["passed"] and certificate["numbers"]["largest_logit_difference"] < 5e-5
    assert certificate["numbers"]["argmax_agreement"] == 1
    remark = certificate["remarks"][1]
    for part in (
        "value embeddings",
        "lookup layers",
        "n-gram values",
        "scales of norms",
        "windows of 128",
        "smear_lambda",
        "backout",
    ):
        assert part in remark
    assert "trust_remote_code=True" in remark and {"modeling_megachat.py", "tokenizer.json"} <= set(left_in(exported))
    cache = Path(transformers.dynamic_module_utils.HF_MODULES_CACHE) / "transformers_modules"
    assert cache.is_dir() and not (cache / f"_dot_hf_dot_{os.getpid()}_dot_tmp").exists()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("LOGIT_CAP = 15.0", "LOGIT_CAP = 14.9"), ("x + gate * previous", "x + gate * previous * 0.99")],
)
def test_wrong_code_is_refused(run, right, wrong, tmp_path, monkeypatch):
    """The proof runs the code in the folder, not megachat's model."""
    copied = shutil.copyfile

    def copyfile(source, target):
        copied(source, target)
        if Path(source).parent == Path(huggingface.__file__).parent:
            code = Path(source).read_text()
            assert code.count(right) == 1
            Path(target).write_text(code.replace(right, wrong))

    monkeypatch.setattr(huggingface.shutil, "copyfile", copyfile)
    monkeypatch.setattr(huggingface, "write_tokenizer", lambda *arguments: None)
    with pytest.raises(UserError, match="was not written.*largest_logit_difference is"):
        export_checkpoint("hf", run, tmp_path / "hf")
    assert left_in(tmp_path) == []


def test_chunks_and_steps_through_the_cache_give_the_same_logits(model):
    ids, cache = row(100), transformers.DynamicCache()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        parts = [model(part, past_key_values=cache).logits for part in ids.split([1, 40, 1, 1, 57], dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4
    assert torch.allclose(model(ids, logits_to_keep=2).logits, whole[:, -2:], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    """A window, a smear and n-grams reach over the border; the rows also continue through the cache."""
    short, long = row(140, seed=1), row(150, seed=2)
    padding = torch.zeros(1, 10, dtype=torch.int64)
    parts = (padding, short) if side == "left" else (short, padding)
    mask = torch.cat([torch.full_like(part, 0 if part is padding else 1) for part in parts], dim=1)
    ids, mask = torch.cat((torch.cat(parts, dim=1), long)), torch.cat((mask, torch.ones_like(long)))
    with torch.no_grad():
        both, alone = model(ids, attention_mask=mask), model(short)
        kept = both.logits[0, -140:] if side == "left" else both.logits[0, :140]
        assert (kept - alone.logits[0]).abs().max() < 1e-4
        assert (both.logits[1] - model(long).logits[0]).abs().max() < 1e-4
        if side == "left":
            mask, new = torch.cat((mask, torch.ones(2, 3, dtype=torch.int64)), dim=1), row(3, seed=3)
            more = model(
                new.expand(2, -1), attention_mask=mask, past_key_values=both[next(iter(set(both) - {"logits"}))]
            )
            assert (more.logits[0] - model(torch.cat((short, new), dim=1)).logits[0, -3:]).abs().max() < 1e-4


def test_generation_continues_like_megachats(run, model):
    """Greedy, past the window; several rows with left padding; beams, whose rows change places in the cache."""
    checkpoint = open_checkpoint(run)
    ours = LocalModel(build_model(checkpoint), checkpoint.dims)
    prompts = [row(110, seed=4)[0].tolist(), row(120, seed=5)[0].tolist()]
    expected = [each.tokens for each in generate(ours, prompts, tokens=30)]
    ids = torch.tensor([[0] * 10 + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * 10 + [1] * 110, [1] * 120])
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": -1}
    assert model.generate(ids, attention_mask=mask, **options)[:, 120:].tolist() == expected
    options |= {"max_new_tokens": 12, "num_beams": 3}
    cached, computed = (model.generate(row(9), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, computed)


def test_loss_and_gradients(model):
    ids = row(40)
    loss = model(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert torch.allclose(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


def test_what_it_does_not_take_is_refused(model, exported):
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 48))
    with pytest.raises(ValueError, match="leave cache_implementation at its default"):
        model.generate(row(5), max_new_tokens=2, cache_implementation="static")
    narrow = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.bfloat16)
    assert narrow.resid_lambdas.dtype == torch.float32 and narrow.lm_head.weight.dtype == torch.bfloat16
    logits = narrow(row(5)).logits
    assert logits.dtype == torch.float32 and logits.shape == (1, 5, VOCAB_SIZE)


def test_a_machine_without_megachat(run, exported, tmp_path):
    """A fresh process in an empty folder: both Auto classes, the ids, the logits, greedy and sampled text."""
    command = [sys.executable, "-I", "-c", USER, str(exported)]
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s(),
    )
    assert done.returncode == 0, done.stderr
    ids, greedy, sampled, last = json.loads(done.stdout.splitlines()[-1])
    assert ids[0] == tokenizer().encode("the cat and <|bos|> I'll", bos=True).tolist()
    checkpoint = open_checkpoint(run)
    expected = megachat_logits(checkpoint)(torch.tensor(ids))
    assert (torch.tensor(last) - expected[-1]).abs().max() < 5e-4
    model = LocalModel(build_model(checkpoint), checkpoint.dims)
    assert greedy[0][len(ids[0]) :] == generate(model, ids, tokens=8)[0].tokens
    assert len(sampled[0]) == len(ids[0]) + 8 and sampled != greedy


def test_there_and_back(run, exported, tmp_path, monkeypatch, capsys):
    """The weights to the bit and the same sizes, also after transformers has saved the model again."""
    transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path / "hf")
    assert {"config.json", "model.safetensors", "modeling_megachat.py"} <= set(left_in(tmp_path / "hf"))
    status, out, err = tool(monkeypatch, capsys, "diff", tmp_path / "hf", exported)
    assert status == 0 and out.splitlines()[-1] == "equal", out + err
    import_checkpoint("hf", exported, tmp_path / "back")
    back, source = open_checkpoint(tmp_path / "back"), open_checkpoint(run)
    assert back.dims == source.dims and back.facts["step"] == 0
    names = [name for name in source.entries if name.startswith("model/")]
    for (name, ours), (_, expected) in zip(back.tensors(names), source.tensors(names), strict=True):
        assert torch.equal(ours, expected), name
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings["lookup"] == LOOKUP and settings["ngram"]["rows"] == 50


def texts_of_the_cases(folder: Path) -> list[str]:
    """The texts of ../shared/cases, whatever pyarrow reads of them."""
    subprocess.run([sys.executable, SHARED / "cases" / "make_data.py", folder], check=True, capture_output=True)
    texts: list[str] = []
    for path in filter(Path.is_file, sorted(folder.rglob("[!.]*.parquet"))):
        table = pq.ParquetFile(path).read()
        columns = [column for name, column in zip(table.column_names, table.columns, strict=True) if name == "text"]
        for column in columns:
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                texts += [text.decode(errors="replace") for text in column.cast(pa.binary())[:10].to_pylist() if text]
    return texts


@pytest.mark.skipif(
    not (SHARED / "cases").is_dir(), reason="../shared is absent: it comes with the developers' checkout"
)
def test_the_tokenizer_gives_our_ids(tmp_path):
    """A trained vocabulary, whose merges matter, on novels that it has not seen, and on odd texts."""
    shards = sorted((SHARED / "data" / "english").glob("*.parquet"))
    train, held_out = (pq.read_table(path)["text"].to_pylist()[:12] for path in (shards[0], shards[-1]))
    ours = train_tokenizer((text[:20_000] for text in train), 2000)
    write_tokenizer(tmp_path, ours, 512)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [text[:20_000] for text in held_out] + texts_of_the_cases(tmp_path / "cases") + [" " * 120_000 + "x"]
    assert len(texts) > 300 and any("<|bos|>" in text for text in texts) and any("\x00" in text for text in texts)
    for text in texts:
        ids = ours.encode(text, bos=True).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids[1:])
    special = theirs("<|bos|>a", add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert special == [ours.bos, ord("a")]


def test_another_tokenizer_is_refused(tmp_path):
    """A difference of one merge is noticed when the folder is written."""
    ours = tokenizer()
    other = Tokenizer(ours.ranks | {b"aa": ours.ranks[b"ab"], b"ab": ours.ranks[b"aa"]})
    write_tokenizer(tmp_path, other, 160)
    other.encode = ours.encode
    with pytest.raises(UserError, match="tokenizer.json would not give the ids of tokenizer megachat for a text that"):
        write_tokenizer(tmp_path, other, 160)


def test_folders_that_are_damaged_or_newer(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"windows": [0, 160]}))
    with pytest.raises(UserError, match="lacks sizes of its model"):
        open_checkpoint(tmp_path / "hf")
    path.write_text(json.dumps(settings | {"vocab_size": 400}))
    with pytest.raises(UserError, match="wte.weight is|no allocation of lookup rows"):
        open_checkpoint(tmp_path / "hf")
