"""A run folder follows its user: where its config lies, and which checkpoint its training continues from."""

import contextlib
import re
import shutil
from pathlib import Path

from megachat.checkpoint.facts import checkpoint_name
from megachat.checkpoint.resume import checkpoints_folder
from megachat.config import Config
from megachat.files import free_name, set_aside

_OF_A_STEP = re.compile(r"step_(\d+)(_in_training)?(\.json)?")


def config_in_place(config: Config, path: Path, overrides: list[str]) -> tuple[Config, list[str]]:
    """Returns the config for the place where its run folder lies now, and a line for the log if it was moved.

    A run folder's config.json names the folder. If the folder was copied, renamed or moved since, or is named relative
    to another working directory, the run continues where the file lies. An override of run.name or run.folder names
    another run; then nothing changes.
    """
    here = path.absolute().parent
    chosen = {override.partition("=")[0].strip() for override in overrides} & {"run.name", "run.folder"}
    is_run_folder = path.name == "config.json" and any((here / name).exists() for name in ("plan.json", "checkpoints"))
    if chosen or not is_run_folder:
        return config, []
    name = config.run.name or here.name
    named = (Path(config.run.folder) / name).absolute()
    if named.resolve() == here.resolve():
        return config, []

    def moved(value: str) -> str:
        inside = Path(value).absolute()
        return str(here / inside.relative_to(named)) if inside.is_relative_to(named) else value

    run = config.run.model_copy(update={"name": here.name, "folder": str(here.parent)})
    data = config.data.model_copy(
        update={"tokenizer": moved(config.data.tokenizer), "folder": moved(config.data.folder)}
    )
    line = f"{path} names the run folder {named}, but lies in {here}: the run continues in {here}"
    return config.model_copy(update={"run": run, "data": data}), [line]


def follow_checkpoint(run_folder: Path, checkpoint: Path, step: int) -> list[str]:
    """Makes a checkpoint that the user named the newest of the run, so that `--resume auto` continues from it as well.

    The run's checkpoints and results of later steps are renamed to NAME.aside, and metrics.jsonl is copied. One of them
    that is named later gets its name back. A checkpoint of another run is linked. Returns lines for the log.
    """
    folder, home = checkpoints_folder(run_folder), checkpoints_folder(run_folder) / checkpoint_name(step)
    renamed = []
    for path in sorted(
        path for kind in ("checkpoints", "samples", "evaluations") for path in run_folder.glob(f"{kind}/*")
    ):
        if match := _OF_A_STEP.fullmatch(path.name):
            other = path.parent == folder and path.resolve() != checkpoint.resolve()
            if int(match[1]) > step or (other and int(match[1]) == step):
                renamed.append(set_aside(path, ".aside"))
    lines = []
    if renamed:
        metrics = run_folder / "metrics.jsonl"
        if metrics.is_file():
            renamed.append(Path(shutil.copyfile(metrics, free_name(metrics, ".aside"))))
        listed = ", ".join(str(path.relative_to(run_folder)) for path in renamed)
        lines = [f"the run continues from step {step}, so later ones are set aside: {listed}"]
    if checkpoint.resolve() != home.resolve():
        if checkpoint.resolve().parent == folder.resolve():
            checkpoint.rename(home)
            lines.append(f"{checkpoint} was set aside and is {home.name} again")
        else:
            folder.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # a storage without links: auto follows from the first save on
                home.symlink_to(checkpoint.resolve())
    return lines
