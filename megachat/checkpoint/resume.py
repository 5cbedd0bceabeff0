"""Choosing the checkpoint that a job resumes from: all ranks agree, and its files are compared with their hashes."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megachat.checkpoint.facts import checkpoint_step, files_of_rank, find_file_problems, read_facts
from megachat.errors import UnreadableError, UserError
from megachat.files import CHECKPOINTS, list_folder, path_kind

if TYPE_CHECKING:
    from megachat.parallel.mesh import Axis


def choose_checkpoint(
    run_folder: Path, resume: str | None, world: "Axis", *, before: float = math.inf
) -> tuple[Path | None, list[str]]:
    """Returns (the checkpoint to resume from or None, remarks for the log), the same on all ranks; all ranks call it.

    Rank 0 finds the checkpoint as `find_checkpoint` does, then each rank hashes a share of its files. With "auto", a
    damaged checkpoint is skipped for the one before, and those of step `before` and later are not considered. Raises
    UserError on all ranks when `find_checkpoint` does, when a checkpoint given by its path is damaged, and when a rank
    cannot see the files that rank 0 sees.
    """
    from megachat.parallel.collectives import all_gather_objects, on_all_ranks_or_raise  # import torch

    damaged: dict[Path, str] = {}

    def find_on_rank_0() -> tuple[Path | None, list[str]]:
        return find_checkpoint(run_folder, resume, damaged, before=before) if world.rank == 0 else (None, [])

    while True:
        checkpoint, remarks = all_gather_objects(on_all_ranks_or_raise(find_on_rank_0, world), world)[0]
        remarks = [*remarks, *(f"{path} is damaged and was skipped: {problem}" for path, problem in damaged.items())]
        if checkpoint is None:
            return None, remarks
        problem = find_damage(checkpoint, world)
        if problem is None:
            return checkpoint, remarks
        if resume != "auto":
            raise UserError(
                f"{checkpoint} is damaged: {problem}; use another step's checkpoint, "
                "or --resume auto for the newest undamaged one"
            )
        damaged[checkpoint] = problem


def find_damage(checkpoint: Path, world: "Axis") -> str | None:
    """Returns a problem with a checkpoint's files, None when all match their hashes.

    All ranks call it and get the same result; each hashes a share of the files. Raises UnreadableError on all ranks if
    one of them may not read a file now: the checkpoint may be intact.
    """
    from megachat.parallel.collectives import all_gather_objects

    problems: list[str] = []
    refusal = None
    try:
        facts = read_facts(checkpoint)
        problems = find_file_problems(checkpoint, facts, files_of_rank(facts, world.rank, world.size))
    except UnreadableError as error:
        refusal = f"rank {world.rank}: {error}" if world.size > 1 else str(error)
    except UserError as error:
        problems = [f"rank {world.rank}: {error}"]
    everyone = all_gather_objects((problems, refusal), world)
    if refusals := [rank_refusal for _, rank_refusal in everyone if rank_refusal]:
        raise UnreadableError(refusals[0])
    return next((rank_problems[0] for rank_problems, _ in everyone if rank_problems), None)


def newest_complete(
    folder: Path, skip: Collection[Path] = (), *, before: float = math.inf
) -> tuple[Path | None, list[str]]:
    """Returns (the newest complete checkpoint in the folder or None, why each newer one is not complete).

    skip: checkpoints that are not considered; nor are those of step `before` and later. Raises UnreadableError rather
    than pass over a newer one that the system refuses to read, or that is a link to a storage that is not there now.
    """
    problems: list[str] = []
    checkpoints = {
        step: path
        for path in list_folder(folder)
        if (step := checkpoint_step(path)) is not None and step < before and path not in skip
    }
    for _, checkpoint in sorted(checkpoints.items(), reverse=True):
        if (kind := path_kind(checkpoint)) != "folder":
            if not kind and checkpoint.is_symlink():
                raise UnreadableError(
                    f"{checkpoint} is a link to {checkpoint.readlink()}, which is not there: restore that, or remove "
                    "the link"
                )
            continue
        try:
            read_facts(checkpoint)
            return checkpoint, problems
        except UnreadableError:
            raise
        except UserError as error:
            problems.append(str(error))
    return None, problems


def _named_checkpoint(resume: str) -> Path:
    """Returns the complete checkpoint at a path that the user gave. Raises UserError if there is none."""
    path = Path(resume)
    if not resume:
        raise UserError("--resume is empty: give auto, or the path of a checkpoint")
    if not path_kind(path):
        raise UserError(f"--resume {resume}: there is no such folder; give auto, or the path of a checkpoint")
    if path_kind(path / CHECKPOINTS) == "folder":
        newest, _ = newest_complete(path / CHECKPOINTS)
        example = f", such as {newest}" if newest else ""
        raise UserError(f"--resume {resume}: this is a run folder; give auto, or one of its checkpoints{example}")
    read_facts(path)
    return path


def find_checkpoint(
    run_folder: Path, resume: str | None, damaged: Mapping[Path, str] | None = None, *, before: float = math.inf
) -> tuple[Path | None, list[str]]:
    """Returns (the checkpoint to resume from or None, remarks for the log).

    resume: None for a new run, a checkpoint's path, or "auto" for the newest complete checkpoint, if there is one.
    damaged: checkpoints that "auto" skips, and why; it also skips those of step `before` and later. Raises UserError
    when a new run would start in a folder that already holds checkpoints, when the path is not a complete checkpoint,
    or when "auto" finds only bad ones.
    """
    if resume is not None and resume != "auto":
        return _named_checkpoint(resume), []
    try:
        path_kind(run_folder)
    except UnreadableError as error:
        raise UnreadableError(f"the run folder {error}, or set run.folder to another path") from None
    damaged = damaged or {}
    newest, remarks = newest_complete(run_folder / CHECKPOINTS, damaged, before=before)
    if resume is None:
        if newest is not None:
            raise UserError(
                f"{run_folder} already holds checkpoints up to {newest.name}: continue with --resume auto, "
                "or start another run with --set run.name=NAME"
            )
        return None, remarks
    if newest is None:
        if problems := [*(f"{path} is damaged: {problem}" for path, problem in damaged.items()), *remarks]:
            raise UserError(f"{run_folder} holds no complete checkpoint to resume from: {problems[0]}")
        remarks = [f"--resume auto: no checkpoint in {run_folder / CHECKPOINTS}, training starts at step 0"]
    return newest, remarks
