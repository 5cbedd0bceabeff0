"""What `tools/bench.py generation` measures: tokens a second with the KV cache beside computing every text anew for each token."""

import torch

from megachat.config import Config
from megachat.evals.generation import LocalModel, generate
from megachat.model.cache import cache_bytes
from megachat.model.gpt import ModelOptions, build_layers, last_logits, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.place import place_of
from megachat.planning.dimensions import Dimensions
from megachat.planning.plan import resolve_dimensions
from megachat.programs.verify_layout import related_rows

ROWS = (1, 8)
SHORTEST = 8  # tokens of a prompt; the longest leaves room for what is generated


def random_model(dims: Dimensions) -> LocalModel:
    """Weights of which none is zero, so that texts differ."""
    layers = build_layers(dims, ModelOptions()).requires_grad_(False)
    for parameter in placed_parameters(layers):
        where = place_of(parameter)
        load_whole(parameter, starting_value(where.__class__(where.name, where.whole, 0, ("normal", 0.1)), seed=1))
    return LocalModel(layers, dims)


@torch.no_grad()
def computed_anew(model: LocalModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy continuations without a cache: all rows whole, padded at the end, once for each token."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(tokens):
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        found = last_logits(
            run_layers(model.layers, ids), torch.tensor([len(row) - 1 for row in rows]), model.dims
        ).argmax(-1)
        for row, token in zip(rows, found.tolist(), strict=True):
            row.append(token)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def actions(config: Config, vocab_size: int, tokens: int) -> tuple[dict, dict]:
    """(what to time by case and way, facts): prompts of one length and of several, both ways once compared, where all tokens must be equal."""
    dims = resolve_dimensions(config, vocab_size)
    model, longest = random_model(dims), dims.sequence_len - tokens
    cases = {f"{n} x {length} tokens": [length] * n for n in ROWS for length in (SHORTEST, longest)}
    cases["8 of 8 lengths"] = [SHORTEST + (longest - SHORTEST) * i // 7 for i in range(8)]
    made = {}
    for name, lengths in cases.items():
        prompts = [
            row[:length].tolist()
            for row, length in zip(related_rows(0, len(lengths), longest, vocab_size), lengths, strict=True)
        ]
        made[name] = {
            "anew": lambda prompts=prompts: computed_anew(model, prompts, tokens),
            "cached": lambda prompts=prompts: [row.new for row in generate(model, prompts, tokens=tokens)],
        }
        if made[name]["anew"]() != made[name]["cached"]():
            raise RuntimeError(f"{name}: the ways give other tokens")
    kept = {f"{n} rows": cache_bytes(dims, n, dims.sequence_len, torch.float32) for n in ROWS}
    facts = {
        "width": dims.width,
        "depth": dims.depth,
        "windows": dims.windows,
        "sequence_len": dims.sequence_len,
        "cache_bytes": kept,
    }
    return made, facts | {"rows": {name: len(lengths) for name, lengths in cases.items()}}
