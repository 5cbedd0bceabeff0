"""The conversions, one function each: they return the certificate, raise UserError, and leave nothing when they fail."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megachat.checkpoint.facts import find_file_problems
from megachat.convert.architecture import dims_of, has_optimizer
from megachat.convert.conversion import adjusted, convert
from megachat.convert.formats import open_checkpoint
from megachat.convert.huggingface import (
    TOKENIZER_FOLDER,
    carried,
    not_carried,
    open_huggingface,
    transformers_logits,
    without_padding,
    write_huggingface,
)
from megachat.convert.imported import (
    Import,
    check_sizes,
    foreign_tokenizer,
    fresh_state,
    imported_facts,
    settings_of_dims,
    tokenizer_folder,
    whole_pieces,
    write_import,
)
from megachat.convert.nanochat import open_nanochat, refuse_others
from megachat.convert.nanochat_settings import config_of, loop_of, nanochat_tokenizer_folder
from megachat.convert.nanochat_write import rounded, write_nanochat
from megachat.convert.opened import Opened
from megachat.convert.plain import open_plain, write_plain
from megachat.convert.proof import Tolerance, prove
from megachat.data.tokenizer import load_origin, load_tokenizer
from megachat.errors import UserError
from megachat.planning.dimensions import VOCAB_MULTIPLE

ROUNDED_TABLES = Tolerance(
    logit=0.25, kl=1e-3, argmax=0.95
)  # against the source as it is: rounding is asked for, and its size is told
OTHER_CODE = Tolerance(logit=5e-4, kl=1e-7, argmax=0.99)  # transformers' kernels add up in another order

_OF_SAVING = ("files", "sha256", "format_version", "architecture_version", "step", "tokenizer")


def to_safetensors(checkpoint: Path, target: Path, *, tokenizer: Path | None = None) -> dict:
    """Everything as safetensors and JSON."""
    source = _source(checkpoint, "megachat")
    found = tokenizer_folder(source, tokenizer)

    def make(temporary: Path):
        write_plain(source, temporary, found)
        return prove(source, open_plain(temporary), Tolerance())

    return convert("to-safetensors", source, target, make)


def from_safetensors(folder: Path, target: Path, *, tokenizer: Path | None = None) -> dict:
    """Back from `to_safetensors`, into a run folder or a step's folder."""
    source = _source(folder, "safetensors")
    found = needed_tokenizer(source, tokenizer)
    facts = {key: value for key, value in source.facts.items() if key not in _OF_SAVING}
    copies = tuple(name for name in source.files if name.startswith(("loader/", "random/")))
    made = Import(
        source.facts["step"],
        whole_pieces(source),
        facts,
        load_tokenizer(found),
        load_origin(found),
        source.folder,
        copies,
    )
    return convert(
        "from-safetensors",
        source,
        target,
        lambda temporary: prove(source, write_import(made, temporary, target), Tolerance()),
    )


def to_nanochat(
    checkpoint: Path, target: Path, *, ranks: int = 1, tables: str = "float32", tokenizer: Path | None = None
) -> dict:
    """nanochat's weights, meta, tokenizer, and the optimizer's state for a job of `ranks` ranks. tables: dtype of embeddings and their moments.

    Raises UserError also for a model that nanochat does not have.
    """
    if ranks < 1:
        raise UserError(f"--ranks is {ranks}: give 1 or more")
    source = _source(checkpoint, "megachat")
    refuse_others(dims_of(source.facts))
    found, dtype = load_tokenizer(needed_tokenizer(source, tokenizer)), getattr(torch, tables)
    expected = adjusted(
        source, list(source.entries), lambda name, tensor: rounded(name, tensor, dtype).to(tensor.dtype)
    )
    remarks = (
        []
        if tables == "float32"
        else [f"embeddings and their moments are rounded to {tables}; the logits are compared with the unrounded"]
    )

    def make(temporary: Path):
        write_nanochat(source, temporary, found, ranks, dtype)
        return prove(
            source,
            open_nanochat(temporary),
            ROUNDED_TABLES if remarks else Tolerance(),
            expected=expected,
            remarks=remarks,
        )

    return convert("to-nanochat", source, target, make)


def from_nanochat(
    folder: Path, target: Path, *, step: int | None = None, tokenizer: Path | None = None, fresh_optimizer: bool = False
) -> dict:
    """A run folder, or a step's folder, that goes on where nanochat stopped. fresh_optimizer: leave its optimizer's state away."""
    source = _source(folder, "nanochat", step)
    dims = dims_of(source.facts)
    if not has_optimizer(source.entries) and not fresh_optimizer:
        raise UserError(
            f"{folder} has no optimizer state of step {source.facts['step']}: copy its optim files too, or give --fresh-optimizer"
        )
    if fresh_optimizer:
        weights = [name for name in source.entries if name.startswith("model/")]
        source = adjusted(source, weights, facts=source.facts | {"adamw_steps": 0})
    config, remarks = config_of(source, dims)
    check_sizes(config, dims, folder)
    found = foreign_tokenizer(
        tokenizer or nanochat_tokenizer_folder(folder) or folder / "tokenizer", dims.vocab_size, dims.vocab_size
    )
    facts = imported_facts(source.facts, dims, config) | {"loop": loop_of(source.facts["imported"]["meta"])}
    pieces = whole_pieces(source) | (fresh_state(dims) if fresh_optimizer else {})
    made = Import(source.facts["step"], pieces, facts, *found, source.folder)

    def make(temporary: Path):
        back = adjusted(write_import(made, temporary, target), list(source.entries))
        return prove(source, back, Tolerance(), remarks=remarks)

    return convert("from-nanochat", source, target, make)


def to_hf(checkpoint: Path, target: Path, *, tokenizer: Path | None = None) -> dict:
    """What transformers' NanoChatForCausalLM loads. Raises UserError with all that it cannot carry, where the model has such."""
    source = _source(checkpoint, "megachat")
    if missing := not_carried(source):
        raise UserError("\n".join(f"transformers' NanoChat does not compute this model's {what}" for what in missing))
    dims, place, names = dims_of(source.facts), needed_tokenizer(source, tokenizer), carried(source)
    expected = adjusted(source, names, lambda name, tensor: without_padding(name, tensor, dims.vocab_size))
    remarks = [
        f"not carried: the optimizer's state, the loader, {dims.padded_vocab - dims.vocab_size} padding rows a table"
    ]

    def make(temporary: Path):
        write_huggingface(source, temporary, load_tokenizer(place), load_origin(place))
        build = partial(transformers_logits, temporary, dims.vocab_size)
        back = adjusted(open_huggingface(temporary), names, facts={})
        return prove(source, back, OTHER_CODE, expected=expected, build_target=build, remarks=remarks)

    return convert("to-hf", source, target, make)


def from_hf(folder: Path, target: Path, *, tokenizer: Path | None = None) -> dict:
    """A run folder, or a step's folder, at step 0 with the weights of a transformers NanoChat model and a fresh optimizer."""
    source = _source(folder, "huggingface")
    rows = dims_of(source.facts).vocab_size
    found = foreign_tokenizer(tokenizer or folder / TOKENIZER_FOLDER, rows - VOCAB_MULTIPLE + 1, rows)
    dims = replace(dims_of(source.facts), vocab_size=found[0].vocab_size)
    if dims.padded_vocab < rows:
        raise UserError(
            f"{folder} has tables of {rows} rows, and a model of {dims.vocab_size} tokens has {dims.padded_vocab}: give its own --tokenizer"
        )
    config = settings_of_dims(dims)
    check_sizes(config, dims, folder)
    facts = imported_facts(source.facts, dims, config)
    source = adjusted(source, list(source.entries), facts=facts | {"step": 0})
    made = Import(0, whole_pieces(source) | fresh_state(dims), facts, *found, source.folder)

    def make(temporary: Path):
        back = adjusted(write_import(made, temporary, target), list(source.entries))
        build, remarks = (
            partial(transformers_logits, folder, dims.vocab_size),
            ["the optimizer, the schedule and the documents begin afresh"],
        )
        return prove(source, back, OTHER_CODE, build_source=build, remarks=remarks)

    return convert("from-hf", source, target, make)


def needed_tokenizer(source: Opened, asked: Path | None) -> Path:
    """`tokenizer_folder`, but a UserError when there is none."""
    found = tokenizer_folder(source, asked)
    if found is None:
        raise UserError(
            f"the tokenizer of {source.folder} is not where its config says: give its folder with --tokenizer"
        )
    return found


def _source(path: Path, form: str, step: int | None = None) -> Opened:
    opened = open_checkpoint(path, step)
    if opened.form != form:
        raise UserError(f"{path} is of the form {opened.form}, not {form}: use the conversion for that")
    if "files" in opened.facts and (problems := find_file_problems(opened.folder, opened.facts)):
        raise UserError(f"{opened.folder} is damaged: {problems[0]}")
    return opened
