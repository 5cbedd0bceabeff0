"""One plain process: autograd over the whole batch, torch's AdamW, and Muon's whole-matrix reference. What every layout is compared with."""

import math

import torch

from megachat.config import ParallelConfig
from megachat.model.gpt import Loss, ModelOptions, build_layers, run_layers
from megachat.model.parameters import load_whole, placed_parameters
from megachat.optim.groups import ADAMW_EPSILON, MUON_BETA2, assign, rate_multipliers
from megachat.optim.muon import Hyper, reference_step, second_moment_shape
from megachat.place import place_of
from megachat.planning.plan import resolve
from megachat.programs.verify import FLIPPED_SHARE, gradient_pieces, warm_noise, warm_up
from megachat.schedule import learning_rate_multiplier, muon_momentum, weight_decay_multiplier
from megachat.train.step import set_schedules
from tests.training import SMALL_VOCAB, assembled, build, random_rows, take_step, whole_state

ROWS, TOKENS = 12, 161


class Oracle:
    """One process, no engine, no partition; tensors by checkpoint name."""

    def __init__(self, config, vocab_size: int = SMALL_VOCAB):
        config = config.model_copy(update={"parallel": ParallelConfig()})
        self.config, self.plan = config, resolve(config, 1, vocab_size)
        self.layers = build_layers(self.plan.dims, ModelOptions(rotary=config.model.rotary), config.run.seed)
        self.parameters = placed_parameters(self.layers)
        for p in self.parameters:  # see verify.warm_up for why
            if p.ndim == 2:
                load_whole(p, p.detach() + warm_noise(place_of(p).name, place_of(p).whole))
        self.first_gradients = None
        self.groups = assign([place_of(p) for p in self.parameters])
        self.muon = [p for p in self.parameters if self.groups[place_of(p).name].optimizer == "muon"]
        self.multiplier = rate_multipliers(
            {place_of(p).name: place_of(p).whole for p in self.muon}, config.optimizer.muon_multiplier
        )
        self.momentum = {p: torch.zeros_like(p) for p in self.muon}
        self.second = {p: torch.zeros(second_moment_shape(tuple(p.shape))) for p in self.muon}
        self.adamw = torch.optim.AdamW(
            [{"params": [p]} | self._settings(p) for p in self.parameters if p not in self.momentum], eps=ADAMW_EPSILON
        )

    def _settings(self, parameter):
        group = self.groups[place_of(parameter).name]
        return {
            "betas": group.betas,
            "weight_decay": group.weight_decay,
            "rate": self.plan.rates[group.rate],
            "lr": 0.0,
        }

    def step(self, number: int, rows: torch.Tensor) -> tuple[float, float]:
        asked, plan = self.config.optimizer, self.plan
        loss = Loss(plan.dims, torch.ones(self.plan.dims.vocab_size))(
            run_layers(self.layers, rows[:, :-1]), rows[:, 1:]
        )
        loss.backward()
        if self.first_gradients is None:
            self.first_gradients = self._by_name([p.grad.clone() for p in self.parameters])
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
                    lr=torch.tensor(plan.rates["matrix"] * lrm * self.multiplier[place_of(p).name]),
                    weight_decay=torch.tensor(plan.weight_decay * weight_decay_multiplier(number, plan.steps)),
                    momentum=torch.tensor(muon_momentum(number, plan.steps, warmdown_ratio=asked.warmdown_ratio)),
                    beta2=torch.tensor(MUON_BETA2),
                )
                reference_step(p.data, p.grad, self.momentum[p], self.second[p], hyper, torch.float32)
        for p in self.parameters:
            p.grad = None
        return loss.item(), norm

    def weights(self) -> dict[str, torch.Tensor]:
        return self._by_name([p.detach() for p in self.parameters])

    def _by_name(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        whole: dict[str, list] = {}
        for p, tensor in zip(self.parameters, tensors, strict=True):
            whole.setdefault(place_of(p).name, []).append(tensor)
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in whole.items()}


def assert_nearly_all_equal(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To 1e-5, but for the share of elements that verify.FLIPPED_SHARE explains."""
    off = (found - wanted).abs() > 1e-5 + 1e-5 * wanted.abs()
    assert off.sum() <= max(1, int(FLIPPED_SHARE * wanted.numel())) and (found - wanted).abs().max() < 3e-3, (
        f"{name}: {int(off.sum())} of {off.numel()} elements differ"
    )


def train(config, steps: int, vocab_size: int = SMALL_VOCAB):
    """On each rank: (loss, norm, skipped) of every step, the first one's mean gradients, the whole state at last, the views that the model uses."""
    training = build(config, vocab_size)
    warm_up(training)
    told, gradients = [], {}
    for step in range(steps):
        set_schedules(training, step)
        inspect = None if step else lambda: gradients.update(gradient_pieces(training))
        told.append(take_step(training, random_rows(step, ROWS, TOKENS, vocab_size), inspect_gradients=inspect))
    views = {
        place_of(p).name: (place_of(p), p.detach().float().clone()) for p in training.layers.parameters() if p.ndim == 2
    }
    return told, assembled(gradients, training), whole_state(training), views
