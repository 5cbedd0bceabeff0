"""Where the documents go on after a resume: exactly where they stopped; only where that cannot be, and the user allows it, with the first one."""

from pathlib import Path

from megachat.config import Config
from megachat.data.loader_state import (
    TransientReadError,
    combined_ledger,
    load_header,
    load_loader_state,
    loader_settings,
    require_same_settings,
    restarted_state,
    step_of_run,
)
from megachat.data.packing import streams_of_rank
from megachat.data.shards import open_shards, split_shards
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Mesh
from megachat.planning.plan import Plan
from megachat.train.build import order_of_rows


def resume_documents(
    checkpoint: Path, facts: dict, config: Config, plan: Plan, mesh: Mesh, tokenizer: Tokenizer
) -> tuple[dict, list[str]]:
    """(this rank's state for the Loader, what to tell the user); all ranks call it, and all decide alike.

    facts: the checkpoint's. Raises UserError, on all ranks, where going on would repeat or skip a document, unless data.resume is "restart" or
    the checkpoint was imported; then the documents begin anew, which their ledger remembers.
    """
    folder = checkpoint / "loader"
    header, state, problem, transient = None, None, None, False
    try:
        header = load_header(folder)
        require_same_settings(
            header,
            loader_settings(
                split_shards(open_shards(config.data.folder), "train"), tokenizer, order_of_rows(config, plan)
            ),
        )
        if step_of_run(header) != facts["step"]:
            raise UserError(
                f"{folder} is of step {step_of_run(header)}, the checkpoint of step {facts['step']}: load another checkpoint"
            )
        state = load_loader_state(
            folder, streams_of_rank(mesh.data.rank, mesh.data.size, config.data.streams, plan.rows_per_step)
        )
    except UserError as error:
        problem, transient = str(error), isinstance(error, TransientReadError)
    ledgers = {stream: arrays["ledger"].tobytes() for stream, arrays in state["streams"].items()} if state else {}
    everyone = all_gather_objects((problem, transient, ledgers, header), mesh.world)
    problem = next((told[0] for told in everyone if told[0]), None)
    if problem is None:
        found = combined_ledger({stream: ledger for told in everyone for stream, ledger in told[2].items()})
        if facts.get("ledger") in (found, None):  # early checkpoints tell of none
            return state, []
        problem = f"{folder} tells of other documents (ledger {found[:12]}) than the checkpoint ({facts['ledger'][:12]}): load another checkpoint"
    if any(told[1] for told in everyone):
        raise UserError(next(told[0] for told in everyone if told[1]))
    imported = bool(facts.get("imported")) and not folder.exists()
    if config.data.resume == "exact" and not imported:
        raise UserError(f"{problem}, or set data.resume=restart, which begins with the first document again")
    why = (
        f"{checkpoint} was imported without a place in them"
        if imported
        else f"data.resume=restart; {problem.rpartition(': ')[0]}"
    )
    state = restarted_state(facts["step"], facts.get("ledger"), everyone[0][3])
    return state, [
        f"documents begin anew with the first one at step {facts['step']} and may repeat earlier ones ({why})"
    ]
