"""tools/verify.py's comparison on forked ranks: equal layouts pass at any rates, planted faults are named."""

import pytest

from megachat.config import Config
from megachat.programs import verify_layout
from megachat.settings import ParallelConfig
from tests.harness import run_ranks
from tests.ranks.test_layouts import drop_a_contribution, raise_the_rate, scale_gradients, swap_owners
from tests.training import SMALL_VOCAB, small_config

# full rates at the first step, where AdamW's sign of a gradient that is rounding noise moves a value embedding by 0.15
REPORTED = Config.model_validate(
    {
        "model": {"depth": 5, "aspect_ratio": 12, "head_size": 16, "sequence_len": 160, "window_pattern": "SL"},
        "optimizer": {"warmup_steps": 1, "scale_to_batch": False},
        "ngram": {"blocks": (1, 3), "rows": 90},
        "lookup": {"after_blocks": (2,), "score_scale": "sqrt"},
    }
)


def drop_the_tensor_reduction(training) -> None:
    """Leaves out the sum over the tensor axis of gradients that cover each rank's tokens."""
    assert training.engine.adamw.partial_over_tensor
    training.engine.adamw.partial_over_tensor = []


def change_a_copy(training) -> None:
    """Makes one rank's copies of the scalars' gradients, which all tensor ranks have, too large after reduction."""
    shares = training.engine.adamw.gradient_shares

    def changed():
        return [share * (1.1 if training.mesh.tensor.rank and share.numel() < 100 else 1) for share in shares()]

    training.engine.adamw.gradient_shares = changed


FAULTS = {  # -> layout, sequence parallelism, the faulty ranks, what is named
    scale_gradients: ("dp", False, {1}, "gradient/"),
    drop_a_contribution: ("dp", False, {1}, "gradient/transformer.wte.weight, step 0"),
    drop_the_tensor_reduction: ("tp", True, {0, 1}, "gradient/"),
    change_a_copy: ("tp", True, {0, 1}, " on tensor rank 1, step 0"),
    swap_owners: ("dp", False, {1}, "weight/"),
    raise_the_rate: ("dp", False, {1}, "weight/"),
}


def run_rank(fault, config, vocab_size, device, folder, reference) -> None:
    build = verify_layout.build_training_model

    def build_with_fault(*arguments):
        training = build(*arguments)
        if reference and training.mesh.world.rank in FAULTS[fault][2]:
            fault(training)
        return training

    verify_layout.build_training_model = build_with_fault if fault else build
    verify_layout.run_rank(config, vocab_size, device, folder, reference)


def verdict(config, layout, folder, fault=None, vocab_size=SMALL_VOCAB) -> dict:
    import torch

    def forked(config, world, vocab_size, folder, reference):
        folder.mkdir()
        run_ranks(run_rank, world, fault, config, vocab_size, torch.device("cpu"), folder, reference)

    return verify_layout.verify_layout(config, layout, vocab_size, folder, forked, depth=None, rows=2)


def test_the_verdict_does_not_depend_on_the_rates(tmp_path):
    config = REPORTED.model_copy(update={"parallel": ParallelConfig(sequence=True)})
    document = verdict(config, {"data": 3, "tensor": 2, "pipeline": 1}, tmp_path, vocab_size=499)
    assert document["passed"], document["first_difference"]
    largest = max(entry["error"] for entry in document["compared"] if entry["name"].startswith("weight/"))
    assert largest < 1e-6, "given equal gradients, the updates are equal"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named(fault, tmp_path):
    axis, sequence, _, named = FAULTS[fault]
    config = small_config(model={"kv_heads": None, "head_size": 24}, parallel={"sequence": sequence})
    layout = {"data": 1, "tensor": 1, "pipeline": 1} | {"data" if axis == "dp" else "tensor": 2}
    document = verdict(config, layout, tmp_path, fault)
    assert not document["passed"] and named in document["first_difference"]["name"]
