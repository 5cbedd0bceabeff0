"""Names every number of a plan: what it is, its formula with the numbers put in, and its source."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megachat.planning.explain import plan_values
from megachat.planning.plan import RATES, Plan

if TYPE_CHECKING:
    from megachat.planning.memory import Memory  # imports torch

_NANOCHAT = "nanochat's rule"
_POWER_LINES = "Power Lines, arXiv 2505.13738, as nanochat applies it"
_RATE_RULES = "nanochat's settings, scaled as it scales them: square root of the batch, width^-0.5 for AdamW"
_COUNT = "counted from the shapes; a test compares it with the model"
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
_MEMORY = "counted from the plan; tests compare it with what ranks hold"


@dataclass(frozen=True)
class Number:
    """What a number of the plan is. formula: where Plan.why has none. source: of the rule."""

    meaning: str
    formula: str = ""
    source: str = ""


NUMBERS = {
    "depth": Number("blocks", "model.depth"),
    "width": Number("channels of the residual stream", source=_NANOCHAT),
    "heads": Number("query heads", source=_NANOCHAT),
    "kv_heads": Number("key/value heads", "model.kv_heads, else heads"),
    "head_size": Number("channels per head", "model.head_size"),
    "sequence_len": Number("tokens per row", "model.sequence_len"),
    "vocab_size": Number("tokens of the vocabulary", "model.vocab_size, else the tokenizer's"),
    "windows": Number("earlier positions that each block's queries see", source=_NANOCHAT),
    "rotary_base": Number("base of the rotary frequencies", "model.rotary_base"),
    "qk_scale": Number("factor on normed queries and keys", "model.qk_scale"),
    "norm_epsilon": Number("added to the mean square in every norm", "model.norm_epsilon"),
    "value_embeddings": Number("whether every other block has a value embedding", "model.value_embeddings"),
    "lambdas": Number("whether residual mix, smear and backout are trained", "model.lambdas"),
    "norm_scales": Number("norms with a learned scale per channel", "model.norm_scales, in the order of the model"),
    "lookup.blocks": Number("blocks that end with a lookup layer", "lookup.after_blocks, sorted", "arXiv 2601.21461"),
    "lookup.rows": Number("rows of each lookup table", source="arXiv 2601.21461"),
    "lookup.up_width": Number("channels between W_up and W_mix", source="arXiv 2601.21461"),
    "lookup.tied": Number("whether keys are the values", "lookup.tied"),
    "lookup.score_scale": Number("factor on lookup scores", "lookup.score_scale"),
    "lookup.mean_rows": Number("rows that a token of the text has on average"),
    "ngram.blocks": Number("blocks with n-gram values", "ngram.blocks, sorted"),
    "ngram.orders": Number("lengths of n-grams", "ngram.orders, sorted"),
    "ngram.rows": Number("rows of each n-gram table"),
    "ngram.width": Number("channels of a row"),
    "ngram.sign_trick": Number("whether rows are multiplied by signs", "ngram.sign_trick"),
    "ngram.seed": Number("seed of the hashes", "ngram.seed"),
    "ngram.bos": Number("id that begins a document"),
    "layout.data": Number("ranks of the data axis", "world / (parallel.tensor * parallel.pipeline)"),
    "layout.tensor": Number("ranks that share each matrix", "parallel.tensor"),
    "layout.pipeline": Number("pipeline stages", "parallel.pipeline"),
    "stages": Number("layers [first, last) of each stage; 0 embeds, the blocks follow, then the head"),
    "bubble": Number(
        "share of a step that pipeline ranks wait for each other", source="1F1B, PipeDream, arXiv 2006.09503"
    ),
    "tokens_per_step": Number("tokens of one optimizer step over all ranks", source=_POWER_LINES),
    "rows_per_step": Number("rows of one optimizer step over all ranks"),
    "micro_rows": Number("rows of a micro-batch on one rank"),
    "accumulation": Number("micro-batches of a step on one rank"),
    "steps": Number("optimizer steps of the horizon", source=_NANOCHAT),
    "stop_step": Number("the step at which this job stops", "the smaller of steps and horizon.stop_step, if set"),
    "total_tokens": Number("tokens of the whole horizon"),
    "flops_per_token": Number("training FLOPs per token", source="PaLM, arXiv 2204.02311, appendix B, with windows"),
    "total_flops": Number("training FLOPs of the whole horizon"),
    **{f"rates.{name}": Number(rule.meaning, source=_RATE_RULES) for name, rule in RATES.items()},
    "weight_decay": Number("Muon's weight decay before its cosine", source="arXiv 2405.13698, as nanochat applies it"),
    "evaluation_rows": Number("rows of one validation"),
    "parameters.wte": Number("elements of the embedding table", "vocab_size up to a multiple of 64 * width", _COUNT),
    "parameters.value_embeds": Number(
        "elements of the value embeddings", "blocks that have one * padded vocabulary * kv_heads * head_size", _COUNT
    ),
    "parameters.lookup_tables": Number("elements of the lookup tables", "layers * rows * width, twice if untied"),
    "parameters.ngram": Number("elements of the n-gram tables", "blocks * orders * ngram.rows * ngram.width"),
    "parameters.lm_head": Number("elements of the head", "vocab_size up to a multiple of 64 * width", _COUNT),
    "parameters.matrices": Number(
        "elements of Muon's matrices",
        "per block 2 * width * (heads * head_size + kv_heads * head_size + 4 * width), gates and lookup layers beside",
        _COUNT,
    ),
    "parameters.scalars": Number("lambdas and the smear gate", "2 * depth + 24 + 2", _COUNT),
    "parameters.norm_scales": Number("learned scales of norms", "a number per channel of each norm", _COUNT),
    "parameters.total": Number("elements of all parameters", "sum of all kinds", _COUNT),
    "memory.weights": Number(
        "bytes of weights on the fullest rank", "bytes per element of the compute dtype * elements of the rank", _MEMORY
    ),
    "memory.masters": Number("bytes of float32 masters", "4 * elements of this rank's share of the state", _MEMORY),
    "memory.moments": Number(
        "bytes of optimizer state", "8 * AdamW's share + 4 * Muon's share + a number per row or column", _MEMORY
    ),
    "memory.gradients": Number("bytes of gradients", "4 * elements of the rank's weights", _MEMORY),
    "memory.activations": Number(
        "bytes kept for the backward pass",
        "what each block of the stage keeps per token * micro_rows * sequence_len * micro-batches in flight",
        _MEMORY,
    ),
    "memory.workspace": Number(
        "bytes of what else exists at the peak", "the larger of the head's, a block's and the optimizer step's needs"
    ),
    "memory.total": Number(
        "bytes of the fullest rank", "weights + masters + moments + gradients + activations + workspace"
    ),
}


def plan_numbers(plan: Plan) -> dict[str, object]:
    """Returns every number of the plan by its name in NUMBERS."""
    values = plan_values(plan)
    dims = values.pop("dims")
    del values["why"]
    numbers = {name: value for name, value in (dims | values).items() if not isinstance(value, dict)}
    for group in ("lookup", "ngram"):
        numbers |= {f"{group}.{name}": value for name, value in (dims[group] or {}).items()}
        numbers.pop(group, None)
    for group in ("layout", "rates", "parameters"):
        numbers |= {f"{group}.{name}": value for name, value in values[group].items()}
    return numbers


def memory_numbers(stages: "list[Memory]") -> dict[str, int]:
    """Returns the bytes of the fullest rank by their names in NUMBERS."""
    fullest = max(stages, key=lambda stage: stage.total)
    return {name: getattr(fullest, name.partition(".")[2]) for name in NUMBERS if name.startswith("memory.")}


def formula_of(name: str, plan: Plan) -> str:
    """Returns the formula of a number of the plan."""
    return plan.why.get(name) or NUMBERS[name].formula


def with_numbers(formula: str, values: Mapping[str, object]) -> str | None:
    """Returns an arithmetic formula with the values of its names; None for words, and if it has the numbers already."""
    numeric = {name: value for name, value in values.items() if type(value) in (int, float)}
    names = set(_NAME.findall(formula))
    try:
        ast.parse(formula.replace("^", "**"), mode="eval")
    except SyntaxError:
        return None
    if not names or not names <= numeric.keys() or not re.search(r"[*/+-]", formula):
        return None
    return _NAME.sub(lambda match: f"{numeric[match[0]]}", formula)


def names_in(formula: str) -> set[str]:
    """Returns the words of a formula, among them the names of numbers and settings."""
    return set(_NAME.findall(formula))
