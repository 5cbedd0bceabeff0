"""A folder for transformers: config.json, safetensors, a tokenizer, and the code of the model if transformers lacks it.

A model that computes what transformers' NanoChat computes is written for that class (huggingface_native). Any other is
written for megachat's class in modeling_megachat.py, which is copied into the folder; its tensors have our names.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch

from megachat.convert import huggingface_native as native
from megachat.convert.architecture import neutral_tensor, places
from megachat.convert.declaration import Export, Import, Logits, Tolerance
from megachat.convert.huggingface_tokenizer import TOKENIZER_FILES, write_tokenizer
from megachat.convert.megachat import first_facts
from megachat.convert.nanochat_settings import make_resolvable
from megachat.convert.plain import open_tensors, save_tensors
from megachat.convert.reader import SHARD_BYTES, CheckpointReader, TensorInfo
from megachat.convert.tokenizers import load_tokenizer_of
from megachat.data.tokenizer import save_tokenizer
from megachat.errors import UserError, summary
from megachat.files import path_kind, refuse_damaged, write_json
from megachat.planning.dimensions import Dimensions, saved_dimensions

CONFIG_FILE, INDEX_FILE, WHOLE_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
MODEL_CODE = "modeling_megachat.py"
TOKENIZER_FOLDER = "megachat_tokenizer"
TRANSFORMERS_TOLERANCE = Tolerance(logit=5e-4, kl=1e-7, argmax=0.99)  # transformers' kernels add up in another order
_MODEL_SECTIONS = ("model", "lookup", "ngram")  # of a config: what determines the model's sizes
_CODE_CACHE = "transformers_modules"
_INSTALL = "pip install 'megachat[hf]', or pip install 'transformers>=5'"

KeyOf = Callable[[str], "str | None"]  # our name of a tensor ("model/...") -> the name in the folder


def is_huggingface(folder: Path) -> bool:
    """True for a folder with a config.json of transformers."""
    return "model_type" in (_read_json(folder / CONFIG_FILE) or {})


def _plain_key(name: str) -> str:
    return name.removeprefix("model/")


def export_huggingface(source: CheckpointReader, requested_tokenizer: Path | None) -> Export:
    """The weights, config.json, the tokenizer and, unless transformers' class computes the same, the model's code."""
    require_transformers()
    dims, obstacles = source.dims, native.find_obstacles(source)
    tokenizer, origin = load_tokenizer_of(source, requested_tokenizer)
    names = [name for name in source.entries if name.startswith("model/")]
    lost = ["the optimizer's state", "the loader"]
    if obstacles:
        remark = f"transformers' NanoChat does not compute {', '.join(obstacles)}: load with trust_remote_code=True"
        remark += ", the tokenizer too"
        written = expected = source.select(names)
    else:
        names = [name for name in names if native.key_of(name)]
        tables = {f"model/{place.name}" for place in places(dims) if place.cut == "vocabulary"}  # a row per token
        written = source.select(names, lambda name, x: x[: dims.vocab_size] if name in tables else x)
        expected = source.select(names, lambda name, x: _pad(x[: dims.vocab_size], len(x)) if name in tables else x)
        lost.append(f"{dims.padded_vocab - dims.vocab_size} padding rows per table")
        remark = "loads with transformers' own NanoChat class"

    def write(folder: Path) -> None:
        write_tensors(written, folder, _plain_key if obstacles else native.key_of)
        values = _config_with_code(source) if obstacles else native.config_of_dims(dims)
        bos = tokenizer.bos  # it begins a document, and so ends the one before it; no token is padding
        write_json(folder / CONFIG_FILE, values | {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": None})
        if obstacles:
            shutil.copyfile(Path(__file__).with_name(MODEL_CODE), folder / MODEL_CODE)
        write_tokenizer(folder, tokenizer, dims.sequence_len)
        save_tokenizer(folder / TOKENIZER_FOLDER, tokenizer, origin)

    return Export(
        write,
        lambda folder: open_huggingface(folder).select(names, facts={}),
        TRANSFORMERS_TOLERANCE,
        expected,
        lambda folder: transformers_logits(folder, dims.vocab_size),
        (f"not carried: {', '.join(lost)}", remark, "tokenizer.json gives megachat's ids for all texts of its check"),
    )


def _config_with_code(source: CheckpointReader) -> dict:
    """Returns config.json for megachat's class: our sizes, and the settings that they follow from, for the way back."""
    settings = source.facts.get("config", {})
    return asdict(source.dims) | {
        "architectures": ["MegachatForCausalLM"],
        "model_type": "megachat",
        "auto_map": {
            "AutoConfig": "modeling_megachat.MegachatConfig",
            "AutoModelForCausalLM": "modeling_megachat.MegachatForCausalLM",
        },
        "dtype": "float32",
        "tie_word_embeddings": False,
        "megachat_settings": {name: settings[name] for name in _MODEL_SECTIONS if name in settings},
    }


def import_huggingface(source: CheckpointReader, requested_tokenizer: Path | None) -> Import:
    """A checkpoint of step 0. transformers' vocab_size may count padding rows, so the tokenizer decides."""
    tokenizer, origin = load_tokenizer_of(source, requested_tokenizer)
    rows, dims = source.dims.vocab_size, replace(source.dims, vocab_size=tokenizer.vocab_size)
    settings = source.facts["imported"].get("settings")
    if dims.padded_vocab < rows or (settings is not None and dims.vocab_size != rows):
        needed = f"a model of {dims.vocab_size} tokens has {dims.padded_vocab}"
        raise UserError(f"{source.folder} has tables of {rows} rows, and {needed}: give its own --tokenizer")
    source = source.select(source.entries, facts=source.facts | {"model": asdict(dims)})
    if settings is None:
        same = (
            "depth head_size sequence_len kv_heads rotary_base qk_scale norm_epsilon value_embeddings lambdas".split()
        )
        model = {"aspect_ratio": max(1, dims.width // dims.depth), "window_pattern": "L"}
        settings = {"model": model | {key: getattr(dims, key) for key in same}}
    config: dict[str, dict] = settings | {"batch": {}, "horizon": {}}
    remarks = make_resolvable(config, dims, 0)
    return Import(
        source,
        first_facts(source, {name: section for name, section in config.items() if section}, {}),
        tokenizer,
        origin,
        tolerance=TRANSFORMERS_TOLERANCE,
        source_logits=partial(transformers_logits, source.folder, dims.vocab_size),
        remarks=("the optimizer, the schedule and the documents start from the beginning", *remarks),
    )


def write_tensors(source: CheckpointReader, folder: Path, key_of: KeyOf) -> None:
    """Writes the weights in float32, in files of at most SHARD_BYTES."""
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


def open_huggingface(folder: Path, step: int | None = None) -> CheckpointReader:
    """Opens the weights under our names: tables padded with zero rows, neutral values for what transformers lacks.

    Raises UserError for what is missing, damaged or of another model.
    """
    dims, rows, key_of, settings = _described_model(folder / CONFIG_FILE)
    index = _read_json(folder / INDEX_FILE)
    files = sorted(set(index["weight_map"].values())) if index else [WHOLE_FILE]
    stored, read_stored = open_tensors(folder, files, lambda _, key: key)
    places_by_name = {f"model/{place.name}": place for place in places(dims)}
    keys = {name: key for name in places_by_name if (key := key_of(name))}
    shapes = {
        key: (rows, dims.width) if places_by_name[name].cut == "vocabulary" else places_by_name[name].whole
        for name, key in keys.items()
    }
    _check_stored(folder, stored, shapes)

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = read_stored([keys[name] for name in names if name in keys])
        tensors |= {name: neutral_tensor(places_by_name[name]) for name in names if name not in keys}
        return {name: _pad(tensors[keys.get(name, name)], places_by_name[name].whole[0]) for name in names}

    entries = {
        name: TensorInfo(place.whole, stored[keys[name]].dtype if name in keys else "float32")
        for name, place in places_by_name.items()
    }
    imported = {"form": "huggingface", "step": 0} | ({} if settings is None else {"settings": settings})
    facts = {"step": 0, "model": asdict(dims), "imported": imported}
    others = [name for name in (INDEX_FILE, MODEL_CODE, *TOKENIZER_FILES) if (folder / name).is_file()]
    files = [CONFIG_FILE, *files, *others]
    return CheckpointReader("huggingface", folder, facts, entries, read, tuple(files), (folder / TOKENIZER_FOLDER,))


def _described_model(path: Path) -> tuple[Dimensions, int, KeyOf, dict | None]:
    """Returns what config.json describes: sizes, rows of the tables, names of tensors, and megachat's settings if it
    has them. Raises UserError for another model."""
    config = _read_json(path) or {}
    kind = config.get("model_type")
    if kind == "nanochat":
        dims = native.dims_of_config(config, path)
        return dims, dims.vocab_size, native.key_of, None
    if kind == "megachat":
        names = {field.name for field in fields(Dimensions)}
        dims = saved_dimensions({name: value for name, value in config.items() if name in names})
        return dims, dims.padded_vocab, _plain_key, config.get("megachat_settings", {})
    raise UserError(f"{path} describes a {kind} model: only transformers' nanochat and megachat can be converted")


def _check_stored(folder: Path, stored: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError if the tensors in the folder are not those of the model in config.json."""
    for key in shapes.keys() ^ stored.keys():
        problem = "not among" if key not in stored else "too much for"
        raise UserError(f"{folder}: {key} is {problem} the weights of the model in config.json")
    for key, shape in shapes.items():
        if stored[key].shape != shape:
            actual = list(stored[key].shape)
            raise UserError(f"{folder}: {key} is {actual}, and the model in config.json has {list(shape)}")


def _pad(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Appends zero rows up to `rows`."""
    missing = rows - len(tensor)
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor


def require_transformers() -> None:
    """Raises UserError if transformers is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            f"conversions of this format are proved with transformers, which is not installed: {_INSTALL}"
        ) from None


def transformers_logits(folder: Path, vocab_size: int) -> Logits:
    """Loads the model in float32 from the folder as any user of transformers would. Raises UserError without it."""
    require_transformers()
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32, local_files_only=True)
    try:
        model = load(folder, trust_remote_code=True).eval()
    except OSError as error:
        problem = f"transformers cannot load {folder} ({summary(error)})"
        raise UserError(
            f"{problem}: if it cannot write its cache, set HF_HOME to a folder that can be written"
        ) from None
    if folder.suffix == ".tmp":  # a conversion: remove the copy of the code in transformers' cache, which has this name
        copies = [each for each in Path(inspect.getfile(type(model))).parents if each.parent.name == _CODE_CACHE]
        for copy in copies:
            shutil.rmtree(copy, ignore_errors=True)

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
