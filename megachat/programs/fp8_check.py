"""What `megachat fp8-check` does: measures the matrix products of a config with and without FP8 on this device, in
turn, and trains the config with and without FP8 (megachat/studies/fp8.py has the arithmetic).
"""

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megachat.activity import ProgressBar, counted
from megachat.config import Config, load_config
from megachat.data.tokenizer import load_tokenizer
from megachat.device import choose_compute_dtype, device_name, dtype_name, seconds_of, this_device
from megachat.errors import UserError
from megachat.files import check_writable, write_json
from megachat.kernels.choice import choose_fp8, describe_fp8
from megachat.kernels.cross_entropy import PlainProducts, capped_cross_entropy
from megachat.kernels.fp8 import Fp8Choice, apply_fp8, head_products
from megachat.kernels.linear import Linear
from megachat.model.gpt import LOGIT_CAP, ModelOptions, build_layers
from megachat.parallel.cuts import cut_shape
from megachat.place import place_of
from megachat.planning.dimensions import fits_fp8, head_fits_fp8
from megachat.planning.plan import Plan, resolve_without_text
from megachat.studies.fp8 import (
    HEAD,
    MatrixTime,
    advice,
    gate_result,
    matrix_row,
    settings_time,
    time_to_equal_loss,
    verdict_of,
    verdict_of_products,
)
from megachat.studies.runs import RunRecord
from megachat.studies.trials import QUESTION, Diverged, Trial, refuse_fixed, saved_question, trainer

ROUND_SEC = 0.01  # of one side in a round, at least: a launch or a clock tick must not matter
SHAPE_SEC, LEAST_ROUNDS = 20.0, 3  # after which a shape's rounds end, so that a slow device ends, too
# settings that the check gives its runs; the steps are --steps
_SET_BY_CHECK = (
    *("run.name", "run.folder", "horizon.steps", "precision.fp8_head"),
    *("evaluate.every", "evaluate.core_every", "evaluate.prompts", "log.every"),
)
CURVE_POINTS = 10  # of a paired run: points of the curves that are compared


@dataclass(frozen=True)
class Fp8Question:
    """What is checked. settings: of all runs. steps: of each paired run, 0 for none. baselines: 1, or 2 for the noise
    of the seed. gate: relative loss that FP8 may lose. rounds: turns of the measurement. ranks: processes per run."""

    config: str
    settings: Sequence[str]
    recipe: str
    steps: int
    baselines: int
    gate: float
    rounds: int
    ranks: int
    out: Path


def fp8_check(question: Fp8Question) -> dict[str, Any]:
    """Measures, trains, and returns the result as JSON values. Raises UserError for a config that cannot be in FP8."""
    refuse_fixed(question.settings, _SET_BY_CHECK, "--set")
    config, device = load_config(question.config, [*question.settings]), this_device()
    vocab_size = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    plan = resolve_without_text(config, question.ranks, vocab_size)
    dtype, reason = choose_compute_dtype(config.precision.compute, device)
    # without bfloat16, FP8 is compared with what the config would use otherwise
    to_bfloat16 = [] if dtype == torch.bfloat16 else ["precision.compute=bfloat16"]
    settings = [f"precision.fp8={question.recipe}", *to_bfloat16]
    choice = choose_fp8(question.recipe, config.precision.fp8_backend, device, torch.bfloat16, reason)
    assert choice is not None, "the recipe is not off"
    # refuses a model without a matrix that qualifies before anything is measured
    resolve_without_text(load_config(question.config, [*question.settings, *settings]), question.ranks, vocab_size)
    result: dict[str, Any] = {
        "config": question.config,
        "settings": [*question.settings],
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": dtype_name(dtype),
        "recipe": question.recipe,
        "backend": describe_fp8(choice, plan.dims, plan.layout.tensor, head=True),
        "tokens": plan.micro_rows * plan.dims.sequence_len,
    }
    check_writable(question.out / "fp8_check.json")
    saved_head = check_question(question) if question.steps else None
    matrices = measure_matrices(config, plan, choice, device, dtype, question.rounds)
    result |= {"matrices": [matrix_row(each) for each in matrices], "products_s": settings_time(matrices)}
    result["advice"] = advice(matrices, question.recipe)
    if not question.steps:
        verdict, why = verdict_of_products(matrices)
        return result | {"verdict": verdict, "why": why}
    head = saved_head
    if head is None:  # a later call continues these runs, whatever it measures then
        head = any(each.gains for each in matrices if each.name == HEAD)
        check_question(question, head)
    result |= {"fp8_head": head}
    try:
        runs = train_pair(question, [*settings, f"precision.fp8_head={'true' if head else 'false'}"])
    except Diverged as error:
        if error.run.folder.name != "fp8":
            raise
        return result | {"verdict": "no-go", "why": f"FP8 diverged at step {error.run.step}: its loss is no number"}
    gate = gate_result(runs["base"], runs["fp8"], question.gate, runs.get("base_seed"))
    equal = time_to_equal_loss(runs["base"], runs["fp8"])
    verdict, why = verdict_of(gate, equal)
    equal |= {key: equal[key] and equal[key]._asdict() for key in ("steps", "step_time", "time")}
    result |= {"runs": {name: str(run.folder) for name, run in runs.items()}}
    return result | {"gate": gate, "equal_loss": equal, "verdict": verdict, "why": why}


# ---- the products


def matrix_shapes(plan: Plan) -> dict[tuple[str, int, int], int]:
    """Returns (name without block, rows, columns) of every linear's weight on tensor rank 0 -> number in the model."""
    with torch.device("meta"):
        layers = build_layers(plan.dims, ModelOptions())
    shapes: dict[tuple[str, int, int], int] = {}
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, Linear):
                place = place_of(module.weight)
                name = place.name.removesuffix(".weight").rpartition("transformer.h.")[2].partition(".")
                kind = name[2] if name[0].isdecimal() else place.name.removesuffix(".weight")
                rows, columns = cut_shape(place, plan.layout.tensor, 0)[0]
                shapes[kind, rows, columns] = shapes.get((kind, rows, columns), 0) + 1
    return shapes


def measure_matrices(
    config: Config, plan: Plan, choice: Fp8Choice, device: torch.device, dtype: torch.dtype, rounds: int
) -> list[MatrixTime]:
    """Measures every matrix of the model in turn without and with FP8. dtype: of the model without FP8."""
    shapes, tokens = matrix_shapes(plan), plan.micro_rows * plan.dims.sequence_len
    results = []
    for (name, rows, columns), count in counted(shapes.items(), "measuring products", len(shapes)):
        if name == HEAD:
            fits = head_fits_fp8(plan.dims, plan.layout.tensor, choice.recipe)
            classes = [PlainProducts]
            if fits:
                classes.append(head_products(choice, plan.dims, plan.layout.tensor))
            kinds = [dtype, torch.bfloat16]
            # the loss of one rank's tokens: a shard of the table is a vocabulary of its size
            actions = [
                _head_action(products, (tokens, min(rows, plan.dims.vocab_size), columns), device, kind)
                for products, kind in zip(classes, kinds, strict=False)
            ]
        else:
            fits = fits_fp8(rows, columns, choice.recipe)
            actions = [_linear_action((tokens, rows, columns), device, dtype, None, compiles=False)]
            if fits:
                compiles = config.precision.compile and choice.backend == "torch"
                actions.append(_linear_action((tokens, rows, columns), device, torch.bfloat16, choice, compiles))
        plain, *fp8 = time_in_turn(actions, rounds, device)
        results.append(MatrixTime(name, rows, columns, count, plain, fp8[0] if fp8 else ()))
    return results


def _linear_action(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, choice: Fp8Choice | None, compiles: bool
) -> Callable[[], object]:
    """Returns forward and both backward products of a linear, as in training. shape: tokens, rows, columns."""
    tokens, rows, columns = shape
    linear = Linear(columns, rows).to(device)
    linear.weight.data = _random_tensor(device, rows, columns).mul_(columns**-0.5).to(dtype)
    if choice:
        apply_fp8([linear], choice)
    function: Callable = torch.compile(linear) if compiles else linear
    x, gradient = (_random_tensor(device, tokens, size).to(dtype) for size in (columns, rows))
    x.requires_grad_()
    return lambda: torch.autograd.grad(function(x), (x, linear.weight), gradient)


def _head_action(
    products: type[PlainProducts], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """Returns head and loss, whose forward pass computes the gradients, too. shape: tokens, rows, columns."""
    tokens, rows, columns = shape
    hidden = _random_tensor(device, tokens, columns).to(dtype).requires_grad_()
    table = _random_tensor(device, rows, columns).mul_(0.02).requires_grad_()
    targets = torch.randint(0, rows, (tokens,), device=device)

    def action():
        loss = capped_cross_entropy(hidden, table, targets, rows, LOGIT_CAP, products=products)
        return torch.autograd.grad(loss, (hidden, table))

    return action


def _random_tensor(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device)


def _repeat(action: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        action()


def time_in_turn(
    actions: Sequence[Callable[[], object]], rounds: int, device: torch.device, round_sec: float = ROUND_SEC
) -> list[list[float]]:
    """Returns the seconds per call of each action in each round. All actions run in each round, because the speed of a
    shared machine changes; each as often as `round_sec` needs."""

    calls = []
    for action in actions:
        action()  # allocates, and chooses kernels
        calls.append(max(1, math.ceil(round_sec / seconds_of(action, device))))
    seconds: list[list[float]] = [[] for _ in actions]
    end = time.perf_counter() + SHAPE_SEC
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for number, action in enumerate(actions):
            repeated = functools.partial(_repeat, action, calls[number])
            seconds[number].append(seconds_of(repeated, device) / calls[number])
    return seconds


# ---- the paired runs


def check_question(question: Fp8Question, fp8_head: bool | None = None) -> bool | None:
    """Notes in the folder what its runs are for, and returns precision.fp8_head of its runs, None if it is not decided.

    fp8_head: decides it. Raises UserError if the folder has the runs of another question.
    """
    values = load_config(question.config, [*question.settings]).model_dump(mode="json", exclude_defaults=True)
    here: dict[str, Any] = {"study": "fp8-check", "recipe": question.recipe, "steps": question.steps}
    here |= {"ranks": question.ranks, "config": question.config, "settings": [*question.settings], "values": values}
    saved = saved_question(question.out, "fp8-check")
    question.out.mkdir(parents=True, exist_ok=True)
    if saved:
        differs = [key for key in ("recipe", "steps", "ranks", "values") if saved.get(key) != here[key]]
        if differs:
            was = json.dumps(saved.get(differs[0]))
            raise UserError(f"{question.out} has the runs of another check ({differs[0]} {was}): give another --out")
        if fp8_head is None:
            fp8_head = saved.get("fp8_head")
    write_json(question.out / QUESTION, here | {"fp8_head": fp8_head})
    return fp8_head


def train_pair(question: Fp8Question, fp8: Sequence[str]) -> dict[str, RunRecord]:
    """Trains the baseline and FP8 from the same seed on the same rows; returns the runs by name. What is finished is
    not trained again. fp8: the settings of FP8."""
    seed = load_config(question.config, [*question.settings]).run.seed
    every = max(1, question.steps // CURVE_POINTS)
    common = [f"horizon.steps={question.steps}", f"evaluate.every={every}", "log.every=1"]
    common += ["evaluate.core_every=0", "evaluate.prompts=[]"]
    trials = [Trial("base", ("precision.fp8=off",)), Trial("fp8", tuple(fp8))]
    if question.baselines > 1:
        trials.append(Trial("base_seed", ("precision.fp8=off", f"run.seed={seed + 1}")))
    train = trainer(question.config, question.out, [*question.settings, *common], ranks=question.ranks)
    runs = {}
    with ProgressBar("training", len(trials) * question.steps, " steps") as progress:
        for number, trial in enumerate(trials):
            progress.rename(f"training {trial.name} ({number + 1} of {len(trials)})")
            already = number * question.steps

            def watch(run: RunRecord, already: int = already) -> bool:
                progress.update(already + run.step - progress.done)
                return False

            runs[trial.name] = train(trial, watch)
            watch(runs[trial.name])
    return runs
