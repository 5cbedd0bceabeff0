"""What is computed again in the backward pass gives the same bits as what is kept, on every axis and in every dtype."""

import pytest
import torch

from tests.harness import run_ranks
from tests.oracle import train
from tests.training import small_config

EQUAL_HEADS = {"aspect_ratio": 32, "head_size": 24, "kv_heads": None}
FP8 = {"depth": 2, "aspect_ratio": 128, "head_size": 64, "kv_heads": 2, "sequence_len": 160}
NGRAM = {"blocks": (0, 2), "rows": 40}
LOOKUP = {"after_blocks": (1,), "rows": 300, "max_rows_per_token": 50}
CASES = {
    "one": (1, {}, {}),
    "one, float16": (1, {}, {"precision": {"compute": "float16"}, "ngram": NGRAM, "lookup": LOOKUP}),
    "tp2 sequence, bfloat16": (
        2,
        {"tensor": 2, "sequence": True},
        {"model": EQUAL_HEADS, "precision": {"compute": "bfloat16"}, "ngram": NGRAM, "lookup": LOOKUP},
    ),
    "tp2, fp8": (
        2,
        {"tensor": 2},
        {
            "model": FP8,
            "precision": {"compute": "bfloat16", "fp8": "tensorwise", "fp8_backend": "torch"},
            "lookup": LOOKUP,
        },
    ),
    "dp2 pp2": (4, {"pipeline": 2}, {"ngram": NGRAM | {"width": 8}}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}, {"model": EQUAL_HEADS}),
}


def train_each_way(parallel, changes):
    batch = {"micro_rows": 2} | changes.pop("batch", {})
    return [
        train(small_config(**changes, parallel=parallel, batch=batch | {"recompute": kind}), 2)
        for kind in ("none", "selective", "block")
    ]


@pytest.mark.parametrize("case", CASES)
def test_results_are_equal_to_the_bit(case):
    world, parallel, changes = CASES[case]
    for kept, *again in run_ranks(train_each_way, world, parallel, changes):
        for outcomes, gradients, states, _ in again:
            assert outcomes == kept[0]
            for actual, wanted in (*zip(gradients, kept[1], strict=True), *zip(states, kept[2], strict=True)):
                assert actual.keys() == wanted.keys()
                assert not [name for name, tensor in wanted.items() if not torch.equal(actual[name], tensor)]
