"""The oracle rule: every layout has the loss, every gradient and every weight after two steps of one plain process."""

import pytest
import torch

from megachat.place import place_of
from megachat.planning.dimensions import NORMS
from megachat.train.step import set_schedules
from tests import oracle
from tests.harness import run_ranks
from tests.oracle import ROWS, TOKENS, Oracle, assert_same_gradients, assert_same_weights, train
from tests.training import SMALL_VOCAB, random_rows, small_config

STEPS = 2
GQA = {"aspect_ratio": 32, "head_size": 16, "kv_heads": 2}  # depth 3: width 96, 6 heads
EQUAL_HEADS = {"aspect_ratio": 32, "head_size": 24, "kv_heads": None}  # 4 heads
FIRST_NANOCHAT = {
    "qk_scale": 1.0,
    "rotary_base": 5000.0,
    "norm_epsilon": 1e-5,
    "value_embeddings": False,
    "lambdas": "neutral",
}
LOOKUP = {"after_blocks": (0, 1), "rows": 400, "max_rows_per_token": 60, "up_width": 96}
# keys alone get gradients of softmax differences only, which rounding covers where unscaled scores are nearly one-hot
UNTIED = LOOKUP | {"tied": False, "score_scale": "sqrt", "after_blocks": (2,)}
NGRAM = {"blocks": (0, 2), "rows": 60}
OTHER_MOMENTS = {
    **{f"{group}_betas": (0.7, 0.9) for group in ("resid", "x0", "smear", "unembedding")},
    "embedding_betas": (0.6, 0.99),
    "adamw_epsilon": 1e-8,
    "muon_beta2": 0.8,
    "momentum_start": 0.5,
    "momentum_warmup_steps": 3,
    "warmup_ratio": 0.5,
    "warmdown_shape": "cosine",
    "decay_shape": "rate",
}
RAMP = {"ramp": (0.5, 2.0)}  # of all rates
SCALES = {"norm_scales": NORMS}
CLIPS = {"z_loss": 0.01, "qk_clip": 6.6}  # without clipping, most heads of the warm model have larger logits, some not
NARROW = NGRAM | {"width": 12, "sign_trick": False}  # projected up
CASES = {
    "one": (1, {}, {}),
    # three micro-batches of two rows; rates follow the root of a batch that is no power of two
    "dp2": (
        2,
        {},
        {"model": SCALES, "optimizer": CLIPS | {"clip_norm": 0.2, "scale_to_batch": True}, "batch": {"micro_rows": 2}},
    ),
    "dp3": (3, {}, {"optimizer": {"muon_multiplier": "flipped"}, "model": {"rotary": "chunk"}, "ngram": NARROW}),
    "dp4": (4, {}, {"batch": {"micro_rows": 3}, "ngram": NGRAM | {"storage": "host"}}),
    "tp2": (2, {"tensor": 2}, {"model": GQA, "ngram": NGRAM, "batch": {"micro_rows": 4}}),
    "tp2 sequence": (2, {"tensor": 2, "sequence": True}, {"model": GQA | SCALES, "optimizer": CLIPS}),
    "tp4": (4, {"tensor": 4}, {"model": EQUAL_HEADS, "optimizer": RAMP | {"clip_norm": 0.2}}),
    "tp3, which does not divide the table": (3, {"tensor": 3}, {"batch": {"micro_rows": 2}, "ngram": NARROW}),
    "pp2": (2, {"pipeline": 2}, {"model": SCALES, "optimizer": CLIPS | {"clip_norm": 0.2}}),
    # fewer micro-batches than stages
    "pp3, one block a stage": (3, {"pipeline": 3}, {"batch": {"micro_rows": 6}, "ngram": NGRAM}),
    "pp2, five blocks": (
        2,
        {"pipeline": 2},
        {"model": {"depth": 5, "kv_heads": None}, "optimizer": RAMP | {"ramp_rates": ["matrix", "embedding"]}},
    ),
    # the patterns match matrices of one stage each
    "pp3, seven blocks": (
        3,
        {"pipeline": 3},
        {
            "model": {"depth": 7, "kv_heads": None, "aspect_ratio": 8},
            "optimizer": {"muon_multiplier": {"*.h.0.*": 2.0, "*.h.6.mlp.*": 0.5}},
        },
    ),
    "dp2 tp2": (
        4,
        {"tensor": 2},
        {"model": GQA | SCALES, "ngram": NGRAM | {"optimizer": "rowwise", "storage": "host"}},
    ),
    "dp2 pp2": (4, {"pipeline": 2}, {"optimizer": OTHER_MOMENTS, "ngram": NGRAM}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}, {"model": GQA, "optimizer": {"clip_norm": 0.2}}),
    "tp2 pp2, as transformers' NanoChat": (4, {"tensor": 2, "pipeline": 2}, {"model": GQA | FIRST_NANOCHAT}),
    "tp2 pp2 sequence": (
        4,
        {"tensor": 2, "pipeline": 2, "sequence": True},
        {"model": EQUAL_HEADS, "ngram": NARROW | {"optimizer": "rowwise"}},
    ),
    "lookup": (1, {}, {"lookup": LOOKUP}),
    "lookup dp2": (2, {}, {"lookup": UNTIED, "optimizer": {"clip_norm": 0.2}}),
    "lookup tp2": (2, {"tensor": 2}, {"model": GQA, "lookup": UNTIED | {"after_blocks": (0, 1)}}),
    "lookup tp2 sequence": (2, {"tensor": 2, "sequence": True}, {"model": GQA, "lookup": LOOKUP}),
    "lookup pp2": (2, {"pipeline": 2}, {"lookup": UNTIED}),
    "lookup dp2 tp2": (4, {"tensor": 2}, {"model": GQA, "lookup": UNTIED, "ngram": NGRAM}),
    "lookup tp2 pp2 sequence": (
        4,
        {"tensor": 2, "pipeline": 2, "sequence": True},
        {"model": EQUAL_HEADS | SCALES, "lookup": LOOKUP, "ngram": NGRAM, "batch": {"recompute": "block"}},
    ),
    "dp2 tp2 pp2": (8, {"tensor": 2, "pipeline": 2}, {"model": GQA, "batch": {"micro_rows": 2}, "ngram": NGRAM}),
}


def compare(config, results) -> None:
    """Hold what every rank reports to one process, which takes its steps from the layout's own weights and with its own
    gradients, after both were compared.
    """
    alone = Oracle(config)
    _, gradients, states, _ = results[0]
    for step in range(STEPS):
        loss_wanted, norm_wanted, wanted = alone.step(
            step, random_rows(step, ROWS, TOKENS, SMALL_VOCAB), gradients[step]
        )
        for loss, norm, skipped in (each[0][step] for each in results):
            assert not skipped
            assert loss == pytest.approx(loss_wanted, rel=1e-6)
            assert norm == pytest.approx(norm_wanted, rel=1e-5)
        assert_same_gradients(gradients[step], wanted)
        weights = {name: states[step][f"model/{name}"] for name in alone.weights()}
        assert_same_weights(weights, alone.weights(), alone.decay)
        alone.load(weights)  # rounding of this step must not count as a difference of the next
    state = states[-1]
    for _, each_gradients, each_states, views in results:
        for name, tensor in state.items():
            assert torch.equal(each_states[-1][name], tensor), f"{name}: ranks assemble different states"
        for step in range(STEPS):
            assert all(torch.equal(each_gradients[step][name], gradients[step][name]) for name in gradients[step])
        for name, (where, view) in views.items():
            offset = where.offset or (0, 0)
            part = state[f"model/{name}"][offset[0] : offset[0] + view.size(0), offset[1] : offset[1] + view.size(1)]
            assert torch.equal(view, part), f"{name}: the model does not use its master"


@pytest.mark.parametrize("case", CASES)
def test_every_layout_equals_one_process(case):
    world, parallel, changes = CASES[case]
    config = small_config(**changes, parallel=parallel)
    compare(config, run_ranks(train, world, config, STEPS))


def scale_gradients(training) -> None:
    """Makes this rank's gradients 0.1 % too large before they are reduced."""
    for parameter in training.layers.parameters():
        parameter.register_hook(lambda gradient: 1.001 * gradient)


def drop_a_contribution(training) -> None:
    """Leaves this rank's gradient of the token table out of the sum."""
    (table,) = (p for p in training.layers.parameters() if place_of(p).name == "transformer.wte.weight")
    table.register_hook(torch.zeros_like)


def swap_owners(training) -> None:
    """Sends the updates of two matrices of one shape to each other's fragments."""
    for bucket in training.muon._buckets:

        def swapped(results, send_back=bucket.exchange.send_back):
            shape = {index: (result.direction.shape, result.scale.shape) for index, result in results.items()}
            pair = next(((a, b) for a in shape for b in shape if a < b and shape[a] == shape[b]), None)
            return send_back(results | {pair[0]: results[pair[1]], pair[1]: results[pair[0]]} if pair else results)

        bucket.exchange.send_back = swapped


def raise_the_rate(training) -> None:
    """Updates this rank's share of AdamW's weights with a learning rate that is 0.1 % too high."""
    adamw = training.engine.optimizer.optimizer

    def step(*args, original=adamw.step, **kwargs):
        for group in adamw.param_groups:
            group["lr"] *= 1.001
        return original(*args, **kwargs)

    adamw.step = step


FAULTS = {  # what rank 1 of two data ranks does wrong, and what is reported
    scale_gradients: "gradient of ",
    drop_a_contribution: "gradient of transformer.wte.weight",
    swap_owners: "elements differ",
    raise_the_rate: "elements differ",
}


def train_with_a_fault(config, fault):
    """Like train(), with the fault in the last step, so that no later loss reports it."""

    def break_and_set(training, step):
        if step == STEPS - 1 and training.mesh.world.rank == 1:
            fault(training)
        set_schedules(training, step)

    oracle.set_schedules = break_and_set
    return train(config, STEPS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_reported(fault):
    config = small_config()
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        compare(config, run_ranks(train_with_a_fault, 2, config, fault))
