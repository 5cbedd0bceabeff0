"""The engine on 1 to 4 ranks against one plain process: autograd over the whole batch, torch's AdamW, and Muon's whole-matrix reference."""

import math

import pytest
import torch

from megachat.errors import UserError
from megachat.model.gpt import Loss, ModelOptions, build_layers, run_layers
from megachat.model.parameters import Place, load_whole, placed_parameters, starting_value
from megachat.optim.groups import ADAMW_EPSILON, MUON_BETA2, assign, rate_multipliers
from megachat.optim.muon import Hyper, reference_step, second_moment_shape
from megachat.plan import resolve
from megachat.schedule import learning_rate_multiplier, muon_momentum, weight_decay_multiplier
from megachat.train.build import apply_compile
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.training import SMALL_VOCAB, build, load_whole_state, random_rows, small_config, take_step, whole_state

ROWS, TOKENS = 12, 161


def warm_up(name: str, whole: torch.Tensor) -> torch.Tensor:
    """Weights as if trained a little. From the zero starting values the first gradients are nearly singular, and orthogonalizing them
    magnifies even the rounding of another summation order by three digits, in one process too (LOG.md, 2026-11-22)."""
    return whole + 0.05 * starting_value(Place(name, tuple(whole.shape), 0, ("normal", 1.0)), seed=5) * (whole.ndim == 2)


class Oracle:
    """One process, no engine, no partition; tensors by checkpoint name."""

    def __init__(self, config):
        self.config, self.plan = config, resolve(config, 1, SMALL_VOCAB)
        self.layers = build_layers(self.plan.dims, ModelOptions(rotary=config.model.rotary), config.run.seed)
        self.parameters = placed_parameters(self.layers)
        for p in self.parameters:
            if p.ndim == 2:
                load_whole(p, warm_up(p.place.name, p.detach()))
        self.groups = assign([p.place for p in self.parameters])
        self.muon = [p for p in self.parameters if self.groups[p.place.name].optimizer == "muon"]
        self.multiplier = rate_multipliers({p.place.name: p.place.whole for p in self.muon}, config.optimizer.muon_multiplier)
        self.momentum = {p: torch.zeros_like(p) for p in self.muon}
        self.second = {p: torch.zeros(second_moment_shape(tuple(p.shape))) for p in self.muon}
        self.adamw = torch.optim.AdamW([{"params": [p]} | self._settings(p) for p in self.parameters if p not in self.momentum], eps=ADAMW_EPSILON)

    def _settings(self, parameter):
        group = self.groups[parameter.place.name]
        return {"betas": group.betas, "weight_decay": group.weight_decay, "rate": self.plan.rates[group.rate], "lr": 0.0}

    def step(self, number: int, rows: torch.Tensor) -> tuple[float, float]:
        asked, plan = self.config.optimizer, self.plan
        loss = Loss(plan.dims, torch.ones(SMALL_VOCAB))(run_layers(self.layers, rows[:, :-1]), rows[:, 1:])
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in self.parameters))
        if asked.clip_norm and norm > asked.clip_norm:
            for p in self.parameters:
                p.grad.mul_(asked.clip_norm / norm)
        schedule = {"warmup_steps": asked.warmup_steps, "warmdown_ratio": asked.warmdown_ratio}
        lrm = learning_rate_multiplier(number, plan.steps, final_fraction=asked.final_lr_fraction, **schedule)
        for group in self.adamw.param_groups:
            group["lr"] = group["rate"] * lrm
        self.adamw.step()
        with torch.no_grad():
            for p in self.muon:
                hyper = Hyper(
                    lr=torch.tensor(plan.rates["matrix"] * lrm * self.multiplier[p.place.name]),
                    weight_decay=torch.tensor(plan.weight_decay * weight_decay_multiplier(number, plan.steps)),
                    momentum=torch.tensor(muon_momentum(number, plan.steps, warmdown_ratio=asked.warmdown_ratio)),
                    beta2=torch.tensor(MUON_BETA2),
                )
                reference_step(p.data, p.grad, self.momentum[p], self.second[p], hyper, torch.float32)
        for p in self.parameters:
            p.grad = None
        return loss.item(), norm

    def weights(self) -> dict[str, torch.Tensor]:
        whole: dict[str, list] = {}
        for p in self.parameters:
            whole.setdefault(p.place.name, []).append(p.detach())
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in whole.items()}


def assert_nearly_all_equal(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To 1e-5, but for one element in a thousand: where a gradient is rounding noise around zero, the sign of AdamW's step and the mask of
    Muon's cautious decay are that noise's sign."""
    off = (found - wanted).abs() > 1e-5 + 1e-5 * wanted.abs()
    assert off.sum() <= max(1, wanted.numel() // 1000) and (found - wanted).abs().max() < 3e-3, (
        f"{name}: {int(off.sum())} of {off.numel()} elements differ"
    )


def train(config, steps: int):
    training = build(config, SMALL_VOCAB)
    state = whole_state(training)
    load_whole_state(training, {key: warm_up(key[6:], whole) if key.startswith("model/") else whole for key, whole in state.items()}, 0)
    told = []
    for step in range(steps):
        set_schedules(training, step)
        told.append(take_step(training, random_rows(step, ROWS, TOKENS, SMALL_VOCAB)))
    views = {p.place.name: p.detach().float().clone() for p in training.layers.parameters() if not p.place.offset}
    return told, whole_state(training), views


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {}),
        (2, {"optimizer": {"clip_norm": 0.2}}),
        (3, {"optimizer": {"muon_multiplier": "flipped"}, "model": {"rotary": "chunk"}}),
        (4, {"batch": {"micro_rows": 3}}),
    ],
)
def test_every_world_size_equals_one_process(world, changes):
    config = small_config(**changes)
    oracle = Oracle(config)
    wanted = [oracle.step(step, random_rows(step, ROWS, TOKENS, SMALL_VOCAB)) for step in range(2)]
    results = run_ranks(train, world, config, 2)
    for told, state, views in results:
        for (loss, norm, skipped), (loss_wanted, norm_wanted) in zip(told, wanted, strict=True):
            assert not skipped
            assert loss == pytest.approx(loss_wanted, rel=1e-6)
            assert norm == pytest.approx(norm_wanted, rel=1e-5)
        for name, tensor in oracle.weights().items():
            assert_nearly_all_equal(name, state[f"model/{name}"], tensor)
        for name, view in views.items():
            assert torch.equal(view, results[0][2][name]), f"{name} differs between ranks"
            assert torch.equal(view, state[f"model/{name}"]), f"{name}: the model does not use its master"


def skip_then_go_on(config, poison: str, bad_rank: int):
    training = build(config, SMALL_VOCAB)
    set_schedules(training, 0)
    take_step(training, random_rows(0, ROWS, TOKENS, SMALL_VOCAB))
    before = whole_state(training)
    parameter = next(p for p in training.layers.parameters() if p.place.name == poison)
    if training.mesh.world.rank == bad_rank:
        hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    scale = training.engine.optimizer.loss_scale
    loss, norm, skipped = take_step(training, random_rows(1, ROWS, TOKENS, SMALL_VOCAB))
    after = whole_state(training)
    if training.mesh.world.rank == bad_rank:
        hook.remove()
    halved = training.engine.optimizer.loss_scale / scale
    _, _, skipped_next = take_step(training, random_rows(2, ROWS, TOKENS, SMALL_VOCAB))
    same = [name for name in before if torch.equal(before[name], after[name])]
    changed_next = sum(not torch.equal(after[name], tensor) for name, tensor in whole_state(training).items())
    return math.isfinite(loss), norm, skipped, len(same) == len(before), halved, skipped_next, changed_next / len(before)


@pytest.mark.parametrize("poison", ["transformer.h.1.mlp.c_fc.weight", "lm_head.weight"])
@pytest.mark.parametrize("compute", ["float32", "float16", "bfloat16"])
def test_inf_in_one_gradient_of_one_rank_skips_everything_everywhere(poison, compute):
    config = small_config(precision={"compute": compute, "loss_scale": 1024.0})
    for finite, norm, skipped, untouched, halved, skipped_next, changed in run_ranks(skip_then_go_on, 2, config, poison, 1):
        assert finite and skipped and norm == math.inf
        assert untouched, "a skipped step changed state"
        assert halved == (0.5 if compute == "float16" else 1.0)
        assert not skipped_next and changed > 0.9


def test_float16_unscales_before_both_optimizers():
    plain = run_ranks(train, 1, small_config(), 4)[0]
    # a window of one step doubles the scale at every step: an optimizer that divides by the new scale would move half as far
    config = small_config(precision={"compute": "float16", "loss_scale": 256.0, "loss_scale_window": 1})
    half = run_ranks(train, 2, config, 4)[0]
    for (loss, norm, skipped), (loss_plain, norm_plain, _) in zip(half[0], plain[0], strict=True):
        assert not skipped
        assert loss == pytest.approx(loss_plain, rel=5e-3)
        assert norm == pytest.approx(norm_plain, rel=5e-2)


def test_bfloat16_tables_accumulate_gradients_in_float32():
    config = small_config(precision={"compute": "bfloat16"})
    plain, (told, state, views) = run_ranks(train, 1, small_config(), 3)[0], run_ranks(train, 2, config, 3)[0]
    for (loss, _, _), (loss_plain, _, _) in zip(told, plain[0], strict=True):
        assert loss == pytest.approx(loss_plain, rel=2e-2)
    table = state["model/transformer.wte.weight"]
    assert torch.equal(views["transformer.wte.weight"], table.bfloat16().float())
    assert not torch.equal(table, table.bfloat16().float()), "the master of a bfloat16 table is float32"


def state_size(config):
    training = build(config, SMALL_VOCAB)
    take_step(training, random_rows(0, ROWS, TOKENS, SMALL_VOCAB))
    zero = training.engine.optimizer
    adamw = sum(
        t.numel() * t.element_size() for flat in zero.single_partition_of_fp32_groups for t in (flat, *zero.optimizer.state[flat].values()) if t.ndim
    )
    return training.muon.state_bytes(), adamw, dict(training.plan.parameters)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_state_is_eight_bytes_a_muon_parameter_over_ranks_and_the_zero1_share(world):
    # kv_heads = heads makes all attention matrices alike, and 16 columns a head keeps every count divisible: no padding to explain away
    config = small_config(model={"depth": 4, "kv_heads": None}, precision={"compute": "bfloat16"})
    for muon, adamw, parameters in run_ranks(state_size, world, config):
        gates = 2 * 4 * 12  # two gates of 4 heads x 12 channels, in a bucket padded to 64 elements a rank
        padded = (64 if world > 1 else 128) * world
        assert muon["master"] + muon["momentum"] == 8 * (parameters["matrices"] - gates + padded) // world
        tables = parameters["wte"] + parameters["value_embeds"] + parameters["lm_head"]
        assert 12 * tables // world <= adamw <= 12 * (tables + parameters["scalars"] + 6 * 2 * world) // world + 12


def test_compiled_blocks_train_as_eager_ones():
    model = {"depth": 2, "kv_heads": None}
    eager, compiled = (run_ranks(train, 1, small_config(model=model, precision={"compile": flag}), 2, timeout_s=400)[0] for flag in (False, True))
    for (loss, norm, _), (loss_eager, norm_eager, _) in zip(compiled[0], eager[0], strict=True):
        assert loss == pytest.approx(loss_eager, rel=1e-6)
        assert norm == pytest.approx(norm_eager, rel=1e-5)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="this machine has none"):
        apply_compile(torch.nn.ModuleList(), torch.device("cpu"))
