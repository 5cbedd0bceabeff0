"""The allocation of lookup rows to tokens: made once for a run, then kept in its folder and in every checkpoint."""

import hashlib
from dataclasses import replace
from pathlib import Path

from megachat.config import Config
from megachat.data.texts import BadTexts
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.errors import UserError
from megachat.parallel.collectives import all_gather_objects, on_all_ranks_or_raise
from megachat.parallel.mesh import Axis
from megachat.planning.dimensions import LookupDimensions, saved_dimensions
from megachat.planning.sizes import resolve_dimensions
from megachat.prepare.lookup_allocation import Allocation, allocate, load_allocation, sample_documents, save_allocation

ALLOCATION_NAME = "lookup.json"  # in the run folder


def allocated_lookup(
    config: Config, lookup: LookupDimensions, tokenizer: Tokenizer, folder: Path, facts: dict | None, world: Axis
) -> LookupDimensions:
    """Returns the lookup layers with the rows of each token; all ranks call it and get the same.

    A resumed run (facts: of its checkpoint) keeps the checkpoint's allocation, whatever the data and the settings are
    now. A new run reads lookup.allocation_file, or rank 0 allocates from a sample of the training text, and writes
    lookup.json in the run folder. Raises UserError on all ranks if this fails.
    """
    if facts and (saved := saved_dimensions(facts["model"]).lookup):
        digest = hashlib.sha256(saved.rows_per_token.encode()).hexdigest()
        digests = all_gather_objects(digest, world)
        if others := [rank for rank, other in enumerate(digests) if other != digests[0]]:
            raise UserError(
                f"rank {others[0]} read another allocation of lookup rows from the checkpoint than rank 0: make the "
                "hosts see the same run folder"
            )
        return saved

    def allocate_on_rank_0() -> LookupDimensions:
        if world.rank:
            return lookup
        allocation = read_or_allocate(config, lookup.rows, tokenizer)
        save_allocation(allocation, folder / ALLOCATION_NAME)
        return with_allocation(lookup, allocation)

    return all_gather_objects(on_all_ranks_or_raise(allocate_on_rank_0, world), world)[0]


def read_or_allocate(config: Config, rows: int, tokenizer: Tokenizer) -> Allocation:
    """Returns the allocation of `rows` rows from lookup.allocation_file, or made from a sample of the training text.

    Raises UserError if the file does not fit the settings, or the text cannot be read.
    """
    settings = config.lookup
    if settings.allocation_file is None:
        print(
            f"allocating {rows:,} lookup rows from the first {settings.sample_tokens:,} tokens of {config.data.folder}",
            flush=True,
        )
        bad_texts = BadTexts(config.data.on_bad_text)
        sample = sample_documents(config.data.folder, tokenizer, settings.sample_tokens, bad_texts)
        return allocate(settings.allocation, sample, tokenizer, rows, settings.max_rows_per_token)
    allocation = load_allocation(settings.allocation_file, tokenizer)
    most = int(allocation.rows_per_token.max())
    if allocation.rows != rows or most > settings.max_rows_per_token:
        raise UserError(
            f"{settings.allocation_file} allocates {allocation.rows:,} rows, at most {most:,} to a token, but the "
            f"config has lookup.rows {rows:,} and lookup.max_rows_per_token {settings.max_rows_per_token:,}: make it "
            "again, or set both to what the file has"
        )
    return allocation


def planned_lookup(config: Config, vocab_size: int) -> LookupDimensions | None:
    """Returns the lookup layers with the allocation of lookup.allocation_file, or else of the run folder.

    None if there is neither: the plan then counts the most rows that a token may have.
    """
    lookup = resolve_dimensions(config, vocab_size).lookup
    in_folder = Path(config.run.folder) / str(config.run.name) / ALLOCATION_NAME
    path = Path(config.lookup.allocation_file) if config.lookup.allocation_file else in_folder
    if lookup is None or (path == in_folder and not path.is_file()):
        return None
    return with_allocation(lookup, load_allocation(path, load_tokenizer(config.data.tokenizer)))


def with_allocation(lookup: LookupDimensions, allocation: Allocation) -> LookupDimensions:
    """Returns the lookup layers with the allocation's rows per token."""
    rows = " ".join(map(str, allocation.rows_per_token.tolist()))
    return replace(lookup, rows_per_token=rows, mean_rows=allocation.mean_rows)
