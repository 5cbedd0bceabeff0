"""Saving a checkpoint: written under a temporary name and complete after the rename. A failed save leaves no files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megachat.checkpoint.facts import FACTS_NAME, checkpoint_name, checkpoint_step, hash_files, read_facts, write_facts
from megachat.errors import UserError, how_to_resume
from megachat.files import free_name, sync_to_disk
from megachat.parallel.collectives import all_gather_objects, barrier, on_all_ranks_or_raise
from megachat.parallel.mesh import Axis
from megachat.parallel.rectangles import RectanglesByName

SPACE_MARGIN = 1.05  # containers and indices around the tensors' bytes
_TEMPORARY, _REPLACED = ".tmp", ".old"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: RectanglesByName,
    facts: dict,
    write_rank_files: Callable[[Path], None],
    world: Axis,
    suffix: str = "",
) -> Path:
    """Writes `folder`/step_NNNNNN and returns its path. All ranks call it; either all return or all raise.

    tensors: this rank's rectangles. facts: small JSON values, the same on all ranks. write_rank_files: writes this
    rank's other files into the given folder. suffix: is added to the name. Raises UserError when the disk is full or
    cannot be written; earlier checkpoints stay as they are.
    """
    from megachat.checkpoint.storage import save_rectangles  # loads torch.distributed.checkpoint, 0.7 s

    final = folder / (checkpoint_name(step) + suffix)
    temporary = final.with_name(final.name + _TEMPORARY)
    needed_bytes = int(SPACE_MARGIN * sum(all_gather_objects(rectangle_bytes(tensors), world)))

    def failure(problem: str) -> str:
        if not folder.parent.exists():
            return (
                f"checkpoint {final} could not be saved because the run folder {folder.parent} no longer exists: "
                "restore it from a copy, or start again"
            )
        return (
            f"checkpoint {final} could not be saved by {problem}; earlier checkpoints are untouched: "
            f"free space there and continue with {how_to_resume()}"
        )

    def on_rank_0(action: Callable[[], None]) -> None:
        on_all_ranks_or_raise(lambda: action() if world.rank == 0 else None, world, failure)

    on_rank_0(lambda: _make_folder(temporary, needed_bytes))
    try:
        on_all_ranks_or_raise(lambda: write_rank_files(temporary), world, failure)
        on_all_ranks_or_raise(lambda: save_rectangles(temporary, tensors, world), world, failure)
        files = _hash_all_files(temporary, world, failure)
        on_rank_0(lambda: _move_into_place(temporary, final, facts | {"step": step, "files": files}))
    except UserError:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier(world)  # the first rank that leaves may end the job, before rank 0 has removed the files
        raise
    barrier(world)
    return final


def rectangle_bytes(tensors: RectanglesByName) -> int:
    """Returns the bytes of this rank's rectangles."""
    return sum(view.numel() * view.element_size() for _, rectangles in tensors.values() for _, _, view in rectangles)


def _make_folder(temporary: Path, needed_bytes: int) -> None:
    _remove(temporary)
    # Without parents: a run folder that was removed is not created again, because everything else in it is missing.
    temporary.parent.mkdir(exist_ok=True)
    temporary.mkdir()
    free_bytes = shutil.disk_usage(temporary).free
    if free_bytes < needed_bytes:
        temporary.rmdir()
        raise OSError(
            f"the disk has {free_bytes / 1e6:,.1f} MB free and the checkpoint takes {needed_bytes / 1e6:,.1f} MB"
        )


def _hash_all_files(folder: Path, world: Axis, failure: Callable[[str], str]) -> dict[str, dict]:
    """Returns name -> {"bytes", "sha256"} of every file in the folder.

    Each file is hashed by one of the ranks that see it: network storage may show a rank the other ranks' files late.
    """
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    seen_by: dict[str, list[int]] = {}
    for rank, seen in enumerate(all_gather_objects(names, world)):
        for name in seen:
            seen_by.setdefault(name, []).append(rank)

    def hash_local() -> dict[str, dict]:
        ordered = enumerate(sorted(seen_by.items()))
        share = [name for index, (name, ranks) in ordered if ranks[index % len(ranks)] == world.rank]
        digests = hash_files(folder, share).items()
        return {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in digests}

    local = on_all_ranks_or_raise(hash_local, world, failure)
    return dict(sorted(entry for entries in all_gather_objects(local, world) for entry in entries.items()))


def _move_into_place(temporary: Path, final: Path, facts: dict) -> None:
    """Writes checkpoint.json and renames the folder. If the step was saved before, the old folder is removed last; a
    damaged one is kept as NAME.damaged, because it may be repaired."""
    write_facts(temporary, facts)
    sync_to_disk(temporary)
    replaced = final.with_name(final.name + _REPLACED)
    _remove(replaced)
    if os.path.lexists(final):
        final.rename(free_name(final, ".damaged") if _is_damaged(final) else replaced)
    temporary.rename(final)
    sync_to_disk(final.parent)
    _remove(replaced)


def _is_damaged(checkpoint: Path) -> bool:
    try:
        read_facts(checkpoint)
    except UserError:
        return True
    return False


def _remove(path: Path) -> None:
    """Removes a checkpoint's folder, or the link to it: what a link leads to belongs to someone else."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def repair_checkpoints_folder(folder: Path) -> None:
    """Removes or restores what a killed save or removal left. Only for the job that holds the run folder's lock."""
    for path in folder.glob("step_*"):
        name = path.name.removesuffix(_REPLACED)
        if path.name.endswith(_TEMPORARY) or (path.name != name and (folder / name).exists()):
            _remove(path)
        elif path.name != name:
            path.rename(folder / name)


def remove_old_checkpoints(folder: Path, keep_last: int | None, keep_every: int | None, newest: int) -> list[Path]:
    """Removes complete checkpoints up to step `newest`, except the last `keep_last` and multiples of `keep_every`
    steps.

    keep_last: None keeps all. Returns the removed checkpoints.
    """
    if keep_last is None:
        return []
    complete = (path for path in folder.glob("step_*") if (path / FACTS_NAME).is_file())
    steps = {step: path for path in complete if (step := checkpoint_step(path)) is not None and step <= newest}
    surplus = [steps[step] for step in sorted(steps)[:-keep_last] if not (keep_every and step % keep_every == 0)]
    for checkpoint in surplus:
        # Renamed first: after a kill the rest does not look complete, and the next start removes it.
        temporary = folder / (checkpoint.name + _TEMPORARY)
        _remove(temporary)
        checkpoint.rename(temporary)
        _remove(temporary)
    return surplus
