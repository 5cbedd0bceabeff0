"""nanochat's meta file and parameter groups in megachat's words, and back."""

import json
import math
from pathlib import Path

from megachat.config import Config
from megachat.convert.nanochat import optimizer_groups
from megachat.convert.opened import Opened
from megachat.optim.groups import ADAMW_EPSILON, GROUPS, MUON_BETA2
from megachat.optim.matrix import NEWTON_SCHULZ_STEPS
from megachat.planning.dimensions import Dimensions
from megachat.planning.plan import Plan, resolve
from megachat.schedule import learning_rate_multiplier, muon_momentum, weight_decay_multiplier

# nanochat's argument (scripts/base_train.py) -> our setting. -1 there is "none" or "never".
_SETTINGS = {
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
_ZERO_IS_NEVER = ("evaluate.every", "checkpoint.every")
# group of parameters -> the setting that gives its rate
_RATE_OF = {
    "unembedding": "unembedding_lr",
    "embedding": "embedding_lr",
    "x0": "scalar_lr",
    "smear": "smear_lr",
    "matrix": "matrix_lr",
}


def config_of(opened: Opened, dims: Dimensions) -> tuple[dict, list[str]]:
    """(config, remarks): the run as far as the meta file tells it; what it does not tell stays at the defaults, and the remarks say so."""
    meta, groups = opened.facts["imported"]["meta"], opened.facts["imported"]["param_groups"]
    asked = meta.get("user_config") or {}
    config: dict[str, dict] = {
        "model": _model_settings(dims, meta["model_config"], asked.get("aspect_ratio")),
        "optimizer": {},
        "data": {},
    }
    remarks = []
    if asked:
        for theirs, ours in _SETTINGS.items():
            section, key = ours.split(".")
            value = asked.get(theirs)
            if value == -1:
                value = 0 if ours in _ZERO_IS_NEVER else None
            if value is not None:
                config.setdefault(section, {})[key] = value
    else:
        config["optimizer"] = _settings_of_groups(groups, dims) if groups else {}
        remarks.append(
            f"{opened.files[0]} has no user_config: batch, horizon and schedule are the defaults, so give them in config.json or with --set"
        )
    if tokens := meta.get("total_batch_size"):
        config.setdefault("batch", {})["tokens"] = tokens
    if asked and groups:
        remarks += _take_rates(config, groups, dims)
    remarks.append(
        "nanochat's place in the documents cannot be continued: the loader starts at the first ones; set data.folder to the shards"
    )
    return config, remarks


def _model_settings(dims: Dimensions, told: dict, aspect: int | None) -> dict:
    rounded = aspect and -(-dims.depth * aspect // dims.head_size) * dims.head_size
    settings = {
        "depth": dims.depth,
        "aspect_ratio": aspect if rounded == dims.width else max(1, dims.width // dims.depth),
        "head_size": dims.head_size,
        "sequence_len": dims.sequence_len,
        "window_pattern": told.get("window_pattern", "L").upper(),
    }
    return settings | ({"kv_heads": dims.kv_heads} if dims.kv_heads != dims.heads else {})


def _take_rates(config: dict, groups: list[dict], dims: Dimensions) -> list[str]:
    """Set the parameter groups' rates where user_config gives others: a resumed nanochat goes on with those of the groups. Returns remarks."""
    plan = resolve(Config.model_validate_json(json.dumps(config)), 1, dims.vocab_size)
    rates = {group.name: plan.rates[group.rate] for group in GROUPS}
    if all(
        math.isclose(rates[name], group["initial_lr"], rel_tol=1e-6)
        for (name, _), group in zip(optimizer_groups(dims), groups, strict=True)
    ):
        return []
    config["optimizer"] |= _settings_of_groups(groups, dims) | {"weight_decay": plan.weight_decay}
    return [
        "the parameter groups have other rates than user_config gives: they are taken as they are, not scaled to the batch"
    ]


def _settings_of_groups(groups: list[dict], dims: Dimensions) -> dict:
    """Rates as they are in the parameter groups, not scaled again; Muon's decay is the one of the last step."""
    found = {name: group for (name, _), group in zip(optimizer_groups(dims), groups, strict=True)}
    by_width = (dims.width / 768) ** -0.5
    settings = {
        _RATE_OF[name]: found[name]["initial_lr"] / (by_width if "embedding" in name else 1) for name in _RATE_OF
    }
    settings = {key: float(f"{value:.12g}") for key, value in settings.items()}  # 0.008, not 0.00799..98
    return settings | {"scale_to_batch": False, "weight_decay": found["matrix"]["weight_decay"]}


def loop_of(meta: dict) -> dict:
    """The loop's counters."""
    saved = meta.get("loop_state") or {}
    numbers = {"val_bpb": meta.get("val_bpb"), "min_val_bpb": saved.get("min_val_bpb")}
    numbers = {
        key: value if isinstance(value, (int, float)) and math.isfinite(value) else None
        for key, value in numbers.items()
    }
    return {
        "step": meta["step"],
        "training_s": float(saved.get("total_training_time") or 0.0),
        "skipped_steps": 0,
    } | numbers


def meta_of(facts: dict, dims: Dimensions, config: Config, plan: Plan) -> dict:
    """nanochat's meta file. Its loader's place is null: nanochat then starts at the first documents."""
    loop = facts["loop"]
    model = {
        "sequence_len": dims.sequence_len,
        "vocab_size": dims.vocab_size,
        "n_layer": dims.depth,
        "n_head": dims.heads,
    }
    model |= {"n_kv_head": dims.kv_heads, "n_embd": dims.width, "window_pattern": config.model.window_pattern}
    settings = {
        theirs: getattr(getattr(config, ours.split(".")[0]), ours.split(".")[1]) for theirs, ours in _SETTINGS.items()
    }
    settings = {
        theirs: -1 if value is None or (value == 0 and _SETTINGS[theirs] in _ZERO_IS_NEVER) else value
        for theirs, value in settings.items()
    }
    settings["eval_tokens"] = plan.evaluation_rows * dims.sequence_len
    sizes = {
        "depth": dims.depth,
        "aspect_ratio": config.model.aspect_ratio,
        "head_dim": dims.head_size,
        "max_seq_len": dims.sequence_len,
    }
    return {
        "step": facts["step"],
        "val_bpb": loop.get("val_bpb"),
        "model_config": model,
        "user_config": sizes | {"window_pattern": config.model.window_pattern} | settings,
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
    """nanochat's parameter groups after the checkpoint's last step: exactly those it was imported with, or what config and schedule give."""
    imported = facts.get("imported") or {}
    if imported.get("form") == "nanochat" and imported["step"] == facts["step"] and imported["param_groups"]:
        return [
            {key: tuple(value) if key == "betas" else value for key, value in group.items()}
            for group in imported["param_groups"]
        ]
    asked, last = config.optimizer, facts["step"] - 1  # nanochat keeps the values with which it took its last step
    schedule = {
        "warmup_steps": asked.warmup_steps,
        "warmdown_ratio": asked.warmdown_ratio,
        "final_fraction": asked.final_lr_fraction,
    }
    multiplier = learning_rate_multiplier(last, plan.steps, **schedule) if last >= 0 else 1.0
    muon = {"momentum": 0.95, "ns_steps": NEWTON_SCHULZ_STEPS, "beta2": MUON_BETA2, "weight_decay": plan.weight_decay}
    if last >= 0:
        muon |= {
            "momentum": muon_momentum(last, plan.steps, warmdown_ratio=asked.warmdown_ratio),
            "weight_decay": plan.weight_decay * weight_decay_multiplier(last, plan.steps),
        }
    made, first, ours = [], 0, {group.name: group for group in GROUPS}
    for name, members in optimizer_groups(dims):
        group, rate = ours[name], plan.rates[ours[name].rate]
        own = (
            muon
            if name == "matrix"
            else {"betas": group.betas, "eps": ADAMW_EPSILON, "weight_decay": group.weight_decay}
        )
        numbers = list(range(first, first + len(members)))
        made.append({"kind": group.optimizer, "lr": rate * multiplier} | own | {"initial_lr": rate, "params": numbers})
        first += len(members)
    return made


def nanochat_tokenizer_folder(folder: Path) -> Path | None:
    """Where nanochat keeps the tokenizer of a checkpoint folder: beside the weights in an export, else in its base folder."""
    for place in (folder / "tokenizer", folder.parent.parent / "tokenizer"):
        if (place / "tokenizer.pkl").is_file():
            return place
    return None
