"""Going back to the last checkpoint, to continue without the rows of a step."""

import dataclasses
from pathlib import Path

from megachat.checkpoint.facts import read_facts
from megachat.checkpoint.resume import choose_checkpoint
from megachat.errors import UserError
from megachat.train.build import Run, build_loader
from megachat.train.documents import resume_documents
from megachat.train.state import LoopState, load_state


def rewind(run: Run, state: LoopState) -> tuple[Run, LoopState, Path]:
    """Loads the newest checkpoint into the run, and leaves out the rows of the step that has just been taken.

    Returns the run with a new loader, the state, and the checkpoint. All ranks call it; no save is in progress. The
    loader's state in later checkpoints records what is left out, so a resumed run continues equally. A run that is
    resumed from the same checkpoint meets the step again, and rewinds again. Raises UserError if there is no
    checkpoint.
    """
    checkpoint, _ = choose_checkpoint(run.folder, "auto", run.mesh.world)
    if checkpoint is None:
        raise UserError(
            f"step {state.step}: there is no checkpoint to go back to, as reliability.on_nonfinite=rewind requires: "
            "lower the rates, or save earlier with checkpoint.every"
        )
    left_out = {*run.loader.left_out, run.loader.step - 1}
    documents, _ = resume_documents(checkpoint, read_facts(checkpoint), run.config, run.plan, run.mesh, run.tokenizer)
    header = documents["header"] if documents else {"step": 0}
    header["left_out"] = sorted(left_out)
    run.loader.close()
    loader = build_loader(
        run.config, run.plan, run.mesh, run.tokenizer, (documents or {"streams": None}) | {"header": header}
    )
    run = dataclasses.replace(run, loader=loader)
    rewound = load_state(run, checkpoint)
    rewound.rewinds = state.rewinds + 1
    return run, rewound, checkpoint
