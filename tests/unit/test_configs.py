"""Every file in configs/: what its line in configs/README.md says of it, what --dry-run says, and that it fits the GPU it is made for."""

import json
import re
import subprocess
import sys

import pytest
import torch

from megachat.config import Config, load_config
from megachat.planning.memory import FILLS, memory_of_stages
from megachat.planning.plan import resolve
from megachat.programs.pretrain import describe_job
from tests.runs.job import ROOT, environment

FOLDER = ROOT / "configs"
GPU_GB = 80
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
# name -> (ranks that it is made for, "GPU" or "CPU", rows x micro-batches, GB), as the table has them
LINE = r"^\| \[(\w+)\]\(\1\.json\) \| (\d+) (GPU|CPU)s? \| ([\d x]+) \| [\d,]+ \| [\d,]+ \| (\d+|-) \|$"
TABLE = {name: (int(ranks), *rest) for name, ranks, *rest in re.findall(LINE, (FOLDER / "README.md").read_text(), re.M)}
GPU_NAMES = [name for name in NAMES if TABLE.get(name, (0, ""))[1] == "GPU"]


def config_of(name: str) -> Config:
    """Where a tokenizer would tell the vocabulary, the tests do."""
    config = load_config(FOLDER / f"{name}.json")
    return (
        config
        if config.model.vocab_size
        else config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 4096})})
    )


def test_the_table_has_every_config():
    assert sorted(TABLE) == NAMES
    wanted = {
        f"{base}{axis}"
        for base in ("d12", "d20", "d24", "d24_fp8", "d26_fp8", "d32_fp8")
        for axis in ("", "_tp2", "_pp2")
    }
    assert wanted - {"d26_fp8_tp2"} <= set(GPU_NAMES), "13 heads are not divided by 2"


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_on_the_ranks_it_is_made_for(name):
    ranks, kind, shape, _ = TABLE[name]
    config = config_of(name)
    told = describe_job(config, ranks, GPU_GB if kind == "GPU" else None)
    assert "memory by the count" in told and "WARNING" not in told
    plan = resolve(config, ranks, config.model.vocab_size)
    assert f"{plan.micro_rows} x {plan.accumulation}" == shape
    assert f"accumulation = {plan.accumulation}   [" in told


@pytest.mark.parametrize("name", GPU_NAMES)
def test_it_fits_one_gpu_and_keeps_its_pipeline_busy(name):
    config, (ranks, _, _, told_gb) = config_of(name), TABLE[name]
    plan = resolve(config, ranks, config.model.vocab_size)
    total = max(stage.total for stage in memory_of_stages(config, plan, torch.bfloat16))
    assert total <= FILLS * GPU_GB * 1e9 and f"{total / 1e9:.0f}" == told_gb
    assert plan.bubble < 0.2
    assert (config.precision.fp8 != "off") == ("fp8" in name)
    assert config.model.sequence_len == 2048 and config.model.head_size == 128 and config.model.vocab_size == 32768


@pytest.mark.parametrize("name", [name for name in GPU_NAMES if re.search("_(tp|pp)2", name)])
def test_a_variant_is_its_base_on_another_layout(name):
    base = re.sub("_(tp|pp)2", "", name)
    own, other = (json.loads((FOLDER / f"{file}.json").read_text()) for file in (name, base))
    axes = own.pop("parallel")
    assert axes == {axis: 2 for short, axis in (("_tp2", "tensor"), ("_pp2", "pipeline")) if short in name}
    for settings in (own, other):
        settings["batch"] = {}  # rows a micro-batch may be others; tokens a step are the plan's
    assert own == other


def test_the_readmes_config_through_the_program_itself():
    """Without data, tokenizer or CORE's bundle being there."""
    line = [
        sys.executable,
        "launch/pretrain.py",
        "--config",
        "configs/d24_fp8.json",
        "--dry-run",
        "--world",
        "8",
        "--memory-gb",
        "24",
    ]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "layout = data 8 x tensor 1 x pipeline 1" in done.stdout and "tokens_per_step = 1,048,576" in done.stdout
    assert re.search(
        r"WARNING: this run needs [\d.]+ GB on a rank by the count, and the device has 24\.0 GB: .*: set batch\.micro_rows=",
        done.stdout,
    )
    assert not (ROOT / "data" / "eval_bundle.zip").exists() or "CORE bundle" in done.stdout
