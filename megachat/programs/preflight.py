"""The checks of a preflight: what a job would fail on after its ranks have started, examined before anything is."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from megachat.config import Config
from megachat.data.shards import check_data_folder
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.device import variable
from megachat.errors import UserError
from megachat.evals.core_bundle import describe_bundle, open_configured_bundle
from megachat.evals.core_download import BUNDLE_PATH
from megachat.job.launch import try_port
from megachat.planning.memory import format_bytes
from megachat.planning.plan import Plan
from megachat.train.trackers import check_trackers, configured_trackers

STATE_BYTES = 12  # of a checkpoint per parameter: float32 masters and two moments; Muon's matrices have one


class Check(NamedTuple):
    """One check. problem: whether the job would fail or stop on it."""

    name: str
    problem: bool
    detail: str


def preflight(config: Config, plan: Plan, made: Mapping[str, str] | None = None) -> list[Check]:
    """Returns the checks of data folder, tokenizer, CORE bundle, trackers, disk space and port on this machine.

    made: checks that are not done, because other commands make what is checked -> what these do.
    """
    made = made or {}
    checks: list[tuple[str, Callable[[], str]]] = [
        ("data folder", lambda: str(check_data_folder(config.data.folder))),
        ("tokenizer", lambda: f"{config.data.tokenizer}, {configured_tokenizer(config).vocab_size:,} tokens"),
        ("trackers", lambda: _trackers(config)),
        ("disk", lambda: _disk(config, plan)),
        ("port", _port),
    ]
    bundle = made.get("CORE bundle") or _bundle(config)  # raises: its settings would be refused
    answered = [Check(name, False, made[name]) if name in made else _checked(name, check) for name, check in checks]
    return [*answered, Check("CORE bundle", False, bundle.removeprefix("CORE bundle: "))]


def describe_checks(checks: list[Check]) -> list[str]:
    """Returns one line per check, those with a problem first."""
    ordered = sorted(checks, key=lambda check: not check.problem)
    return [f"{'PROBLEM' if check.problem else 'ok':<8}{check.name}: {check.detail}" for check in ordered]


def _checked(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, False, check())
    except UserError as error:
        return Check(name, True, str(error))


def configured_tokenizer(config: Config) -> Tokenizer:
    """Loads the tokenizer of data.tokenizer. Raises UserError if model.vocab_size differs from its size."""
    tokenizer, configured = load_tokenizer(config.data.tokenizer), config.model.vocab_size
    if configured not in (None, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size is {configured} but the tokenizer in {config.data.tokenizer} has {tokenizer.vocab_size} "
            "tokens: remove model.vocab_size, or use the tokenizer that belongs to it"
        )
    return tokenizer


def _bundle(config: Config) -> str:
    if not config.evaluate.core_every:
        return "not needed (evaluate.core_every is 0)"
    if config.evaluate.core_bundle is None and not BUNDLE_PATH.exists():
        return f"downloaded to {BUNDLE_PATH} when the job starts"
    bundle = open_configured_bundle(config.evaluate)
    assert bundle is not None
    return describe_bundle(bundle)


def _trackers(config: Config) -> str:
    check_trackers(config.log)
    return ", ".join(kind.name for kind in configured_trackers(config.log)) or "none is used"


def checkpoint_bytes(config: Config, plan: Plan) -> tuple[int, int]:
    """Returns the bytes of one checkpoint, and of the most that exist at a time, roughly."""
    one = STATE_BYTES * plan.parameters["total"] - 4 * plan.parameters["matrices"]
    every, keep = config.checkpoint.every, config.checkpoint.keep_last
    saved = (plan.stop_step // every if every else 0) + 1
    kept = saved if keep is None else min(saved, keep + 1)  # an old one goes when the new one is complete
    if keep and config.checkpoint.keep_every:
        kept += plan.stop_step // config.checkpoint.keep_every
    return one, min(kept, saved) * one


def rank_checkpoint_bytes(config: Config, plan: Plan) -> float:
    """Returns the bytes that a rank writes of a checkpoint, roughly: equal shares."""
    return checkpoint_bytes(config, plan)[0] / plan.layout.world


def _disk(config: Config, plan: Plan) -> str:
    folder = Path(config.run.folder).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{config.run.folder} cannot be examined ({error.strerror}): set run.folder") from None
    one, most = checkpoint_bytes(config, plan)
    needs = f"checkpoints of {format_bytes(one)}, at most {format_bytes(most)} at a time"
    if most > free:
        raise UserError(
            f"{needs}, but {folder} has {format_bytes(free)} free: set checkpoint.keep_last, or another run.folder"
        )
    return f"{needs}; {folder} has {format_bytes(free)} free"


def _port() -> str:
    text = variable("MASTER_PORT")
    if text is None:
        return "chosen by the launcher (MASTER_PORT is not set)"
    try:
        try_port(int(text))
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"MASTER_PORT={text} cannot be bound on this machine ({error}): set another one") from None
    return f"{text} is free on this machine"
