"""Chooses how much `megachat demo` trains on this machine, by two seconds of forward and backward passes."""

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch

from megachat.config import Config, load_config
from megachat.device import choose_compute_dtype
from megachat.files import CONFIG_NAME
from megachat.kernels.choice import choose_kernels
from megachat.model.gpt import Loss, build_layers, run_layers
from megachat.planning.plan import resolve_without_text
from megachat.programs.probe_step import random_rows
from megachat.train.stage import model_options

LIMIT_S = 200  # predicted seconds of the config's training, above which the short one is chosen
OVERHEAD = 1.4  # the time of a run relative to its passes: optimizer, validation, samples


class Size(NamedTuple):
    """Steps, tokens per step, and steps between validations; checkpoints are half as frequent."""

    steps: int
    tokens: int
    every: int

    def settings(self, note: str | None) -> list[str]:
        """Returns the size as settings of a config, with the reason for it."""
        values = {"horizon.steps": self.steps, "batch.tokens": self.tokens, "evaluate.every": self.every}
        values["checkpoint.every"] = 2 * self.every
        return [*(f"{key}={value}" for key, value in values.items()), _note_setting(note)]


def _note_setting(text: str | None) -> str:
    return f"run.note={json.dumps(text)}"


SHORT = Size(240, 4096, 60)


def size_settings(config: Config, run_folder: Path, vocab_size: int) -> list[str]:
    """Returns the settings that shorten the run if this machine is slow, and say why as run.note.

    A run that exists keeps its size: nothing is measured.
    """
    if (path := run_folder / CONFIG_NAME).exists():
        saved = load_config(path)
        return SHORT.settings(saved.run.note) if saved.batch.tokens == SHORT.tokens else [_note_setting(saved.run.note)]
    return choose_size(config, passes_per_second(config, vocab_size))


def choose_size(config: Config, tokens_per_s: float) -> list[str]:
    """Returns the settings of the size and of run.note. tokens_per_s: of passes, on all cores."""
    tokens = (config.horizon.steps or 0) * (config.batch.tokens or 0)  # configs/demo.json has both
    whole_s = OVERHEAD * tokens / tokens_per_s
    note = (
        f"forward and backward of {tokens_per_s:,.0f} tokens per second, so {tokens:,} would take about "
        f"{whole_s / 60:.1f} minutes with all else"
    )
    if whole_s <= LIMIT_S:
        return [_note_setting(note)]
    return SHORT.settings(f"{note}: shortened to {SHORT.steps * SHORT.tokens:,} tokens")


def passes_per_second(config: Config, vocab_size: int, seconds: float = 2.0) -> float:
    """Returns the tokens per second of forward and backward passes on this process's CPU cores, after the first."""
    cpu, config = torch.device("cpu"), config.changed("parallel", tensor=1, pipeline=1)
    plan = resolve_without_text(config, 1, vocab_size)
    attend = choose_kernels(config, plan, cpu).attention.attend
    options = model_options(config, choose_compute_dtype(config.precision.compute, cpu)[0], attend)
    layers, loss = build_layers(plan.dims, options, seed=0), Loss(plan.dims, torch.ones(vocab_size, dtype=torch.int64))
    rows = random_rows(plan)[: plan.micro_rows]
    passes, begin = -1, time.perf_counter()  # the first pass starts threads
    while passes < 1 or time.perf_counter() - begin < seconds:
        loss(run_layers(layers, rows[:, :-1]), rows[:, 1:]).backward()
        passes += 1
        begin = time.perf_counter() if passes == 0 else begin
    return passes * rows[:, 1:].numel() / (time.perf_counter() - begin)
