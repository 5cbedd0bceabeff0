"""The documents of a run: the loader of this rank's rows, and where it continues after a resume."""

from pathlib import Path
from typing import Any

from megachat.activity import print_line
from megachat.config import Config
from megachat.data.loader import Loader
from megachat.data.loader_state import (
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
from megachat.errors import UnreadableError, UserError
from megachat.files import LOADER
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Mesh
from megachat.planning.plan import Plan


def _order_of_rows(config: Config, plan: Plan) -> dict:
    """Returns the Loader's settings on which the training rows depend."""
    return {
        "split": "train",
        "seed": config.run.seed if config.data.shuffle else None,
        "row_tokens": plan.dims.sequence_len + 1,
        "rows": plan.rows_per_step,
        "streams": config.data.streams,
        "buffer_documents": config.data.buffer_documents,
    }


def build_loader(
    config: Config, plan: Plan, mesh: Mesh, tokenizer: Tokenizer, state: dict | None = None, *, validation: bool = False
) -> Loader:
    """Returns the loader of this rank's rows. A step of validation rows is one micro-batch per rank."""
    data, order = config.data, _order_of_rows(config, plan)
    if validation:
        order |= {"split": "validation", "rows": plan.micro_rows * mesh.data.size, "seed": None}
    return Loader(
        data.folder,
        tokenizer,
        **order,
        ranks=mesh.data.size,
        rank=mesh.data.rank,
        tokenizer_threads=data.tokenizer_threads,
        prefetch_steps=data.prefetch_steps,
        state=state,
        on_bad_text=data.on_bad_text,
        device="cpu" if validation else mesh.device,  # validation keeps the rows of several steps
        # on any data rank: the rank that reads a document reports it
        log=print_line if mesh.tensor.rank == mesh.pipeline.rank == 0 else lambda line: None,
    )


def resume_documents(
    checkpoint: Path, facts: dict, config: Config, plan: Plan, mesh: Mesh, tokenizer: Tokenizer
) -> tuple[dict, list[str]]:
    """Returns (this rank's state for the Loader, remarks for the log). All ranks call it and make the same decision.

    facts: the checkpoint's. Raises UserError on all ranks if resuming would repeat or skip a document, unless
    data.resume is "restart" or the checkpoint was imported. Then the documents restart from the first one, and their
    ledger records it.
    """
    folder = checkpoint / LOADER
    header, state, problem, transient = None, dict[str, Any](), None, False
    try:
        header = load_header(folder)
        train = split_shards(open_shards(config.data.folder), "train")
        require_same_settings(header, loader_settings(train, tokenizer, _order_of_rows(config, plan)))
        if (step := step_of_run(header)) != facts["step"]:
            raise UserError(
                f"{folder} is of step {step}, but the checkpoint of step {facts['step']}: load another checkpoint"
            )
        streams = streams_of_rank(mesh.data.rank, mesh.data.size, config.data.streams, plan.rows_per_step)
        state = load_loader_state(folder, streams)
    except UserError as error:
        problem, transient = str(error), isinstance(error, UnreadableError)
    ledgers = {stream: arrays["ledger"].tobytes() for stream, arrays in state["streams"].items()} if state else {}
    everyone = all_gather_objects((problem, transient, ledgers, header), mesh.world)
    for rank_problem, rank_transient, _, _ in everyone:
        if rank_transient:
            raise UserError(rank_problem)
    problem = next((rank_problem for rank_problem, *_ in everyone if rank_problem), None)
    if problem is None:
        ledger = combined_ledger({stream: value for _, _, ledgers, _ in everyone for stream, value in ledgers.items()})
        if facts.get("ledger") in (ledger, None):  # early checkpoints have none
            return state, []
        problem = (
            f"{folder} has the ledger {ledger[:12]}, but the checkpoint has {facts['ledger'][:12]}, so they are of "
            "different documents: load another checkpoint"
        )
    imported = bool(facts.get("imported")) and not folder.exists()
    if config.data.resume == "exact" and not imported:
        raise UserError(f"{problem}, or set data.resume=restart, which restarts from the first document")
    reason = (
        f"{checkpoint} was imported and has no position in them"
        if imported
        else f"data.resume=restart; {problem.rpartition(': ')[0]}"
    )
    return restarted_state(facts["step"], facts.get("ledger"), everyone[0][3]), [
        f"documents restart from the first one at step {facts['step']} and may repeat earlier ones ({reason})"
    ]
