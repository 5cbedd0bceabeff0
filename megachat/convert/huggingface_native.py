"""transformers' NanoChatForCausalLM: its names and config. It is nanochat's first GPT.

What that class does not compute is in `find_obstacles`; a model that has any of it needs megachat's class.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

from megachat.convert.architecture import places
from megachat.convert.reader import CheckpointReader
from megachat.errors import UserError
from megachat.model.gpt import LOGIT_CAP
from megachat.planning.dimensions import MLP_RATIO, Dimensions

_ROTARY_BASE = 10_000.0  # transformers' default, if the config has none

# Our names -> transformers'; N is the number of a block. Everything else that our model has must have no effect.
TENSORS = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.h.N.attn.c_q.weight": "model.layers.N.self_attn.q_proj.weight",
    "transformer.h.N.attn.c_k.weight": "model.layers.N.self_attn.k_proj.weight",
    "transformer.h.N.attn.c_v.weight": "model.layers.N.self_attn.v_proj.weight",
    "transformer.h.N.attn.c_proj.weight": "model.layers.N.self_attn.o_proj.weight",
    "transformer.h.N.mlp.c_fc.weight": "model.layers.N.mlp.fc1.weight",
    "transformer.h.N.mlp.c_proj.weight": "model.layers.N.mlp.fc2.weight",
    "lm_head.weight": "lm_head.weight",
}
# Keys of config.json -> our sizes.
NATIVE_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "max_position_embeddings": "sequence_len",
}
# Keys that are absent or have these values: transformers' class can compute something else, our model cannot.
FIXED = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "final_logit_softcapping": LOGIT_CAP,
    "attention_dropout": 0.0,
}
# Keys that are checked one by one; then those that do not change the logits.
OTHERS = """
    model_type intermediate_size num_key_value_heads head_dim rms_norm_eps rope_parameters rope_theta rope_scaling
    architectures dtype torch_dtype transformers_version use_cache initializer_range _name_or_path bos_token_id
    eos_token_id pad_token_id id2label label2id problem_type is_encoder_decoder chunk_size_feed_forward return_dict
    output_hidden_states output_attentions
""".split()


def key_of(name: str) -> str | None:
    """Returns transformers' name of one of our tensors ("model/..."), or None if it has no such parameter."""
    block = re.search(r"\.h\.(\d+)\.", name)
    key = TENSORS.get(re.sub(r"\.h\.\d+\.", ".h.N.", name.removeprefix("model/")))
    return key and key.replace(".N.", f".{block[1]}." if block else "")


def find_obstacles(source: CheckpointReader) -> list[str]:
    """Returns what transformers' class does not compute of the model; empty if it computes the same."""
    dims, obstacles = source.dims, []
    if dims.value_embeddings:
        obstacles.append("value embeddings")
    if dims.lookup:
        obstacles.append("lookup layers")
    if dims.ngram:
        obstacles.append("n-gram values")
    if dims.norm_scales:
        obstacles.append("learned scales of norms")
    if dims.qk_scale != 1.0:
        obstacles.append(f"the factor {dims.qk_scale:g} on normed queries and keys")
    if short := sorted({window for window in dims.windows if window < dims.sequence_len}):
        obstacles.append(f"attention windows of {short[0]} tokens")
    all_places = places(replace(dims, lambdas="neutral", norm_scales=()))
    neutral = {f"model/{place.name}": place.start[1] for place in all_places if len(place.whole) == 1}
    for name, scalar in source.tensors(neutral):
        if not bool((scalar == neutral[name]).all()):
            obstacles.append(f"{name.removeprefix('model/')} other than {neutral[name]:g}")
    return obstacles


def config_of_dims(dims: Dimensions) -> dict:
    """Returns transformers' config.json without the tokens."""
    return {
        **FIXED,
        **{key: getattr(dims, ours) for key, ours in NATIVE_SIZES.items()},
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": "float32",
        "intermediate_size": MLP_RATIO * dims.width,
        "num_key_value_heads": dims.kv_heads,
        "rms_norm_eps": dims.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": dims.rotary_base},
    }


def dims_of_config(config: dict, path: Path) -> Dimensions:
    """Returns the model's sizes. Raises UserError naming what our model cannot compute."""
    for key, value in config.items():
        if key in FIXED and value != FIXED[key] and not (key == "attention_dropout" and not value):
            ours = f"megachat's model has {json.dumps(FIXED[key])}"
            raise UserError(f"{path}: {key} is {json.dumps(value)}, and {ours}: it cannot be converted")
        if key not in {*FIXED, *NATIVE_SIZES, *OTHERS}:
            problem = f"{key} is unknown to megachat for transformers' nanochat"
            raise UserError(f"{path}: {problem}: remove it if it does not change the model")
    rope = dict(config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", _ROTARY_BASE)})
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        kind = rope.get("rope_type") or config["rope_scaling"]
        raise UserError(f"{path}: rotary positions of type {kind} are not megachat's: it cannot be converted")
    try:
        sizes = {ours: int(config[key]) for key, ours in NATIVE_SIZES.items()}
        width, heads, length = sizes["width"], sizes["heads"], sizes["sequence_len"]
        head_size = config.get("head_dim") or width // heads
        if config.get("intermediate_size") != MLP_RATIO * width or head_size * heads != width:
            required = f"intermediate_size must be {MLP_RATIO} x hidden_size, and heads x head_dim hidden_size"
            raise UserError(f"{path}: {required}: it cannot be converted")
        return Dimensions(
            **sizes,  # type: ignore[arg-type]
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=head_size,
            windows=(length,) * sizes["depth"],
            rotary_base=float(rope.get("rope_theta", _ROTARY_BASE)),
            qk_scale=1.0,
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            value_embeddings=False,
            lambdas="neutral",
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        problem = f"{path} does not give the model's sizes ({type(error).__name__}: {error})"
        raise UserError(f"{problem}: copy it again") from None
