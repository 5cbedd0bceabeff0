"""What tools/partition_table.py runs on every rank: four ways to spread Muon over data-parallel ranks, their bytes, work, state and time."""

import inspect
import time
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megachat.config import Config
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.optim import muon
from megachat.optim.groups import assign, muon_matrices
from megachat.optim.matrix import Matrix
from megachat.optim.partition import MuonPartition
from megachat.parallel.collectives import all_gather, all_to_all, reduce_scatter
from megachat.parallel.engine import quiet_output, start_collectives
from megachat.parallel.mesh import Mesh, build_mesh
from megachat.place import place_of
from megachat.planning.plan import resolve_dimensions

MEASURED = (6, 42)  # depth, width a block
LR, MOMENTUM, BETA2 = 0.02, 0.95, 0.9


def model_matrices(depth: int, aspect_ratio: int) -> list[Matrix]:
    """Muon's matrices of megachat's model of that size, the small gates included."""

    config = Config.model_validate({"model": {"depth": depth, "aspect_ratio": aspect_ratio}})
    with torch.device("meta"):
        parameters = placed_parameters(build_layers(resolve_dimensions(config, 65536), ModelOptions()))
    places = list(dict.fromkeys(place_of(parameter) for parameter in parameters))
    return muon_matrices(places, assign(places), "rows_over_cols")


def by_shape(matrices: list[Matrix]) -> list[list[Matrix]]:
    """Matrices of one shape each, in the order in which shapes first come."""
    found: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        found.setdefault(matrix.shape, []).append(matrix)
    return list(found.values())


def dealt_by_cost(matrices: list[Matrix], ranks: int) -> list[list[Matrix]]:
    """Whole matrices, the costliest first, to the rank with the least cost, then the fewest elements (LPT)."""
    dealt, loads = [[] for _ in range(ranks)], [(0, 0)] * ranks
    for matrix in sorted(matrices, key=lambda matrix: (-matrix.flops, matrix.name)):
        rank = min(range(ranks), key=lambda rank: loads[rank])
        dealt[rank].append(matrix)
        loads[rank] = loads[rank][0] + matrix.flops, loads[rank][1] + matrix.elements
    return dealt


class Wire:
    """Counts the bytes that this process sends in torch.distributed's collectives, by the usual ring formulas."""

    def __init__(self):

        self.bytes = 0.0
        shares = {  # of argument number, times (ranks - 1) / ranks
            "all_reduce": (0, 2),
            "reduce": (0, 1),
            "broadcast": (0, 1),
            "reduce_scatter_tensor": (1, 1),
            "all_gather_into_tensor": (0, 1),
            "all_to_all_single": (1, 1),
        }
        for name, (argument, times) in shares.items():
            setattr(dist, name, self._counting(getattr(dist, name), argument, times))

    def _counting(self, inner, argument: int, times: int):
        signature = inspect.signature(inner)

        def call(*args, **kwargs):
            given = list(signature.bind(*args, **kwargs).arguments.values())
            ranks, rank = dist.get_world_size(kwargs.get("group")), dist.get_rank(kwargs.get("group"))
            counts = given[3] if inner.__name__ == "all_to_all_single" and isinstance(given[3], list) else None
            elements = given[argument].numel() * (ranks - 1) / ranks if counts is None else sum(counts) - counts[rank]
            self.bytes += times * elements * given[argument].element_size()
            return inner(*args, **kwargs)

        return call


class Contender:
    """Parameters and a step: a backward pass that gives them the gradients, then the update. State is what the optimizer keeps."""

    def __init__(self, matrices: list[Matrix]):
        self.matrices = matrices
        self.parameters = {}
        for number, matrix in enumerate(matrices):
            value = 0.1 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(number))
            self.parameters[matrix.name] = torch.nn.Parameter(value)

    def loss(self, gradients: dict):
        """Whose gradients are the given ones."""
        return sum((parameter * gradients[name]).sum() for name, parameter in self.parameters.items())

    def momentum_step(self, gradient, state: dict, matrix: Matrix, weight) -> None:
        """megachat's mathematics on whole matrices, one or a stack of them, float32, in place; state: momentum and second moment."""
        update = muon.momentum_update(state["momentum"], gradient, torch.tensor(MOMENTUM))
        direction = muon.update_direction(update.bfloat16())
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
        self.partition.step(1.0)
        self.partition.wait_for_gather()

    def state_bytes(self) -> int:
        return sum(self.partition.state_bytes().values())


class DeepSpeed(Contender):
    """DeepSpeed's built-in Muon (deepspeed.runtime.zero.muon) under ZeRO-1 in bfloat16, with the usual Newton-Schulz iteration."""

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
        """float32 masters of the shards, and what the optimizer keeps beside them."""
        zero = self.engine.optimizer
        kept = [
            tensor for state in zero.optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*kept, *zero.single_partition_of_fp32_groups])


class Chunks(Contender):
    """nanochat's rule: stacks by shape, padded to the ranks, float32 both ways; the float32 weights are whole on every rank."""

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
                own, updated = stack[first : first + len(mine)], torch.zeros_like(mine)
                if own:
                    torch.stack([self.parameters[matrix.name] for matrix in own], out=updated[: len(own)])
                    part = {key: tensor[: len(own)] for key, tensor in state.items()}
                    self.momentum_step(mine[: len(own)].div_(self.axis.size), part, own[0], updated[: len(own)])
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
    """Whole matrices dealt by cost, bfloat16 both ways, sums in float32, every rank's part padded to the fullest."""

    def __init__(self, matrices: list[Matrix], mesh: Mesh):
        super().__init__(matrices)
        self.axis, self.dealt = mesh.data, dealt_by_cost(matrices, mesh.data.size)
        self.fullest = max(sum(matrix.elements for matrix in own) for own in self.dealt)
        self.states = {}
        for matrix in self.dealt[self.axis.rank]:
            kept = {
                "momentum": torch.zeros(matrix.shape),
                "second": torch.zeros(muon.second_moment_shape(matrix.shape)),
            }
            self.states[matrix.name] = kept | {"master": self.parameters[matrix.name].detach()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.bfloat16()

    def step(self, gradients: dict) -> None:

        self.loss(gradients).backward()
        with torch.no_grad():
            sent = torch.zeros(self.axis.size, self.fullest, dtype=torch.bfloat16)
            for own, flat in zip(self.dealt, sent, strict=True):
                if own:
                    parts = [self.parameters[matrix.name].grad.flatten() for matrix in own]
                    torch.cat(parts, out=flat[: sum(matrix.elements for matrix in own)])
            received = torch.empty_like(sent)
            all_to_all(received.view(-1), sent.view(-1), self.axis)
            mean, updated, position = received.float().sum(0).div_(self.axis.size), sent[self.axis.rank], 0
            for matrix in self.dealt[self.axis.rank]:
                state, here = self.states[matrix.name], slice(position, position + matrix.elements)
                self.momentum_step(mean[here].view(matrix.shape), state, matrix, state["master"])
                updated[here] = state["master"].flatten()
                position += matrix.elements
            all_gather(sent.view(-1), updated, self.axis)
            for own, flat in zip(self.dealt, sent, strict=True):
                used = flat[: sum(matrix.elements for matrix in own)]
                for matrix, value in zip(own, used.split([matrix.elements for matrix in own]), strict=True):
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


def measure_here(rounds: int) -> dict:
    """On every rank: contender -> bytes and FLOPs of a step, state, and seconds of each round; contenders take turns."""
    torch._dynamo.config.disable = True  # DeepSpeed would compile its iteration, the others would not
    wire = Wire()
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"))
    matrices = model_matrices(*MEASURED)
    generator = torch.Generator().manual_seed(1000 + mesh.data.rank)
    gradients = {matrix.name: torch.randn(matrix.shape, generator=generator).bfloat16() for matrix in matrices}
    contenders = {name: build(matrices, mesh) for name, build in CONTENDERS.items()}
    found: dict = {name: {"seconds": []} for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody always follows the same one
            contender = contenders[name]
            dist.barrier()
            begin, before = time.perf_counter(), wire.bytes
            if number == 0:  # warms up, too
                with FlopCounterMode(display=False) as flops:
                    contender.step(gradients)
                found[name] |= {
                    "bytes": wire.bytes - before,
                    "flops": flops.get_total_flops(),
                    "state": contender.state_bytes(),
                }
                continue
            contender.step(gradients)
            dist.barrier()
            found[name]["seconds"].append(time.perf_counter() - begin)
    dist.barrier()
    return found
