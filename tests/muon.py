"""Muon matrices, gradients and their whole-matrix oracle on one process; what the tests of the partition over ranks
compare with.

Data ranks' gradients have very different scales: a float32 sum of a few bfloat16 values of one scale is usually exact
in any order, and then a wrong order of summation would not show.
"""

import functools
import random
import zlib

import torch
import torch.distributed as dist

from megachat.optim.matrix import Matrix
from megachat.optim.muon import Hyper, reference_step, second_moment_shape
from megachat.optim.partition import MuonPartition
from megachat.parallel.mesh import Mesh, build_mesh

LR, WEIGHT_DECAY, BETA2 = 0.02, 0.1, 0.9
MOMENTA = (0.85, 0.9, 0.95)  # of the steps
RANK_SCALES = (1.0, 2.0**-11, 2.0**-17, 2.0**-13)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {  # k: fewer heads; every shape and cut that a block has
    "q": ((160, 160), "column"),
    "k": ((112, 160), "column"),
    "o": ((160, 160), "row"),
    "fc": ((480, 160), "column"),
    "proj": ((160, 480), "row"),
}


def small_matrices() -> list[Matrix]:
    """Three blocks, and matrices that fit nowhere: odd sides, a tall one cut by row, tiny ones."""
    found = []
    for layer in range(3):
        found += [
            Matrix(f"{layer}.{name}", shape, layer, max(1.0, shape[0] / shape[1]) ** 0.5, cut)
            for name, (shape, cut) in SHAPES.items()
        ]
    found += [Matrix("0.down", (208, 92), 0, 1.3, "row"), Matrix("1.odd", (132, 127), 1, 1.7, "column")]
    return found + [Matrix("0.gate", (4, 12), 0, 1.0, "column"), Matrix("2.gate", (4, 12), 2, 1.0, "column")]


def on_cpu(layout: tuple[int, int]) -> Mesh:
    """The mesh of (data, tensor) ranks over the running world."""
    mesh = build_mesh(torch.device("cpu"), tensor=layout[1])
    assert (mesh.data.size, mesh.tensor.size) == tuple(layout)
    return mesh


def _random(label: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(label.encode())))


def initial(matrix: Matrix) -> torch.Tensor:
    """The whole starting weight."""
    return 0.1 * _random(matrix.name, matrix.shape)


def gradient(matrix: Matrix, step: int, rank: int, micro: int) -> torch.Tensor | None:
    """The whole gradient of one micro-batch of data rank `rank`; None for a parameter that the loss of this step does
    not reach.
    """
    if step == 1 and matrix.name == "1.odd":
        return None
    return 0.01 * RANK_SCALES[rank] * _random(f"{matrix.name} {step} {rank} {micro}", matrix.shape)


def weight_dtype(compute: torch.dtype) -> torch.dtype:
    """Of the parameters."""
    return BF16 if compute == BF16 else FP32


def shard(matrix: Matrix, whole: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """This tensor rank's part."""
    (row, column), (rows, columns) = (
        matrix.local_offset(mesh.tensor.size, mesh.tensor.rank),
        matrix.local_shape(mesh.tensor.size),
    )
    return whole[row : row + rows, column : column + columns].contiguous()


def build(
    matrices, mesh: Mesh, compute, wire=BF16, layers_per_bucket=None
) -> tuple[dict[str, torch.nn.Parameter], MuonPartition]:
    """Parameters with their starting values, and the partition over them."""
    parameters = {matrix.name: torch.nn.Parameter(shard(matrix, initial(matrix), mesh)) for matrix in matrices}
    settings = {"compute_dtype": compute, "gradient_wire": wire, "beta2": BETA2, "layers_per_bucket": layers_per_bucket}
    return parameters, MuonPartition(parameters, matrices, mesh, **settings)


def backward(
    parameters,
    matrices,
    mesh: Mesh,
    step: int,
    micros: int,
    *,
    rank=None,
    spoil=False,
    last=lambda: None,
    shuffled=False,
) -> None:
    """Real backward passes whose gradients are the wanted ones.

    last: called before the last of them. spoil: an inf among the gradients.

    shuffled: hooks come in another order in every micro-batch and on every rank.
    """
    for micro in range(micros):
        if micro == micros - 1:
            last()
        order = (
            random.Random(f"{step} {micro} {mesh.world.rank}").sample(matrices, len(matrices)) if shuffled else matrices
        )
        loss = torch.zeros(())
        for matrix in order:
            whole = gradient(matrix, step, mesh.data.rank if rank is None else rank, micro)
            if whole is not None:
                if spoil:
                    whole[-1, -1] = torch.inf  # in the last tensor rank's shard
                loss = loss + (parameters[matrix.name].float() * shard(matrix, whole, mesh)).sum()
        loss.backward()
    assert all(parameter.grad is None for parameter in parameters.values())


def take_step(
    parameters, partition, matrices, mesh: Mesh, step: int, micros=1, *, rank=None, armed=True, shuffled=True, wait=True
) -> float:
    """One step as the engine takes it; returns the sum of squares of the whole mean gradient."""
    backward(
        parameters,
        matrices,
        mesh,
        step,
        micros,
        rank=rank,
        last=partition.start_async_reduce if armed else lambda: None,
        shuffled=shuffled,
    )
    partition.set_hyper(LR, WEIGHT_DECAY, MOMENTA[step])
    partition.start_reduce()
    partition.wait_for_reduce()
    squares = partition.sum_of_squares().clone()
    dist.all_reduce(squares)
    partition.step(1.0)
    if wait:
        partition.wait_for_gather()
    return squares.item()


def state(partition) -> list:
    """A copy of state_shards()."""
    return [
        (kind, name, shape, [(at, size, view.clone()) for at, size, view in pieces])
        for kind, name, shape, pieces in partition.state_shards()
    ]


def weights(parameters) -> dict[str, torch.Tensor]:
    """Copies of this rank's parameters."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def whole_state(states) -> dict[tuple[str, str], torch.Tensor]:
    """The ranks' rectangles put together; every element must come from exactly one."""
    found, covered = {}, {}
    for one in states:
        for kind, name, shape, pieces in one:
            whole = found.setdefault((kind, name), torch.zeros(shape))
            count = covered.setdefault((kind, name), torch.zeros(shape))
            for (row, column), (rows, width), view in pieces:
                whole[row : row + rows, column : column + width] = view
                count[row : row + rows, column : column + width] += 1
    assert all(bool((count == 1).all()) for count in covered.values())
    return found


def mean_gradient(matrix, step, data, compute, wire, micros, ranks=None) -> torch.Tensor:
    """Over the data ranks, as the partition is to compute it; ranks: another order of summation."""
    total = torch.zeros(matrix.shape)
    for rank in ranks or range(data):
        own = torch.zeros(matrix.shape)
        for micro in range(micros):
            one = gradient(matrix, step, rank, micro)
            if one is not None:
                own += one.to(weight_dtype(compute)).float()  # autograd gives a gradient the dtype of its weight
        total += own.to(wire).float() if data > 1 else own
    return total / data


def hyper(matrix, step) -> Hyper:
    """Of one matrix in one step."""
    values = (LR * matrix.multiplier, WEIGHT_DECAY, MOMENTA[step], BETA2)
    return Hyper(*(torch.tensor(value, dtype=FP32) for value in values))


@functools.cache
def oracle(
    data, compute, wire=BF16, micros=1, steps=3
) -> tuple[dict[tuple[str, str], torch.Tensor], tuple[float, ...]]:
    """State after `steps`, and the sum of squares of each step's gradient, on one process and whole matrices."""
    expected, squares = {}, [0.0] * steps
    for matrix in small_matrices():
        weight, momentum, moment = (
            initial(matrix),
            torch.zeros(matrix.shape),
            torch.zeros(second_moment_shape(matrix.shape)),
        )
        for step in range(steps):
            mean = mean_gradient(matrix, step, data, compute, wire, micros)
            squares[step] += mean.double().square().sum().item()
            reference_step(weight, mean, momentum, moment, hyper(matrix, step), compute)
        expected["master", matrix.name], expected["momentum", matrix.name], expected["second_moment", matrix.name] = (
            weight,
            momentum,
            moment,
        )
    return expected, tuple(squares)


def different(found, expected) -> list[str]:
    """What is not equal, bit for bit."""
    assert found.keys() == expected.keys()
    return [
        f"{kind} of {name}" for (kind, name), tensor in expected.items() if not torch.equal(found[kind, name], tensor)
    ]
