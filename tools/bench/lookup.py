"""Measures lookup layers on real text: the attention over table rows alone, and whole training steps."""

import itertools
import statistics
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megachat.config import Config, load_config
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.device import dtype_name
from megachat.errors import UserError
from megachat.kernels.lookup import TableRows, lookup_attention
from megachat.planning.dimensions import LookupDimensions, flops_per_token
from megachat.planning.plan import Plan, resolve_plan
from megachat.planning.sizes import LOOKUP_ROWS_PER_TOKEN, resolve_dimensions
from megachat.prepare.lookup_allocation import sample_documents
from megachat.programs.walk_memory import LiveBytes
from megachat.train.lookup_rows import read_or_allocate, with_allocation
from tools.bench.turns import round_ratios, time_in_turn

TOKENS = 8192
ORACLE_TOKENS = 256  # gathered at a time: 134 MB at 512 rows and width 256


def lookup_config(arguments: Namespace) -> tuple[Config, Tokenizer]:
    """Returns the config with --data and --tokenizer, and the tokenizer."""
    data = [f"data.folder={arguments.data}", f"data.tokenizer={arguments.tokenizer}"]
    config = load_config(arguments.config, ["lookup.sample_tokens=2000000", *data, *arguments.set])
    return config, load_tokenizer(config.data.tokenizer)


def text_ids(config: Config, tokenizer: Tokenizer, count: int) -> torch.Tensor:
    """Returns the last `count` of the first 2 * `count` + 500,000 ids of the training text, int64."""
    documents = sample_documents(config.data.folder, tokenizer, 500_000 + 2 * count)
    return torch.tensor(list(itertools.chain.from_iterable(document.tolist() for document in documents))[-count:])


def gathered_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, rows: TableRows, scale: float
) -> torch.Tensor:
    """Computes lookup_attention of a whole table with the rows of every token gathered: [tokens, most rows, width]."""
    sizes = rows.first[ids + 1] - rows.first[ids]
    offsets = torch.arange(int(sizes.max()))
    missing = offsets >= sizes[:, None]
    places = torch.where(missing, 0, rows.first[ids][:, None] + offsets)
    scores = scale * torch.einsum("tc,trc->tr", queries, F.embedding(places, keys))
    weights = torch.softmax(scores.masked_fill(missing, -torch.inf), dim=-1)
    return torch.einsum("tr,trc->tc", weights, F.embedding(places, values))


def read_actions(width: int, dtype: torch.dtype, ids: torch.Tensor, rows: TableRows) -> dict[str, Callable]:
    """Returns {name: forward and backward pass} of the kernel, of gathering, and of a block's matrices."""
    queries = torch.randn(len(ids), width, dtype=dtype, requires_grad=True)
    table = torch.randn(int(rows.first[-1]), width, dtype=dtype, requires_grad=True)
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    matrices = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    gradient, scale = torch.randn(len(ids), width, dtype=dtype), width**-0.5

    def kernel() -> None:
        # a copy of the ids, because each micro-batch groups its tokens once
        output = lookup_attention(queries, table, table, ids.clone(), rows, scale)
        torch.autograd.grad(output, (queries, table), gradient)

    def gather() -> None:
        total = torch.zeros_like(table, dtype=torch.float32)
        for part, g, local in zip(*(tensor.split(ORACLE_TOKENS) for tensor in (queries, gradient, ids)), strict=True):
            total += torch.autograd.grad(gathered_attention(part, table, table, local, rows, scale), (table, part), g)[
                0
            ]

    def block() -> None:
        x = queries
        for matrix in matrices:
            x = F.linear(x, matrix)
        torch.autograd.grad(x, (queries, *matrices), gradient)

    return {"kernel": kernel, "gathered": gather, "matrices of a block": block}


def bench_lookup_read(arguments: Namespace) -> dict:
    """Measures forward and backward of attention over table rows for 8,192 tokens of --data."""
    config, tokenizer = lookup_config(arguments)
    allocation = read_or_allocate(config, LOOKUP_ROWS_PER_TOKEN * tokenizer.vocab_size, tokenizer)
    last = torch.from_numpy(allocation.rows_per_token).long().cumsum(0)
    rows = TableRows(torch.nn.functional.pad(last, (1, 0)))
    ids, width, dtypes = text_ids(config, tokenizer, TOKENS), 256, {}
    for dtype in (torch.float32, torch.bfloat16):
        actions = read_actions(width, dtype, ids, rows)
        seconds = time_in_turn(actions, arguments.rounds)
        with LiveBytes() as live:
            actions["kernel"]()
        ratios = {
            f"kernel_over_{name}": statistics.median(round_ratios(seconds["kernel"], others))
            for name, others in seconds.items()
            if name != "kernel"
        }
        medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
        tables = allocation.rows * width * dtype.itemsize
        dtypes[dtype_name(dtype)] = (
            {"median_ms": medians}
            | ratios
            | {
                "bytes_at_most": live.most,
                "of_it_gradient_of_the_table": tables,
            }
        )
    facts = {
        "tokens": TOKENS,
        "distinct": len(ids.unique()),
        "vocabulary": tokenizer.vocab_size,
        "rows": allocation.rows,
        "most_rows": int(allocation.rows_per_token.max()),
        "mean_rows": float((rows.first[ids + 1] - rows.first[ids]).float().mean()),
        "width": width,
        "threads": torch.get_num_threads(),
    }
    return {"what": "milliseconds of a forward and a backward pass", "facts": facts} | dtypes


def step_plans(config: Config, lookup: LookupDimensions, vocab_size: int) -> dict[str, tuple[Config, Plan]]:
    """Returns {side: config and plan}: with tables, without them, and with so many more blocks of the same width that
    the FLOPs per token are not fewer than with tables.
    """
    with_tables = resolve_plan(config, 1, vocab_size, lookup)
    flops, width = flops_per_token(with_tables.dims), with_tables.dims.width
    plain = replace_model(config, config.model.depth, width)
    sides = {"tables": (config, with_tables), "plain": (plain, resolve_plan(plain, 1, vocab_size))}
    for depth in itertools.count(config.model.depth + 1):
        deeper = replace_model(config, depth, width)
        plan = resolve_plan(deeper, 1, vocab_size)
        if flops_per_token(plan.dims) >= flops:
            return sides | {"deeper": (deeper, plan)}
    raise AssertionError


def replace_model(config: Config, depth: int, width: int) -> Config:
    """Returns the config without lookup layers, with another depth at the same width."""
    model = config.model.model_copy(update={"depth": depth, "aspect_ratio": width // depth})
    return config.model_copy(update={"model": model, "lookup": type(config.lookup)()})


def bench_lookup_step(arguments: Namespace) -> dict:
    """Measures training steps with lookup layers against steps without tables at equal active FLOPs per token.

    Without tables, the time at equal FLOPs is interpolated between two models of the same width: with as many blocks,
    and with more blocks.
    """
    from tools.bench.step import build_steps  # imports DeepSpeed

    config, tokenizer = lookup_config(arguments)
    lookup = resolve_dimensions(config, tokenizer.vocab_size).lookup
    if lookup is None:
        raise UserError("lookup_step requires lookup layers: --set lookup.after_blocks=[1]")
    lookup = with_allocation(lookup, read_or_allocate(config, lookup.rows, tokenizer))
    sides = step_plans(config, lookup, tokenizer.vocab_size)
    plan = sides["tables"][1]
    ids = text_ids(config, tokenizer, plan.rows_per_step * (plan.dims.sequence_len + 1))
    seconds = time_in_turn(build_steps(sides, ids.view(plan.rows_per_step, -1)), arguments.rounds)
    flops = {name: flops_per_token(side.dims) for name, (_, side) in sides.items()}
    share = (flops["tables"] - flops["plain"]) / (flops["deeper"] - flops["plain"])
    rounds = zip(seconds["tables"], seconds["plain"], seconds["deeper"], strict=True)
    facts = {
        "blocks": {name: side.dims.depth for name, (_, side) in sides.items()},
        "lookup_after_blocks": lookup.blocks,
        "width": plan.dims.width,
        "tokens_per_step": plan.rows_per_step * plan.dims.sequence_len,
        "vocabulary": tokenizer.vocab_size,
        "rows": lookup.rows,
        "mean_rows": lookup.mean_rows,
        "flops_per_token": flops,
        "threads": torch.get_num_threads(),
    }
    return {
        "what": "seconds of a training step; equal FLOPs: interpolated between plain and deeper",
        "facts": facts,
        "median_s": {name: statistics.median(values) for name, values in seconds.items()},
        "tables_over_equal_flops": statistics.median(t / (p + share * (d - p)) for t, p, d in rounds),
    }
