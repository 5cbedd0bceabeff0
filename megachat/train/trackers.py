"""Programs that draw metrics: Weights & Biases, TensorBoard and Trackio. None of them can end a run."""

import contextlib
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

from megachat.errors import UserError, summary
from megachat.files import METRICS_NAME, TENSORBOARD, Log, read_side_file, write_atomically
from megachat.settings import LogConfig


class Tracker(Protocol):
    """A tracker that was started for a run."""

    def log(self, values: dict) -> object:
        """Takes a line of metrics.jsonl, with "step" and "time"; values may be null, strings or dictionaries, too."""

    def finish(self) -> object:
        """Ends it; everything is sent or written afterwards."""


@dataclass(frozen=True)
class TrackedRun:
    """What trackers know about a run. settings: config and plan. first_step: of this job; 0 is a new run."""

    folder: Path
    name: str
    settings: dict
    first_step: int
    write_line: Log


class TrackerKind(NamedTuple):
    """name: of its setting in `log`. module: what it needs. install: the arguments of pip. off: the value without it.
    remedy: what to do if it fails.
    """

    name: str
    module: str
    install: str
    off: str
    remedy: str
    start: Callable[[LogConfig, TrackedRun], Tracker]


def _start_wandb(log: LogConfig, run: TrackedRun) -> Tracker:
    """Starts or resumes the wandb run whose id is in the run folder, so that a resumed run continues its curves."""
    import wandb

    name = {"project": log.wandb_project, "name": run.name, "id": _wandb_id(run)}
    started = wandb.init(**name, resume="allow", mode=log.wandb, config=run.settings, dir=str(run.folder))
    # an axis in place of log(step=...): wandb ignores steps that are not above its last one
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


def _wandb_id(run: TrackedRun) -> str:
    """Returns the id in the run folder; makes one for a new run."""

    def parse(content: bytes) -> str:
        if not re.fullmatch(r"[\w-]+", text := content.decode("ascii").strip()):
            raise ValueError("no id")
        return text

    path = run.folder / "wandb_id.txt"
    saved = read_side_file(path, parse, run.write_line)
    if run.first_step == 0 or saved is None:
        saved = secrets.token_hex(4)
        write_atomically(path, saved.encode() + b"\n")
    return saved


class _TensorBoard:
    """Event files in the run folder; TensorBoard hides those of steps that are run again."""

    def __init__(self, log: LogConfig, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        # readers drop all points from purge_step on
        self._writer = SummaryWriter(str(run.folder / TENSORBOARD), purge_step=run.first_step, flush_secs=30)
        self._writer.add_text("settings", f"```\n{json.dumps(run.settings, indent=1)}\n```", run.first_step)
        # an evaluation after `first_step` steps has the number of the step that comes next, and is not repeated
        for line in (run.folder / METRICS_NAME).read_bytes().splitlines() if run.first_step else ():
            if (values := json.loads(line))["step"] == run.first_step and "time" in values:
                self.log(values)

    def log(self, values: dict) -> None:
        for key, value in numbers_in(values):
            self._writer.add_scalar(key, value, values["step"], walltime=values["time"])

    def finish(self) -> None:
        self._writer.close()


class _Trackio:
    """Trackio's database of this machine, or the server that its environment variables name."""

    def __init__(self, log: LogConfig, run: TrackedRun):
        import trackio

        resume = "allow" if run.first_step else "never"
        self._run = trackio.init(
            project=log.trackio_project,
            name=run.name,
            config=run.settings,
            resume=resume,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: dict) -> None:
        self._run.log(dict(numbers_in(values)), step=values["step"])

    def finish(self) -> None:
        self._run.finish()


KINDS = (
    TrackerKind("wandb", "wandb", "wandb", "off", "run `wandb login`, or set log.wandb=offline or off", _start_wandb),
    TrackerKind(
        "tensorboard",
        "torch.utils.tensorboard",
        "'megachat[trackers]'",
        "false",
        "set log.tensorboard=false",
        _TensorBoard,
    ),
    TrackerKind("trackio", "trackio", "'megachat[trackers]'", "false", "set log.trackio=false", _Trackio),
)


def numbers_in(values: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields (key, value) of all numbers in a line of metrics but step and time; keys of dictionaries within are joined
    with "/".
    """
    for key, value in values.items():
        if isinstance(value, dict):
            yield from numbers_in(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "time"):
            yield prefix + key, value


def configured_trackers(log: LogConfig) -> list[TrackerKind]:
    """Returns the trackers that are on."""
    return [kind for kind in KINDS if getattr(log, kind.name) not in (False, "off")]


def check_trackers(log: LogConfig) -> None:
    """Raises UserError when a configured tracker cannot be imported."""
    for kind in configured_trackers(log):
        try:
            import_module(kind.module)
        except Exception as error:
            problem = "is not installed" if isinstance(error, ImportError) else f"cannot be imported ({summary(error)})"
            raise UserError(
                f"log.{kind.name} is {json.dumps(getattr(log, kind.name))} but {kind.name} {problem}: "
                f"pip install {kind.install}, or set log.{kind.name}={kind.off}"
            ) from None


class Trackers:
    """The configured trackers of a run, started. One that fails is dropped with a line in the log."""

    def __init__(self, log: LogConfig, run: TrackedRun):
        self._write_line = run.write_line
        self._started: dict[TrackerKind, Tracker] = {}
        for kind in configured_trackers(log):
            with self._errors(kind):
                self._started[kind] = kind.start(log, run)

    def log(self, values: dict) -> None:
        """Sends a line of metrics.jsonl to all of them."""
        for kind, tracker in list(self._started.items()):
            with self._errors(kind):
                tracker.log(values)

    def finish(self) -> None:
        """Ends all of them."""
        for kind, tracker in list(self._started.items()):
            with self._errors(kind):
                tracker.finish()

    @contextlib.contextmanager
    def _errors(self, kind: TrackerKind) -> Iterator[None]:
        """Logs an error of a tracker and continues without it: the training is worth more than its plots."""
        try:
            yield
        except Exception as error:
            self._started.pop(kind, None)
            self._write_line(
                f"{kind.name} failed ({summary(error)}): the run continues without it, and {METRICS_NAME} has "
                f"everything; {kind.remedy}"
            )
