"""How a setting is declared, bounds with their reasons, and what is said about a mistake in a config."""

import difflib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

NEAR = 0.75  # least similarity of an unknown key to the one that is suggested
UNSUPPORTED_FP8 = {
    "rowwise": "scales by row have no equivalent in Transformer Engine: set tensorwise, or blockwise, which is finer",
    "delayed": "delayed scaling keeps a history of maxima that checkpoints do not hold: set tensorwise, which uses the "
    "current maximum",
    "mxfp8": "MXFP8 needs a Blackwell GPU and is not supported: set blockwise",
    "nvfp4": "four bits are not supported: set blockwise",
}


# Part of an unknown key's name -> why there is no such setting. The first that fits counts.
_REFUSED_IDEAS = {
    "checkpointing": "batch.recompute chooses what a block recomputes in the backward pass",
    "dropout": "dropout is not supported: in pretraining hardly any text is seen twice",
    "activation": "the MLP has nanochat's squared ReLU; others were measured to be no better",
    "width": "the model's width is model.depth times model.aspect_ratio",
    "swiglu": "the MLP has nanochat's squared ReLU; nanochat measured SwiGLU to be worse",
    "moe": "mixtures of experts are not supported: nanochat measured no gain in time",
    "expert": "mixtures of experts are not supported: nanochat measured no gain in time",
    "mtp": "multi-token prediction is not supported: nanochat measured it to be worse",
    "multi_token": "multi-token prediction is not supported: nanochat measured it to be worse",
    "ramp": "the batch is constant: nanochat measured hardly any gain by a batch ramp",
    "batch_warmup": "the batch is constant: nanochat measured hardly any gain by a batch ramp",
    "softcap": "the logits' softcap is nanochat's 15",
    "beta": "each group of parameters has a pair, such as optimizer.embedding_betas",
    "zero": "AdamW always has ZeRO-1 and Muon its partition; other stages are not supported",
}


class Most(NamedTuple):
    """An upper bound and its reason."""

    value: float
    reason: str


STEPS = Most(10**9, "the longest trainings have 10^7 steps")
BATCH = Most(10**13, "a whole training has about as many tokens")
SECONDS = Most(10**7, "no job waits 116 days")
RATE = Most(100, "already a rate of 1 moves most weights by more than their size in every step")
MOMENT = Most(0.9999, "a mean over more than 10,000 steps hardly follows the gradient")
RANKS = Most(10**5, "no job has as many ranks")
WIDTH = Most(4096, "such a model fits no device")
TOKENS = Most(2**24, "such a model fits no device")
THREADS = Most(1024, "more threads take memory and no host has as many cores")


class Section(BaseModel):
    """Frozen, strict settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _refuse_nul(cls, value):
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and "\0" in text for text in texts):
            raise PydanticCustomError("nul", "must not contain the character NUL")
        return value


def setting(default: Any, description: str, most: Most | None = None, **limits: Any) -> Any:
    """Returns the field of a setting. description: its meaning, for the docs, `explain` and editors."""
    if most:
        limits |= {"le": most.value, "json_schema_extra": {"reason": most.reason}}
    return Field(default, description=description, **limits)


def check_run_name(name: str | None) -> str | None:
    """Returns the name of a run. Raises PydanticCustomError if it would lead out of run.folder or break a log line."""
    if name is not None and (name in (".", "..") or "/" in name or not name.isprintable()):
        raise PydanticCustomError("run_name", "is a path or has control characters: set run.folder to the parent")
    return name


def check_unique(values: tuple) -> tuple:
    """Returns the numbers or names. Raises PydanticCustomError if one of them occurs twice."""
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise PydanticCustomError("duplicates", "must not contain {value} twice", {"value": repeated[0]})
    return values


def shown(text: str) -> str:
    """Returns the text on one line, at most 80 characters of it."""
    line = text if text.isprintable() else text.encode("unicode_escape").decode()
    return line if len(line) <= 80 else f"{line[:80]}..."


def describe_mistake(source: str, problem: ErrorDetails, sections: Mapping[str, Mapping[str, FieldInfo]]) -> str:
    """Returns one sentence: the key, its value, the limit with its reason, or what to write instead."""
    if not problem["loc"]:  # of the whole text
        return f"{source}: not a config: {problem['msg']}"
    location = [shown(str(part)) for part in problem["loc"]]
    name = ".".join(location[:2])
    if problem["type"] == "extra_forbidden":
        return f"{source}: unknown key {name}; {hint(location, sections)}"
    text = problem["msg"].replace("Input should", "should")
    if problem["type"] == "less_than_equal" and len(location) == 2:
        extra = sections[location[0]][location[1]].json_schema_extra
        text += f": {extra['reason']}" if isinstance(extra, dict) else ""
    value = shown(json.dumps(problem["input"], default=str))
    return f"{source}: {name} is {value} but {text}"


def hint(location: list[str], sections: Mapping[str, Mapping[str, FieldInfo]]) -> str:
    """Returns what to write instead of an unknown key: only a name that is near, or why there is none."""
    key = location[-1]
    if len(location) == 1:
        near = difflib.get_close_matches(key, sections, n=1, cutoff=NEAR)
    else:
        near = [f"{section}.{key}" for section in sections if key in sections[section]][:1]
        close = difflib.get_close_matches(key, sections[location[0]], n=1, cutoff=NEAR)
        near = near or [f"{location[0]}.{name}" for name in close]
    if near and key not in _REFUSED_IDEAS:
        return f"did you mean {near[0]}?"
    lower = key.lower().replace("-", "_")
    reason = next((reason for idea, reason in _REFUSED_IDEAS.items() if idea in lower), None)
    return reason or "see megachat/settings/ for all keys"
