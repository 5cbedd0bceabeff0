"""Every config and every `--set` variant in configs/README.md: the numbers of the table, the dry run, the memory."""

import re

import pytest
import torch

from megachat.config import Config, load_config
from megachat.planning.memory import FILLS, memory_of_stages
from megachat.planning.plan import resolve
from megachat.programs.dry_run import Hardware, describe_job
from tests.runs.forked import run_forked
from tests.runs.job import ROOT

FOLDER = ROOT / "configs"
GPU_GB = 80
NAMES = sorted(path.stem for path in FOLDER.glob("d*.json"))
# The columns of the table: name, options, devices, "GPU" or "CPU", rows x micro-batches, tokens per step, steps, GB
LINE = (
    r"^\| \[(\w+)\]\(\1\.json\) \| (?:`(.+)` )?\| (\d+) (GPU|CPU)s? \| ([\d x]+) \| ([\d,]+) \| ([\d,]+) \| (\d+|-) \|$"
)
TABLE = re.findall(LINE, (FOLDER / "README.md").read_text(), re.M)
GPU_TABLE = [line for line in TABLE if line[3] == "GPU"]


def line_id(line: tuple) -> str:
    return " ".join((line[0], *settings_of(line[1])))


def settings_of(options: str) -> list[str]:
    """The settings in `--set A=1 --set B=2`."""
    words = options.split()
    assert words[::2] == ["--set"] * (len(words) // 2)
    return words[1::2]


def config_of(name: str, options: str) -> Config:
    """Loads a config as a command line does; a config whose vocabulary comes from a tokenizer gets 4,096 tokens."""
    config = load_config(FOLDER / f"{name}.json", settings_of(options))
    if config.model.vocab_size:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 4096})})


def test_the_table_has_every_config_and_variant():
    assert {line[0] for line in TABLE} == set(NAMES) and len({line[:3] for line in TABLE}) == len(TABLE)
    assert sorted(line[0] for line in TABLE if not line[1]) == NAMES
    axes = {(line[0], axis) for line in GPU_TABLE for axis in re.findall(r"parallel\.(\w+)=2", line[1])}
    names = {line[0] for line in GPU_TABLE}
    assert {"d12", "d20", "d24", "d24_fp8", "d26_fp8", "d32_fp8"} == names
    expected = {(name, axis) for name in names for axis in ("tensor", "pipeline")}
    assert axes == expected - {("d26_fp8", "tensor")}, "2 does not divide the 13 heads of d26"
    assert ("d32_fp8", "--set parallel.tensor=2 --set parallel.pipeline=2", "16") in {line[:3] for line in TABLE}


@pytest.mark.parametrize("line", TABLE, ids=line_id)
def test_a_dry_run_on_the_documented_devices(line):
    name, options, devices, kind, shape, tokens, steps, _ = line
    config = config_of(name, options)
    text = describe_job(config, int(devices), Hardware(GPU_GB if kind == "GPU" else None), verbose=True)
    assert "memory" in text and "WARNING" not in text
    plan = resolve(config, int(devices), config.model.vocab_size)
    assert f"{plan.micro_rows} x {plan.accumulation}" == shape
    assert (f"{plan.tokens_per_step:,}", f"{plan.steps:,}") == (tokens, steps)
    assert f"accumulation = {plan.accumulation}   [" in text


@pytest.mark.parametrize("line", GPU_TABLE, ids=line_id)
def test_it_fits_one_gpu_and_keeps_its_pipeline_busy(line):
    name, options, devices, _, _, _, _, documented_gb = line
    config = config_of(name, options)
    plan = resolve(config, int(devices), config.model.vocab_size)
    total = max(stage.total for stage in memory_of_stages(config, plan, torch.bfloat16))
    assert total <= FILLS * GPU_GB * 1e9 and f"{total / 1e9:.0f}" == documented_gb
    assert plan.bubble < 0.2
    assert (config.precision.fp8 != "off") == ("fp8" in name)
    assert config.model.sequence_len == 2048 and config.model.head_size == 128 and config.model.vocab_size == 32768


@pytest.mark.parametrize("line", [line for line in GPU_TABLE if line[1]], ids=line_id)
def test_a_variant_changes_only_the_layout_and_the_rows_per_micro_batch(line):
    keys = [setting.partition("=")[0] for setting in settings_of(line[1])]
    assert set(keys) <= {"parallel.tensor", "parallel.pipeline", "batch.micro_rows"}
    base = resolve(config_of(line[0], ""), 8, 32768)
    variant = resolve(config_of(*line[:2]), int(line[2]), 32768)
    assert (variant.tokens_per_step, variant.steps) == (base.tokens_per_step, base.steps)


def test_the_config_of_the_readme_in_a_dry_run():
    """The program needs neither data, nor a tokenizer, nor the CORE bundle for it."""
    options = ["--config", "configs/d24_fp8.json", "--dry-run", "--world", "8", "--memory-gb", "24"]
    done = run_forked(["launch/pretrain.py", *options])
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("does not fit: ") and " of 24.0 GB per rank; " in done.out.splitlines()[0]
    assert "layout = data 8 x tensor 1 x pipeline 1; 5,568 steps of 1,048,576 tokens" in done.out
    (warning,) = (line for line in done.out.splitlines() if line.startswith("WARNING: "))
    assert re.search(r"[\d.]+ GB.*24\.0 GB", warning) and "set batch.micro_rows=" in warning
    assert not (ROOT / "data" / "eval_bundle.zip").exists() or "CORE bundle" in done.out
