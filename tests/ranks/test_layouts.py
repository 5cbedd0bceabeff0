"""The oracle rule: on every layout, the loss, every gradient and every weight after two steps are one plain process's."""

import pytest
import torch

from tests.harness import run_ranks
from tests.oracle import ROWS, TOKENS, Oracle, assert_nearly_all_equal, train
from tests.training import SMALL_VOCAB, random_rows, small_config

GQA = {"aspect_ratio": 32, "head_size": 16, "kv_heads": 2}  # depth 3: width 96, 6 heads
EQUAL_HEADS = {"aspect_ratio": 32, "head_size": 24, "kv_heads": None}  # 4 heads
FIRST_NANOCHAT = {
    "qk_scale": 1.0,
    "rotary_base": 5000.0,
    "norm_epsilon": 1e-5,
    "value_embeddings": False,
    "lambdas": "neutral",
}
CASES = {
    "one": (1, {}, {}),
    "dp2": (2, {}, {"optimizer": {"clip_norm": 0.2}}),
    "dp3": (3, {}, {"optimizer": {"muon_multiplier": "flipped"}, "model": {"rotary": "chunk"}}),
    "dp4": (4, {}, {"batch": {"micro_rows": 3}}),
    "tp2": (2, {"tensor": 2}, {"model": GQA}),
    "tp2 sequence": (2, {"tensor": 2, "sequence": True}, {"model": GQA}),
    "tp4": (4, {"tensor": 4}, {"model": EQUAL_HEADS, "optimizer": {"clip_norm": 0.2}}),
    "tp3, which does not divide the table": (3, {"tensor": 3}, {"batch": {"micro_rows": 2}}),
    "pp2": (2, {"pipeline": 2}, {"optimizer": {"clip_norm": 0.2}}),
    "pp3, one block a stage": (3, {"pipeline": 3}, {"batch": {"micro_rows": 6}}),  # fewer micro-batches than stages
    "pp2, five blocks": (2, {"pipeline": 2}, {"model": {"depth": 5, "kv_heads": None}}),
    "pp3, seven blocks": (3, {"pipeline": 3}, {"model": {"depth": 7, "kv_heads": None, "aspect_ratio": 8}}),
    "dp2 tp2": (4, {"tensor": 2}, {"model": GQA}),
    "dp2 pp2": (4, {"pipeline": 2}, {}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}, {"model": GQA, "optimizer": {"clip_norm": 0.2}}),
    "tp2 pp2, as transformers' NanoChat": (4, {"tensor": 2, "pipeline": 2}, {"model": GQA | FIRST_NANOCHAT}),
    "tp2 pp2 sequence": (4, {"tensor": 2, "pipeline": 2, "sequence": True}, {"model": EQUAL_HEADS}),
    "dp2 tp2 pp2": (8, {"tensor": 2, "pipeline": 2}, {"model": GQA, "batch": {"micro_rows": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layout_equals_one_process(case):
    world, parallel, changes = CASES[case]
    config = small_config(**changes, parallel=parallel)
    oracle = Oracle(config)
    wanted = [oracle.step(step, random_rows(step, ROWS, TOKENS, SMALL_VOCAB)) for step in range(2)]
    results = run_ranks(train, world, config, 2)
    for told, found, state, views in results:
        for (loss, norm, skipped), (loss_wanted, norm_wanted) in zip(told, wanted, strict=True):
            assert not skipped
            assert loss == pytest.approx(loss_wanted, rel=1e-6)
            assert norm == pytest.approx(norm_wanted, rel=1e-5)
        assert found.keys() == oracle.first_gradients.keys()
        for name, gradient in oracle.first_gradients.items():
            error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
            # a scalar's gradient is a sum over all tokens and channels that nearly cancels
            assert error < (1e-5 if gradient.ndim == 2 else 1e-3), f"gradient of {name}: {error}"
        for name, tensor in oracle.weights().items():
            assert_nearly_all_equal(name, state[f"model/{name}"], tensor)
        for name, (where, view) in views.items():
            offset = where.offset or (0, 0)
            part = state[f"model/{name}"][offset[0] : offset[0] + view.size(0), offset[1] : offset[1] + view.size(1)]
            assert torch.equal(view, part), f"{name}: the model does not use its master"
