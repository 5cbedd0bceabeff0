"""From which checkpoint a job goes on: agreed between all ranks, its files compared with their hashes before anything of it is used."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from megachat.checkpoint.facts import checkpoint_step, files_of_rank, find_file_problems, read_facts
from megachat.errors import UserError
from megachat.parallel.collectives import all_gather_objects, on_all_ranks_or_raise
from megachat.parallel.mesh import Axis


def choose_checkpoint(folder: Path, resume: str | None, world: Axis) -> tuple[Path | None, list[str]]:
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
        problem = find_damage(checkpoint, world)
        if problem is None:
            return checkpoint, remarks
        if resume != "auto":
            raise UserError(
                f"{checkpoint} is damaged: {problem}; give another step's folder, or --resume auto for the newest that is whole"
            )
        damaged[checkpoint] = problem


def find_damage(checkpoint: Path, world: Axis) -> str | None:
    """What is wrong with a checkpoint's files, None when they are as they were saved; all ranks call it, hash a share each, and get the same."""
    return next((told for told in all_gather_objects(_own_problem(checkpoint, world), world) if told), None)


def _first_rank_finds(
    folder: Path, resume: str | None, damaged: dict[Path, str], world: Axis
) -> tuple[Path | None, list[str]]:
    found: list = [None, []]

    def find() -> None:
        if world.rank == 0:
            found[:] = find_checkpoint(folder, resume, damaged)

    on_all_ranks_or_raise(find, world, lambda text: text.partition(": ")[2])
    path, remarks = all_gather_objects((str(found[0]) if found[0] else None, found[1]), world)[0]
    return Path(path) if path else None, remarks


def _own_problem(checkpoint: Path, world: Axis) -> str | None:
    """What is wrong in this rank's share of the files."""
    try:
        facts = read_facts(checkpoint)
    except UserError as error:
        return f"rank {world.rank}: {error}"
    problems = find_file_problems(checkpoint, facts, files_of_rank(facts, world.rank, world.size))
    return problems[0] if problems else None


_NONE: Mapping[Path, str] = MappingProxyType({})


def checkpoints_folder(run_folder: Path) -> Path:
    """Where a run's checkpoints are."""
    return run_folder / "checkpoints"


def newest_complete(folder: Path, without: Collection[Path] = ()) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint in the folder or None, why each newer one was passed over). without: those known to be damaged."""
    passed_over = []
    steps = {
        step: path
        for path in folder.glob("step_*")
        if (step := checkpoint_step(path)) is not None and path.is_dir() and path not in without
    }
    for _, checkpoint in sorted(steps.items(), reverse=True):
        try:
            read_facts(checkpoint)
        except UserError as error:
            passed_over.append(str(error))
            continue
        return checkpoint, passed_over
    return None, passed_over


def find_checkpoint(
    run_folder: Path, resume: str | None, damaged: Mapping[Path, str] = _NONE
) -> tuple[Path | None, list[str]]:
    """(checkpoint to resume from or None, remarks): resume is None, "auto" (newest complete, or none yet) or a checkpoint's path.

    damaged: checkpoints that "auto" passes over, and why.

    Raises UserError when the run folder holds checkpoints and resuming was not asked for, or when the path is no complete checkpoint.
    """
    if resume and resume != "auto":
        read_facts(Path(resume))
        return Path(resume), []
    newest, remarks = newest_complete(checkpoints_folder(run_folder), damaged)
    if newest is not None and resume is None:
        raise UserError(
            f"{run_folder} already holds checkpoints up to {newest.name}: continue with --resume auto, or start another with --set run.name=NAME"
        )
    if newest is None and (remarks or damaged) and resume == "auto":
        why = [f"{path} is damaged: {problem}" for path, problem in damaged.items()] + remarks
        raise UserError(f"{run_folder} holds no complete checkpoint to resume from: {why[0]}")
    return newest, remarks
