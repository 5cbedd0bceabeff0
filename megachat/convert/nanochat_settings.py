"""nanochat's meta file and parameter groups in megachat's words, and back."""

import json
import math
import re
from pathlib import Path

from megachat.config import Config
from megachat.convert.nanochat_optimizer import optimizer_groups
from megachat.convert.reader import CheckpointReader
from megachat.errors import UserError
from megachat.optim.groups import ADAMW_EPSILON, MUON_BETA2
from megachat.optim.matrix import NEWTON_SCHULZ_STEPS
from megachat.planning.dimensions import Dimensions, window_sizes
from megachat.planning.plan import Plan, resolve
from megachat.schedule import learning_rate_multiplier, muon_momentum, weight_decay_multiplier

# Keys of model_config -> our sizes; window_pattern is its one other key.
SIZES = {
    "sequence_len": "sequence_len",
    "vocab_size": "vocab_size",
    "n_layer": "depth",
    "n_head": "heads",
    "n_kv_head": "kv_heads",
    "n_embd": "width",
}
# Arguments of nanochat's scripts/base_train.py -> our settings. -1 there is "none" or "never".
SETTINGS = {
    "num_iterations": "horizon.steps",
    "target_flops": "horizon.flops",
    "target_param_data_ratio": "horizon.ratio",
    "device_batch_size": "batch.micro_rows",
    "embedding_lr": "optimizer.embedding_lr",
    "unembedding_lr": "optimizer.unembedding_lr",
    "weight_decay": "optimizer.weight_decay",
    "matrix_lr": "optimizer.matrix_lr",
    "scalar_lr": "optimizer.scalar_lr",
    "warmup_steps": "optimizer.warmup_steps",
    "warmdown_ratio": "optimizer.warmdown_ratio",
    "final_lr_frac": "optimizer.final_lr_fraction",
    "eval_every": "evaluate.every",
    "eval_tokens": "evaluate.tokens",
    "save_every": "checkpoint.every",
}
ZERO_IS_NEVER = ("evaluate.every", "checkpoint.every")
# Groups of parameters whose rates determine all others -> the setting of the rate, and its scaling with the model's
# width.
RATES = {
    "unembedding": ("unembedding_lr", True),
    "embedding": ("embedding_lr", True),
    "x0": ("scalar_lr", False),
    "smear": ("smear_lr", False),
    "matrix": ("matrix_lr", False),
}


def dims_of_meta(meta: dict, path: Path) -> Dimensions:
    """Returns the model's sizes. Raises UserError for keys that are missing or that this version does not know."""
    try:
        model = dict(meta["model_config"])
        if unknown := sorted(model.keys() - SIZES.keys() - {"window_pattern"}):
            problem = f"model_config has {unknown[0]}, which no nanochat model that megachat knows has"
            raise UserError(f"{path}: {problem}: it cannot be converted")
        sizes = {ours: model[theirs] for theirs, ours in SIZES.items()}
        pattern = _window_pattern(model)
        if sizes["width"] % sizes["heads"] or not re.fullmatch("[SL]+", pattern):
            shown = f"n_embd {sizes['width']}, n_head {sizes['heads']} and windows {pattern}"
            raise UserError(f"{path}: model_config has {shown}, which is no nanochat model")
        windows = window_sizes(pattern, sizes["depth"], sizes["sequence_len"])
        return Dimensions(**sizes, head_size=sizes["width"] // sizes["heads"], windows=windows)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} does not give the model's sizes ({type(error).__name__}: {error}): copy it again"
        ) from None


def _window_pattern(model_config: dict) -> str:
    return model_config.get("window_pattern", "L").upper()  # as nanochat reads older checkpoints


def config_of(source: CheckpointReader) -> tuple[dict, list[str]]:
    """Returns (config, remarks). What the meta file does not describe keeps its default, and the remarks say so."""
    dims, imported = source.dims, source.facts["imported"]
    meta, groups = imported["meta"], imported["param_groups"]
    arguments = meta.get("user_config") or {}
    model = _model_settings(dims, _window_pattern(meta["model_config"]), arguments.get("aspect_ratio"))
    config: dict[str, dict] = {"model": model, "optimizer": {}, "data": {}}
    remarks = []
    for theirs, ours in SETTINGS.items():
        value = arguments.get(theirs)
        if value == -1:
            value = 0 if ours in ZERO_IS_NEVER else None
        if value is not None:
            section, key = ours.split(".")
            config.setdefault(section, {})[key] = value
    if not arguments:
        config["optimizer"] = _settings_of_groups(groups, dims) if groups else {}
        remarks.append(
            f"{source.files[0]} has no user_config: batch, horizon and schedule are the defaults, so give them in "
            "config.json or with --set"
        )
    if tokens := meta.get("total_batch_size"):
        config.setdefault("batch", {})["tokens"] = tokens
    if arguments and groups:
        remarks += _take_rates(config, groups, dims)
    remarks.append(
        "nanochat's position in the documents cannot be continued: the loader starts at the first ones; "
        "set data.folder to the shards"
    )
    return config, remarks


def _model_settings(dims: Dimensions, pattern: str, aspect: int | None) -> dict:
    width = aspect and -(-dims.depth * aspect // dims.head_size) * dims.head_size
    settings = {
        "depth": dims.depth,
        "aspect_ratio": aspect if width == dims.width else max(1, dims.width // dims.depth),
        "head_size": dims.head_size,
        "sequence_len": dims.sequence_len,
        "window_pattern": pattern,
    }
    return settings | ({"kv_heads": dims.kv_heads} if dims.kv_heads != dims.heads else {})


def _take_rates(config: dict, groups: list[dict], dims: Dimensions) -> list[str]:
    """Sets the groups' rates, which a resumed nanochat uses, if user_config gives others. Returns remarks."""
    plan = resolve(Config.model_validate_json(json.dumps(config)), 1, dims.vocab_size)
    pairs = zip(optimizer_groups(dims), groups, strict=True)
    if all(math.isclose(plan.rates[ours.rate], group["initial_lr"], rel_tol=1e-6) for (ours, _), group in pairs):
        return []
    config["optimizer"] |= _settings_of_groups(groups, dims) | {"weight_decay": plan.weight_decay}
    remark = "the parameter groups have other rates than user_config gives: they are used as they are"
    return [f"{remark}, not scaled to the batch"]


def _settings_of_groups(groups: list[dict], dims: Dimensions) -> dict:
    """Returns the rates of the parameter groups, not to be scaled again; Muon's decay is the one of the last step."""
    by_name = {ours.name: group for (ours, _), group in zip(optimizer_groups(dims), groups, strict=True)}
    by_width = (dims.width / 768) ** -0.5
    settings: dict[str, float | bool] = {}
    for name, (setting, scaled) in RATES.items():
        rate = by_name[name]["initial_lr"] / (by_width if scaled else 1)
        settings[setting] = float(f"{rate:.12g}")  # 0.008, not 0.00799..98
    return settings | {"scale_to_batch": False, "weight_decay": by_name["matrix"]["weight_decay"]}


def loop_of(meta: dict) -> dict:
    """Returns the training loop's counters."""
    saved = meta.get("loop_state") or {}
    losses = {"val_bpb": meta.get("val_bpb"), "min_val_bpb": saved.get("min_val_bpb")}
    known = {key: value for key, value in losses.items() if isinstance(value, (int, float)) and math.isfinite(value)}
    return {"training_s": float(saved.get("total_training_time") or 0.0)} | known


def _imported_and_unchanged(facts: dict) -> dict | None:
    """Returns what was imported from nanochat at the checkpoint's step, if nothing was trained since."""
    imported = facts.get("imported") or {}
    return imported if imported.get("form") == "nanochat" and imported["step"] == facts["step"] else None


def meta_of(facts: dict, dims: Dimensions, config: Config, plan: Plan) -> dict:
    """Returns the imported meta file, or a new one, whose loader position is null: it starts at the first documents."""
    if imported := _imported_and_unchanged(facts):
        return imported["meta"]
    loop, pattern = facts["loop"], config.model.window_pattern
    settings = {}
    for theirs, ours in SETTINGS.items():
        section, key = ours.split(".")
        value = getattr(getattr(config, section), key)
        settings[theirs] = -1 if value is None or (value == 0 and ours in ZERO_IS_NEVER) else value
    arguments = {
        "depth": dims.depth,
        "aspect_ratio": config.model.aspect_ratio,
        "head_dim": dims.head_size,
        "max_seq_len": dims.sequence_len,
        "window_pattern": pattern,
    }
    return {
        "step": facts["step"],
        "val_bpb": loop.get("val_bpb"),
        "model_config": {key: getattr(dims, ours) for key, ours in SIZES.items()} | {"window_pattern": pattern},
        "user_config": arguments | settings | {"eval_tokens": plan.evaluation_rows * dims.sequence_len},
        "device_batch_size": plan.micro_rows,
        "max_seq_len": dims.sequence_len,
        "total_batch_size": plan.tokens_per_step,
        "dataloader_state_dict": None,
        "loop_state": {
            "min_val_bpb": float("inf") if loop.get("min_val_bpb") is None else loop["min_val_bpb"],
            "smooth_train_loss": 0.0,
            "total_training_time": loop.get("training_s", 0.0),
        },
    }


def param_groups_of(facts: dict, dims: Dimensions, config: Config, plan: Plan) -> list[dict]:
    """Returns the imported parameter groups, or those that config and schedule give after the last step."""
    imported = _imported_and_unchanged(facts)
    if imported and imported["param_groups"]:
        return [
            {key: tuple(value) if key == "betas" else value for key, value in group.items()}
            for group in imported["param_groups"]
        ]
    optimizer, last = config.optimizer, facts["step"] - 1  # nanochat keeps the values with which it took its last step
    multiplier, decay, momentum = 1.0, plan.weight_decay, 0.95
    if last >= 0:
        multiplier = learning_rate_multiplier(
            last,
            plan.steps,
            warmup_steps=optimizer.warmup_steps,
            warmdown_ratio=optimizer.warmdown_ratio,
            final_fraction=optimizer.final_lr_fraction,
        )
        decay *= weight_decay_multiplier(last, plan.steps)
        momentum = muon_momentum(last, plan.steps, warmdown_ratio=optimizer.warmdown_ratio)
    muon = {"momentum": momentum, "ns_steps": NEWTON_SCHULZ_STEPS, "beta2": MUON_BETA2, "weight_decay": decay}
    groups, first = [], 0
    for group, names in optimizer_groups(dims):
        rate, numbers = plan.rates[group.rate], list(range(first, first + len(names)))
        adamw = {"betas": group.betas, "eps": ADAMW_EPSILON, "weight_decay": group.weight_decay}
        settings = muon if group.optimizer == "muon" else adamw
        groups.append(
            {"kind": group.optimizer, "lr": rate * multiplier, **settings, "initial_lr": rate, "params": numbers}
        )
        first += len(names)
    return groups
