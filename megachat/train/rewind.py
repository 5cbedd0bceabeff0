"""Going back to a checkpoint, to continue without the rows of a step."""

import contextlib
import dataclasses
from pathlib import Path

from megachat.checkpoint.facts import checkpoint_name, checkpoint_step, read_facts
from megachat.checkpoint.resume import choose_checkpoint, newest_complete
from megachat.checkpoint.run_folder import follow_checkpoint
from megachat.errors import UserError, how_to_resume
from megachat.files import CHECKPOINTS
from megachat.parallel.collectives import on_all_ranks_or_raise
from megachat.train.build import Run
from megachat.train.documents import build_loader, resume_documents
from megachat.train.state import LoopState, load_state


def earlier_checkpoint(run: Run, state: LoopState) -> Path | None:
    """Returns the newest checkpoint whose weights may be good, or None; all ranks call it. No save is in progress.

    A checkpoint of the step itself has the weights that failed. The one that the run went back to last led to a fault
    again, so only those before it count.
    """
    checkpoint, _ = choose_checkpoint(run.folder, "auto", run.mesh.world, before=state.step)
    if checkpoint and (last := state.rewound_to) is not None and checkpoint_step(checkpoint) == last:
        checkpoint, _ = choose_checkpoint(run.folder, "auto", run.mesh.world, before=last)
    return checkpoint


def rewind(run: Run, state: LoopState, checkpoint: Path) -> tuple[Run, LoopState, list[str]]:
    """Loads the checkpoint into the run, and leaves out the rows of the step that has just been taken.

    Returns the run with a new loader, the state, and lines for the log. All ranks call it; no save is in progress. What
    the run left for later steps is set aside. The loader's state in later checkpoints records what is left out, so a
    resumed run continues equally. A run that is resumed from the same checkpoint meets the step again, and rewinds
    again.
    """
    left_out = {*run.loader.left_out, run.loader.step - 1}
    facts = read_facts(checkpoint)
    documents, _ = resume_documents(checkpoint, facts, run.config, run.plan, run.mesh, run.tokenizer)
    header = documents["header"] if documents else {"step": 0}
    header["left_out"] = sorted(left_out)
    step, lines = facts["step"], list[str]()

    def set_aside() -> None:
        if run.is_writer:
            lines.extend(follow_checkpoint(run.folder, checkpoint, step))

    on_all_ranks_or_raise(set_aside, run.mesh.world)
    run.loader.close()
    loader = build_loader(
        run.config, run.plan, run.mesh, run.tokenizer, (documents or {"streams": None}) | {"header": header}
    )
    run = dataclasses.replace(run, loader=loader)
    rewound = load_state(run, checkpoint)
    rewound.rewinds, rewound.rewound_to = state.rewinds + 1, step
    return run, rewound, lines


def resume_advice(run: Run, state: LoopState, capsule: Path | None, *, saving: bool) -> str:
    """Returns how to continue after a fault has ended the run. saving: the state before the step is being saved."""
    look = f"run `megachat replay {capsule}`, which names the cause" if capsule else "look at the rows of this step"
    start = f"continue with {how_to_resume()} and lower rates"
    if saving or (run.folder / CHECKPOINTS / checkpoint_name(state.step)).exists():
        start = "start again with lower rates (no earlier checkpoint is left)"
        with contextlib.suppress(UserError):
            if earlier := newest_complete(run.folder / CHECKPOINTS, before=state.step)[0]:
                start = f"continue with --resume {earlier} and lower rates"
        start = f"the weights of this step are in the newest checkpoint, so {start}"
    return f"{start}, or {look}"
