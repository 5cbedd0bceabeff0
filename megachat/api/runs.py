"""Plans, trains and reads runs from Python. Only `pretrain` loads torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megachat.config import Config, config_from_values, load_config
from megachat.data.tokenizer import load_tokenizer
from megachat.errors import UserError
from megachat.installation import config_path
from megachat.planning.plan import Plan, resolve_plan

AnyConfig = str | os.PathLike | Mapping[str, Any] | Config


def resolve(config: AnyConfig, world: int = 1, overrides: Sequence[str] = (), *, vocab_size: int | None = None) -> Plan:
    """Returns the plan of a run on `world` ranks: every derived number, with its formula in `plan.why`.

    config: a JSON file, the name of one of megachat's ("d24"), a dictionary of its sections, or a
    megachat.config.Config. overrides: "section.key=value", as after --set. vocab_size: if not given, the config's or
    that of its tokenizer.

    Raises megachat.UserError for invalid settings, and a layout or batch that does not fit.
    """
    if not isinstance(world, int) or world < 1:
        raise ValueError(f"world is {world!r}: give the number of ranks, 1 or more")
    settings = _read_config(config, overrides)
    size = vocab_size or settings.model.vocab_size or load_tokenizer(settings.data.tokenizer).vocab_size
    return resolve_plan(settings, world, size)


def pretrain(config: AnyConfig, overrides: Sequence[str] = (), *, resume: str | os.PathLike | None = None) -> Path:
    """Trains as launch/pretrain.py does, and returns the run folder. It prints the log.

    This process is the only rank, or one rank of the launcher that started it (torchrun, deepspeed, mpirun). config,
    overrides: see `resolve`; a run without run.name has the name of its config file. resume: "auto" continues from the
    run's newest checkpoint, a path from that one. A job that is interrupted by Ctrl-C saves first; "auto" continues it.
    Environment variables and signal handlers of this process are as before when it returns.

    Raises megachat.UserError for what launch/pretrain.py refuses.
    """
    from megachat.job.launch import process_restored  # loads torch
    from megachat.programs.pretrain import open_job_config, run_job  # loads DeepSpeed

    if isinstance(config, str | os.PathLike):
        settings, notes = open_job_config(config_path(os.fspath(config)), list(overrides))
    else:
        settings, notes = _read_config(config, overrides), []
        if settings.run.name is None:
            raise UserError('the config has no run.name: give one, for example {"run": {"name": "first"}}')
    with process_restored():
        run_job(settings, notes, resume=None if resume is None else os.fspath(resume))
    return Path(settings.run.folder) / str(settings.run.name)


def _read_config(config: AnyConfig, overrides: Sequence[str]) -> Config:
    if isinstance(overrides, str):
        raise TypeError(f"overrides is {overrides!r}: give a list of texts")
    if isinstance(config, str | os.PathLike):
        return load_config(config_path(os.fspath(config)), list(overrides))
    if isinstance(config, Config):
        config = config.model_dump(mode="json", exclude_defaults=True)
    if not isinstance(config, Mapping):
        raise TypeError(f"config is {type(config).__name__} {config!r}: give a file, a dictionary or a Config")
    return config_from_values(dict(config), "the config", list(overrides))
