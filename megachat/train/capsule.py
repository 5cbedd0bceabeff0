"""What a step leaves behind whose loss or gradient is not finite, or is a spike: its rows and their documents.

A capsule is a checkpoint of the step's weights, without optimizer state, with rows.npz and capsule.json beside them.
Every layout writes the same one, so `megachat replay` runs it on one process.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megachat.checkpoint.facts import checkpoint_name
from megachat.checkpoint.save import repair_checkpoints_folder, save_checkpoint
from megachat.device import dtype_name
from megachat.errors import UserError
from megachat.files import CAPSULES, SPIKES, free_name, list_folder, write_atomically, write_json
from megachat.parallel.collectives import all_gather_objects, on_all_ranks_or_raise
from megachat.planning.explain import plan_values
from megachat.train.build import Run
from megachat.train.rank_reports import Report
from megachat.train.state import LoopState, checkpoint_facts, save_random_state, state_pieces
from megachat.train.step import StepResult

ROWS_NAME, CAPSULE_NAME = "rows.npz", "capsule.json"
MOST_SPIKES = 100  # folders of spikes in a run; later spikes are logged only


def gather_rows(run: Run, rows: torch.Tensor) -> tuple[np.ndarray, list[list[dict]]]:
    """Returns the rows of all data ranks in the order of the step, int32 [rows, tokens + 1], and the documents of each
    (see Loader.documents); all ranks call it.
    """

    def read() -> Any:
        if run.mesh.tensor.rank == run.mesh.pipeline.rank == 0:
            return rows.cpu().numpy().astype(np.int32), run.loader.documents(), run.mesh.data.rank
        return None

    mine = on_all_ranks_or_raise(read, run.mesh.world)
    parts = sorted((part for part in all_gather_objects(mine, run.mesh.world) if part), key=lambda part: part[2])
    whole = np.stack([part[0] for part in parts], axis=1).reshape(-1, rows.shape[1])  # row k of rank r: k * ranks + r
    return whole, [documents for same_row in zip(*(part[1] for part in parts), strict=True) for documents in same_row]


def _write_rows(folder: Path, rows: np.ndarray, facts: dict) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, rows=rows)
    write_atomically(folder / ROWS_NAME, content.getvalue())
    write_json(folder / CAPSULE_NAME, facts)


def _is_of(branch: dict, capsule: Path) -> bool:
    """Returns whether an earlier capsule has these values, so that its rows and weights are those of the step."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((capsule / CAPSULE_NAME).read_text(encoding="utf-8"))
        return all(values.get(key) == value for key, value in branch.items())
    return False


def write_capsule(
    run: Run, state: LoopState, result: StepResult, reports: Sequence[Report], sentence: str
) -> tuple[Path | None, str | None]:
    """Writes capsules/step_N of the step that has just been taken; all ranks call it. If that is of another branch of
    the run, whose rows or rates were others, it is step_N.2 and so on. One of this branch is not written again.
    reports, sentence: of the fault, see train/fault_reports.py and train/nonfinite.py.

    Returns its path, None if there is none, and a line for the log. A failure is such a line and raises nothing.
    """
    folder, world, most = run.folder / CAPSULES, run.mesh.world, run.config.reliability.capsules
    branch = {
        "step": state.step,
        "loader_step": run.loader.step - 1,
        "left_out": sorted(run.loader.left_out),
        "config": run.config.model_dump(mode="json"),
    }

    def look() -> tuple[Path, int, Path | None]:
        if world.rank:
            return folder, 0, None
        repair_checkpoints_folder(folder)
        existing = [path for path in list_folder(folder) if (path / CAPSULE_NAME).is_file()]
        same = next((path for path in existing if _is_of(branch, path)), None)
        return free_name(folder / checkpoint_name(state.step), ""), len(existing), same

    try:
        free, count, same = all_gather_objects(on_all_ranks_or_raise(look, world), world)[0]
        if same:
            return same, None
        if count >= most:
            return None, f"no capsule is written: reliability.capsules is {most}" if most else None
        rows, documents = gather_rows(run, result.rows)
        capsule = branch | {
            "what": sentence,
            "loss_scale": result.loss_scale,
            "weights_changed": not result.skipped,
            "compute_dtype": dtype_name(run.compute_dtype),
            "micro_rows": run.plan.micro_rows,
            "ranks": reports,
            "documents": documents,
            "plan": plan_values(run.plan),
        }

        def write_rank_files(temporary: Path) -> None:
            save_random_state(temporary, run)
            if world.rank == 0:
                _write_rows(temporary, rows, capsule)

        pieces = state_pieces(run, replicas=False)
        weights = {name: piece for name, piece in pieces.items() if name.startswith("model/")}
        facts = checkpoint_facts(run, state) | {"capsule": sentence}
        suffix = free.name.removeprefix(checkpoint_name(state.step))
        return save_checkpoint(folder, state.step, weights, facts, write_rank_files, world, suffix), None
    except UserError as error:
        return None, f"the capsule of step {state.step} could not be written: {error}"


def write_spike(run: Run, step: int, rows: torch.Tensor, facts: dict) -> tuple[Path | None, list[str]]:
    """Writes spikes/step_N with the rows of a step; all ranks call it.

    Returns its path, None if there is none because of the limit or a failure, and the places of the documents. Raises
    UserError if a rank cannot name its documents.
    """
    whole, documents = gather_rows(run, rows)
    places = list(dict.fromkeys(each["place"] for row in documents for each in row))
    folder, path = run.folder / SPIKES, run.folder / SPIKES / checkpoint_name(step)

    def write() -> None:
        if run.is_writer and len(list_folder(folder)) < MOST_SPIKES:
            path.mkdir(parents=True, exist_ok=True)
            _write_rows(path, whole, facts | {"step": step, "documents": documents})

    try:
        on_all_ranks_or_raise(write, run.mesh.world)
    except UserError:
        return None, places
    return path if path.is_dir() else None, places


def read_capsule(folder: Path) -> tuple[np.ndarray, dict]:
    """Returns the rows, int64 [rows, tokens + 1], and capsule.json. Raises UserError if the folder is no capsule."""
    try:
        with np.load(folder / ROWS_NAME, allow_pickle=False) as file:
            rows = file["rows"].astype(np.int64)
        return rows, json.loads((folder / CAPSULE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        problem = f"it has no {ROWS_NAME} and {CAPSULE_NAME}" if folder.is_dir() else "there is no such folder"
    except (OSError, ValueError, KeyError, EOFError) as error:
        problem = f"its rows cannot be read ({type(error).__name__})"
    home = folder if folder.name == CAPSULES else folder / CAPSULES
    capsules = sorted(str(path.parent) for path in home.glob(f"*/{CAPSULE_NAME}"))
    listed = f": {', '.join(capsules)}" if capsules else ""
    raise UserError(f"{folder} is no capsule: {problem}; give a folder of RUN/{CAPSULES}/{listed}")
