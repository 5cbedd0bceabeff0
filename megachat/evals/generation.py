"""Continues several prompts at once with a KV cache, on any layout: one prefill pass, then one pass per token.

One rank chooses the token of each row and sends it to all, so that all ranks have the same rows. Each row has its own
random stream, derived from the seed and the row's number. Its tokens therefore depend on neither the layout nor the
other rows, except that logits are rounded differently: that may decide between two equally likely tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from megachat.errors import UserError
from megachat.evals.sampling import GREEDY, Sampling, choose_token
from megachat.model.cache import Cache, Chunk, set_past
from megachat.model.gpt import last_logits, run_layers
from megachat.planning.dimensions import Dimensions, up_to_multiple

# Chooses a token per row: logits [rows, vocab_size] float32 and row numbers [rows] (-1: unused) -> tokens [rows] int64
Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Per micro-batch: ids [rows, tokens], and [rows, 2] with the index of each row's last token and the row's number
Passes = Sequence[tuple[torch.Tensor, torch.Tensor]]


class GenerationModel(Protocol):
    """The model that `generate` runs: LocalModel in one process, or on ranks megachat.evals.engine_model.EngineModel.

    parts: number of micro-batches that the rows are split into. multiple: the tokens per row of a pass must be a
    multiple of it.
    """

    dims: Dimensions
    parts: int
    multiple: int

    def next_tokens(self, passes: Passes, chunks: Sequence[Chunk], choose: Choose) -> list[int]:
        """Returns the chosen token of every row of all passes, the same on every rank."""
        ...


class LocalModel:
    """The whole model in this process, without an engine."""

    parts, multiple = 1, 1

    def __init__(self, layers: nn.ModuleList, dims: Dimensions):
        self.layers, self.dims, self.device = layers, dims, next(layers.parameters()).device

    @torch.no_grad()
    def next_tokens(self, passes: Passes, chunks: Sequence[Chunk], choose: Choose) -> list[int]:
        """Returns the chosen token of every row of all passes."""
        tokens: list[int] = []
        for (ids, labels), chunk in zip(passes, chunks, strict=True):
            set_past(self.layers, chunk)
            try:
                output = run_layers(self.layers, ids.to(self.device))
            finally:
                set_past(self.layers, None)
            logits = last_logits(output, labels[:, 0].to(self.device), self.dims)
            tokens += choose(logits, labels[:, 1]).tolist()
        return tokens


@dataclass(frozen=True)
class Continuation:
    """A prompt's new tokens. end_reason: "stop", "tokens" (as many as requested) or "length" (sequence_len is full)."""

    tokens: list[int]
    end_reason: str


@dataclass
class _Row:
    number: int
    ids: list[int]
    prompt_length: int
    random: np.random.Generator
    end_reason: str = ""  # empty until the row ends

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt_length :]


_UNUSED = _Row(-1, [], 0, GREEDY.stream(0), "unused")  # fills up the last micro-batch


def generate(
    model: GenerationModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    tokens: int,
    sampling: Sampling = GREEDY,
    stop: Callable[[int, list[int]], bool] = lambda number, new: False,
    on_token: Callable[[int, int, str], object] = lambda number, token, end_reason: None,
    slide: bool = False,
    first: int = 0,
) -> list[Continuation]:
    """Generates up to `tokens` tokens for each prompt, see `generate_tokens`. Returns the prompts' continuations.

    on_token: called with what `generate_tokens` yields.
    """
    new: list[list[int]] = [[] for _ in prompts]
    reasons = [""] * len(prompts)
    for number, token, end_reason in generate_tokens(
        model, prompts, tokens=tokens, sampling=sampling, stop=stop, slide=slide, first=first
    ):
        new[number - first].append(token)
        reasons[number - first] = end_reason
        on_token(number, token, end_reason)
    return [Continuation(*continuation) for continuation in zip(new, reasons, strict=True)]


def generate_tokens(
    model: GenerationModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    tokens: int,
    sampling: Sampling = GREEDY,
    stop: Callable[[int, list[int]], bool] = lambda number, new: False,
    slide: bool = False,
    first: int = 0,
) -> Iterator[tuple[int, int, str]]:
    """Yields (row's number, token, end reason or "") for each prompt (token ids), one token of all rows at a time.

    On several ranks, all call it and get the same. first: number of the first prompt, if these are part of a longer
    list. stop: called with a row's number and its new tokens after each token; true ends the row. slide: False refuses
    prompts longer than the model's sequence_len and ends a row there. True lets the model see the last sequence_len
    tokens, which are then computed again for every token.

    Raises UserError if a prompt is empty or, without slide, too long.
    """
    longest = model.dims.sequence_len
    rows = [
        _Row(number, [int(i) for i in ids], len(ids), sampling.stream(number))
        for number, ids in enumerate(prompts, first)
    ]
    for row in rows:
        check_prompt(row.ids, row.number, longest, slide=slide)

    def choose(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        if not sampling.temperature:
            return logits.argmax(dim=-1)
        pairs = zip(logits.cpu(), numbers.tolist(), strict=True)
        return torch.tensor(
            [choose_token(line, sampling, rows[n - first].random.random()) if n >= 0 else 0 for line, n in pairs]
        )

    rows_per_part = max(1, -(-len(rows) // model.parts))
    slots = rows + [_UNUSED] * (-len(rows) % rows_per_part)
    parts = [slots[begin : begin + rows_per_part] for begin in range(0, len(slots), rows_per_part)]
    caches: list[Cache] = []
    while any(not row.end_reason for row in rows):
        prefill = not caches or (slide and any(len(row.ids) > longest for row in rows if not row.end_reason))
        if prefill:
            size = min(longest, max(row.prompt_length for row in rows) + tokens)
            caches = [Cache(model.dims, rows_per_part, size) for _ in parts]
        passes, chunks = _build_passes(parts, caches, longest if prefill else 1, model.multiple)
        for row, token in zip(slots, model.next_tokens(passes, chunks, choose), strict=True):
            if row.end_reason:
                continue
            row.ids.append(token)
            if stop(row.number, row.new):
                row.end_reason = "stop"
            elif len(row.new) == tokens:
                row.end_reason = "tokens"
            elif not slide and len(row.ids) > longest:
                row.end_reason = "length"
            yield row.number, token, row.end_reason


def check_prompt(ids: Sequence[int] | np.ndarray, number: int, longest: int, *, slide: bool = False) -> None:
    """Raises UserError if a prompt is empty or, without slide, longer than the model's sequence_len."""
    if not len(ids):
        raise UserError(f"prompt {number + 1} has no tokens: start it with the tokenizer's BOS")
    if len(ids) > longest and not slide:
        raise UserError(f"prompt {number + 1} has {len(ids)} tokens, but the model takes at most {longest}: shorten it")


def _build_passes(
    parts: list[list[_Row]], caches: list[Cache], most: int, multiple: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[Chunk]]:
    """Builds one pass per part, all of one shape, with the last `most` tokens of each row that has not ended."""
    new = [[[] if row.end_reason else row.ids[-most:] for row in rows] for rows in parts]
    width = up_to_multiple(max(len(ids) for rows in new for ids in rows), multiple)
    passes, chunks = [], []
    for rows, new_ids, cache in zip(parts, new, caches, strict=True):
        numbers = [-1 if row.end_reason else row.number for row in rows]
        labels = [[max(0, len(ids) - 1), number] for ids, number in zip(new_ids, numbers, strict=True)]
        passes.append((torch.tensor([ids + [0] * (width - len(ids)) for ids in new_ids]), torch.tensor(labels)))
        chunks.append(cache.extend([len(ids) for ids in new_ids]))
    return passes, chunks
