"""The rules that tools/partition_table.py compares with the partition compute the same update and send the bytes of
their plans.

Seen to fail with: sums in bfloat16, every rank updating the first chunk, all-reduces counted once, gradients gathered
instead of weights, a rule without padding.
"""

from datetime import timedelta

import pytest
import torch

from megachat.optim.matrix import Matrix
from megachat.parallel.build import start_collectives
from tests.harness import run_ranks
from tests.muon import on_cpu
from tools.bench.partition_contenders import CONTENDERS, Wire
from tools.bench.partition_rules import RULES, lower_bound, planned_chunks, planned_whole

SHAPES = {"q": (160, 160), "k": (96, 160), "fc": (320, 160), "proj": (160, 320)}
MATRICES = [Matrix(f"{layer}.{name}", shape, layer, 1.0) for layer in range(3) for name, shape in SHAPES.items()]


def _two_steps():
    torch._dynamo.config.disable = True
    wire = Wire()
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = on_cpu((torch.distributed.get_world_size(), 1))
    answers = {}
    for name, build in CONTENDERS.items():
        contender = build(MATRICES, mesh)
        generator = torch.Generator().manual_seed(7 + mesh.data.rank)
        for _ in range(2):
            gradients = {matrix.name: torch.randn(matrix.shape, generator=generator).bfloat16() for matrix in MATRICES}
            before = wire.bytes
            contender.step(gradients)
        weights = {name: parameter.detach().float().clone() for name, parameter in contender.parameters.items()}
        answers[name] = (weights, wire.bytes - before, contender.state_bytes())
    return answers


@pytest.mark.parametrize("world", [2, 3])
def test_contenders_agree_and_send_the_bytes_of_their_plans(world):
    answers = run_ranks(_two_steps, world)
    for name, plan in RULES.items():
        assert sum(answer[name][1] for answer in answers) / world == pytest.approx(plan(MATRICES, world)[1]), name
    bound = lower_bound(MATRICES, world)
    assert all(answer["DeepSpeed's Muon, ZeRO-1"][1] / bound == pytest.approx(1.5, rel=0.01) for answer in answers)
    for answer in answers:
        ours = answer["megachat"][0]
        for matrix in MATRICES:
            assert torch.equal(ours[matrix.name], answers[0]["megachat"][0][matrix.name])
            assert torch.equal(ours[matrix.name], answer["whole matrices by cost"][0][matrix.name])
            # float32 wires and stacks: the same update up to bfloat16's rounding inside the iteration
            apart = (ours[matrix.name] - answer["nanochat's chunks"][0][matrix.name]).norm() / ours[matrix.name].norm()
            assert apart < 0.01, (matrix.name, float(apart))


def test_rules_by_hand():
    squares = [Matrix(f"{number}", (64, 64), number) for number in range(5)]
    one = squares[0]
    assert planned_chunks(squares, 4) == ([2 * one.flops, 2 * one.flops, one.flops, 0], 2 * 4 * 3 * 2 * 4096)
    assert planned_whole(squares, 4) == ([2 * one.flops, one.flops, one.flops, one.flops], 2 * 2 * 3 * 2 * 4096)
    assert lower_bound(squares, 4) == 4 * 5 * 4096 * 3 / 4
