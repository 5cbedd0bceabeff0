"""The folder that transformers' NanoChatForCausalLM loads: config.json and safetensors.

That class is nanochat's first GPT (transformers, models/nanochat). What it does not compute cannot be exported: see
`find_obstacles`.
"""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megachat.convert.architecture import places
from megachat.convert.declaration import Export, Import, Logits, Tolerance
from megachat.convert.megachat import first_facts
from megachat.convert.nanochat_settings import make_resolvable
from megachat.convert.plain import open_tensors, save_tensors
from megachat.convert.reader import CheckpointReader, TensorInfo
from megachat.convert.tokenizers import load_tokenizer_of
from megachat.data.tokenizer import Tokenizer, save_tokenizer
from megachat.errors import UserError
from megachat.files import path_kind, refuse_damaged, write_json
from megachat.model.gpt import LOGIT_CAP
from megachat.place import Place
from megachat.planning.dimensions import MLP_RATIO, Dimensions

CONFIG_FILE, INDEX_FILE, WHOLE_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FOLDER = "megachat_tokenizer"
SHARD_BYTES = 2 << 30
TOLERANCE = Tolerance(logit=5e-4, kl=1e-7, argmax=0.99)  # transformers' kernels add up in another order
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
SIZES = {
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


def is_huggingface(folder: Path) -> bool:
    """True for a folder with a config.json of transformers."""
    return "model_type" in (_read_json(folder / CONFIG_FILE) or {})


def key_of(name: str) -> str | None:
    """Returns transformers' name of one of our tensors ("model/..."), or None if it has no such parameter."""
    block = re.search(r"\.h\.(\d+)\.", name)
    key = TENSORS.get(re.sub(r"\.h\.\d+\.", ".h.N.", name.removeprefix("model/")))
    return key and key.replace(".N.", f".{block[1]}." if block else "")


def export_huggingface(source: CheckpointReader, requested_tokenizer: Path | None) -> Export:
    """The weights and config.json. Raises UserError with everything that cannot be carried."""
    if obstacles := find_obstacles(source):
        raise UserError("\n".join(f"transformers' NanoChat does not compute this model's {part}" for part in obstacles))
    dims = source.dims
    tokenizer, origin = load_tokenizer_of(source, requested_tokenizer)
    tables = {f"model/{where.name}" for where in places(dims) if where.cut == "vocabulary"}  # a row per token
    names = [name for name in source.entries if name.startswith("model/") and key_of(name)]
    without_padding = source.select(names, lambda name, x: x[: dims.vocab_size] if name in tables else x)
    cleared = source.select(names, lambda name, x: _pad(x[: dims.vocab_size], len(x)) if name in tables else x)
    padding = dims.padded_vocab - dims.vocab_size
    return Export(
        lambda folder: write_huggingface(without_padding, folder, tokenizer, origin),
        lambda folder: open_huggingface(folder).select(names, facts={}),
        TOLERANCE,
        cleared,
        lambda folder: transformers_logits(folder, dims.vocab_size),
        (f"not carried: the optimizer's state, the loader, {padding} padding rows per table",),
    )


def import_huggingface(source: CheckpointReader, requested_tokenizer: Path | None) -> Import:
    """A checkpoint of step 0. transformers' vocab_size may count padding rows, so the tokenizer decides."""
    tokenizer, origin = load_tokenizer_of(source, requested_tokenizer)
    rows, dims = source.dims.vocab_size, replace(source.dims, vocab_size=tokenizer.vocab_size)
    if dims.padded_vocab < rows:
        needed = f"a model of {dims.vocab_size} tokens has {dims.padded_vocab}"
        raise UserError(f"{source.folder} has tables of {rows} rows, and {needed}: give its own --tokenizer")
    source = source.select(source.entries, facts=source.facts | {"model": vars(dims)})
    same = "depth head_size sequence_len kv_heads rotary_base qk_scale norm_epsilon value_embeddings lambdas".split()
    settings = {"aspect_ratio": max(1, dims.width // dims.depth), "window_pattern": "L"}
    settings |= {key: getattr(dims, key) for key in same}
    config: dict[str, dict] = {"model": settings, "batch": {}, "horizon": {}}
    remarks = make_resolvable(config, dims, 0)
    return Import(
        source,
        first_facts(source, {name: section for name, section in config.items() if section}, {}),
        tokenizer,
        origin,
        tolerance=TOLERANCE,
        source_logits=partial(transformers_logits, source.folder, dims.vocab_size),
        remarks=("the optimizer, the schedule and the documents start from the beginning", *remarks),
    )


def find_obstacles(source: CheckpointReader) -> list[str]:
    """Returns what transformers' class does not compute, and how to train without it; empty if it computes the same."""
    dims, obstacles = source.dims, []
    if dims.value_embeddings:
        obstacles.append("value embeddings: train with model.value_embeddings=false")
    if dims.lookup:
        obstacles.append("lookup layers: train with lookup.after_blocks=[]")
    if dims.ngram:
        obstacles.append("n-gram values: train with ngram.blocks=[]")
    if dims.qk_scale != 1.0:
        obstacles.append(f"queries and keys scaled by {dims.qk_scale:g} after their norm: train with model.qk_scale=1")
    if short := sorted({window for window in dims.windows if window < dims.sequence_len}):
        obstacles.append(f"attention windows of {short[0]} tokens: train with model.window_pattern=L")
    wheres = places(replace(dims, lambdas="neutral"))
    neutral = {f"model/{where.name}": where.start[1] for where in wheres if len(where.whole) == 1}
    for name, scalar in source.tensors(neutral):
        if not bool((scalar == neutral[name]).all()):
            value = f"{name.removeprefix('model/')} other than {neutral[name]:g}"
            obstacles.append(f"{value}: train with model.lambdas=neutral")
    return obstacles


def write_huggingface(source: CheckpointReader, folder: Path, tokenizer: Tokenizer, origin: dict) -> None:
    """Writes config.json, the weights in float32 and megachat's tokenizer folder. The caller has found no obstacles."""
    shards = source.batches(source.entries, SHARD_BYTES)
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WHOLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: tensor for name, tensor in source.tensors(shard) if (key := key_of(name))}
        save_tensors(tensors, folder / file)
        file_of |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(entry.bytes for entry in source.entries.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": file_of})
    write_json(folder / CONFIG_FILE, config_of_dims(source.dims, tokenizer.bos))
    save_tokenizer(folder / TOKENIZER_FOLDER, tokenizer, origin)


def config_of_dims(dims: Dimensions, bos: int) -> dict:
    """Returns transformers' config.json. BOS begins a document, and so ends the one before it; no token is padding."""
    return {
        **FIXED,
        **{key: getattr(dims, ours) for key, ours in SIZES.items()},
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": "float32",
        "intermediate_size": MLP_RATIO * dims.width,
        "num_key_value_heads": dims.kv_heads,
        "rms_norm_eps": dims.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": dims.rotary_base},
        "bos_token_id": bos,
        "eos_token_id": bos,
        "pad_token_id": None,
    }


def dims_of_config(config: dict, path: Path) -> Dimensions:
    """Returns the model's sizes. Raises UserError naming what our model cannot compute."""
    if config.get("model_type") != "nanochat":
        kind = f"{path} describes a {config.get('model_type')} model"
        raise UserError(f"{kind}: only transformers' nanochat can be converted")
    for key, value in config.items():
        if key in FIXED and value != FIXED[key] and not (key == "attention_dropout" and not value):
            ours = f"megachat's model has {json.dumps(FIXED[key])}"
            raise UserError(f"{path}: {key} is {json.dumps(value)}, and {ours}: it cannot be converted")
        if key not in {*FIXED, *SIZES, *OTHERS}:
            problem = f"{key} is unknown to megachat for transformers' nanochat"
            raise UserError(f"{path}: {problem}: remove it if it does not change the model")
    rope = dict(config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", _ROTARY_BASE)})
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        kind = rope.get("rope_type") or config["rope_scaling"]
        raise UserError(f"{path}: rotary positions of type {kind} are not megachat's: it cannot be converted")
    try:
        sizes = {ours: int(config[key]) for key, ours in SIZES.items()}
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


def open_huggingface(folder: Path, step: int | None = None) -> CheckpointReader:
    """Opens the weights under our names: tables padded with zero rows, neutral values for what transformers lacks.

    Raises UserError for what is missing, damaged or of another model.
    """
    dims = dims_of_config(_read_json(folder / CONFIG_FILE) or {}, folder / CONFIG_FILE)
    index = _read_json(folder / INDEX_FILE)
    files = sorted(set(index["weight_map"].values())) if index else [WHOLE_FILE]
    stored, read_stored = open_tensors(folder, files, lambda _, key: key)
    wheres = {f"model/{where.name}": where for where in places(dims)}
    keys = {name: key for name in wheres if (key := key_of(name))}
    for key in set(keys.values()) ^ stored.keys():
        problem = "not among" if key not in stored else "too much for"
        raise UserError(f"{folder}: {key} is {problem} the weights of the model in config.json")
    for name, key in keys.items():
        shape = (dims.vocab_size, dims.width) if wheres[name].cut == "vocabulary" else wheres[name].whole
        if stored[key].shape != shape:
            actual = list(stored[key].shape)
            raise UserError(f"{folder}: {key} is {actual}, and the model in config.json has {list(shape)}")

    def neutral(where: Place) -> torch.Tensor:  # dims.lambdas is "neutral": the scalars start at neutral values
        return torch.full(where.whole, where.start[1] if where.start[0] == "constant" else 0.0)

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = read_stored([keys[name] for name in names if name in keys])
        tensors |= {name: neutral(wheres[name]) for name in names if name not in keys}
        return {name: _pad(tensors[keys.get(name, name)], wheres[name].whole[0]) for name in names}

    entries = {
        name: TensorInfo(where.whole, stored[keys[name]].dtype if name in keys else "float32")
        for name, where in wheres.items()
    }
    facts = {"step": 0, "model": vars(dims), "imported": {"form": "huggingface", "step": 0}}
    names = (CONFIG_FILE, *files, *([INDEX_FILE] if index else []))
    return CheckpointReader("huggingface", folder, facts, entries, read, names, (folder / TOKENIZER_FOLDER,))


def _pad(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Appends zero rows up to `rows`."""
    missing = rows - len(tensor)
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor


def transformers_logits(folder: Path, vocab_size: int) -> Logits:
    """Loads transformers' own model in float32 from the folder. Raises UserError if transformers is not installed."""
    try:
        from transformers import NanoChatForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise UserError(
            "conversions of this format are proved with transformers' own class, which is not installed: "
            "pip install transformers"
        ) from None
    disable_progress_bar()
    model = NanoChatForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    def compute(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits[0, :, :vocab_size].float()

    return compute


def _read_json(path: Path) -> dict | None:
    if not path_kind(path):
        return None
    with refuse_damaged(path, "cannot be read ({}): copy it again"):
        value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else None
