"""From which checkpoint a job goes on: agreed between all ranks, its files compared with their hashes before anything of it is used."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megachat.checkpoint.facts import read_facts
from megachat.checkpoint.hashes import check_files, share
from megachat.checkpoint.lock import run_lock
from megachat.checkpoint.save import tidy, together
from megachat.errors import UserError
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Axis
from megachat.train.state import checkpoints_folder, find_checkpoint


@contextlib.contextmanager
def held_run_folder(folder: Path, world: Axis) -> Iterator[list[str]]:
    """The run folder locked by rank 0, and tidied; gives remarks. All ranks enter together. Raises UserError on all when another job has it."""
    with contextlib.ExitStack() as stack:
        remarks = []

        def hold() -> None:
            if world.rank == 0:
                try:
                    remark = stack.enter_context(run_lock(folder))
                except OSError as error:
                    raise UserError(
                        f"the run folder {folder} cannot be made or written ({error.strerror}): set run.folder to a place that can be written"
                    ) from None
                remarks.extend([remark] if remark else [])
                tidy(checkpoints_folder(folder))

        together(hold, world, lambda text: text.partition(": ")[2])
        yield remarks


def settle_checkpoint(folder: Path, resume: str | None, world: Axis) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from or None, remarks); all ranks call it and get the same. Each rank hashes a share of its files.

    With "auto" a damaged checkpoint is passed over for the one before. Raises UserError, on all ranks, as `find_checkpoint` does, for a named
    checkpoint that is damaged, and when a rank cannot see what rank 0 sees.
    """
    damaged: dict[Path, str] = {}
    while True:
        checkpoint, remarks = _first_rank_finds(folder, resume, damaged, world)
        remarks = [*remarks, *(f"{path} is damaged and passed over: {problem}" for path, problem in damaged.items())]
        if checkpoint is None:
            return None, remarks
        problem = damage(checkpoint, world)
        if problem is None:
            return checkpoint, remarks
        if resume != "auto":
            raise UserError(f"{checkpoint} is damaged: {problem}; give another step's folder, or --resume auto for the newest that is whole")
        damaged[checkpoint] = problem


def damage(checkpoint: Path, world: Axis) -> str | None:
    """What is wrong with a checkpoint's files, None when they are as they were saved; all ranks call it, hash a share each, and get the same."""
    return next((told for told in all_gather_objects(_own_problem(checkpoint, world), world) if told), None)


def _first_rank_finds(folder: Path, resume: str | None, damaged: dict[Path, str], world: Axis) -> tuple[Path | None, list[str]]:
    found: list = [None, []]

    def find() -> None:
        if world.rank == 0:
            found[:] = find_checkpoint(folder, resume, damaged)

    together(find, world, lambda text: text.partition(": ")[2])
    path, remarks = all_gather_objects((str(found[0]) if found[0] else None, found[1]), world)[0]
    return Path(path) if path else None, remarks


def _own_problem(checkpoint: Path, world: Axis) -> str | None:
    """What is wrong in this rank's share of the files."""
    try:
        facts = read_facts(checkpoint)
    except UserError as error:
        return f"rank {world.rank}: {error}"
    problems = check_files(checkpoint, facts, share(facts, world.rank, world.size))
    return problems[0] if problems else None
