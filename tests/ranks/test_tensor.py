"""The tensor axis below the optimizers: loss, every gradient, evaluation and sampling of a cut model against the whole
one, and what is sent.
"""

import dataclasses

import pytest
import torch

from megachat.model.gpt import Loss, ModelOptions, build_layers, last_logits, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.parallel import collectives, tensor
from megachat.parallel.cuts import cut_range
from megachat.parallel.mesh import build_mesh
from megachat.parallel.tensor import apply_tensor, vocabulary_part
from megachat.place import is_partial_over_tensor, is_tensor_shard, place_of
from megachat.planning.plan import resolve_plan
from megachat.settings import ParallelConfig
from tests.harness import run_ranks
from tests.training import SMALL_VOCAB, random_rows, small_config

GQA = {"head_size": 8, "kv_heads": 2}


def some_values(layers) -> None:
    """Loads values without zeros, so that no gradient is zero."""
    for parameter in placed_parameters(layers):
        load_whole(parameter, starting_value(dataclasses.replace(place_of(parameter), start=("normal", 0.1)), seed=3))


def measured(layers, dims, part, rows):
    loss = Loss(dims, torch.arange(dims.vocab_size) % 3, part)  # some tokens have no bytes
    ids, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[0, :5] = -1
    value = loss(run_layers(layers, ids), targets)
    value.backward()
    loss.eval()
    with torch.no_grad():
        output = run_layers(layers, ids)
        evaluated = loss(output, targets), last_logits(output, torch.tensor([3, 100]), dims, part).argmax(-1)
    return value.item(), *evaluated


def cut_model(config, sequence: bool, tokens: int, vocab_size: int):
    rows = random_rows(0, 2, tokens, vocab_size)
    mesh = build_mesh(torch.device("cpu"), tensor=config.parallel.tensor)
    dims = resolve_plan(config, mesh.world.size, vocab_size).dims
    layers = build_layers(dims, ModelOptions())
    apply_tensor(list(layers), mesh.tensor, sequence=sequence)
    some_values(layers)
    value, nats, result = measured(layers, dims, vocabulary_part(dims.padded_vocab, mesh.tensor), rows)
    gradients = []
    for parameter in placed_parameters(layers):
        if is_partial_over_tensor(parameter):
            collectives.all_reduce(parameter.grad, mesh.tensor)
        gradients.append((place_of(parameter), parameter.grad, is_tensor_shard(parameter)))
    return value, nats, result, gradients


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("tensor_size", "model", "vocab_size"),
    [
        (2, GQA, SMALL_VOCAB),
        (2, {"head_size": 8, "kv_heads": None, "sequence_len": 162}, 96),
        (3, {"sequence_len": 162}, SMALL_VOCAB),  # 128 rows in three parts
        (4, {"head_size": 4, "kv_heads": 4}, 65),  # of 128 rows the third rank has one token, the last none
    ],
)
def test_a_cut_model_has_the_loss_and_every_gradient_of_the_whole_one(tensor_size, model, vocab_size, sequence):
    config = small_config(model=model, parallel={"tensor": tensor_size}, batch={"tokens": None, "accumulation": 1})
    dims = resolve_plan(config.model_copy(update={"parallel": ParallelConfig()}), 1, vocab_size).dims
    whole = build_layers(dims, ModelOptions())
    some_values(whole)
    rows = random_rows(0, 2, 160 // tensor_size * tensor_size + 1, vocab_size)
    expected = measured(whole, dims, tensor.WHOLE, rows)
    gradients = {(place_of(p).name, place_of(p).block): p.grad for p in placed_parameters(whole)}
    covered = {key: torch.zeros_like(gradient) for key, gradient in gradients.items()}
    for value, nats, tokens, parts in run_ranks(cut_model, tensor_size, config, sequence, rows.size(1), vocab_size):
        assert value == pytest.approx(expected[0], rel=1e-6)
        assert torch.allclose(nats, expected[1], rtol=1e-6) and torch.equal(tokens, expected[2])
        for place, gradient, is_shard in parts:
            key = place.name, place.block
            assert is_shard == (place.cut != "whole")
            start = place.offset if place.cut != "whole" else (0,) * gradient.ndim
            here = tuple(slice(first, first + size) for first, size in zip(start, gradient.shape, strict=True))
            # A scalar's gradient is a sum over all tokens and channels, which nearly cancels in one block or another:
            # its rounding is measured by the largest of all blocks.
            near = 1e-5 if gradient.ndim == 2 else 1e-4
            largest = max(whole.abs().max() for (name, _), whole in gradients.items() if name == place.name)
            assert torch.allclose(gradient, gradients[key][here], rtol=1e-5, atol=near * largest), place.name
            covered[key][here] += 1
    for (name, _), count in covered.items():
        assert set(count.unique().tolist()) <= {1.0, float(tensor_size)}, f"{name} is not held once or by all"


def count_collectives(config, sequence: bool):
    mesh = build_mesh(torch.device("cpu"), tensor=config.parallel.tensor)
    dims = resolve_plan(config, mesh.world.size, SMALL_VOCAB).dims
    layers = build_layers(dims, ModelOptions(), seed=1)
    apply_tensor(list(layers), mesh.tensor, sequence=sequence)
    some_values(layers)
    rows, counts = random_rows(0, 2, 161, SMALL_VOCAB), []
    before = dict(mesh.world.progress.counts)
    value = Loss(dims, torch.ones(SMALL_VOCAB), vocabulary_part(dims.padded_vocab, mesh.tensor))(
        run_layers(layers, rows[:, :-1]), rows[:, 1:]
    )
    for action in (lambda: None, value.backward):
        action()
        counts.append(mesh.world.progress.counts["tensor"] - before.get("tensor", 0))
        before = dict(mesh.world.progress.counts)
    return counts


@pytest.mark.parametrize("sequence", [False, True])
def test_a_region_communicates_once_each_way(sequence):
    """Three blocks of two regions: a sum out of each and one for the gradient into each; the embedding, the loss, the
    head once.
    """
    config = small_config(model=GQA, parallel={"tensor": 2}, batch={"tokens": None, "accumulation": 1})
    for forward, backward in run_ranks(count_collectives, 2, config, sequence):
        # sequence parallelism gathers before and scatters after each region, and gathers for the head; embeddings are
        # sliced for nothing
        assert (forward, backward) == ((1 + 12 + 1 + 1, 12 + 1 + 1) if sequence else (1 + 6 + 1, 6 + 1))


def test_parts_differ_by_at_most_one_and_cover_all():
    for size in (5, 64, 128, 1):
        for ranks in (1, 2, 3, 5, 7):
            parts = [cut_range(size, ranks, rank) for rank in range(ranks)]
            assert [first for first, _ in parts] == [0, *(last for _, last in parts[:-1])] and parts[-1][1] == size
            assert max(last - first for first, last in parts) - min(last - first for first, last in parts) <= 1
