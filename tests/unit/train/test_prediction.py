"""The predicted step in the log: from a probe or a known GPU, else none; and beside the measured steps."""

import json
from types import SimpleNamespace

import pytest
import torch

from megachat.config import load_config
from megachat.errors import UserError
from megachat.files import METRICS_NAME
from megachat.planning.plan import resolve_plan
from megachat.train import prediction
from megachat.train.prediction import measured_seconds, predict_training, predicted_lines, predicted_step_rows
from tests.unit.planning.test_probe import written

CPU = torch.device("cpu")


def planned(settings=(), world=1):
    config = load_config("configs/d4_cpu.json", list(settings))
    return config, resolve_plan(config, world, 4096)


def run_of(settings, world=1, device=CPU, folder=None):
    config, plan = planned(settings, world)
    return SimpleNamespace(
        config=config, plan=plan, mesh=SimpleNamespace(device=device), compute_dtype=torch.bfloat16, folder=folder
    )


def test_a_cpu_without_a_probe_gets_no_prediction(tmp_path):
    assert predicted_lines(run_of([]), 1) == []
    path = written(tmp_path)
    (line,) = predicted_lines(run_of([f"log.probe={path}"]), 1)
    assert str(path) in line and "+-8%" in line and "matrix products" in line
    with pytest.raises(UserError, match="measured up to 2 ranks"):
        predict_training(*planned([f"log.probe={path}"], 4), CPU, torch.bfloat16, 4)


def test_a_known_gpu_is_predicted_by_its_data_sheet_on_one_node(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(prediction, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert "data sheet of H100" in predicted_lines(run_of([], device=gpu), 1)[0]
    assert predicted_lines(run_of([], world=4, device=gpu), 2) == []  # the network between nodes is unknown
    monkeypatch.setattr(prediction, "device_name", lambda device: "NVIDIA GH200 480GB")
    assert predicted_lines(run_of([], device=gpu), 1) == []


def test_the_end_compares_with_steps_after_the_first_ones(tmp_path):
    settings = [f"log.probe={written(tmp_path)}"]
    total = predict_training(*planned(settings), CPU, torch.bfloat16, 1).step.total
    run = run_of(settings, folder=tmp_path)
    assert predicted_step_rows(run, 0, 1) == []

    def write(seconds):
        lines = [{"step": step, "train/dt": 9.0 if step <= 12 else seconds} for step in range(1, 20)]
        (tmp_path / METRICS_NAME).write_text(
            "\n".join([*map(json.dumps, lines), '{"step": 20, "val/bpb": 1.0}', "damaged"])
        )

    write(total / 1.05)
    assert len(measured_seconds(tmp_path, 10)) == 7
    ((label, text),) = predicted_step_rows(run, 10, 1)
    assert label == "step" and "+5.0%" in text and "outside" not in text
    write(total / 2)
    assert "+100.0%, outside of its +-8%" in predicted_step_rows(run, 10, 1)[0][1]
