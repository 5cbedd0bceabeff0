"""Settings go to nanochat's files and back without a loss, whatever they are, and the certificate compares them."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megachat.config import Config, config_from_values, known_keys
from megachat.convert import nanochat
from megachat.convert.conversion import export_checkpoint, import_checkpoint
from megachat.convert.differences import compare_settings
from megachat.convert.nanochat_settings import EMBEDDED, config_of, loop_of, meta_of, param_groups_of
from megachat.convert.reader import CheckpointReader
from megachat.errors import UserError
from megachat.planning.plan import resolve_plan
from tests.unit.convert.checkpoints import STEP, VOCAB_SIZE, edit_meta, edit_optimizer, make_run

# nanochat's scripts/chat_sft.py: its arguments; the meta file has no total_batch_size, and the decay is zero.
FINE_TUNING = {
    "num_iterations": -1,
    "max_seq_len": 160,
    "device_batch_size": 2,
    "total_batch_size": None,
    "embedding_lr": None,
    "unembedding_lr": None,
    "matrix_lr": None,
    "init_lr_frac": 0.8,
    "warmup_ratio": 0.0,
    "warmdown_ratio": 0.5,
    "final_lr_frac": 0.0,
    "eval_every": 200,
    "eval_tokens": 40 * 524288,
}


def random_config(rng: random.Random) -> dict:
    """Returns settings of every kind that a plan of 330 tokens on one rank allows."""

    def number(least: float, most: float) -> float:
        return rng.choice([least, rng.uniform(least, most), round(rng.uniform(least, most), 3)])

    micro_rows, length = rng.randint(1, 3), rng.choice([64, 160, 384])
    return {
        "run": {"seed": rng.randint(0, 99)},
        "model": {
            "depth": rng.randint(2, 4),
            "aspect_ratio": rng.choice([16, 24]),
            "head_size": 16,
            "sequence_len": length,
            "window_pattern": rng.choice(["L", "SL", "SSSL"]),
            "lambdas": rng.choice(["learned", "neutral"]),
        },
        "data": {"shuffle": rng.random() < 0.5, "streams": rng.randint(1, 4)},
        "batch": {"tokens": length * micro_rows * rng.randint(1, 4), "micro_rows": micro_rows},
        "horizon": rng.choice([{"steps": rng.randint(20, 99)}, {"ratio": number(0.5, 30)}, {"flops": 1e14}]),
        "optimizer": {
            "matrix_lr": number(0, 0.1),
            "embedding_lr": number(0, 1),
            "unembedding_lr": number(0, 0.1),
            "scalar_lr": number(0, 1),
            "smear_lr": number(0, 1),
            "weight_decay": number(0, 1),
            "scale_to_batch": rng.random() < 0.5,
            "clip_norm": number(0, 1),
            "muon_multiplier": rng.choice(["rows_over_cols", "flipped", {"*c_fc*": 2.0}]),
            "warmup_steps": rng.randint(0, 9),
            "warmdown_ratio": number(0.1, 0.9),
            "final_lr_fraction": number(0, 1),
        },
        "evaluate": {"every": rng.choice([0, 3]), "prompts": ["\u00e9"], "tokens": length * rng.randint(1, 9)},
        "checkpoint": {"every": rng.choice([0, 7]), "keep_last": rng.choice([None, 2])},
    }


def through_files(value):
    """Returns what is left of a value in JSON."""
    return json.loads(json.dumps(value))


def opened(meta: dict, groups: list[dict], model: dict, step: int) -> CheckpointReader:
    """Returns what open_nanochat makes of the files, without tensors."""
    imported = {"form": "nanochat", "step": step, "meta": through_files(meta), "param_groups": groups}
    facts = {"step": step, "model": model, "imported": imported}
    return CheckpointReader("nanochat", Path("in"), facts, {}, lambda names: {}, (f"meta_{step:06d}.json",))


def numbers_of(config: dict) -> dict:
    """Returns everything that training computes from the settings that nanochat has."""
    config = config_from_values(config, "test")
    plan, optimizer = resolve_plan(config, 1, VOCAB_SIZE), config.optimizer
    numbers = {f"rate {name}": rate for name, rate in plan.rates.items()} | {"decay": plan.weight_decay}
    numbers |= {
        "steps": plan.steps,
        "batch": plan.tokens_per_step,
        "micro": plan.micro_rows,
        "rows": plan.evaluation_rows,
    }
    numbers |= {name: getattr(optimizer, name) for name in ("warmup_steps", "warmdown_ratio", "final_lr_fraction")}
    return numbers | {"evaluate": config.evaluate.every, "save": config.checkpoint.every}


@pytest.mark.parametrize("seed", range(40))
def test_random_settings_come_back(seed):
    """megachat to nanochat and back: every setting; and of nanochat's files alone everything that they can say, also
    after nanochat has trained on and written its own meta file, and back in nanochat.
    """
    rng = random.Random(seed)
    config = config_from_values(random_config(rng), "test").model_dump(mode="json", exclude_defaults=True)
    plan = resolve_plan(config_from_values(config, "test"), 1, VOCAB_SIZE)
    dims, step = plan.dims, rng.randint(1, plan.steps)
    facts = {"step": step, "config": config, "layout": {"data": 1, "tensor": 1, "pipeline": 1}}
    facts["loop"] = {"smooth_loss": 2.75, "smoothed_steps": step - seed % 2}
    meta, groups = meta_of(facts, dims), param_groups_of(facts, dims)
    back, _ = config_of(opened(meta, groups, asdict(dims), step))
    assert back == config
    # nanochat counts the steps of its average from the first step on
    loop = loop_of(meta)
    assert (loop.get("smooth_loss"), loop.get("smoothed_steps")) == ((None, None) if seed % 2 else (2.75, step))
    meta.pop(EMBEDDED)
    alone, remarks = config_of(opened(meta, groups, asdict(dims), step))
    assert numbers_of(alone) == pytest.approx(numbers_of(config), rel=1e-9, abs=1e-300), remarks
    assert not any("not carried" in remark for remark in remarks)
    arguments = numbers_of(config_of(opened(meta, None, asdict(dims), step))[0])  # as nanochat itself computes them
    expected = numbers_of(config) | {"rate smear": arguments["rate smear"]}  # for which it has no argument
    assert arguments == pytest.approx(expected, rel=1e-9, abs=1e-300)
    again = facts | {"config": alone}
    second, groups_again = meta_of(again, dims), param_groups_of(again, dims)
    assert numbers_of(config_of(opened(second, groups_again, asdict(dims), step))[0]) == numbers_of(alone)
    for group, other in zip(groups, groups_again, strict=True):
        assert group.keys() == other.keys()
        for key in {"lr", "initial_lr", "weight_decay", "momentum"} & group.keys():
            assert group[key] == pytest.approx(other[key], rel=1e-9), key


@pytest.mark.parametrize("seed", range(20))
def test_random_arguments_of_nanochat_come_back(seed):
    """nanochat to megachat, where it trains on, and to nanochat: the same arguments, and the same groups."""
    rng = random.Random(seed)
    arguments = {
        "num_iterations": rng.choice([-1, 30]),
        "target_flops": -1.0,
        "target_param_data_ratio": rng.choice([8.0, 10.5, 20.0]),
        "device_batch_size": rng.randint(1, 4),
        "embedding_lr": rng.uniform(0.1, 0.5),
        "unembedding_lr": rng.uniform(0.001, 0.01),
        "weight_decay": rng.choice([0.0, 0.28, rng.uniform(0.1, 0.3)]),
        "matrix_lr": rng.uniform(0.01, 0.1),
        "scalar_lr": rng.uniform(0.1, 1.0),
        "warmup_steps": rng.randint(0, 9),
        "warmdown_ratio": rng.uniform(0.1, 0.9),
        "final_lr_frac": rng.uniform(0.0, 0.5),
        "eval_every": rng.choice([-1, 250]),
        "eval_tokens": 160 * rng.randint(1, 9),
        "save_every": rng.choice([-1, 100]),
    }
    config = {"model": {"depth": 3, "aspect_ratio": 16, "head_size": 16, "sequence_len": 160}}
    dims = resolve_plan(config_from_values(config | {"batch": {"tokens": 160}}, "test"), 1, VOCAB_SIZE).dims
    sizes = {"sequence_len": 160, "vocab_size": 330, "n_layer": 3, "n_head": 3, "n_kv_head": 3, "n_embd": 48}
    arguments |= {"total_batch_size": 160 * arguments["device_batch_size"] * rng.randint(1, 3)}
    meta = {"model_config": sizes | {"window_pattern": "SSSL"}, "user_config": arguments}
    meta |= {"total_batch_size": arguments["total_batch_size"]}
    imported, _ = config_of(opened(meta, None, asdict(dims), 9))
    facts = {"step": 12, "config": imported, "layout": {"data": 1, "tensor": 1, "pipeline": 1}, "loop": {}}
    there = meta_of(facts, dims)
    assert {key: there["user_config"][key] for key in arguments} == arguments
    assert there["model_config"] == meta["model_config"] and there["total_batch_size"] == meta["total_batch_size"]
    there.pop(EMBEDDED)
    assert numbers_of(config_of(opened(there, param_groups_of(facts, dims), asdict(dims), 12))[0]) == numbers_of(
        imported
    )


def config_in(run) -> dict:
    return json.loads((run / "config.json").read_text())


def test_a_run_that_is_not_scaled_keeps_its_decay(tmp_path):
    """With the config in the meta file, and from nanochat's numbers alone; the certificate counts what it compared."""
    run = make_run(tmp_path / "run", optimizer={"scale_to_batch": False, "clip_norm": 0.5})
    certificate = export_checkpoint("nanochat", run, tmp_path / "nanochat")
    empty = [key for _, section in Config() for key, value in section if isinstance(value, list | tuple) and not value]
    assert certificate["settings"] == {"compared": len(known_keys()) - 3 - len(empty), "different": 0}
    assert certificate["remarks"] == ["kept for megachat, but unknown to nanochat: optimizer.clip_norm"]
    certificate = import_checkpoint("nanochat", tmp_path / "nanochat", tmp_path / "back")
    assert certificate["settings"]["different"] == 0 < certificate["settings"]["compared"]
    assert config_in(tmp_path / "back")["optimizer"] == config_in(run)["optimizer"]
    edit_meta(tmp_path / "nanochat", lambda meta: meta.pop(EMBEDDED))
    import_checkpoint("nanochat", tmp_path / "nanochat", tmp_path / "alone")
    numbers = numbers_of(config_in(tmp_path / "alone"))
    assert numbers == pytest.approx(numbers_of(config_in(run)), rel=1e-9) and numbers["decay"] == pytest.approx(0.28)


def test_settings_that_do_not_come_back_refuse_the_conversion(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    right = nanochat.meta_of

    def spoiled(facts, dims):
        meta = right(facts, dims)
        return meta | {"user_config": meta["user_config"] | {"warmup_steps": 4}}

    monkeypatch.setattr(nanochat, "meta_of", spoiled)
    with pytest.raises(UserError, match="is not the source: setting config.data.streams: 2 and 8"):
        export_checkpoint("nanochat", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    same = {"config": {"optimizer": {"warmup_steps": 40}}}
    assert compare_settings(same, {"config": {}})[1] == []  # 40 is the default


def test_fine_tuning_has_no_decay(tmp_path):
    """nanochat's SFT sets it to zero in the groups, and names neither batch nor decay nor horizon."""
    export_checkpoint("nanochat", make_run(tmp_path / "run"), tmp_path / "sft")

    def edit(meta):
        for key in (EMBEDDED, "total_batch_size", "loop_state", "dataloader_state_dict"):
            meta.pop(key)
        meta["user_config"] = FINE_TUNING

    edit_meta(tmp_path / "sft", edit)
    edit_optimizer(
        tmp_path / "sft", 0, lambda saved: [group.update(weight_decay=0.0) for group in saved["param_groups"][6:]]
    )
    import_checkpoint("nanochat", tmp_path / "sft", tmp_path / "back")
    config = config_in(tmp_path / "back")
    assert (config["optimizer"]["weight_decay"], config["optimizer"]["warmup_steps"]) == (0.0, 0)
    groups = torch.load(tmp_path / "sft" / f"optim_{STEP:06d}_rank0.pt", weights_only=True)["param_groups"]
    numbers = numbers_of(config)
    assert numbers["decay"] == 0 and numbers["rate matrix"] == pytest.approx(groups[-1]["initial_lr"])
    export_checkpoint("nanochat", tmp_path / "back", tmp_path / "again")


@pytest.mark.parametrize("user_config", [None, FINE_TUNING | {"max_seq_len": 384}])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_goes_in_without_a_batch_comes_out(user_config, fresh, tmp_path):
    """384 tokens per row do not divide any batch that the rules give."""
    run = make_run(tmp_path / "run", model={"sequence_len": 384}, batch={"tokens": 768, "micro_rows": 2})
    export_checkpoint("nanochat", run, tmp_path / "in")

    def edit(meta):
        for key in (EMBEDDED, "total_batch_size", "user_config"):
            meta.pop(key)
        if user_config:
            meta["user_config"] = user_config

    edit_meta(tmp_path / "in", edit)
    certificate = import_checkpoint("nanochat", tmp_path / "in", tmp_path / "there", fresh_optimizer=fresh)
    assert any("so set others if you train on" in remark for remark in certificate["remarks"])
    resolve_plan(config_from_values(config_in(tmp_path / "there"), "test"), 1, VOCAB_SIZE)
    export_checkpoint("nanochat", tmp_path / "there", tmp_path / "out")
    for name in (f"meta_{STEP:06d}.json",):
        assert json.loads((tmp_path / "in" / name).read_text()) == json.loads((tmp_path / "out" / name).read_text())


def test_arguments_that_no_config_allows_are_reported(tmp_path):
    export_checkpoint("nanochat", make_run(tmp_path / "run"), tmp_path / "in")
    edit_meta(tmp_path / "in", lambda meta: (meta.pop(EMBEDDED), meta["user_config"].update(eval_tokens=0)))
    certificate = import_checkpoint("nanochat", tmp_path / "in", tmp_path / "there")
    assert "user_config's eval_tokens 0 is not possible here: evaluate.tokens is the default" in certificate["remarks"]
    changed = {"betas": (0.7, 0.9), "weight_decay": 0.5}
    edit_optimizer(tmp_path / "in", 0, lambda saved: saved["param_groups"][0].update(changed))
    certificate = import_checkpoint("nanochat", tmp_path / "in", tmp_path / "other")
    words = "not carried: weight_decay 0.5 of the group unembedding, which is 0.01 in megachat"
    assert words in certificate["remarks"] and not any("betas" in remark for remark in certificate["remarks"])
    assert json.loads((tmp_path / "other" / "config.json").read_text())["optimizer"]["unembedding_betas"] == [0.7, 0.9]
