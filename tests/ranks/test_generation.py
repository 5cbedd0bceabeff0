"""The KV cache and generation through the engine, on several layouts, against the uncached model in one process."""

import torch
from torch import nn

from megachat.evals.engine_model import EngineModel, evaluate_chunks
from megachat.evals.generation import LocalModel, generate
from megachat.evals.sampling import Sampling
from megachat.model.cache import Cache, cache_bytes
from megachat.model.gpt import ModelOptions, build_layers, logits, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.parallel.tensor import vocabulary_part
from megachat.place import Place, place_of
from megachat.planning.plan import resolve_without_text
from tests.harness import run_ranks
from tests.rows import fill_tables
from tests.training import SMALL_VOCAB, build, random_rows, small_config

MODEL = {
    "aspect_ratio": 32,
    "head_size": 16,
    "kv_heads": 2,
}  # 3 blocks in stages of unlike depth, 6 heads; the first sees 128 of 160 tokens
NGRAM = {"blocks": (0, 2), "rows": 90, "orders": (2, 4), "bos": 12}  # texts have several documents
LOOKUP = {"after_blocks": (1,), "rows": 700, "max_rows_per_token": 90}
LAYOUTS = [{"pipeline": 2}, {"tensor": 2}, {"tensor": 2, "sequence": True}]
LENGTHS = [[150, 20], [140, 7]]  # two micro-batches
CUTS = [[128, 8], [131, 0]], [[137, 17], [131, 3]], [[138, 18], [132, 4]]  # how much of each is cached after each pass
SAMPLING = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)


def some_value(name, whole) -> torch.Tensor:
    return starting_value(Place(name, whole, 0, ("normal", 0.2)), seed=3)


def some_values(layers) -> None:
    for parameter in placed_parameters(layers):
        load_whole(parameter, some_value(place_of(parameter).name, place_of(parameter).whole))


def texts() -> list[list[torch.Tensor]]:
    rows = random_rows(0, 4, 160, SMALL_VOCAB)
    return [[rows[2 * i + j, :length] for j, length in enumerate(pair)] for i, pair in enumerate(LENGTHS)]


def padded(parts):
    """Stacks the parts in one tensor, padded to the longest and to an even number of tokens."""
    width = -(-max(map(len, parts)) // 2) * 2
    return torch.stack([nn.functional.pad(part, (0, width - len(part)), value=5) for part in parts])


class Logits(nn.Module):
    def __init__(self, dims, part):
        super().__init__()
        self.dims, self.part = dims, part

    def forward(self, output, targets):
        return logits(output, self.dims, self.part)


def prompts():
    return [random_rows(1, 1, length, SMALL_VOCAB)[0].tolist() for length in (5, 130, 1)]


def generated(model):
    """Generates with sampling and a row that stops, greedily up to the model's length, and beyond it."""
    at_its_end = random_rows(2, 1, 156, SMALL_VOCAB)[0].tolist()
    return (
        generate(
            model, prompts(), tokens=12, sampling=SAMPLING, stop=lambda number, new: number == 1 and len(new) == 5
        ),
        generate(model, [at_its_end, [1, 2]], tokens=8),
        generate(model, [at_its_end, [1, 2]], tokens=8, slide=True),
    )


def cached_on_ranks(parallels):
    return [cached(generation_config(parallel)) for parallel in parallels]


def generation_config(parallel):
    return small_config(model=MODEL, ngram=NGRAM, lookup=LOOKUP, parallel=parallel)


def cached(config):
    """Returns the last stage's logits of every pass, generated tokens, and the cache's actual and predicted bytes."""
    training = build(config, SMALL_VOCAB)
    some_values(training.layers)
    fill_tables(training.rows, some_value)
    dims, mesh = training.plan.dims, training.mesh
    measure = Logits(dims, vocabulary_part(dims.padded_vocab, mesh.tensor))
    caches = [Cache(dims, 2, 150) for _ in LENGTHS]
    done, outputs = [[0, 0], [0, 0]], []
    for cuts in CUTS:
        parts = [
            [text[a:b] for text, a, b in zip(*group, strict=True)] for group in zip(texts(), done, cuts, strict=True)
        ]
        whole = padded([part for group in parts for part in group]).split(2)
        chunks = [cache.extend([len(part) for part in group]) for cache, group in zip(caches, parts, strict=True)]
        outputs.append(evaluate_chunks(training.engine, [(ids, ids) for ids in whole], chunks, measure))
        done = cuts
    tails = padded([texts()[1][0][132:], texts()[1][1][4:], texts()[1][0][132:135]])
    branches = [caches[1].branch([0, 1, 0]), caches[1].branch([0, 1, 0])]
    outputs.append(evaluate_chunks(training.engine, [(tails, tails)] * 2, branches, measure))
    multiple = mesh.tensor.size if config.parallel.sequence else 1
    first, last = training.plan.stages[mesh.pipeline.rank]
    blocks = range(max(0, first - 1), min(dims.depth, last - 1))
    kv_heads = dims.kv_heads // mesh.tensor.size
    predicted_bytes = cache_bytes(dims, 2, 150, torch.float32, blocks=blocks, kv_heads=kv_heads)
    model = EngineModel(training.engine, mesh, dims, multiple=multiple)
    return outputs, generated(model), caches[0].bytes, predicted_bytes


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def test_the_cache_and_generation_are_the_same_on_every_layout():
    dims = resolve_without_text(generation_config({}), 1, SMALL_VOCAB).dims
    layers = build_layers(dims, ModelOptions()).requires_grad_(False)
    some_values(layers)
    whole = [[logits(run_layers(layers, text[None]), dims)[0] for text in group] for group in texts()]
    alone = generated(LocalModel(layers, dims))
    assert [(row.end_reason, len(row.tokens)) for row in alone[0]] == [("tokens", 12), ("stop", 5), ("tokens", 12)]
    assert [row.end_reason for row in alone[1]] == ["length", "tokens"] and len(alone[1][0].tokens) == 5
    assert alone[2][0].tokens[:5] == alone[1][0].tokens and len(alone[2][0].tokens) == 8 and alone[2][1] == alone[1][1]
    answers = run_ranks(cached_on_ranks, 2, LAYOUTS)
    for number, parallel in enumerate(LAYOUTS):
        for rank, answer in enumerate(answers):
            passes, continuations, cached_bytes, predicted_bytes = answer[number]
            assert continuations == alone, parallel
            assert cached_bytes == predicted_bytes > 0
            assert bool(passes[0]) == (rank == 1 or "tensor" in parallel)
            if not passes[0]:
                continue
            starts = [[0, 0], [0, 0]]
            for outputs, cuts in zip(passes, CUTS, strict=False):
                for group, (output, cut) in enumerate(zip(outputs, cuts, strict=True)):
                    for row, (a, b) in enumerate(zip(starts[group], cut, strict=True)):
                        if b > a:
                            assert_close(output[row, : b - a], whole[group][row][a:b])
                starts = cuts
            for output in passes[-1]:
                assert_close(output[0, :8], whole[1][0][132:])
                assert_close(output[1, :3], whole[1][1][4:])
                assert_close(output[2, :3], whole[1][0][132:135])
