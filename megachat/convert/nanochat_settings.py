"""nanochat's meta file and parameter groups in megachat's words, and back."""

import contextlib
import json
import math
import re
from pathlib import Path

from megachat.config import Config, config_from_values
from megachat.convert.nanochat_optimizer import optimizer_groups
from megachat.convert.nanochat_versions import CURRENT, Version, check_windows
from megachat.convert.reader import CheckpointReader
from megachat.errors import UserError
from megachat.optim.groups import RATE_OF_GROUP, betas_of
from megachat.optim.matrix import NEWTON_SCHULZ_STEPS
from megachat.planning.dimensions import Dimensions, window_sizes
from megachat.planning.plan import RATES, REFERENCE_TOKENS, Layout, Plan, resolve_plan
from megachat.schedule import ScheduledValues, scheduled_values, weight_decay_multiplier

# Keys of model_config -> our sizes; window_pattern is its one other key.
NANOCHAT_SIZES = {
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
    "total_batch_size": "batch.tokens",
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
EMBEDDED = "megachat"  # key of the meta file of our exports, with the config and the layout of the run
FINE_TUNING = "init_lr_frac"  # an argument of nanochat's scripts/chat_sft.py only
ZERO_IS_NEVER = ("evaluate.every", "checkpoint.every")
DETERMINING_RATES = ("unembedding", "embedding", "x0", "smear", "matrix")  # groups whose rates determine all others
_UNKNOWN_TO_NANOCHAT = """clip_norm muon_multiplier warmup_ratio warmdown_shape decay_shape ramp ramp_rates z_loss
    momentum_start momentum_top momentum_end momentum_warmup_steps""".split()  # of the optimizer section


def dims_of_meta(meta: dict, path: Path, version: Version = CURRENT) -> Dimensions:
    """Returns the model's sizes. Raises UserError for missing or unknown keys, and other windows than megachat's."""
    try:
        model = dict(meta["model_config"])
        if unknown := sorted(model.keys() - NANOCHAT_SIZES.keys() - {"window_pattern"}):
            problem = f"model_config has {unknown[0]}, which no nanochat model that megachat knows has"
            raise UserError(f"{path}: {problem}: it cannot be converted")
        sizes = {ours: model[theirs] for theirs, ours in NANOCHAT_SIZES.items()}
        pattern = _window_pattern(model)
        if not all(type(size) is int and 0 < size < 1 << 31 for size in sizes.values()) or sizes["depth"] > 1000:
            raise ValueError("a size is no integer, or beyond every model")
        if sizes["width"] % sizes["heads"] or not re.fullmatch("[SL]+", pattern):
            shown = f"n_embd {sizes['width']}, n_head {sizes['heads']} and windows {pattern}"
            raise UserError(f"{path}: model_config has {shown}, which is no nanochat model")
        windows = window_sizes(pattern, sizes["depth"], sizes["sequence_len"])
        dims = Dimensions(
            **(sizes | _saved_lambdas(meta) | dict(version.constants)),
            head_size=sizes["width"] // sizes["heads"],
            windows=windows,
        )
        check_windows(version, dims, pattern, path)
        return dims
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} does not give the model's sizes ({type(error).__name__}: {error}): copy it again"
        ) from None


def _window_pattern(model_config: dict) -> str:
    return model_config.get("window_pattern", "L").upper()  # as nanochat reads older checkpoints


def _saved_lambdas(meta: dict) -> dict:
    """Returns model.lambdas, which nanochat does not have, if the meta file has the config of a megachat run."""
    lambdas = ((meta.get(EMBEDDED) or {}).get("config") or {}).get("model", {}).get("lambdas")
    return {"lambdas": lambdas} if lambdas in ("learned", "neutral") else {}


def config_of(source: CheckpointReader) -> tuple[dict, list[str]]:
    """Returns (config, remarks). What the files do not describe keeps its default, and the remarks say so."""
    dims, imported = source.dims, source.facts["imported"]
    meta, groups, step = imported["meta"], imported["param_groups"], imported["step"]
    documents = (
        "nanochat's position in the documents cannot be continued: the loader starts at the first ones; "
        "set data.folder to the shards"
    )
    if (embedded := _embedded_config(meta, groups, dims, step)) is not None:
        return embedded, [documents]
    arguments = meta.get("user_config") or {}
    model = _model_settings(dims, _window_pattern(meta["model_config"]), arguments.get("aspect_ratio"))
    config: dict[str, dict] = {"model": model, "optimizer": {}, "batch": {}, "horizon": {}, "data": {}}
    remarks = _take_arguments(config, arguments, meta)
    if "version" in imported:
        config["optimizer"] = {} if dims.lambdas == "neutral" else {"smear_lr": 0.0}  # its neutral values stay
        remarks.append(f"rates and schedule are the defaults: nanochat {imported['version']} had other rules for them")
    elif not arguments:
        config["optimizer"] = _settings_of_groups(groups, dims) if groups else {}
        remarks.append(
            f"{source.files[0]} has no user_config: batch, horizon and schedule are the defaults, so give them in "
            "config.json or with --set"
        )
    remarks += make_resolvable(config, dims, step)
    if arguments and groups:
        remarks += _take_rates(config, groups, dims, step, arguments)
    if groups:
        for (ours, _), group in zip(optimizer_groups(dims), groups, strict=True):
            for key, theirs in ((ours.betas, "betas"), ("adamw_epsilon", "eps"), ("muon_beta2", "beta2")):
                if key and group.get(theirs):
                    config.setdefault("optimizer", {})[key] = group[theirs]
        remarks += _not_carried(config, groups, dims)
    return config, [*remarks, documents]


def _take_arguments(config: dict, arguments: dict, meta: dict) -> list[str]:
    """Sets what the arguments of nanochat's script say. Returns a remark per value that our config does not allow."""
    remarks = []
    values = {theirs: arguments.get(theirs) for theirs in SETTINGS}
    values["total_batch_size"] = meta.get("total_batch_size") or values["total_batch_size"]
    if not arguments.get("warmup_ratio", 1):  # fine-tuning has a ratio in place of steps
        values["warmup_steps"] = 0
    for theirs, value in values.items():
        section, key = SETTINGS[theirs].split(".")
        if value == -1:
            value = 0 if SETTINGS[theirs] in ZERO_IS_NEVER else None
        if value is None:
            continue
        try:
            Config.model_validate_json(json.dumps({section: {key: value}}))
        except ValueError:
            remarks.append(f"user_config's {theirs} {value!r} is not possible here: {section}.{key} is the default")
            continue
        config.setdefault(section, {})[key] = value
    return remarks


def _plan_of(config: dict, dims: Dimensions) -> Plan:
    return resolve_plan(config_from_values(config, "the converted config"), 1, dims.vocab_size)


def make_resolvable(config: dict, dims: Dimensions, step: int) -> list[str]:
    """Changes a batch and a horizon that the files do not fix until one rank can run them. Returns remarks."""
    try:
        _plan_of(config, dims)
        return []
    except UserError as error:
        problem = str(error).partition(":")[0]
    tokens, rows = config["batch"].get("tokens") or REFERENCE_TOKENS, config["batch"].get("micro_rows") or 1
    for micro_rows, horizon in ((rows, {}), (1, {}), (1, {"steps": max(step, 1)})):
        size = micro_rows * dims.sequence_len
        config["batch"] = {"tokens": max(1, tokens // size) * size, "micro_rows": micro_rows}
        config["horizon"] |= horizon
        with contextlib.suppress(UserError):
            _plan_of(config, dims)
            break
    chosen = {f"{section}.{key}": value for section in ("batch", "horizon") for key, value in config[section].items()}
    listed = ", ".join(f"{key} {value}" for key, value in chosen.items())
    return [f"{problem}: the config has {listed}, so set others if you train on"]


def _embedded_config(meta: dict, groups: list[dict] | None, dims: Dimensions, step: int) -> dict | None:
    """Returns the config that megachat's export put into the meta file, if the rest of the files still agrees."""
    try:
        embedded = meta[EMBEDDED]
        facts = {"step": step, "config": embedded["config"], "layout": embedded["layout"], "loop": {}}
        expected = meta_of(facts, dims)
        same = all(meta.get(key) == expected[key] for key in ("model_config", "user_config", "total_batch_size"))
        if groups:
            ours = param_groups_of(facts, dims)
            same = same and [_plain(group) for group in ours] == [_plain(group) for group in groups]
        return embedded["config"] if same else None
    except (KeyError, TypeError, ValueError, AttributeError, UserError):
        return None


def _plain(group: dict) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}


def layout_of(source: CheckpointReader) -> dict:
    """Returns the fact "layout" of the megachat run that was exported to these files, if its config is used."""
    imported = source.facts["imported"]
    embedded = _embedded_config(imported["meta"], imported["param_groups"], source.dims, imported["step"])
    return {} if embedded is None else {"layout": imported["meta"][EMBEDDED]["layout"]}


def _model_settings(dims: Dimensions, pattern: str, aspect: int | None) -> dict:
    width = aspect and -(-dims.depth * aspect // dims.head_size) * dims.head_size
    settings = {
        "depth": dims.depth,
        "aspect_ratio": aspect if width == dims.width else max(1, dims.width // dims.depth),
        "head_size": dims.head_size,
        "sequence_len": dims.sequence_len,
        "window_pattern": pattern,
    }
    for name in ("rotary_base", "qk_scale", "value_embeddings", "lambdas"):
        if getattr(dims, name) != getattr(Config().model, name):
            settings[name] = getattr(dims, name)
    return settings | ({"kv_heads": dims.kv_heads} if dims.kv_heads != dims.heads else {})


def _take_rates(config: dict, groups: list[dict], dims: Dimensions, step: int, arguments: dict) -> list[str]:
    """Sets the groups' rates and decay, with which nanochat trained, if user_config gives others. Returns remarks."""
    plan = _plan_of(config, dims)
    by_name = _groups_by_name(groups, dims)
    smear = by_name["smear"]["initial_lr"]
    if not math.isclose(plan.rates["smear"], smear, rel_tol=1e-6):
        config["optimizer"]["smear_lr"] = smear
    decay = _decay_before_schedule(by_name["matrix"], step, plan.steps, arguments)
    same = decay is None or math.isclose(plan.weight_decay, decay, rel_tol=1e-6)
    for name, group in by_name.items():
        rate = plan.rates[RATE_OF_GROUP[name]]
        same = same and (name == "smear" or math.isclose(rate, group["initial_lr"], rel_tol=1e-6))
    if same:
        return []
    config["optimizer"] |= _settings_of_groups(groups, dims)
    config["optimizer"]["weight_decay"] = plan.weight_decay if decay is None else decay
    remark = "the parameter groups have other rates than user_config gives: they are used as they are"
    return [f"{remark}, not scaled to the batch"]


def _decay_before_schedule(muon: dict, step: int, steps: int, arguments: dict) -> float | None:
    """Returns the decay that nanochat's schedule multiplied in its last step, None if that cannot be computed."""
    saved = muon["weight_decay"]
    if not saved or step < 1 or FINE_TUNING in arguments:  # fine-tuning has no schedule of the decay
        return saved
    multiplier = weight_decay_multiplier(step - 1, steps) if step <= steps else 0.0
    return float(f"{saved / multiplier:.12g}") if multiplier > 1e-12 else None


def _groups_by_name(groups: list[dict], dims: Dimensions) -> dict[str, dict]:
    return {ours.name: group for (ours, _), group in zip(optimizer_groups(dims), groups, strict=True)}


def _settings_of_groups(groups: list[dict], dims: Dimensions) -> dict:
    """Returns the rates of the parameter groups, not to be scaled again; Muon's decay is the one of the last step."""
    by_name = _groups_by_name(groups, dims)
    settings: dict[str, float | bool] = {}
    for name in DETERMINING_RATES:
        rate = by_name[name]["initial_lr"] / RATES[name].width_factor(dims)
        settings[RATES[name].setting] = float(f"{rate:.12g}")  # 0.008, not 0.00799..98
    return settings | {"scale_to_batch": False, "weight_decay": by_name["matrix"]["weight_decay"]}


def _not_carried(config: dict, groups: list[dict], dims: Dimensions) -> list[str]:
    """Returns a remark about each constant of a parameter group that is another one in megachat."""
    plan, remarks = _plan_of(config, dims), []
    optimizer = config_from_values(config, "the checkpoint's config").optimizer
    for (ours, _), group in zip(optimizer_groups(dims), groups, strict=True):
        constants: dict[str, object] = {"initial_lr": plan.rates[ours.rate]}
        if ours.optimizer == "muon":
            constants |= {"ns_steps": NEWTON_SCHULZ_STEPS, "beta2": optimizer.muon_beta2}
        else:
            constants |= {"betas": list(betas_of(ours, optimizer)), "eps": optimizer.adamw_epsilon}
            constants["weight_decay"] = ours.weight_decay
        for key, value in constants.items():
            saved = list(group[key]) if isinstance(group.get(key), tuple) else group.get(key)
            if isinstance(value, float) and isinstance(saved, float) and math.isclose(saved, value, rel_tol=1e-6):
                continue
            if saved != value:
                remarks.append(f"not carried: {key} {saved} of the group {ours.name}, which is {value} in megachat")
    return list(dict.fromkeys(remarks))


def loop_of(meta: dict) -> dict:
    """Returns the training loop's counters and its average of the losses, which nanochat corrects by the step."""
    saved, step = meta.get("loop_state") or {}, meta.get("step") or 0
    losses = {"val_bpb": meta.get("val_bpb"), "min_val_bpb": saved.get("min_val_bpb")}
    known = {key: value for key, value in losses.items() if isinstance(value, (int, float)) and math.isfinite(value)}
    smooth = float(saved.get("smooth_train_loss") or 0.0)
    average = {"smooth_loss": smooth, "smoothed_steps": step} if step > 0 and 0 < smooth < math.inf else {}
    return {"training_s": float(saved.get("total_training_time") or 0.0)} | average | known


def imported_and_unchanged(facts: dict) -> dict | None:
    """Returns what was imported from nanochat at the checkpoint's step, if nothing was trained since."""
    imported = facts.get("imported") or {}
    return imported if imported.get("form") == "nanochat" and imported["step"] == facts["step"] else None


def _config_and_plan(facts: dict, dims: Dimensions) -> tuple[Config, Plan]:
    config = config_from_values(facts["config"], "the checkpoint's config")
    return config, resolve_plan(config, Layout(**facts["layout"]).world, dims.vocab_size)


def meta_of(facts: dict, dims: Dimensions) -> dict:
    """Returns the imported meta file, or a new one, whose loader position is null: it starts at the first documents.

    user_config has the arguments with which nanochat computes the rates and the decay of this run. EMBEDDED has the
    whole config, which nanochat does not read.
    """
    if imported := imported_and_unchanged(facts):
        return imported["meta"]
    config, plan = _config_and_plan(facts, dims)
    loop, pattern = facts["loop"], config.model.window_pattern
    settings = {}
    for theirs, ours in SETTINGS.items():
        section, key = ours.split(".")
        value = getattr(getattr(config, section), key)
        settings[theirs] = -1 if value is None or (value == 0 and ours in ZERO_IS_NEVER) else value
    if not config.optimizer.scale_to_batch:  # nanochat always scales them
        for theirs in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay"):
            settings[theirs] /= _scaling(config, plan)[theirs == "weight_decay"]
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
        "model_config": {key: getattr(dims, ours) for key, ours in NANOCHAT_SIZES.items()}
        | {"window_pattern": pattern},
        "user_config": arguments
        | settings
        | {"eval_tokens": plan.evaluation_rows * dims.sequence_len, "total_batch_size": plan.tokens_per_step},
        "device_batch_size": plan.micro_rows,
        "max_seq_len": dims.sequence_len,
        "total_batch_size": plan.tokens_per_step,
        "dataloader_state_dict": None,
        "loop_state": {
            "min_val_bpb": float("inf") if loop.get("min_val_bpb") is None else loop["min_val_bpb"],
            "smooth_train_loss": loop.get("smooth_loss", 0.0) if loop.get("smoothed_steps") == facts["step"] else 0.0,
            "total_training_time": loop.get("training_s", 0.0),
        },
        EMBEDDED: {"config": facts["config"], "layout": facts["layout"]},
    }


def _scaling(config: Config, plan: Plan) -> tuple[float, float]:
    """Returns the factors that the scaling to the batch puts on the rates and on Muon's decay."""
    ones = {"scale_to_batch": True, "matrix_lr": 1.0, "weight_decay": 1.0}
    scaled = resolve_plan(config.changed("optimizer", **ones), plan.layout.world, plan.dims.vocab_size)
    return scaled.rates["matrix"], scaled.weight_decay


def remarks_of_export(source: CheckpointReader) -> list[str]:
    """Returns a remark about the settings that nanochat does not have, and so does not train on with."""
    if imported_and_unchanged(source.facts):
        return []
    values = config_from_values(source.facts["config"], "the checkpoint's config").model_dump(mode="json")
    defaults = Config().model_dump(mode="json")
    names = [("optimizer", key) for key in _UNKNOWN_TO_NANOCHAT] + [("data", "shuffle")]
    changed = [f"{section}.{key}" for section, key in names if values[section][key] != defaults[section][key]]
    return [f"kept for megachat, but unknown to nanochat: {', '.join(changed)}"] if changed else []


def param_groups_of(facts: dict, dims: Dimensions) -> list[dict]:
    """Returns the imported parameter groups, or those that config and schedule give after the last step."""
    imported = imported_and_unchanged(facts)
    if imported and imported["param_groups"]:
        return [
            {key: tuple(value) if key == "betas" else value for key, value in group.items()}
            for group in imported["param_groups"]
        ]
    config, plan = _config_and_plan(facts, dims)
    values = ScheduledValues(rate=1.0, momentum=0.95, decay=1.0)
    if facts["step"] > 0:  # nanochat keeps the values with which it took its last step
        values = scheduled_values(config.optimizer, facts["step"] - 1, plan.steps)
    muon = {"momentum": values.momentum, "ns_steps": NEWTON_SCHULZ_STEPS, "beta2": config.optimizer.muon_beta2}
    muon["weight_decay"] = plan.weight_decay * values.decay
    groups, first = [], 0
    for group, names in optimizer_groups(dims):
        rate, numbers = plan.rates[group.rate], list(range(first, first + len(names)))
        moments = group.betas and {"betas": betas_of(group, config.optimizer), "eps": config.optimizer.adamw_epsilon}
        settings = moments | {"weight_decay": group.weight_decay} if moments else muon
        rates = {"lr": rate * values.multiplier(group.rate), "initial_lr": rate}
        groups.append({"kind": group.optimizer, **rates, **settings, "params": numbers})
        first += len(names)
    return groups
