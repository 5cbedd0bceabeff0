"""The checks of a preflight: each finds its problem, and a plan is shown with it."""

from collections import namedtuple

import pytest
import torch

from megachat.config import config_from_values, load_config
from megachat.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from megachat.errors import UserError
from megachat.planning.hardware import parse_gpus
from megachat.planning.plan import resolve_plan
from megachat.planning.step_time import predict_run
from megachat.programs import preflight
from megachat.programs.dry_run import Hardware, describe_job, job_values, predicted_time
from tests.unit.planning.test_probe import written

CONFIG = config_from_values(
    {
        "model": {"depth": 2, "vocab_size": 97, "sequence_len": 256},
        "batch": {"tokens": 2048},
        "horizon": {"steps": 10},
        "optimizer": {"warmup_steps": 1, "warmdown_ratio": 0.5},
        "data": {"folder": "none/data", "tokenizer": "none/tokenizer"},
        "checkpoint": {"every": 2, "keep_last": 2},
    },
    "small",
)
PLAN = resolve_plan(CONFIG, 1, 97)
MEASURED = load_config("configs/d4_cpu.json", ["batch.micro_rows=2"])


def problems(config=CONFIG) -> dict[str, str]:
    return {check.name: check.detail for check in preflight.preflight(config, PLAN) if check.problem}


def test_each_check_finds_its_problem(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert set(problems()) == {"data folder", "tokenizer"} and "none/data" in problems()["data folder"]
    monkeypatch.setenv("MASTER_PORT", "x")
    assert "MASTER_PORT=x cannot be bound" in problems()["port"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage(10, 9, 1))
    assert "has 0.0 MB free: set checkpoint.keep_last" in problems()["disk"]
    wandb = CONFIG.model_copy(update={"log": CONFIG.log.model_copy(update={"wandb": "offline"})})
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert "pip install wandb" in problems(wandb)["trackers"]


def test_a_tokenizer_of_another_size_is_a_problem(tmp_path):
    save_tokenizer(tmp_path, Tokenizer({bytes([byte]): byte for byte in range(256)}), {"source": "tests"})
    config = CONFIG.changed("data", tokenizer=str(tmp_path))
    size = load_tokenizer(tmp_path).vocab_size
    assert f"model.vocab_size is 97 but the tokenizer in {tmp_path} has {size} tokens" in problems(config)["tokenizer"]
    assert "tokenizer" not in problems(config.changed("model", vocab_size=size))
    assert "tokenizer" not in problems(config.changed("model", vocab_size=None))


def test_the_most_checkpoints_at_a_time():
    one, most = preflight.checkpoint_bytes(CONFIG, PLAN)
    assert one == 12 * PLAN.parameters["total"] - 4 * PLAN.parameters["matrices"] and most == 3 * one
    every = CONFIG.model_copy(update={"checkpoint": CONFIG.checkpoint.model_copy(update={"keep_last": None})})
    assert preflight.checkpoint_bytes(every, PLAN)[1] == 6 * one, "at 2, 4, 6, 8, 10 and the end"


def test_time_and_price_where_the_speeds_are_known(tmp_path):
    """Of a named GPU, of a probe and of log.probe; a price without a time is refused."""
    text = describe_job(CONFIG, 8, Hardware(80, "H100", price=2.0)).splitlines()
    assert text[1].startswith("time: ") and "by the data sheet of H100" in text[1] and "(assumed)" in text[1]
    assert text[2].startswith("price: ") and text[3].endswith(" s, without the first 11 steps, evaluation and saving")
    time = job_values(CONFIG, 8, Hardware(80, "H100", price=2.0))["time"]
    step = predict_run(CONFIG, resolve_plan(CONFIG, 8, 97), parse_gpus("8xH100"))
    assert time["step_sec"] == step.step.total and time["price"] == pytest.approx(time["wall_hours"] * 8 * 2)
    path = written(tmp_path)
    plan = resolve_plan(MEASURED, 2, 4096)
    by_file = predicted_time(MEASURED, plan, Hardware(probe=path, price=3.0), torch.bfloat16)
    config = MEASURED.model_copy(update={"log": MEASURED.log.model_copy(update={"probe": str(path)})})
    assert by_file["error"] == 0.08 and by_file["price"] == pytest.approx(3 * by_file["wall_hours"]), "of the CPU"
    assert predicted_time(config, plan, Hardware(price=3.0), torch.bfloat16) == by_file
    for hardware in (Hardware(80, price=2.0), Hardware(80, "H100", price=2.0)):
        with pytest.raises(UserError, match="--price needs a time, and that of 16 ranks"):
            predicted_time(MEASURED, resolve_plan(MEASURED, 16, 4096), hardware, torch.bfloat16)


def test_the_verdict_is_first():
    lines = describe_job(CONFIG, 1, Hardware(80)).splitlines()
    assert lines[0].startswith("fits: ") and lines[0].endswith(" of 80.0 GB per rank; 2 problems on this machine")
    assert lines[1].startswith(
        "time and price: not predicted, because the speed of 1 rank on this machine is not known"
    )
    assert [line[:7] for line in lines[3:5]] == ["PROBLEM"] * 2 and len(lines) < 15
    made = describe_job(CONFIG, 1, Hardware(80), made={"tokenizer": "trained before"})
    assert "; 1 problem on this machine" in made and "\nok      tokenizer: trained before\n" in made
    assert job_values(CONFIG, 1)["time"] is None or torch.cuda.is_available()
    assert describe_job(CONFIG, 1, Hardware(0.01)).startswith("does not fit: ")
    verdict = describe_job(CONFIG.changed("reliability", hash_every=1), 1, Hardware(80)).splitlines()[0]
    assert verdict.endswith("2 problems on this machine; 1 warning")
    assert len(describe_job(CONFIG, 1, Hardware(80), verbose=True).splitlines()) > 100
    assert [check["name"] for check in job_values(CONFIG, 1)["checks"] if check["problem"]] == [
        "data folder",
        "tokenizer",
    ]
