"""Continuing prompts token by token with a KV cache: one prefill, then one token a pass, several prompts at once, on any layout.

The token of each row is chosen on one rank (the first of the last pipeline stage) and sent to all, so that all ranks keep equal rows. Each row
draws from a random stream of its own, made from the seed and the row's number: a row's tokens depend on neither the layout nor the other rows,
as far as logits do not (their rounding may decide between two equally likely tokens).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import nn

from megachat.errors import UserError
from megachat.evals.sampling import GREEDY, Sampling, choose_token
from megachat.model.cache import Cache, Chunk, set_past
from megachat.model.gpt import last_logits, run_layers
from megachat.planning.dimensions import Dimensions, up_to_multiple

Choose = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # logits [rows, vocab_size] float32 and the rows' numbers [rows] -> tokens [rows] int64
Passes = Sequence[
    tuple[torch.Tensor, torch.Tensor]
]  # ids [rows, tokens] and, of each row, [rows, 2]: its last token's place and its number


class Model(Protocol):
    """What `generate` computes with: LocalModel, or where ranks work together megachat.evals.engine_model.EngineModel.

    parts: of a pass, that rows are dealt to. multiple: of which the tokens of a pass must be one.
    """

    dims: Dimensions
    parts: int
    multiple: int

    def next_tokens(self, passes: Passes, chunks: Sequence[Chunk], choose: Choose) -> list[int]:
        """The chosen tokens of all passes' rows, on every rank."""
        ...


@dataclass(frozen=True)
class Generated:
    """A prompt's continuation. why: it ended with a "stop", after the "tokens" asked for, or at the model's "length"."""

    new: list[int]
    why: str


@dataclass
class _Row:
    number: int
    ids: list[int]
    prompt: int  # tokens of it
    random: np.random.Generator
    why: str = field(default="")  # it has ended; empty: it goes on


class LocalModel:
    """The whole model in this process, without an engine."""

    parts, multiple = 1, 1

    def __init__(self, layers: nn.ModuleList, dims: Dimensions):
        self.layers, self.dims, self.device = layers, dims, next(layers.parameters()).device

    @torch.no_grad()
    def next_tokens(self, passes: Passes, chunks: Sequence[Chunk], choose: Choose) -> list[int]:
        """The chosen tokens of all passes' rows."""
        found = []
        for (ids, labels), chunk in zip(passes, chunks, strict=True):
            set_past(self.layers, chunk)
            try:
                output = run_layers(self.layers, ids.to(self.device))
            finally:
                set_past(self.layers, None)
            found += choose(last_logits(output, labels[:, 0].to(self.device), self.dims), labels[:, 1]).tolist()
        return found


def generate(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    tokens: int,
    sampling: Sampling = GREEDY,
    ends: Callable[[int, list[int]], bool] = lambda number, new: False,
    told: Callable[[int, int, str], object] = lambda number, token, why: None,
    slide: bool = False,
    first: int = 0,
) -> list[Generated]:
    """Up to `tokens` more tokens for each prompt (ids, one at least); where there are ranks, all call it and get the same.

    first: the number of the first prompt, where these are a part of many. ends: asked with a row's number and its new tokens after each, whether
    it has ended. told: called then with the row's number, its new token, and why it ended, "" if it goes on.
    slide: what to do where a text is longer than the model's sequence_len. False: a longer prompt is refused, and a row ends there. True: the
    model sees the last sequence_len tokens, which have to be computed anew for each further one.

    Raises UserError for a prompt that is empty or, without slide, longer than the model can take.
    """
    longest = model.dims.sequence_len
    rows = [
        _Row(number, [int(i) for i in ids], len(ids), sampling.stream(number))
        for number, ids in enumerate(prompts, first)
    ]
    for row in rows:
        check_prompt(row.ids, row.number, longest, slide=slide)
    if not rows:
        return []

    def choose(found: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        if not sampling.temperature:
            return found.argmax(dim=-1)
        found = found.cpu()
        return torch.tensor(
            [
                choose_token(line, sampling, rows[n - first].random.random()) if n >= 0 else 0
                for line, n in zip(found, numbers.tolist(), strict=True)
            ]
        )

    each = -(-len(rows) // model.parts)
    groups = [rows[begin : begin + each] for begin in range(0, len(rows), each)]
    caches: list[Cache] = []
    while any(not row.why for row in rows):
        anew = not caches or (slide and any(len(row.ids) > longest for row in rows if not row.why))
        if anew:
            caches = [Cache(model.dims, each, min(longest, max(row.prompt for row in rows) + tokens)) for _ in groups]
        passes, chunks = _passes(groups, caches, each, longest if anew else 1, model.multiple)
        slots = iter(model.next_tokens(passes, chunks, choose))
        for group in groups:
            for row, token in zip(group, [next(slots) for _ in range(each)], strict=False):
                if not row.why:
                    _take(row, token, tokens, None if slide else longest, ends, told)
    return [Generated(row.ids[row.prompt :], row.why) for row in rows]


def check_prompt(ids: Sequence[int], number: int, longest: int, *, slide: bool = False) -> None:
    """Raise UserError for a prompt that is empty or, without slide, longer than the model can take."""
    if not len(ids):
        raise UserError(f"prompt {number + 1} has no tokens: begin it with the tokenizer's BOS")
    if len(ids) > longest and not slide:
        raise UserError(f"prompt {number + 1} has {len(ids)} tokens and the model can take {longest}: shorten it")


def _passes(
    groups: list[list[_Row]], caches: list[Cache], each: int, most: int, multiple: int
) -> tuple[list, list[Chunk]]:
    """One pass a group with the last `most` tokens of each row that goes on, nothing of others; all of one shape."""
    news = [[row.ids[-most:] if not row.why else [] for row in group] + [[]] * (each - len(group)) for group in groups]
    width = up_to_multiple(max(len(new) for group in news for new in group), multiple)
    passes, chunks = [], []
    for group, new_of, cache in zip(groups, news, caches, strict=True):
        ids = torch.tensor([new + [0] * (width - len(new)) for new in new_of])
        numbers = [row.number if not row.why else -1 for row in group] + [-1] * (each - len(group))
        passes.append(
            (ids, torch.tensor([[max(0, len(new) - 1), number] for new, number in zip(new_of, numbers, strict=True)]))
        )
        chunks.append(cache.extend([len(new) for new in new_of]))
    return passes, chunks


def _take(row: _Row, token: int, tokens: int, longest: int | None, ends, told) -> None:
    row.ids.append(token)
    if ends(row.number, row.ids[row.prompt :]):
        row.why = "stop"
    elif len(row.ids) - row.prompt == tokens:
        row.why = "tokens"
    elif longest is not None and len(row.ids) > longest:
        row.why = "length"
    told(row.number, token, row.why)
