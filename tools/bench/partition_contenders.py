"""Four ways to distribute Muon over data-parallel ranks, measured on gloo ranks: bytes, work, state and time."""

import inspect
import statistics
import time
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megachat.job.local_ranks import run_local_ranks
from megachat.optim import muon
from megachat.optim.matrix import Matrix
from megachat.optim.partition import MuonPartition
from megachat.parallel.build import quiet_output, start_collectives
from megachat.parallel.collectives import all_gather, all_to_all, reduce_scatter
from megachat.parallel.mesh import Mesh, build_mesh
from tools.bench.partition_rules import by_shape, dealt_by_cost, lower_bound, model_matrices
from tools.bench.turns import round_ratios

MEASURED = (6, 42)  # depth, width per block
LR, MOMENTUM, BETA2 = 0.02, 0.95, 0.9


class Wire:
    """Counts the bytes that this process sends in torch.distributed's collectives, by the usual ring formulas."""

    def __init__(self):
        self.bytes = 0.0
        formulas = {  # (number of the argument, factor): factor * (ranks - 1) / ranks of the argument's bytes are sent
            "all_reduce": (0, 2),
            "reduce": (0, 1),
            "broadcast": (0, 1),
            "reduce_scatter_tensor": (1, 1),
            "all_gather_into_tensor": (0, 1),
            "all_to_all_single": (1, 1),
        }
        for name, (argument, factor) in formulas.items():
            setattr(dist, name, self._counted(getattr(dist, name), argument, factor))

    def _counted(self, collective, argument: int, factor: int):
        signature = inspect.signature(collective)

        def call(*args, **kwargs):
            given = list(signature.bind(*args, **kwargs).arguments.values())
            ranks, rank = dist.get_world_size(kwargs.get("group")), dist.get_rank(kwargs.get("group"))
            counts = given[3] if collective.__name__ == "all_to_all_single" and isinstance(given[3], list) else None
            elements = given[argument].numel() * (ranks - 1) / ranks if counts is None else sum(counts) - counts[rank]
            self.bytes += factor * elements * given[argument].element_size()
            return collective(*args, **kwargs)

        return call


class Contender:
    """Parameters and a step: a backward pass that produces the gradients, then the update.

    Subclasses define step(gradients) and state_bytes(), the bytes that the optimizer keeps.
    """

    def __init__(self, matrices: list[Matrix]):
        self.matrices = matrices
        self.parameters = {}
        for number, matrix in enumerate(matrices):
            value = 0.1 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(number))
            self.parameters[matrix.name] = torch.nn.Parameter(value)

    def loss(self, gradients: dict):
        """Returns a loss with these gradients."""
        return sum((parameter * gradients[name]).sum() for name, parameter in self.parameters.items())

    def momentum_step(self, gradient, state: dict, matrix: Matrix, weight) -> None:
        """Updates a whole matrix or a stack of them by megachat's functions, float32, in place. state: momentum and
        second moment."""
        update = muon.momentum_update(state["momentum"], gradient, torch.tensor(MOMENTUM))
        updates = update.bfloat16()
        stacked = update.ndim == 3
        direction = torch.stack([*map(muon.update_direction, updates)]) if stacked else muon.update_direction(updates)
        norm, scale = muon.update_scales(direction, state["second"], torch.tensor(BETA2))
        muon.apply_update(weight, direction, norm, scale, torch.tensor(LR * matrix.multiplier), torch.tensor(0.0))


class Megachat(Contender):
    """The partition that the trainer uses."""

    def __init__(self, matrices: list[Matrix], mesh: Mesh):
        super().__init__(matrices)
        wires = {"compute_dtype": torch.bfloat16, "gradient_wire": torch.bfloat16}
        self.partition = MuonPartition(self.parameters, matrices, mesh, beta2=BETA2, **wires)
        self.partition.set_hyper(LR, 0.0, MOMENTUM)

    def step(self, gradients: dict) -> None:
        self.partition.start_async_reduce()
        self.loss(gradients).backward()
        self.partition.start_reduce()
        self.partition.wait_for_reduce()
        self.partition.step(1.0)
        self.partition.wait_for_gather()

    def state_bytes(self) -> int:
        return sum(tensor.nbytes for kind in self.partition.state_tensors().values() for tensor in kind)


class DeepSpeed(Contender):
    """DeepSpeed's built-in Muon (deepspeed.runtime.zero.muon) under ZeRO-1 in bfloat16, standard Newton-Schulz."""

    def __init__(self, matrices: list[Matrix], mesh: Mesh):
        super().__init__(matrices)
        module = torch.nn.Module()
        for number, name in enumerate(self.parameters):
            module.register_parameter(f"matrix{number}", self.parameters[name])
        module.forward = self.loss
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,  # it would clip the orthogonalized update
            "optimizer": {
                "type": "Muon",
                "params": {"lr": LR, "momentum": MOMENTUM, "weight_decay": 0.0, "ns_method": "standard"},
            },
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
            "steps_per_print": 2**31 - 1,
        }
        with quiet_output():
            self.engine, *_ = deepspeed.initialize(
                model=module, model_parameters=list(module.parameters()), config=settings, dist_init_required=False
            )

    def step(self, gradients: dict) -> None:
        self.engine.backward(self.engine(gradients))
        self.engine.step()

    def state_bytes(self) -> int:
        """Returns the bytes of the shards' float32 masters and of the optimizer's states."""
        zero = self.engine.optimizer
        states = [
            tensor for state in zero.optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)
        ]
        return sum(
            tensor.numel() * tensor.element_size() for tensor in [*states, *zero.single_partition_of_fp32_groups]
        )


class Chunks(Contender):
    """nanochat's rule: stacks by shape, padded to the ranks. Both wires are float32; all ranks have all weights."""

    def __init__(self, matrices: list[Matrix], mesh: Mesh):
        super().__init__(matrices)
        self.axis, self.stacks, self.states = mesh.data, by_shape(matrices), []
        for stack in self.stacks:
            chunk = -(-len(stack) // self.axis.size)
            momentum, second = (
                torch.zeros(chunk, *stack[0].shape),
                torch.zeros(chunk, *muon.second_moment_shape(stack[0].shape)),
            )
            self.states.append({"momentum": momentum, "second": second})

    def step(self, gradients: dict) -> None:
        self.loss(gradients).backward()
        with torch.no_grad():
            reductions, gathers = [], []
            for stack, state in zip(self.stacks, self.states, strict=True):
                whole = torch.zeros(self.axis.size * len(state["momentum"]), *stack[0].shape)
                torch.stack([self.parameters[matrix.name].grad for matrix in stack], out=whole[: len(stack)])
                mine = torch.empty_like(state["momentum"])
                reductions.append(
                    (whole, mine, reduce_scatter(mine.view(-1), whole.view(-1), self.axis, asynchronous=True))
                )
            for stack, state, (whole, mine, pending) in zip(self.stacks, self.states, reductions, strict=True):
                pending.wait()
                first = self.axis.rank * len(mine)
                members, updated = stack[first : first + len(mine)], torch.zeros_like(mine)
                if count := len(members):
                    torch.stack([self.parameters[matrix.name] for matrix in members], out=updated[:count])
                    used = {key: tensor[:count] for key, tensor in state.items()}
                    self.momentum_step(mine[:count].div_(self.axis.size), used, members[0], updated[:count])
                gathers.append(
                    (stack, whole, updated, all_gather(whole.view(-1), updated.view(-1), self.axis, asynchronous=True))
                )
            for stack, whole, _, pending in gathers:
                pending.wait()
                for matrix, value in zip(stack, whole, strict=False):
                    self.parameters[matrix.name].copy_(value)
                    self.parameters[matrix.name].grad = None

    def state_bytes(self) -> int:
        weights = 4 * sum(matrix.elements for matrix in self.matrices)
        return weights + sum(4 * tensor.numel() for state in self.states for tensor in state.values())


class WholeByCost(Contender):
    """Whole matrices dealt by cost. bfloat16 wires, sums in float32; all buffers have the size of the fullest one."""

    def __init__(self, matrices: list[Matrix], mesh: Mesh):
        super().__init__(matrices)
        self.axis, self.dealt = mesh.data, dealt_by_cost(matrices, mesh.data.size)
        self.fullest = max(sum(matrix.elements for matrix in members) for members in self.dealt)
        self.states = {}
        for matrix in self.dealt[self.axis.rank]:
            state = {
                "momentum": torch.zeros(matrix.shape),
                "second": torch.zeros(muon.second_moment_shape(matrix.shape)),
            }
            self.states[matrix.name] = state | {"master": self.parameters[matrix.name].detach()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.bfloat16()

    def step(self, gradients: dict) -> None:
        self.loss(gradients).backward()
        with torch.no_grad():
            sent = torch.zeros(self.axis.size, self.fullest, dtype=torch.bfloat16)
            for members, flat in zip(self.dealt, sent, strict=True):
                if members:
                    gradients_of_rank = [self.parameters[matrix.name].grad.flatten() for matrix in members]
                    torch.cat(gradients_of_rank, out=flat[: sum(matrix.elements for matrix in members)])
            received = torch.empty_like(sent)
            all_to_all(received.view(-1), sent.view(-1), self.axis)
            mean, updated, position = received.float().sum(0).div_(self.axis.size), sent[self.axis.rank], 0
            for matrix in self.dealt[self.axis.rank]:
                state, here = self.states[matrix.name], slice(position, position + matrix.elements)
                self.momentum_step(mean[here].view(matrix.shape), state, matrix, state["master"])
                updated[here] = state["master"].flatten()
                position += matrix.elements
            all_gather(sent.view(-1), updated, self.axis)
            for members, flat in zip(self.dealt, sent, strict=True):
                sizes = [matrix.elements for matrix in members]
                for matrix, value in zip(members, flat[: sum(sizes)].split(sizes), strict=True):
                    self.parameters[matrix.name].copy_(value.view(matrix.shape))
                    self.parameters[matrix.name].grad = None

    def state_bytes(self) -> int:
        return sum(4 * tensor.numel() for state in self.states.values() for tensor in state.values())


CONTENDERS = {
    "megachat": Megachat,
    "DeepSpeed's Muon, ZeRO-1": DeepSpeed,
    "nanochat's chunks": Chunks,
    "whole matrices by cost": WholeByCost,
}


def measure_rank(rounds: int) -> dict:
    """Measures every contender; all ranks call it. Returns contender -> bytes and FLOPs of a step, bytes of state, and
    seconds of each round. The contenders take turns."""
    torch._dynamo.config.disable = True  # DeepSpeed would compile its iteration, the others would not
    wire = Wire()
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"))
    matrices = model_matrices(*MEASURED)
    generator = torch.Generator().manual_seed(1000 + mesh.data.rank)
    gradients = {matrix.name: torch.randn(matrix.shape, generator=generator).bfloat16() for matrix in matrices}
    contenders = {name: build(matrices, mesh) for name, build in CONTENDERS.items()}
    measured: dict = {}
    for name, contender in contenders.items():  # also warms up
        before = wire.bytes
        with FlopCounterMode(display=False) as flops:
            contender.step(gradients)
        sent = wire.bytes - before
        state = contender.state_bytes()
        measured[name] = {"bytes": sent, "flops": flops.get_total_flops(), "state": state, "seconds": []}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)  # no contender always follows the same one
        for name in names[first:] + names[:first]:
            dist.barrier()
            begin = time.perf_counter()
            contenders[name].step(gradients)
            dist.barrier()
            measured[name]["seconds"].append(time.perf_counter() - begin)
    return measured


def measure(world: int, rounds: int) -> dict:
    """Starts the ranks and returns contender -> ratios. Raises UserError that names the first rank that failed."""
    return _ratios(run_local_ranks(measure_rank, world, rounds, preload=[__name__]))


def _ratios(by_rank: list[dict]) -> dict:
    """Returns the measurements of each contender relative to: the lower bound of bytes, the mean load, the work without
    repetition, an even share of 8 bytes per element, megachat's seconds. And its seconds."""
    matrices, world = model_matrices(*MEASURED), len(by_rank)
    work, elements = sum(matrix.flops for matrix in matrices), sum(matrix.elements for matrix in matrices)
    ratios = {}
    for name in by_rank[0]:
        each = [measured[name] for measured in by_rank]
        flops, seconds = [one["flops"] for one in each], each[0]["seconds"]
        times = round_ratios(seconds, by_rank[0]["megachat"]["seconds"])
        ratios[name] = {
            "bytes": statistics.mean(one["bytes"] for one in each) / lower_bound(matrices, world),
            "load": max(flops) * world / sum(flops),
            "work": sum(flops) / work,
            "state": max(one["state"] for one in each) * world / (8 * elements),
            "time": statistics.median(times),
            "seconds": statistics.median(seconds),
        }
    return ratios
