"""The folder that transformers' NanoChatForCausalLM loads: config.json and safetensors.

That class is nanochat's first GPT (transformers, models/nanochat). What it does not compute, it cannot carry: see `not_carried`.
"""

import json
from pathlib import Path

import torch

from megachat.convert.architecture import dims_of, weight_shapes
from megachat.convert.opened import Entry, Opened
from megachat.convert.plain import SHARD_BYTES, open_tensors, save_tensors, shards_of
from megachat.data.tokenizer import Tokenizer, save_tokenizer
from megachat.errors import UserError
from megachat.files import write_json
from megachat.model.gpt import LOGIT_CAP
from megachat.planning.dimensions import MLP_RATIO, Dimensions

INDEX_FILE, WHOLE_FILE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FOLDER = "megachat_tokenizer"
_ROTARY_BASE = 10_000.0  # transformers' own default, where the config names none
_BLOCK = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TABLES = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
_NEUTRAL = {"resid_lambdas": 1.0, "x0_lambdas": 0.0, "smear_lambda": 0.0, "backout_lambda": 0.0}
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
# What a config.json may say, and must say so where it does: transformers' class can do it otherwise, our model cannot.
_FIXED = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "final_logit_softcapping": LOGIT_CAP,
    "attention_dropout": 0.0,
}
_KNOWN = {
    "model_type",
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
}
# What does not change the logits.
_KNOWN |= {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "initializer_range",
    "_name_or_path",
}
_KNOWN |= {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "id2label",
    "label2id",
    "problem_type",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
}
_KNOWN |= {"return_dict", "output_hidden_states", "output_attentions"}


def is_huggingface(folder: Path) -> bool:
    """True for a folder with a config.json of transformers."""
    return "model_type" in (_read_json(folder / "config.json") or {})


def key_of(name: str) -> str | None:
    """transformers' name of a parameter; None for those it does not have."""
    if name in _TABLES:
        return _TABLES[name]
    _, _, block, *rest = [*name.split("."), "", ""]
    inner = _BLOCK.get(".".join(rest).removesuffix("..").removesuffix(".weight"))
    return f"model.layers.{block}.{inner}.weight" if inner else None


def not_carried(source: Opened) -> list[str]:
    """What of the model transformers' class does not compute, in words; empty when it computes the same."""
    dims, found = dims_of(source.facts), []
    if dims.value_embeddings:
        found.append("value embeddings: train with model.value_embeddings=false")
    if dims.qk_scale != 1.0:
        found.append(f"queries and keys scaled by {dims.qk_scale:g} after their norm: train with model.qk_scale=1")
    if short := sorted({window for window in dims.windows if window < dims.sequence_len}):
        found.append(f"attention windows of {short[0]} tokens: train with model.window_pattern=L")
    scalars = dict(source.tensors([f"model/{name}" for name in _NEUTRAL]))
    for name, neutral in _NEUTRAL.items():
        if not bool((scalars[f"model/{name}"] == neutral).all()):
            found.append(f"{name} other than {neutral:g}: train with model.lambdas=neutral")
    return found


def carried(source: Opened) -> list[str]:
    """Names of the tensors it holds."""
    return [name for name in source.entries if name.startswith("model/") and key_of(name.removeprefix("model/"))]


def without_padding(name: str, tensor: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The tensor with zeros in the rows of tables that are no tokens, as it comes back from a folder without them."""
    if name.removeprefix("model/") not in _TABLES:
        return tensor
    tensor = tensor.clone()
    tensor[vocab_size:] = 0
    return tensor


def write_huggingface(source: Opened, folder: Path, tokenizer: Tokenizer, origin: dict) -> None:
    """Write config.json, the weights in float32 and megachat's tokenizer folder. The caller has looked at `not_carried`."""
    dims = dims_of(source.facts)
    shards, placed = shards_of(source, carried(source), SHARD_BYTES), {}
    for number, names in enumerate(shards, start=1):
        file = WHOLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key_of(name.removeprefix("model/")): tensor for name, tensor in source.tensors(names)}
        tensors = {
            key: tensor[: dims.vocab_size] if key in _TABLES.values() else tensor for key, tensor in tensors.items()
        }
        save_tensors(tensors, folder / file)
        placed |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(source.entries[name].bytes for names in shards for name in names)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": placed})
    write_json(folder / "config.json", config_of_dims(dims, tokenizer.bos))
    save_tokenizer(folder / TOKENIZER_FOLDER, tokenizer, origin)


def config_of_dims(dims: Dimensions, bos: int) -> dict:
    """transformers' config.json. A document begins, and so the one before it ends, with BOS; no token is padding."""
    return _FIXED | {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": "float32",
        "vocab_size": dims.vocab_size,
        "hidden_size": dims.width,
        "intermediate_size": MLP_RATIO * dims.width,
        "num_hidden_layers": dims.depth,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "max_position_embeddings": dims.sequence_len,
        "rms_norm_eps": dims.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": dims.rotary_base},
        "bos_token_id": bos,
        "eos_token_id": bos,
        "pad_token_id": None,
    }


def dims_of_config(told: dict, path: Path) -> Dimensions:
    """The model's sizes. Raises UserError for what our model cannot do, by name."""
    if told.get("model_type") != "nanochat":
        raise UserError(f"{path} is of a {told.get('model_type')} model: only transformers' nanochat can be converted")
    for key, value in told.items():
        if key in _FIXED and value != _FIXED[key] and not (key == "attention_dropout" and not value):
            raise UserError(
                f"{path}: {key} is {json.dumps(value)}, and megachat's model has {json.dumps(_FIXED[key])}: it cannot be converted"
            )
        if key not in _FIXED and key not in _KNOWN and key not in _SIZES:
            raise UserError(
                f"{path}: {key} is nothing that megachat knows of transformers' nanochat: remove it if it does not change the model"
            )
    rope = dict(told.get("rope_parameters") or {"rope_theta": told.get("rope_theta", _ROTARY_BASE)})
    if rope.get("rope_type", "default") != "default" or told.get("rope_scaling"):
        raise UserError(
            f"{path}: rotary positions of type {rope.get('rope_type') or told['rope_scaling']} are not megachat's: it cannot be converted"
        )
    try:
        depth, width, heads, length, vocab_size = (int(told[key]) for key in _SIZES)
        head_size = told.get("head_dim") or width // heads
        if told.get("intermediate_size") != MLP_RATIO * width or head_size * heads != width:
            raise UserError(
                f"{path}: intermediate_size must be {MLP_RATIO} x hidden_size, and heads x head_dim hidden_size: it cannot be converted"
            )
        base, epsilon = float(rope.get("rope_theta", _ROTARY_BASE)), float(told.get("rms_norm_eps", 1e-6))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} does not tell the model's sizes ({type(error).__name__}: {error}): copy it again"
        ) from None
    choices = {
        "rotary_base": base,
        "qk_scale": 1.0,
        "norm_epsilon": epsilon,
        "value_embeddings": False,
        "lambdas": "neutral",
    }
    kv_heads = told.get("num_key_value_heads") or heads
    return Dimensions(depth, width, heads, kv_heads, head_size, length, vocab_size, (length,) * depth, **choices)


def open_huggingface(folder: Path) -> Opened:
    """Weights by our names: tables padded with zero rows, and neutral scalars for what it does not have. Raises UserError."""
    dims = dims_of_config(_read_json(folder / "config.json") or {}, folder / "config.json")
    index = _read_json(folder / INDEX_FILE)
    files = sorted(set(index["weight_map"].values())) if index else [WHOLE_FILE]
    stored, read_stored = open_tensors(folder, files, lambda _, key: key)
    shapes = {f"model/{name}": shape for name, shape in weight_shapes(dims).items()}
    keys = {name: key_of(name.removeprefix("model/")) for name in shapes}
    for key in {key for key in keys.values() if key} ^ stored.keys():
        raise UserError(
            f"{folder}: {key} is {'not among' if key not in stored else 'too much for'} the weights of the model in config.json"
        )
    for name, key in keys.items():
        shape = (dims.vocab_size, dims.width) if key in _TABLES.values() else shapes[name]
        if key and stored[key].shape != shape:
            raise UserError(
                f"{folder}: {key} is {list(stored[key].shape)}, and the model in config.json has {list(shape)}"
            )

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        found = read_stored([keys[name] for name in names if keys[name]])
        return {
            name: _padded(found[keys[name]], shapes[name]) if keys[name] else _neutral(name, shapes[name])
            for name in names
        }

    entries = {
        name: Entry(shape, stored[keys[name]].dtype if keys[name] else "float32") for name, shape in shapes.items()
    }
    facts = {"step": 0, "model": vars(dims), "imported": {"form": "huggingface", "step": 0}}
    return Opened(
        "huggingface", folder, facts, entries, read, ("config.json", *files, *([INDEX_FILE] if index else []))
    )


def _padded(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(shape[0] - len(tensor), *shape[1:])))


def _neutral(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, _NEUTRAL.get(name.removeprefix("model/"), 0.0))


def transformers_logits(folder: Path, vocab_size: int):
    """transformers' own model in float32 from the folder, as a function (see `proof.Logits`). Raises UserError where it is not installed."""
    try:
        from transformers import NanoChatForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise UserError(
            "conversions of this format are proved with transformers' own class, which is not installed: pip install transformers"
        ) from None
    disable_progress_bar()
    model = NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    def compute(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits[0, :, :vocab_size].float()

    return compute


def _read_json(path: Path) -> dict | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None
    return told if isinstance(told, dict) else None
