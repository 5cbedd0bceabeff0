"""Matrices, gradients and the one-process oracle with which the tests compare the Muon partition.

The gradients of the data ranks have very different scales. A float32 sum of a few bfloat16 values of one scale is
usually exact in any order, so a wrong order of summation would not show.
"""

import functools
import random
import zlib

import torch
import torch.distributed as dist

from megachat.optim.matrix import Matrix
from megachat.optim.muon import (
    apply_update,
    momentum_update,
    orthogonalization_dtype,
    second_moment_shape,
    update_direction,
    update_scales,
)
from megachat.optim.partition import MuonPartition
from megachat.parallel.mesh import Mesh, build_mesh

LR, WEIGHT_DECAY, BETA2 = 0.02, 0.1, 0.9
MOMENTA = (0.85, 0.9, 0.95)  # by step
RANK_SCALES = (1.0, 2.0**-11, 2.0**-17, 2.0**-13)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {  # every shape and cut of a block; k has fewer heads
    "q": ((160, 160), "column"),
    "k": ((112, 160), "column"),
    "o": ((160, 160), "row"),
    "fc": ((480, 160), "column"),
    "proj": ((160, 480), "row"),
}


def state_bytes(partition: MuonPartition) -> dict[str, int]:
    """The bytes of the state on this rank by kind."""
    return {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in partition.state_tensors().items()}


def reference_step(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    momentum: torch.Tensor,
    second_moment: torch.Tensor,
    compute_dtype: torch.dtype,
    *,
    lr: float,
    weight_decay: float,
    momentum_factor: float,
    beta2: float,
) -> None:
    """Takes one step of a whole matrix [m, n] on one process, the oracle of the partition.

    All tensors are float32; `weight`, `momentum` and `second_moment` change in place. lr: the matrix's multiplier
    included.
    """
    rate, decay, factor, beta = (weight.new_tensor(value) for value in (lr, weight_decay, momentum_factor, beta2))
    update = momentum_update(momentum, gradient.clone(), factor)
    direction = update_direction(update.to(orthogonalization_dtype(compute_dtype)))
    norm, scale = update_scales(direction, second_moment, beta)
    apply_update(weight, direction, norm, scale, rate, decay)


def small_matrices() -> list[Matrix]:
    """Returns three blocks, and matrices that are hard to lay out: odd sides, a tall one cut by row, tiny ones."""
    blocks = [
        Matrix(f"{layer}.{name}", shape, layer, max(1.0, shape[0] / shape[1]) ** 0.5, cut)
        for layer in range(3)
        for name, (shape, cut) in SHAPES.items()
    ]
    odd = [Matrix("0.down", (208, 92), 0, 1.3, "row"), Matrix("1.odd", (132, 127), 1, 1.7, "column")]
    return [*blocks, *odd, *(Matrix(f"{layer}.gate", (4, 12), layer, 1.0, "column") for layer in (0, 2))]


def on_cpu(layout: tuple[int, int]) -> Mesh:
    """Returns the mesh of (data, tensor) ranks over the running world."""
    mesh = build_mesh(torch.device("cpu"), tensor=layout[1])
    assert (mesh.data.size, mesh.tensor.size) == tuple(layout)
    return mesh


def _random(label: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(label.encode())))


def initial(matrix: Matrix) -> torch.Tensor:
    """Returns the whole initial weight."""
    return 0.1 * _random(matrix.name, matrix.shape)


def gradient(matrix: Matrix, step: int, rank: int, micro: int) -> torch.Tensor | None:
    """Returns the whole gradient of one micro-batch of a data rank; None if the loss of this step does not use it."""
    if step == 1 and matrix.name == "1.odd":
        return None
    return 0.01 * RANK_SCALES[rank] * _random(f"{matrix.name} {step} {rank} {micro}", matrix.shape)


def weight_dtype(compute: torch.dtype) -> torch.dtype:
    """Returns the dtype of the parameters."""
    return BF16 if compute == BF16 else FP32


def local_matrix(matrix: Matrix, whole: torch.Tensor, tensor: int, rank: int) -> torch.Tensor:
    """Returns the part of a tensor rank."""
    (row, column), (rows, columns) = matrix.local_offset(tensor, rank), matrix.local_shape(tensor)
    return whole[row : row + rows, column : column + columns].contiguous()


def build(
    matrices, mesh: Mesh, compute, wire=BF16, blocks_per_bucket=None
) -> tuple[dict[str, torch.nn.Parameter], MuonPartition]:
    """Returns parameters with their initial values, and the partition over them."""
    tensor = mesh.tensor
    parameters = {
        matrix.name: torch.nn.Parameter(local_matrix(matrix, initial(matrix), tensor.size, tensor.rank))
        for matrix in matrices
    }
    settings = {"compute_dtype": compute, "gradient_wire": wire, "beta2": BETA2, "blocks_per_bucket": blocks_per_bucket}
    return parameters, MuonPartition(parameters, matrices, mesh, **settings)


def backward(
    parameters, matrices, mesh: Mesh, step: int, micros=1, *, rank=None, infinite=False, before_last=lambda: None
) -> None:
    """Runs backward passes that produce the gradients of `gradient`. The hooks fire in another order on every rank and
    in every micro-batch.

    rank: data rank whose gradients are used, this one's by default. infinite: puts an inf into every gradient.
    before_last: called before the last pass.
    """
    for micro in range(micros):
        if micro == micros - 1:
            before_last()
        loss = torch.zeros(())
        for matrix in random.Random(f"{step} {micro} {mesh.world.rank}").sample(matrices, len(matrices)):
            whole = gradient(matrix, step, mesh.data.rank if rank is None else rank, micro)
            if whole is not None:
                if infinite:
                    whole[-1, -1] = torch.inf  # in the local matrix of the last tensor rank
                local = local_matrix(matrix, whole, mesh.tensor.size, mesh.tensor.rank)
                loss = loss + (parameters[matrix.name].float() * local).sum()
        loss.backward()
    assert all(parameter.grad is None for parameter in parameters.values())


def take_step(
    parameters, partition, matrices, mesh: Mesh, step: int, micros=1, *, rank=None, asynchronous=True, wait=True
) -> float:
    """Takes one step like the engine and returns the sum of squares of the whole mean gradient."""
    before_last = partition.start_async_reduce if asynchronous else lambda: None
    backward(parameters, matrices, mesh, step, micros, rank=rank, before_last=before_last)
    partition.set_hyper(LR, WEIGHT_DECAY, MOMENTA[step])
    partition.start_reduce()
    partition.wait_for_reduce()
    squares = partition.sum_of_squares().clone()
    dist.all_reduce(squares)
    partition.step(1.0)
    if wait:
        partition.wait_for_gather()
    return squares.item()


def copied_shards(shards) -> list:
    """Returns a copy of state_shards()."""
    return [
        (kind, name, shape, [(offsets, sizes, view.clone()) for offsets, sizes, view in rectangles])
        for kind, name, shape, rectangles in shards
    ]


def weights(parameters) -> dict[str, torch.Tensor]:
    """Returns copies of this rank's parameters."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def whole_state(shards_by_rank) -> dict[tuple[str, str], torch.Tensor]:
    """Returns whole tensors by (kind, name), assembled from all ranks. Every element must come from exactly one."""
    state, covered = {}, {}
    for shards in shards_by_rank:
        for kind, name, shape, rectangles in shards:
            whole = state.setdefault((kind, name), torch.zeros(shape))
            count = covered.setdefault((kind, name), torch.zeros(shape))
            for (row, column), (rows, columns), view in rectangles:
                whole[row : row + rows, column : column + columns] = view
                count[row : row + rows, column : column + columns] += 1
    assert all(bool((count == 1).all()) for count in covered.values())
    return state


def mean_gradient(matrix, step, data, compute, wire, micros, ranks=None) -> torch.Tensor:
    """Returns the mean over the data ranks as the partition should compute it. ranks: another order of summation."""
    total = torch.zeros(matrix.shape)
    for rank in ranks or range(data):
        accumulated = torch.zeros(matrix.shape)
        for micro in range(micros):
            one = gradient(matrix, step, rank, micro)
            if one is not None:
                accumulated += one.to(weight_dtype(compute)).float()  # a gradient has the dtype of its weight
        total += accumulated.to(wire).float() if data > 1 else accumulated
    return total / data


def reference(matrix, step, mean, weight, momentum, moment, compute) -> None:
    """Takes a reference step with the hyperparameters of `take_step`."""
    rates = {"lr": LR * matrix.multiplier, "weight_decay": WEIGHT_DECAY, "momentum_factor": MOMENTA[step]}
    reference_step(weight, mean, momentum, moment, compute, **rates, beta2=BETA2)


@functools.cache
def oracle(
    data, compute, wire=BF16, micros=1, steps=3
) -> tuple[dict[tuple[str, str], torch.Tensor], tuple[float, ...]]:
    """Returns the state after `steps` steps on one process, and the sum of squares of each step's gradient."""
    expected, squares = {}, [0.0] * steps
    for matrix in small_matrices():
        weight, momentum = initial(matrix), torch.zeros(matrix.shape)
        moment = torch.zeros(second_moment_shape(matrix.shape))
        for step in range(steps):
            mean = mean_gradient(matrix, step, data, compute, wire, micros)
            squares[step] += mean.double().square().sum().item()
            reference(matrix, step, mean, weight, momentum, moment, compute)
        for kind, tensor in (("master", weight), ("momentum", momentum), ("second_moment", moment)):
            expected[kind, matrix.name] = tensor
    return expected, tuple(squares)


def differing(state, expected) -> list[str]:
    """Returns the tensors that are not equal to the bit."""
    assert state.keys() == expected.keys()
    return [
        f"{kind} of {name}" for (kind, name) in expected if not torch.equal(state[kind, name], expected[kind, name])
    ]
