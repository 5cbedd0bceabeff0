"""Lookup layers and n-gram values on a GPU against the CPU, and both storages of sparse rows against each other."""

import pytest
import torch

from megachat.model.gpt import Loss, ModelOptions, build_layers, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.place import place_of
from megachat.planning.plan import resolve_without_text
from megachat.train.build import build_training_model
from megachat.train.step import set_schedules
from tests.gpu.fp8 import DEVICE, rel
from tests.gpu.test_model import mesh  # noqa: F401
from tests.training import SMALL_VOCAB, random_rows, small_config, take_step


def config_of(storage: str = "device"):
    return small_config(
        lookup={"after_blocks": (0,), "rows": 400, "max_rows_per_token": 60},
        ngram={"blocks": (0, 2), "rows": 60, "storage": storage},
        precision={"attention": "sdpa"},
    )


def loss_and_gradients(device: torch.device):
    dims = resolve_without_text(config_of(), 1, SMALL_VOCAB).dims
    layers = build_layers(dims, ModelOptions())
    for parameter in placed_parameters(layers):
        place = place_of(parameter)
        whole = place.__class__(place.name, place.whole, place.block, ("normal", 0.1), offset=place.offset)
        load_whole(parameter, starting_value(whole, seed=3))
    layers = layers.to(device)
    rows = random_rows(0, 2, dims.sequence_len + 1, SMALL_VOCAB).to(device)
    loss = Loss(dims, torch.ones(SMALL_VOCAB)).to(device)(run_layers(layers, rows[:, :-1]), rows[:, 1:])
    loss.backward()
    names = [place_of(parameter).name for parameter in placed_parameters(layers)]
    return loss.item(), names, [parameter.grad.cpu() for parameter in placed_parameters(layers)]


def test_tables_have_the_gradients_of_a_cpu(report):
    loss, names, gradients = loss_and_gradients(DEVICE)
    expected, _, others = loss_and_gradients(torch.device("cpu"))
    distances = {}
    for name, one, other in zip(names, gradients, others, strict=True):
        if one.ndim == 2:  # scalars nearly cancel
            distances[name] = max(rel(one, other), distances.get(name, 0.0))
    report("loss on the GPU and on the CPU, largest distance of a gradient", [loss, expected, max(distances.values())])
    assert loss == pytest.approx(expected, rel=1e-4) and max(distances.values()) < 1e-2, distances


def test_rows_in_host_memory_train_as_those_on_the_gpu(mesh):  # noqa: F811
    losses: dict[str, list[float]] = {}
    for storage in ("device", "host"):
        torch.manual_seed(0)
        config = config_of(storage)
        plan = resolve_without_text(config, 1, SMALL_VOCAB)
        training = build_training_model(config, plan, mesh, torch.ones(SMALL_VOCAB, dtype=torch.int64))
        losses[storage] = []
        for step in range(4):
            set_schedules(training, step)
            rows = random_rows(step, plan.rows_per_step, config.model.sequence_len + 1, SMALL_VOCAB)
            losses[storage].append(take_step(training, rows.to(mesh.device))[0])
    assert losses["host"] == pytest.approx(losses["device"], rel=1e-4)  # gradients on a GPU are not reproducible
