"""Which format a folder is of."""

from pathlib import Path

from megachat.convert.huggingface import is_huggingface, open_huggingface
from megachat.convert.nanochat import open_nanochat, steps_in
from megachat.convert.opened import Opened, open_megachat, step_folder_of
from megachat.convert.plain import FACTS_FILE, open_plain
from megachat.errors import UserError


def open_checkpoint(path: Path, step: int | None = None) -> Opened:
    """Open a folder of any known format: a step or run folder of megachat, or a folder of another. step: where it holds several.

    Raises UserError when it is none of them or cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder: give a checkpoint's step folder, a run folder, or a folder of another format"
        )
    if (path / FACTS_FILE).is_file():
        return open_plain(path)
    if is_huggingface(path):
        return open_huggingface(path)
    if steps_in(path):
        return open_nanochat(path, step)
    return open_megachat(step_folder_of(path))
