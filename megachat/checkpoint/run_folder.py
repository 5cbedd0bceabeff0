"""A run folder follows its user: where its config lies, and which checkpoint its training continues from."""

import contextlib
import itertools
import os
import re
import shutil
from pathlib import Path

from megachat.checkpoint.facts import checkpoint_name
from megachat.config import Config
from megachat.files import CHECKPOINTS, CONFIG_NAME, EVALUATIONS, METRICS_NAME, PLAN_NAME, SAMPLES

_OF_A_STEP = re.compile(r"step_(\d+)(_in_training)?(\.json)?")


def config_in_place(config: Config, path: Path, overrides: list[str]) -> tuple[Config, list[str]]:
    """Returns the config for the place where its run folder lies now, and a line for the log if it was moved.

    A run folder's config.json names the folder. If the folder was copied, renamed or moved since, or is named relative
    to another working directory, the run continues where the file lies. An override of run.name or run.folder names
    another run; then nothing changes.
    """
    here = path.absolute().parent
    chosen = {override.partition("=")[0].strip() for override in overrides} & {"run.name", "run.folder"}
    is_run_folder = path.name == CONFIG_NAME and any((here / name).exists() for name in (PLAN_NAME, CHECKPOINTS))
    if chosen or not is_run_folder:
        return config, []
    name = config.run.name or here.name
    named = (Path(config.run.folder) / name).absolute()
    if named.resolve() == here.resolve():
        return config, []

    def moved(value: str) -> str:
        inside = Path(value).absolute()
        return str(here / inside.relative_to(named)) if inside.is_relative_to(named) else value

    config = config.changed("run", name=here.name, folder=str(here.parent))
    config = config.changed("data", tokenizer=moved(config.data.tokenizer), folder=moved(config.data.folder))
    line = f"{path} names the run folder {named}, but lies in {here}: the run continues in {here}"
    return config, [line]


def follow_checkpoint(run_folder: Path, checkpoint: Path, step: int) -> list[str]:
    """Makes a checkpoint that the user named the newest of the run, so that `--resume auto` continues from it as well.

    The run's checkpoints and results of later steps are renamed to NAME.aside, or all to NAME.aside.2 and so on, and
    metrics.jsonl is copied to such a name. If one of these is named later, it and the earlier ones that were renamed
    with it get their names back, and metrics.jsonl is as it was then. A checkpoint of another run is linked. Returns
    lines for the log.
    """
    folder = run_folder / CHECKPOINTS
    home = folder / checkpoint_name(step)
    inside = checkpoint.resolve().parent == folder.resolve()
    suffix = checkpoint.name.removeprefix(home.name) if inside else ""  # of a checkpoint that was set aside before
    lines = []
    if renamed := _set_others_aside(run_folder, checkpoint, step, whole_step=bool(suffix)):
        listed = ", ".join(str(path.relative_to(run_folder)) for path in renamed)
        lines = [f"the run continues from step {step}, so what others left is set aside: {listed}"]
    if suffix:
        _bring_back(run_folder, suffix, step)
        lines.append(f"{checkpoint} was set aside and is {home.name} again")
    elif not inside:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # a storage without links: auto follows from the first save on
            home.symlink_to(checkpoint.resolve())
    return lines


def _set_others_aside(run_folder: Path, checkpoint: Path, step: int, *, whole_step: bool) -> list[Path]:
    """Renames what belongs to later steps, and another checkpoint of this step. Copies metrics.jsonl.

    whole_step: renames the results of this step, too. Returns the new paths.
    """
    suffix, renamed = _free_suffix(run_folder), []
    for path in _of_steps(run_folder):
        if match := _OF_A_STEP.fullmatch(path.name):
            is_other = path.parent == run_folder / CHECKPOINTS and path.resolve() != checkpoint.resolve()
            if int(match[1]) > step or (int(match[1]) == step and (is_other or whole_step)):
                renamed.append(path.rename(path.with_name(path.name + suffix)))
    metrics = run_folder / METRICS_NAME
    if renamed and metrics.is_file():
        renamed.append(Path(shutil.copyfile(metrics, metrics.with_name(metrics.name + suffix))))
    return renamed


def _bring_back(run_folder: Path, suffix: str, step: int) -> None:
    """Gives what was set aside with a suffix its names back, up to this step, and restores metrics.jsonl of then."""
    for path in _of_steps(run_folder):
        before = path.with_name(path.name.removesuffix(suffix))
        match = _OF_A_STEP.fullmatch(before.name)
        if path != before and match and int(match[1]) <= step and not os.path.lexists(before):
            path.rename(before)
    metrics = run_folder / METRICS_NAME
    copy = metrics.with_name(metrics.name + suffix)
    if suffix.startswith(".aside") and copy.is_file():
        shutil.copyfile(copy, metrics)


def _of_steps(run_folder: Path) -> list[Path]:
    return sorted(path for kind in (CHECKPOINTS, SAMPLES, EVALUATIONS) for path in run_folder.glob(f"{kind}/step_*"))


def _free_suffix(run_folder: Path) -> str:
    """Returns .aside, .aside.2 and so on: the first that no file has, so that all files of a branch have the same."""
    names = [path.name for path in (*_of_steps(run_folder), *run_folder.glob(f"{METRICS_NAME}.aside*"))]
    suffixes = (".aside" if number == 1 else f".aside.{number}" for number in itertools.count(1))
    return next(suffix for suffix in suffixes if not any(name.endswith(suffix) for name in names))
