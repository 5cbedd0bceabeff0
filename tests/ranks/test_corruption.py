"""Silent data corruption on one rank is seen, and its rank and tensor are named: by a replay, and by hashes of copies.

A run with both checks is equal to the bit to one without.
"""

import contextlib
from pathlib import Path

import pytest
import torch

from megachat.errors import CORRUPTION_STATUS, CorruptionError
from megachat.planning.dimensions import NORMS
from megachat.train.corruption import FOLDER
from megachat.train.replay import parameter_name, replay_micro_batch
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.oracle import ROWS, TOKENS
from tests.training import SMALL_VOCAB, build, random_rows, rows_of_rank, small_config, take_step, whole_state

TABLES = {
    "ngram": {"blocks": (0,), "rows": 60},
    "lookup": {"after_blocks": (1,), "rows": 400, "max_rows_per_token": 60},
}
CASES = {
    "dp2": (2, {}, TABLES | {"model": {"norm_scales": NORMS}}),
    "tp2": (
        2,
        {"tensor": 2},
        TABLES | {"model": {"kv_heads": None, "aspect_ratio": 32}, "batch": {"recompute": "block"}},
    ),
    "tp2 sequence": (2, {"tensor": 2, "sequence": True}, {"model": {"kv_heads": None, "aspect_ratio": 32}}),
    "pp2": (2, {"pipeline": 2}, TABLES | {"precision": {"compute": "bfloat16"}}),
}


def step_of(training, step: int) -> torch.Tensor:
    set_schedules(training, step)
    return random_rows(step, ROWS, TOKENS + 1, SMALL_VOCAB)


def flip(tensor: torch.Tensor, bit: int = 12) -> torch.Tensor:
    """The tensor with one bit of its middle element flipped."""
    flipped = tensor.detach().clone(memory_format=torch.contiguous_format)
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    flipped.view(-1).view(integers)[tensor.numel() // 2] ^= 1 << bit
    return flipped


@contextlib.contextmanager
def second_gradient_flipped(parameter: torch.nn.Parameter):
    """The second gradient of the parameter has one wrong bit."""
    calls = []

    def corrupt(gradient):
        calls.append(1)
        return flip(gradient) if len(calls) == 2 else None

    hook = parameter.register_hook(corrupt)
    yield
    hook.remove()


@contextlib.contextmanager
def second_activation_flipped(module: torch.nn.Module):
    """The second output of the module has one wrong bit."""
    calls = []

    def corrupt(module, inputs, output):
        calls.append(1)
        return output + (flip(output, 14) - output).detach() if len(calls) == 2 else None

    hook = module.register_forward_hook(corrupt)
    yield
    hook.remove()


def verdict(check) -> str:
    with pytest.raises(CorruptionError) as error:
        check()
    return str(error.value)


def all_checks(parallel: dict, changes: dict, folder: str):
    """(the states of a run without and with replays are equal, what each fault is said to be)"""
    config = small_config(parallel=parallel, **changes)
    plain, checked = build(config, SMALL_VOCAB), build(config, SMALL_VOCAB)
    results = []
    for training in (plain, checked):
        for step in range(2):
            rows = step_of(training, step)
            if training is checked:
                replay_micro_batch(training, rows_of_rank(training, rows), step, Path(folder))
            outcome = take_step(training, rows)
        results.append((outcome, whole_state(training)))
    assert not Path(folder).exists()
    (before, state), (after, same) = results
    assert before == after and all(torch.equal(state[name], same[name]) for name in state)
    rows, last = rows_of_rank(checked, step_of(checked, 2)), checked.mesh.world.rank == 1
    block = next(layer for layer in checked.layers if hasattr(layer, "mlp"))
    faults = {
        "gradient": second_gradient_flipped(block.mlp.c_fc.weight),
        "scalar gradient": second_gradient_flipped(next(p for p in block.parameters() if p.numel() == 1)),
        "activation": second_activation_flipped(block.mlp.c_proj),
    }
    said = {"name": parameter_name(block.mlp.c_fc.weight)}
    for number, (name, fault) in enumerate(faults.items()):
        with fault if last else contextlib.nullcontext():
            said[name] = verdict(lambda n=number: replay_micro_batch(checked, rows, n, Path(folder)))
        checked.muon.discard_gradients()
        checked.rows.discard_gradients()
        checked.engine.adamw.discard_gradients()
    return said


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_bit_is_found_and_its_rank_is_named(case, tmp_path):
    world, parallel, changes = CASES[case]
    both = run_ranks(all_checks, world, parallel, changes, str(tmp_path / "run"))
    for said in both:
        for fault in ("gradient", "scalar gradient", "activation"):
            assert said[fault] == both[0][fault]
            print(said[fault])
