"""The Muon partition over 1 to 4 ranks against the whole-matrix update of one process, bit for bit.

Ranks' gradients have very different scales: a float32 sum of a few bfloat16 values of one scale is usually exact in any order, and then a
wrong order of summation would not show. Seen to fail with: ranks summed in reverse, momentum moved in reduce() already, a returned
fragment shifted by one element, scales of a cut matrix taken from its first rows, sums in bfloat16, hooks that overwrite instead of adding,
a missing gradient not zeroed, drop() that forgets nothing, multipliers ignored, and an exchange for buckets that need none.
"""

import functools
import zlib

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megachat.optim.muon import Hyper, reference_step, second_moment_shape
from megachat.optim.partition import MuonPartition
from megachat.optim.partition_plan import Matrix
from megachat.parallel.mesh import build_mesh
from tests.harness import run_ranks

WORLDS = (1, 2, 3, 4)
LR, WEIGHT_DECAY, BETA2 = 0.02, 0.1, 0.9
MOMENTA = (0.85, 0.9, 0.95)  # of the steps
RANK_SCALES = (1.0, 2.0**-11, 2.0**-17, 2.0**-13)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _matrices() -> list[Matrix]:
    found = []
    for layer in range(3):
        shapes = {"q": (160, 160), "k": (112, 160), "o": (160, 160), "fc": (480, 160), "proj": (160, 480)}  # k: fewer heads
        found += [Matrix(f"{layer}.{name}", shape, layer, max(1.0, shape[0] / shape[1]) ** 0.5) for name, shape in shapes.items()]
    return found + [Matrix("0.gate", (4, 12), 0), Matrix("1.odd", (131, 127), 1, 1.7), Matrix("2.gate", (4, 12), 2)]


def _random(label: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(label.encode())))


def _initial(matrix: Matrix) -> torch.Tensor:
    return 0.1 * _random(matrix.name, matrix.shape)


def _gradient(matrix: Matrix, step: int, rank: int, micro: int) -> torch.Tensor | None:
    if step == 1 and matrix.name == "1.odd":
        return None  # a parameter that the loss of this step does not reach
    return 0.01 * RANK_SCALES[rank] * _random(f"{matrix.name} {step} {rank} {micro}", matrix.shape)


def _weight_dtype(compute: torch.dtype) -> torch.dtype:
    return BF16 if compute == BF16 else FP32


def _build(matrices, axis, compute, wire, layers_per_bucket=None):
    parameters = {matrix.name: torch.nn.Parameter(_initial(matrix)) for matrix in matrices}
    partition = MuonPartition(parameters, matrices, axis, compute_dtype=compute, gradient_wire=wire, beta2=BETA2, layers_per_bucket=layers_per_bucket)
    return parameters, partition


def _backward(parameters, matrices, step, rank, micros, spoil=False):
    """Real backward passes whose gradients are the wanted ones; spoil: an inf among them."""
    for micro in range(micros):
        loss = torch.zeros(())
        for matrix in matrices:
            gradient = _gradient(matrix, step, rank, micro)
            if gradient is not None:
                if spoil:
                    gradient[0, 0] = torch.inf
                loss = loss + (parameters[matrix.name].float() * gradient).sum()
        loss.backward()
    assert all(parameter.grad is None for parameter in parameters.values())


def _step(parameters, partition, matrices, step, rank, micros=1):
    _backward(parameters, matrices, step, rank, micros)
    partition.set_hyper(LR, WEIGHT_DECAY, MOMENTA[step])
    partition.reduce()
    partition.wait_reduce()
    squares = partition.sum_of_squares().clone()
    dist.all_reduce(squares)
    partition.step(1.0)
    partition.wait()
    return squares


def _state(partition):
    return [(kind, name, shape, [(at, size, view.clone()) for at, size, view in pieces]) for kind, name, shape, pieces in partition.state_shards()]


def _weights(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _whole(states) -> dict[tuple[str, str], torch.Tensor]:
    """The ranks' rectangles put together; every element must come from exactly one."""
    found, covered = {}, {}
    for state in states:
        for kind, name, shape, pieces in state:
            whole = found.setdefault((kind, name), torch.zeros(shape))
            count = covered.setdefault((kind, name), torch.zeros(shape))
            for (row, column), (rows, width), view in pieces:
                whole[row : row + rows, column : column + width] = view
                count[row : row + rows, column : column + width] += 1
    assert all(bool((count == 1).all()) for count in covered.values())
    return found


def _mean_gradient(matrix, step, world, compute, wire, micros, ranks=None):
    total = torch.zeros(matrix.shape)
    for rank in ranks or range(world):
        own = torch.zeros(matrix.shape)
        for micro in range(micros):
            gradient = _gradient(matrix, step, rank, micro)
            if gradient is not None:
                own += gradient.to(_weight_dtype(compute)).float()  # autograd gives a gradient the dtype of its weight
        total += own.to(wire).float() if world > 1 else own
    return total / world


def _hyper(matrix, step):
    values = (LR * matrix.multiplier, WEIGHT_DECAY, MOMENTA[step], BETA2)
    return Hyper(*(torch.tensor(value, dtype=FP32) for value in values))


@functools.cache
def _oracle(world, compute, wire, micros=1, steps=3) -> tuple[dict[tuple[str, str], torch.Tensor], tuple[float, ...]]:
    """State after `steps`, and the sum of squares of each step's gradient, on one process and whole matrices."""
    state, squares = {}, [0.0] * steps
    for matrix in _matrices():
        weight, momentum, moment = _initial(matrix), torch.zeros(matrix.shape), torch.zeros(second_moment_shape(matrix.shape))
        for step in range(steps):
            gradient = _mean_gradient(matrix, step, world, compute, wire, micros)
            squares[step] += gradient.double().square().sum().item()
            reference_step(weight, gradient, momentum, moment, _hyper(matrix, step), compute)
        state["master", matrix.name], state["momentum", matrix.name], state["second_moment", matrix.name] = weight, momentum, moment
    return state, tuple(squares)


def _equal(found, expected) -> list[str]:
    assert found.keys() == expected.keys()
    return [f"{kind} of {name}" for (kind, name), tensor in expected.items() if not torch.equal(found[kind, name], tensor)]


# ---- what the ranks run


def _train(settings):
    """Three steps for each (compute, wire, layers_per_bucket, micros); for each: state, weights, sums of squares."""
    axis = build_mesh(torch.device("cpu")).data
    answers = []
    for compute, wire, layers_per_bucket, micros in settings:
        parameters, partition = _build(_matrices(), axis, compute, wire, layers_per_bucket)
        squares = [_step(parameters, partition, _matrices(), step, axis.rank, micros).item() for step in range(3)]
        answers.append((_state(partition), _weights(parameters), squares))
    return answers


def _spoiled_step(compute):
    """A step, a step given up because one rank had an inf, two more steps."""
    axis = build_mesh(torch.device("cpu")).data
    parameters, partition = _build(_matrices(), axis, compute, BF16)
    _step(parameters, partition, _matrices(), 0, axis.rank)
    before, weights = _state(partition), _weights(parameters)
    _backward(parameters, _matrices(), 1, axis.rank, 1, spoil=axis.rank == axis.size - 1)
    partition.reduce()
    partition.wait_reduce()
    squares = partition.sum_of_squares()
    dist.all_reduce(squares)
    partition.drop()
    after = _state(partition)
    untouched = all(torch.equal(a[2], b[2]) for x, y in zip(before, after, strict=True) for a, b in zip(x[3], y[3], strict=True))
    untouched &= all(torch.equal(weights[name], parameter) for name, parameter in parameters.items())
    for step in (1, 2):
        _step(parameters, partition, _matrices(), step, axis.rank)
    return squares.item(), untouched, partition.matrices_updated, _state(partition)


class _Recorder:
    """Wraps torch.distributed's functions in this process and notes what they send to other ranks."""

    def __init__(self, world):
        self.world, self.calls = world, []
        for name in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
            setattr(dist, name, self._wrapped(name, getattr(dist, name)))

    def _wrapped(self, name, inner):
        def call(*args, **kwargs):
            self.calls.append((name, str(args[0].dtype), self._bytes(name, args)))
            return inner(*args, **kwargs)

        return call

    def _bytes(self, name, args):
        if name == "all_reduce":
            return 0
        sent = args[1]
        if name == "all_to_all_single" and args[3] is not None:
            elements = sum(count for rank, count in enumerate(args[3]) if rank != dist.get_rank())
        elif name == "all_gather_into_tensor":
            elements = sent.numel() * (self.world - 1)
        else:
            elements = sent.numel() // self.world * (self.world - 1)
        return elements * sent.element_size()

    def taken(self):
        calls, self.calls = self.calls, []
        return calls


def _measured(settings):
    """One step each: calls, bytes by phase and by the plan, FLOPs counted and planned."""
    axis = build_mesh(torch.device("cpu")).data
    recorder = _Recorder(axis.size)
    answers = []
    for compute, wire, layers_per_bucket in settings:
        parameters, partition = _build(_matrices(), axis, compute, wire, layers_per_bucket)
        _backward(parameters, _matrices(), 0, axis.rank, 1)
        partition.set_hyper(LR, WEIGHT_DECAY, MOMENTA[0])
        recorder.taken()
        partition.reduce()
        partition.wait_reduce()
        reducing = recorder.taken()
        with FlopCounterMode(display=False) as flops:
            partition.step(1.0)
        partition.wait()
        stepping = recorder.taken()
        found = {
            "reduce": sum(size for _, _, size in reducing),
            "exchange": sum(size for name, _, size in stepping if name == "all_to_all_single"),
            "gather": sum(size for name, _, size in stepping if name == "all_gather_into_tensor"),
        }
        weight_bytes = _weight_dtype(compute).itemsize
        planned = partition.plan.wire_bytes(
            axis.rank, gradient_bytes=wire.itemsize, weight_bytes=weight_bytes, direction_bytes=partition.direction_dtype.itemsize
        )
        counts = (flops.get_total_flops(), partition.plan.newton_schulz_flops(axis.rank), partition.matrices_updated, len(partition.plan.matrices))
        exchanges = sum(name == "all_to_all_single" for name, _, _ in stepping), 2 * sum(map(bool, partition.plan.moves))
        answers.append((found, planned, counts, [(name, dtype) for name, dtype, _ in reducing + stepping], exchanges))
    return answers


def _resumed(whole, compute):
    """Load whole tensors, take step 2 with rank 0's gradients on every rank."""
    axis = build_mesh(torch.device("cpu")).data
    parameters, partition = _build(_matrices(), axis, compute, BF16)
    for kind, name, _, pieces in partition.state_shards():
        for (row, column), (rows, width), view in pieces:
            view.copy_(whole[kind, name][row : row + rows, column : column + width])
    partition.refresh_weights()
    loaded = _weights(parameters)
    _step(parameters, partition, _matrices(), 2, 0)
    return loaded, _weights(parameters), _state(partition)


def _even_bytes(compute):
    axis = build_mesh(torch.device("cpu")).data
    matrices = [Matrix(f"{layer}.{name}", shape, layer) for layer in range(6) for name, shape in (("a", (192, 128)), ("b", (128, 384)))]
    _, partition = _build(matrices, axis, compute, BF16)
    return partition.state_bytes(), partition.plan.state_bytes(axis.rank), sum(matrix.elements for matrix in matrices)


def _different_plans():
    axis = build_mesh(torch.device("cpu")).data
    _build(_matrices()[axis.rank :], axis, FP32, FP32)


# ---- the tests


@pytest.mark.parametrize("world", WORLDS)
def test_every_bucket_size_gives_the_bits_of_one_process(world):
    settings = [(compute, BF16, layers, 1) for compute in (BF16, FP32) for layers in (1, 2, None)] + [(FP16, BF16, 3, 1)]
    answers = run_ranks(_train, world, settings)
    for index, (compute, wire, layers, micros) in enumerate(settings):
        expected, squares = _oracle(world, compute, wire, micros)
        assert not _equal(_whole([answer[index][0] for answer in answers]), expected), (compute, layers)
        for answer in answers:
            _, weights, found_squares = answer[index]
            assert all(torch.equal(weights[name], expected["master", name].to(_weight_dtype(compute))) for name in weights), (compute, layers)
            assert found_squares == pytest.approx(squares, rel=1e-6)


@pytest.mark.parametrize("micros", [2, 4])
def test_micro_batches_accumulate_in_float32(micros):
    settings = [(BF16, BF16, None, micros), (FP32, BF16, 1, micros)]
    answers = run_ranks(_train, 2, settings)
    for index, (compute, wire, _, _) in enumerate(settings):
        assert not _equal(_whole([answer[index][0] for answer in answers]), _oracle(2, compute, wire, micros)[0])


@pytest.mark.parametrize("world", [1, 3, 4])
def test_a_float32_wire_differs_only_by_the_order_of_summation(world):
    (expected, _), answers = _oracle(world, FP32, FP32), run_ranks(_train, world, [(FP32, FP32, 2, 1)])
    found = _whole([answer[0][0] for answer in answers])
    different = {key: (found[key] - tensor).abs() for key, tensor in expected.items()}
    assert all(float(value.max()) < 1e-6 for (kind, _), value in different.items() if kind != "master")
    masters = torch.cat([value.flatten() for (kind, _), value in different.items() if kind == "master"])
    # where the update is all but zero, its sign decides on the decay of that one element: lr * decay * weight
    assert int((masters > 1e-6).sum()) <= 3 and float(masters.max()) < 2e-3


def test_the_gradients_show_the_order_of_summation():
    matrix = _matrices()[0]
    forward, backward = (_mean_gradient(matrix, 0, 4, BF16, BF16, 1, ranks) for ranks in ((0, 1, 2, 3), (3, 2, 1, 0)))
    assert not torch.equal(forward, backward)


@pytest.mark.parametrize("compute", [BF16, FP32])
def test_an_inf_on_one_rank_is_seen_by_all_and_leaves_every_bit(compute):
    answers = run_ranks(_spoiled_step, 3, compute)
    assert all(not torch.isfinite(torch.tensor(squares)) and untouched for squares, untouched, _, _ in answers)
    assert sum(updated for _, _, updated, _ in answers) == len(_matrices())
    assert not _equal(_whole([state for _, _, _, state in answers]), _oracle(3, compute, BF16)[0])


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_work_and_order_are_those_of_the_plan(world):
    settings = [(BF16, BF16, 1), (BF16, BF16, None), (BF16, FP32, 2), (FP32, BF16, 2), (FP32, FP32, 3)]
    answers = run_ranks(_measured, world, settings)
    for index, setting in enumerate(settings):
        for found, planned, (flops, planned_flops, _, _), calls, (exchanges, planned_exchanges) in (answer[index] for answer in answers):
            assert found == planned, setting
            assert flops == planned_flops, setting
            assert calls == answers[0][index][3], setting
            assert exchanges == planned_exchanges, setting
            assert bool(exchanges) == bool(calls) == (world > 1), setting  # some matrices are cut, so the exchange is tested
        updated, matrices = zip(*(answer[index][2][2:] for answer in answers), strict=True)
        assert sum(updated) == matrices[0]


@pytest.mark.parametrize("compute", [BF16, FP32])
def test_state_of_four_ranks_goes_on_with_fewer(compute):
    answers = run_ranks(_train, 4, [(compute, BF16, None, 1)])
    whole = _whole([answer[0][0] for answer in answers])
    for world in (3, 2, 1):
        resumed = run_ranks(_resumed, world, whole, compute)
        expected = {}
        for matrix in _matrices():
            weight, momentum, moment = (whole[kind, matrix.name].clone() for kind in ("master", "momentum", "second_moment"))
            gradient = _gradient(matrix, 2, 0, 0).to(_weight_dtype(compute))
            gradient = gradient.to(BF16).float() if world > 1 else gradient.float()
            mean = sum([gradient] * world) / world
            reference_step(weight, mean, momentum, moment, _hyper(matrix, 2), compute)
            expected |= {("master", matrix.name): weight, ("momentum", matrix.name): momentum, ("second_moment", matrix.name): moment}
        assert not _equal(_whole([state for _, _, state in resumed]), expected), world
        for loaded, weights, _ in resumed:
            assert all(torch.equal(loaded[name], whole["master", name].to(loaded[name].dtype)) for name in loaded)
            assert all(torch.equal(weights[name], expected["master", name].to(weights[name].dtype)) for name in weights)


@pytest.mark.parametrize("world", WORLDS)
def test_state_is_eight_bytes_an_element_divided_by_the_ranks(world):
    for held, planned, elements in run_ranks(_even_bytes, world, BF16):
        assert held == planned
        assert held["master"] + held["momentum"] == 8 * elements // world and elements % world == 0


def test_ranks_with_different_matrices_refuse_to_start():
    with pytest.raises(RuntimeError, match="different Muon partitions"):
        run_ranks(_different_plans, 2)
