"""Saving: written under a temporary name, complete only after the rename. A checkpoint that could not be finished leaves no trace."""

import shutil
from collections.abc import Callable
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megachat.checkpoint.storage import Pieces, save_pieces, write_json
from megachat.errors import UserError
from megachat.parallel.collectives import all_gather_objects, barrier
from megachat.parallel.mesh import Axis

FORMAT_VERSION = 1
FACTS_NAME = "checkpoint.json"
SPACE_MARGIN = 1.05  # containers and indices around the raw bytes


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint; names sort as steps do, up to a million."""
    return f"step_{step:06d}"


def save_checkpoint(folder: Path, step: int, pieces: Pieces, facts: dict, write_own_files: Callable[[Path], None], world: Axis) -> Path:
    """Write `folder`/step_NNNNNN; all ranks call it and all return, or all raise, together.

    pieces: this rank's rectangles. facts: small JSON values, the same on all ranks. write_own_files: writes what else this rank keeps into
    the given folder. Raises UserError when the disk is full or cannot be written; earlier checkpoints stay as they are.
    """
    final = folder / checkpoint_name(step)
    temporary = folder / (checkpoint_name(step) + ".tmp")
    own_bytes = sum(view.numel() * view.element_size() for _, rectangles in pieces.values() for _, _, view in rectangles)
    needed = int(SPACE_MARGIN * sum(all_gather_objects(own_bytes, world)))
    _together(lambda: world.rank == 0 and _prepare(temporary, needed), world, final)
    try:
        _together(lambda: write_own_files(temporary), world, final)
        _together(lambda: save_pieces(temporary, pieces), world, final)
        _together(lambda: world.rank == 0 and _finish(temporary, final, step, facts), world, final)
    except UserError:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier(world)  # whoever leaves first may end the job, and the files would stay
        raise
    barrier(world)
    return final


def _prepare(temporary: Path, needed_bytes: int) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    free = shutil.disk_usage(temporary).free
    if free < needed_bytes:
        temporary.rmdir()
        raise OSError(f"the disk has {free / 1e6:,.1f} MB free and the checkpoint takes {needed_bytes / 1e6:,.1f} MB")


def _finish(temporary: Path, final: Path, step: int, facts: dict) -> None:
    files = {str(path.relative_to(temporary)): path.stat().st_size for path in sorted(temporary.rglob("*")) if path.is_file()}
    write_json(temporary / FACTS_NAME, {"format_version": FORMAT_VERSION, "step": step, "files": files} | facts)
    replaced = final.with_name(final.name + ".old")  # the same step saved again: the old one goes only after the new one is there
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def _together(action: Callable[[], object], world: Axis, final: Path) -> None:
    """Run on every rank; when it fails on one, all raise its reason."""
    problem = None
    try:
        action()
    except CheckpointException as error:  # torch's, the same on every rank, with one error a rank; it is no Exception
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        problem = rank, _in_words(cause)
    except Exception as error:  # whatever it was, no rank may wait for the others alone
        problem = world.rank, _in_words(error)
    problems = [told for told in all_gather_objects(problem, world) if told]
    if problems:
        rank, text = problems[0]
        raise UserError(
            f"checkpoint {final} could not be saved by rank {rank}: {text}; earlier checkpoints are untouched, free space there and use --resume auto"
        )


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
