"""Runs a pipeline stage of any size without memory: torch's FakeTensorMode gives every tensor a shape and a storage
size, and no bytes. Model, tensor axis, FP8, sparse tables and the Muon partition are those of a run.

Replaced are: collectives, which leave their results unwritten; attention and norms by functions that keep what the
kernels of a GPU keep (flash-attention: queries, keys, values, result and float32 sums; torch's fused norm: its input
and a float32 factor), because torch cannot build a graph of fake CUDA tensors without CUDA; the grouping of tokens and
the distinct rows of sparse tables, which depend on ids; and DeepSpeed's flat groups of AdamW, by ones of equal layout.
"""

import contextlib
import gc
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from megachat.config import Config
from megachat.device import gradient_wire
from megachat.kernels import cross_entropy, lookup
from megachat.kernels.fp8 import Fp8Choice, apply_fp8, head_products
from megachat.model.gpt import Loss, layer_builders
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import adamw_groups, assign_groups, muon_matrices
from megachat.optim.partition import MuonPartition
from megachat.optim.row_tables import RowTables, _Request
from megachat.optim.row_update import MASTER
from megachat.parallel import collectives
from megachat.parallel.mesh import Axis, Mesh
from megachat.parallel.tensor import apply_tensor, vocabulary_part
from megachat.place import place_of
from megachat.planning.dimensions import passed_tensors
from megachat.planning.plan import Plan
from megachat.programs.walk_memory import LiveBytes, attend, rms_norm, storages
from megachat.train.build import attach_row_tables, model_options


def _request(tables: RowTables, name: str, index: torch.Tensor) -> _Request:
    """As many distinct rows as there are tokens or rows, requested from all ranks of the stage alike."""
    known, rows = tables._requests.setdefault(index, {}), tables.tables[name].rows
    if rows not in known:
        ranks = tables.mesh.stage.size
        each = min(index.numel(), rows) // ranks
        wanted = index.new_empty(each * ranks)
        known[rows] = _Request(torch.empty_like(index), each * ranks, [each] * ranks, [each] * ranks, wanted, wanted)
    return known[rows]


@contextlib.contextmanager
def fake_run():
    """Everything inside is computed by shapes only."""
    launch = mock.patch.object(collectives, "_launch", lambda *args, **options: collectives.Pending())
    norm = mock.patch.object(F, "rms_norm", rms_norm)
    groups = mock.patch.object(lookup, "_groups", lambda *args: [])
    gather = mock.patch("megachat.optim.partition.all_gather_objects", lambda value, axis, name: [value])
    requests = mock.patch.object(RowTables, "_request", _request)
    sums = mock.patch("megachat.optim.row_tables._add_pending", lambda collected: None)
    chunks = mock.patch.object(cross_entropy, "CHUNK_BYTES", cross_entropy.GPU_CHUNK_BYTES)
    with launch, norm, groups, gather, requests, sums, chunks, FakeTensorMode():
        yield


def rank_of(plan: Plan, stage: int, data: int = 0, tensor: int = 0) -> Mesh:
    """The mesh of one rank, without processes."""
    layout = plan.layout
    sizes = {"data": (layout.data, data), "tensor": (layout.tensor, tensor), "pipeline": (layout.pipeline, stage)}
    sizes["stage"] = layout.data * layout.tensor, data * layout.tensor + tensor
    world = sizes["stage"][0] * layout.pipeline, stage * sizes["stage"][0] + sizes["stage"][1]
    sizes |= {"world": world, "saving": world}
    axes = {name: Axis(name, size, rank, None, tuple(range(size))) for name, (size, rank) in sizes.items()}
    return Mesh(device=torch.device("cpu"), topology=None, **axes)


@dataclass
class FakeStage:
    """One rank's stage in a run. Make and use it inside fake_run(). state: its bytes by use."""

    layers: list
    loss: Loss
    state: dict[str, int]
    muon: MuonPartition
    rows: RowTables


def build_fake_stage(config: Config, plan: Plan, mesh: Mesh, dtype: torch.dtype) -> FakeStage:
    """Builds what train.build.build_training_model builds, without DeepSpeed's engine."""
    first, last = plan.stages[mesh.pipeline.rank]
    options = model_options(config, dtype, attend)
    options = type(options)(**vars(options) | {"holds_ngrams": False})
    layers = torch.nn.ModuleList(build() for build in layer_builders(plan.dims, options)[first:last])
    apply_tensor(list(layers), mesh.tensor, sequence=config.parallel.sequence)
    fp8 = None if config.precision.fp8 == "off" else Fp8Choice(config.precision.fp8, "torch", "")
    if fp8:
        apply_fp8(list(layers), fp8)
    rows = attach_row_tables(layers, config, mesh, dtype)
    parameters = placed_parameters(layers)
    groups = assign_groups([place_of(parameter) for parameter in parameters])
    places = dict.fromkeys(place_of(parameter) for parameter in parameters)
    matrices = muon_matrices(places, groups, config.optimizer.muon_multiplier)
    names = {matrix.name for matrix in matrices}
    named = {place_of(parameter).name: parameter for parameter in parameters if place_of(parameter).name in names}
    wire = gradient_wire(config.optimizer.gradient_wire, dtype)
    muon = MuonPartition(named, matrices, mesh, compute_dtype=dtype, gradient_wire=wire, beta2=0.9)
    masters = [bucket.master for bucket in muon._buckets]
    moments = [*(bucket.momentum for bucket in muon._buckets), *muon._second_moment.values()]
    for group in adamw_groups(parameters, groups, plan.rates, config.optimizer):  # as ZeRO-1 does with each group
        members, unit = group["params"], 2 * mesh.data.size
        count = -(-sum(parameter.numel() for parameter in members) // unit) * unit
        flat, at = torch.empty(count, dtype=members[0].dtype), 0
        for parameter in members:
            parameter.data = flat[at : (at := at + parameter.numel())].view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(_keep_in_float32)
        masters.append(torch.empty(count // mesh.data.size))
        moments += [torch.empty_like(masters[-1]) for _ in range(2)]
    masters += [state[MASTER] for state in rows._state.values()]
    moments += [tensor for state in rows._state.values() for kind, tensor in state.items() if kind != MASTER]
    weights = storages(parameters)
    state = {"weights": sum(weights.values()), "moments": sum(storages(moments).values())}
    state["masters"] = sum(size for place, size in storages(masters).items() if place not in weights)
    products = head_products(fp8 if config.precision.fp8_head else None, plan.dims, mesh.tensor.size)
    part = vocabulary_part(plan.dims.padded_vocab, mesh.tensor)
    loss = Loss(plan.dims, torch.empty(plan.dims.vocab_size, dtype=torch.int64), part, products)
    return FakeStage(list(layers), loss, state, muon, rows)


def _keep_in_float32(parameter: torch.nn.Parameter) -> None:
    parameter.grad_accum, parameter.grad = parameter.grad.float().clone(), None


def tracked(config: Config, plan: Plan, stage: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns the bytes of a stage on its first rank: state, `activations` of all micro-batches in flight between their
    forward and backward passes, `gradients` after the first backward pass, and the `peak` of both together.
    """
    with fake_run():
        made = build_fake_stage(config, plan, rank_of(plan, stage), dtype)
        first, last = plan.stages[stage]
        shape = plan.micro_rows, plan.dims.sequence_len
        in_flight = min(plan.layout.pipeline - stage, plan.accumulation)
        batches = [torch.empty(shape, dtype=torch.int64) for _ in range(in_flight)]
        targets, results = torch.empty(shape, dtype=torch.int64), []
        local = shape[1] // (plan.layout.tensor if config.parallel.sequence else 1)
        with LiveBytes() as live:
            for ids in batches:
                sizes, count = (shape[0], local, plan.dims.width), passed_tensors(plan.dims, first) if first else 0
                received = [torch.empty(sizes, dtype=dtype, requires_grad=True) for _ in range(count)]
                stream = (*received, ids) if first else ids
                for layer in made.layers:
                    stream = layer(stream)
                loss = made.loss(stream, targets) if last == plan.dims.depth + 2 else None
                results.append((received, stream, loss))
            gc.collect()
            activations = live.now
            _, stream, loss = results[0]
            if loss is not None:
                loss.backward()
            else:
                outputs = [tensor for tensor in stream if tensor.is_floating_point()]
                torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
            peak = live.most
        parameters = [parameter for layer in made.layers for parameter in layer.parameters()]
        gradients = [bucket.gradients for bucket in made.muon._buckets]
        gradients += [parameter.grad_accum for parameter in parameters if hasattr(parameter, "grad_accum")]
        return made.state | {
            "activations": activations,
            "gradients": sum(storages(gradients).values()),
            "peak": peak,
        }
