"""Saving: written under a temporary name, complete only after the rename. A checkpoint that could not be finished leaves no trace."""

import shutil
from collections.abc import Callable
from pathlib import Path

from megachat.checkpoint.facts import FACTS_NAME, checkpoint_name, checkpoint_step, hash_files, write_facts
from megachat.checkpoint.storage import RectanglesByName, save_rectangles
from megachat.errors import UserError
from megachat.files import sync_to_disk
from megachat.parallel.collectives import all_gather_objects, barrier, on_all_ranks_or_raise
from megachat.parallel.mesh import Axis

SPACE_MARGIN = 1.05  # containers and indices around the raw bytes
_TEMPORARY, _REPLACED = ".tmp", ".old"


def save_checkpoint(
    folder: Path,
    step: int,
    pieces: RectanglesByName,
    facts: dict,
    write_rank_files: Callable[[Path], None],
    world: Axis,
) -> Path:
    """Write `folder`/step_NNNNNN; all ranks call it and all return, or all raise, together.

    pieces: this rank's rectangles. facts: small JSON values, the same on all ranks. write_rank_files: writes what else this rank keeps into
    the given folder. Raises UserError when the disk is full or cannot be written; earlier checkpoints stay as they are.
    """
    final = folder / checkpoint_name(step)
    temporary = folder / (checkpoint_name(step) + _TEMPORARY)
    needed = int(SPACE_MARGIN * sum(all_gather_objects(rectangle_bytes(pieces), world)))

    def failed(text: str) -> str:
        if not folder.parent.exists():
            return f"checkpoint {final} could not be saved, the run folder {folder.parent} has gone: bring it back from a copy, or start again"
        return f"checkpoint {final} could not be saved by {text}; earlier checkpoints are untouched, free space there and use --resume auto"

    on_all_ranks_or_raise(lambda: world.rank == 0 and _prepare(temporary, needed), world, failed)
    try:
        on_all_ranks_or_raise(lambda: write_rank_files(temporary), world, failed)
        on_all_ranks_or_raise(lambda: save_rectangles(temporary, pieces, world), world, failed)
        files = _hashed(temporary, world, failed)
        on_all_ranks_or_raise(
            lambda: world.rank == 0 and _finish(temporary, final, facts | {"step": step, "files": files}), world, failed
        )
    except UserError:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier(world)  # whoever leaves first may end the job, and the files would stay
        raise
    barrier(world)
    return final


def rectangle_bytes(pieces: RectanglesByName) -> int:
    """Bytes of a rank's rectangles."""
    return sum(view.numel() * view.element_size() for _, rectangles in pieces.values() for _, _, view in rectangles)


def _prepare(temporary: Path, needed_bytes: int) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(
        exist_ok=True
    )  # and not the run folder: one that was taken away is not made again, without all it held
    temporary.mkdir()
    free = shutil.disk_usage(temporary).free
    if free < needed_bytes:
        temporary.rmdir()
        raise OSError(f"the disk has {free / 1e6:,.1f} MB free and the checkpoint takes {needed_bytes / 1e6:,.1f} MB")


def _hashed(temporary: Path, world: Axis, failed: Callable[[str], str]) -> dict[str, dict]:
    """Name -> size and hash of every file, each hashed by one rank that sees it: network storage may show a rank others' files late."""
    names = [str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()]
    seen_by: dict[str, list[int]] = {}
    for rank, seen in enumerate(all_gather_objects(names, world)):
        for name in seen:
            seen_by.setdefault(name, []).append(rank)
    own: dict[str, dict] = {}

    def hash_own() -> None:
        mine = [
            name
            for index, (name, ranks) in enumerate(sorted(seen_by.items()))
            if ranks[index % len(ranks)] == world.rank
        ]
        for name, digest in hash_files(temporary, mine).items():
            own[name] = {"bytes": (temporary / name).stat().st_size, "sha256": digest}

    on_all_ranks_or_raise(hash_own, world, failed)
    files = {name: entry for part in all_gather_objects(own, world) for name, entry in part.items()}
    return dict(sorted(files.items()))


def _finish(temporary: Path, final: Path, facts: dict) -> None:
    write_facts(temporary, facts)
    sync_to_disk(temporary)
    replaced = final.with_name(
        final.name + _REPLACED
    )  # the same step saved again: the old one goes only after the new one is there
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def repair_checkpoints_folder(folder: Path) -> None:
    """Put in order what a killed save or removal left in a checkpoints folder. Only for the job that holds the run folder's lock."""
    for path in folder.glob("step_*"):
        name = path.name.removesuffix(_REPLACED)
        if path.name.endswith(_TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != name:
            if (folder / name).exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(folder / name)


def remove_old_checkpoints(folder: Path, keep_last: int | None, keep_every: int | None, newest: int) -> list[Path]:
    """Remove complete checkpoints up to step `newest` that are neither among its last `keep_last` nor of a multiple of `keep_every` steps.

    keep_last None: all stay. Returns what was removed.
    """
    if keep_last is None:
        return []
    complete = (path for path in folder.glob("step_*") if (path / FACTS_NAME).is_file())
    steps = {step: path for path in complete if (step := checkpoint_step(path)) is not None and step <= newest}
    surplus = [step for step in sorted(steps)[:-keep_last] if not (keep_every and step % keep_every == 0)]
    for step in surplus:
        going = folder / (
            steps[step].name + _TEMPORARY
        )  # what a kill leaves of it counts as none, and the next start removes it
        shutil.rmtree(going, ignore_errors=True)
        steps[step].rename(going)
        shutil.rmtree(going, ignore_errors=True)
    return [steps[step] for step in surplus]
