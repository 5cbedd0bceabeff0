"""One plain process: autograd over the whole batch, torch's AdamW, Muon's whole-matrix reference, and dense tables.

What every layout is compared with.
"""

import math

import torch

from megachat.model.gpt import Loss, ModelOptions, build_layers, run_layers
from megachat.model.ngram import NgramTable
from megachat.model.parameters import load_whole, placed_parameters
from megachat.optim.groups import assign_groups, betas_of, rate_multipliers
from megachat.optim.muon import second_moment_shape
from megachat.place import place_of
from megachat.planning.plan import resolve_without_text
from megachat.programs.verify_layout import warm_noise, warm_up
from megachat.schedule import scheduled_values
from megachat.settings import ParallelConfig
from megachat.train.step import set_schedules
from tests.muon import reference_step
from tests.rows import DenseRows
from tests.training import SMALL_VOCAB, assembled, build, gradient_pieces, random_rows, take_step, whole_state

ROWS, TOKENS = 12, 161


class Oracle:
    """One process, no engine, no partition; tensors by checkpoint name."""

    def __init__(self, config, vocab_size: int = SMALL_VOCAB):
        config = config.model_copy(update={"parallel": ParallelConfig()})
        self.config, self.plan = config, resolve_without_text(config, 1, vocab_size)
        self.layers = build_layers(self.plan.dims, ModelOptions(rotary=config.model.rotary), config.run.seed)
        self.parameters = placed_parameters(self.layers)
        for p in self.parameters:  # see verify.warm_up for why
            if p.ndim == 2:
                load_whole(p, p.detach() + warm_noise(place_of(p).name, place_of(p).whole))
        self.groups = assign_groups([place_of(p) for p in self.parameters])
        self.muon = [p for p in self.parameters if self.groups[place_of(p).name].optimizer == "muon"]
        self.multiplier = rate_multipliers(
            {place_of(p).name: place_of(p).whole for p in self.muon}, config.optimizer.muon_multiplier
        )
        self.decay = 0.0  # the most that Muon's decay has taken of an element since load(), as a share of it
        self.momentum = {p: torch.zeros_like(p) for p in self.muon}
        self.second = {p: torch.zeros(second_moment_shape(tuple(p.shape))) for p in self.muon}
        self.tables = {
            p: DenseRows(p.data, rowwise=config.ngram.optimizer == "rowwise")
            for p in self.parameters
            if self.groups[place_of(p).name].optimizer == "rows"
        }
        self.read: dict[str, torch.Tensor] = {}  # by table, the rows that the last forward pass read
        for module in self.layers.modules():
            if isinstance(module, NgramTable):
                module.register_forward_pre_hook(lambda table, inputs: self.read.update({table.place.name: inputs[0]}))
        others = [p for p in self.parameters if p not in self.momentum and p not in self.tables]
        self.adamw = torch.optim.AdamW(
            [{"params": [p]} | self._settings(p) for p in others], eps=config.optimizer.adamw_epsilon
        )

    def _settings(self, parameter):
        group = self.groups[place_of(parameter).name]
        return {
            "betas": betas_of(group, self.config.optimizer),
            "weight_decay": group.weight_decay,
            "rate": self.plan.rates[group.rate],
            "kind": group.rate,
            "lr": 0.0,
        }

    def step(self, number: int, rows: torch.Tensor, reduced: dict[str, torch.Tensor] | None = None):
        """Take a step; returns (loss, gradient norm, the gradients by name).

        reduced: a layout's gradients, which the optimizers get instead of these. Where a gradient is rounding noise
        around zero, the sign of AdamW's whole step (its epsilon is 1e-10) is that noise's sign; given equal gradients
        the updates must be equal on any machine.
        """
        settings, plan = self.config.optimizer, self.plan
        measure = Loss(plan.dims, torch.ones(self.plan.dims.vocab_size), z_loss=settings.z_loss)
        loss = measure(run_layers(self.layers, rows[:, :-1]), rows[:, 1:])
        loss.backward()
        gradients = self._by_name([p.grad.clone() for p in self.parameters])
        if reduced is not None:
            for gradient, part in self._parts(reduced, [p.grad for p in self.parameters]):
                gradient.copy_(part)
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in self.parameters))
        if settings.clip_norm and norm > settings.clip_norm:
            for p in self.parameters:
                p.grad.mul_(settings.clip_norm / norm)
        scheduled = scheduled_values(settings, number, plan.steps)
        epsilon = settings.adamw_epsilon
        for group in self.adamw.param_groups:
            group["lr"] = group["rate"] * scheduled.multiplier(group["kind"])
        self.adamw.step()
        for p, table in self.tables.items():
            of_table, index = self._settings(p), self.read[place_of(p).name]
            read = torch.zeros(len(p), dtype=torch.bool).index_fill_(0, index[index >= 0], True)
            lr = of_table["rate"] * scheduled.multiplier(of_table["kind"])
            table.step(p.grad, read, lr=lr, betas=of_table["betas"], epsilon=epsilon)
        with torch.no_grad():
            for p in self.muon:
                lr = plan.rates["matrix"] * scheduled.multiplier("matrix") * self.multiplier[place_of(p).name]
                decay = plan.weight_decay * scheduled.decay
                self.decay += lr * decay / len(self.muon) * max(1.0, *self.multiplier.values())
                rates = {
                    "lr": lr,
                    "weight_decay": decay,
                    "momentum_factor": scheduled.momentum,
                    "beta2": settings.muon_beta2,
                }
                reference_step(p.data, p.grad, self.momentum[p], self.second[p], torch.float32, **rates)
        if settings.qk_clip:
            self._clip(settings.qk_clip)
        for p in self.parameters:
            p.grad = None
        return loss.item(), norm, gradients

    @torch.no_grad()
    def _clip(self, limit: float) -> None:
        """QK clip, head by head. Heads that share a key: the smallest factor is the key's, the others' queries grow."""
        dims, by_name = self.plan.dims, {place_of(p).name: p for p in self.parameters}
        shared = dims.heads // dims.kv_heads
        for block in range(dims.depth):
            queries, keys = (by_name[f"transformer.h.{block}.attn.{kind}_scale"] for kind in ("query", "key"))
            for head, key in enumerate(keys):
                group = queries[head * shared : (head + 1) * shared]
                largest = [1.2**2 * dims.head_size**0.5 * (query * key).abs().max().item() for query in group]
                factors = [min(1.0, limit / each) for each in largest]
                for query, factor in zip(group, factors, strict=True):
                    query *= factor / min(factors) ** 0.5
                key *= min(factors) ** 0.5

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Continue from whole weights, so that the next gradients are those of the same weights."""
        for p, part in self._parts(weights, self.parameters):
            p.copy_(part)
        self.decay = 0.0

    def _parts(self, whole: dict[str, torch.Tensor], targets: list[torch.Tensor]):
        """Pairs of (target, its part of the whole tensor), for targets in the order of the parameters.

        Parameters of one name are its parts along the first dimension, in order.
        """
        taken = dict.fromkeys(whole, 0)
        for p, target in zip(self.parameters, targets, strict=True):
            name = place_of(p).name
            yield target, whole[name][taken[name] : taken[name] + len(p)].view_as(p)
            taken[name] += len(p)

    def weights(self) -> dict[str, torch.Tensor]:
        return self._by_name([p.detach() for p in self.parameters])

    def _by_name(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        whole: dict[str, list] = {}
        for p, tensor in zip(self.parameters, tensors, strict=True):
            whole.setdefault(place_of(p).name, []).append(tensor)
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in whole.items()}


def assert_same_gradients(reduced: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of each tensor's largest element, which is float32's rounding of a sum over all tokens. Both gradients
    are those of equal weights.
    """
    assert reduced.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (reduced[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
        # a scalar's gradient is a sum over all tokens and channels that nearly cancels
        assert error < (1e-5 if gradient.ndim == 2 else 1e-3), f"gradient of {name}: {error}"


def assert_same_weights(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], decay: float) -> None:
    """To 1e-5, after updates from equal gradients. decay: the most that Muon's decay takes of a weight in all steps.

    One element of a matrix may differ by that: its decay applies where update and weight have one sign, and an update
    may be zero but for rounding.
    """
    for name, tensor in wanted.items():
        difference = (weights[name] - tensor).abs()
        allowed = 1e-5 + 1e-5 * tensor.abs()
        outside = difference > allowed
        assert outside.sum() <= 1 and not (difference > allowed + decay * tensor.abs()).any(), (
            f"{name}: {int(outside.sum())} of {tensor.numel()} elements differ, by {difference.max()}"
        )


def train(config, steps: int, vocab_size: int = SMALL_VOCAB):
    """On each rank: (loss, norm, skipped), the mean gradients and the whole state after every step; the views that the
    model uses.
    """
    training = build(config, vocab_size)
    warm_up(training)
    outcomes, gradients, states = [], [], []
    for step in range(steps):
        set_schedules(training, step)
        inspect = lambda: gradients.append(gradient_pieces(training))  # noqa: E731
        outcomes.append(take_step(training, random_rows(step, ROWS, TOKENS, vocab_size), inspect_gradients=inspect))
        states.append(whole_state(training))
    views = {
        place_of(p).name: (place_of(p), p.detach().float().clone()) for p in training.layers.parameters() if p.ndim == 2
    }
    return outcomes, [assembled(pieces, training) for pieces in gradients], states, views
