"""A Git LFS pointer in place of a user's file is called one, wherever the file is opened."""

import pytest

from megachat.checkpoint.facts import read_facts
from megachat.checkpoint.index import read_index
from megachat.config import load_config
from megachat.convert.formats import open_checkpoint
from megachat.data.shards import open_shard
from megachat.data.tokenizer import load_tokenizer, save_tokenizer
from megachat.errors import UserError
from megachat.evals.core_bundle import open_bundle
from megachat.prepare.sources import read_text_files
from megachat.prepare.tokenizer_training import import_nanochat
from megachat.programs.generate import read_prompts
from tests.unit.convert.checkpoints import make_run, pointer, step_folder, tokenizer

READERS = {  # a file in the folder that is a pointer -> what opens it
    "shard_00001.parquet": lambda folder, path: open_shard(path),
    "corpus.txt": lambda folder, path: list(read_text_files([path], 1000)),
    "config.json": lambda folder, path: load_config(path),
    "tokenizer.json": lambda folder, path: load_tokenizer(folder),
    "ranks.tiktoken": lambda folder, path: load_tokenizer(folder),
    "tokenizer.pkl": lambda folder, path: import_nanochat(folder),
    "checkpoint_facts.json": lambda folder, path: open_checkpoint(folder),
    "prompts.txt": lambda folder, path: read_prompts(str(path)),
    "eval_bundle.zip": lambda folder, path: open_bundle(path),
    "core.yaml": lambda folder, path: open_bundle(folder),
    "model.safetensors": lambda folder, path: open_checkpoint(folder),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_called_one(name, tmp_path):
    save_tokenizer(tmp_path, tokenizer(), {})
    if name == "model.safetensors":
        sizes = {"vocab_size": 330, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
        rest = {"max_position_embeddings": 64, "model_type": "nanochat", "intermediate_size": 192}
        (tmp_path / "config.json").write_text(str(sizes | rest).replace("'", '"'))
    pointer(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        READERS[name](tmp_path, tmp_path / name)


@pytest.mark.parametrize("name", ["checkpoint.json", "tensors.json", "__0_0.distcp", "loader/loader.json"])
def test_a_pointer_in_a_checkpoint_is_called_one(name, tmp_path):
    folder = step_folder(make_run(tmp_path / "run"))
    pointer(folder / name)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        read_index(folder) if name == "tensors.json" else read_facts(folder)
