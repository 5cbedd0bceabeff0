"""Writing nanochat's checkpoint folder, with the optimizer's state for any number of ranks."""

import json
from collections import OrderedDict
from pathlib import Path

import torch

from megachat.config import Config
from megachat.convert.architecture import dims_of, has_optimizer, weight_shapes
from megachat.convert.conversion import writing
from megachat.convert.nanochat import adamw_shares, optimizer_groups
from megachat.convert.nanochat_settings import meta_of, param_groups_of
from megachat.convert.opened import Opened
from megachat.data.tokenizer import Tokenizer
from megachat.optim.muon import second_moment_shape
from megachat.planning.dimensions import Dimensions
from megachat.planning.plan import resolve
from megachat.prepare.tokenizer_training import export_nanochat

_FIRST = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda", "transformer.wte.weight")
_LAST = ("lm_head.weight", "smear_gate.weight")


def state_order(dims: Dimensions) -> list[str]:
    """Parameter names in the order of nanochat's state_dict."""
    names = list(weight_shapes(dims))
    blocks = [name for name in names if name.startswith("transformer.h.")]
    return [*_FIRST, *blocks, *_LAST, *(name for name in names if name.startswith("value_embeds."))]


def is_table(name: str) -> bool:
    """True for what nanochat stores in the compute dtype: token and value embeddings, and their moments."""
    return "transformer.wte." in name or "value_embeds." in name


def rounded(name: str, tensor: torch.Tensor, tables: torch.dtype) -> torch.Tensor:
    """The tensor in the dtype it is written in."""
    return tensor.to(tables) if is_table(name) else tensor


def write_nanochat(source: Opened, folder: Path, tokenizer: Tokenizer, ranks: int, tables: torch.dtype) -> None:
    """Write weights, meta, the optimizer's state for `ranks` ranks and the tokenizer into `folder`. Weights and one rank's state are in memory.

    Raises UserError when nanochat cannot divide its tables over the ranks.
    """
    step, dims = source.facts["step"], dims_of(source.facts)
    config = Config.model_validate_json(json.dumps(source.facts["config"]))
    layout = source.facts["layout"]
    plan = resolve(config, layout["data"] * layout["tensor"] * layout["pipeline"], dims.vocab_size)
    imported = source.facts.get("imported") or {}
    unchanged = imported.get("form") == "nanochat" and imported["step"] == step
    meta = imported["meta"] if unchanged else meta_of(source.facts, dims, config, plan)
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    order = [f"model/{name}" for name in state_order(dims)]
    model = OrderedDict(
        (name.removeprefix("model/"), rounded(name, tensor, tables)) for name, tensor in source.tensors(order)
    )
    _save(model, folder / f"model_{step:06d}.pt")
    if has_optimizer(source.entries):
        groups = param_groups_of(source.facts, dims, config, plan)
        for rank in range(ranks):
            state = {"state": rank_state(source, dims, rank, ranks, tables), "param_groups": groups}
            _save(state, folder / f"optim_{step:06d}_rank{rank}.pt")
    export_nanochat(tokenizer, folder / "tokenizer")


def _save(value: dict, path: Path) -> None:
    with writing(path):
        torch.save(value, path)


def rank_state(source: Opened, dims: Dimensions, rank: int, ranks: int, tables: torch.dtype) -> dict[int, dict]:
    """What nanochat's optimizer keeps on a rank, by its numbers of the parameters."""
    state, number, shapes = {}, 0, weight_shapes(dims)
    for kind, names in optimizer_groups(dims):
        if kind == "matrix":
            state[number] = _stacked(source, names, shapes[names[0]], rank, ranks)
        else:
            for offset, name in enumerate(names):
                begin, end = adamw_shares(shapes[name], ranks)[rank]
                moments = dict(source.tensors([f"adamw/{name}/exp_avg", f"adamw/{name}/exp_avg_sq"]))
                parts = {
                    key.split("/")[-1]: rounded(name, whole[begin:end], tables).clone()
                    for key, whole in moments.items()
                }
                state[number + offset] = {"step": int(source.facts["adamw_steps"])} | parts
        number += len(names)
    return state


def _stacked(
    source: Opened, names: list[str], shape: tuple[int, int], rank: int, ranks: int
) -> dict[str, torch.Tensor]:
    """A rank's chunk of the stack of one shape, zeros where the stack has ended."""
    chunk = -(-len(names) // ranks)
    buffers = {"momentum": torch.zeros(chunk, *shape), "second_moment": torch.zeros(chunk, *second_moment_shape(shape))}
    for kind, buffer in buffers.items():
        own = [f"muon/{name}/{kind}" for name in names[rank * chunk : (rank + 1) * chunk]]
        for place, (_, whole) in enumerate(source.tensors(own)):
            buffer[place] = whole
    return {"momentum_buffer": buffers["momentum"], "second_momentum_buffer": buffers["second_moment"]}
