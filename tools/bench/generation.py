"""Measures tokens per second with the KV cache and when every text is computed again for each token."""

from argparse import Namespace

import torch

from megachat.config import load_config
from megachat.evals.generation import LocalModel, generate
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.model.cache import cache_bytes
from megachat.model.gpt import ModelOptions, build_layers, last_logits, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.place import Place, place_of
from megachat.planning.dimensions import Dimensions
from megachat.planning.sizes import resolve_dimensions
from megachat.programs.verify_layout import related_rows
from tools.bench.turns import compare_rates, time_in_turn

ROWS = (1, 8)
SHORTEST = 8  # tokens of a prompt; the longest prompt leaves room for the new tokens


def random_model(dims: Dimensions) -> LocalModel:
    """Builds a model without zero weights, so that texts differ."""
    layers = build_layers(dims, ModelOptions()).requires_grad_(False)
    for parameter in placed_parameters(layers):
        place = place_of(parameter)
        load_whole(parameter, starting_value(Place(place.name, place.whole, 0, ("normal", 0.1)), seed=1))
    return LocalModel(layers, dims)


@torch.no_grad()
def generate_without_cache(model: LocalModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Returns greedy continuations. Each token computes all rows whole, padded at the end."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(tokens):
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        chosen = last_logits(run_layers(model.layers, ids), last, model.dims).argmax(-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def bench_generation(arguments: Namespace) -> dict:
    """Measures greedy tokens per second in float32, with the KV cache and without, which must give the same tokens."""
    choose_device(bootstrap_environment())
    tokens, vocab_size = arguments.tokens, arguments.vocab_size
    dims = resolve_dimensions(load_config(arguments.config, arguments.set), vocab_size)
    model, longest = random_model(dims), dims.sequence_len - tokens
    cases = {f"{n} x {length} tokens": [length] * n for n in ROWS for length in (SHORTEST, longest)}
    cases["8 of 8 lengths"] = [SHORTEST + (longest - SHORTEST) * i // 7 for i in range(8)]
    rates = {}
    for name, lengths in cases.items():
        rows = related_rows(0, len(lengths), longest, vocab_size)
        prompts = [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]
        ways = {
            "anew": lambda prompts=prompts: generate_without_cache(model, prompts, tokens),
            "cached": lambda prompts=prompts: [row.tokens for row in generate(model, prompts, tokens=tokens)],
        }
        if ways["anew"]() != ways["cached"]():
            raise RuntimeError(f"{name}: the tokens with and without the cache differ")
        rates[name] = compare_rates(time_in_turn(ways, arguments.rounds), "anew", len(lengths) * tokens)
    facts = {
        "width": dims.width,
        "depth": dims.depth,
        "windows": dims.windows,
        "sequence_len": dims.sequence_len,
        "cache_bytes": {f"{n} rows": cache_bytes(dims, n, dims.sequence_len, torch.float32) for n in ROWS},
        "rows": {name: len(lengths) for name, lengths in cases.items()},
    }
    return {"what": f"new tokens per second, {tokens} per row", "facts": facts, "found": rates}
