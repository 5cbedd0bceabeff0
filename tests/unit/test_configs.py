"""Every config and every `--set` variant in configs/README.md: the numbers of the table, the dry run, the memory."""

import math
import re

import pytest
import torch

from megachat.config import Config, load_config
from megachat.planning.memory import FILLS, memory_of_stages
from megachat.planning.plan import resolve_plan
from megachat.programs.dry_run import Hardware, describe_job
from tests.runs.forked import run_forked
from tests.runs.job import ROOT

FOLDER = ROOT / "configs"
GPU_GB = 80
NAMES = sorted(path.stem for pattern in ("d*.json", "speedrun*.json") for path in FOLDER.glob(pattern))
SPEEDRUNS = {"speedrun_run6", "speedrun_public", "speedrun"}
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
    assert {line[0] for line in TABLE if not line[1]} == set(NAMES)
    assert {line[0] for line in TABLE if not line[1] and line[2] == "16"} == SPEEDRUNS, "recipes on two nodes"
    axes = {(line[0], axis) for line in GPU_TABLE for axis in re.findall(r"parallel\.(\w+)=2", line[1])}
    names = {line[0] for line in GPU_TABLE}
    assert {"d12", "d20", "d24", "d24_fp8", "d26_fp8", "d32_fp8"} | SPEEDRUNS == names
    expected = {(name, axis) for name in names for axis in ("tensor", "pipeline")}
    odd = {(name, "tensor") for name in ("d26_fp8", "speedrun_public", "speedrun")}
    assert axes == expected - odd, "2 does not divide the 13 heads of d26 and the 11 of d22"
    assert ("d32_fp8", "--set parallel.tensor=2 --set parallel.pipeline=2", "16") in {line[:3] for line in TABLE}


@pytest.mark.parametrize("line", TABLE, ids=line_id)
def test_a_dry_run_on_the_documented_devices(line):
    name, options, devices, kind, shape, tokens, steps, _ = line
    config = config_of(name, options)
    text = describe_job(config, int(devices), Hardware(GPU_GB if kind == "GPU" else None), verbose=True)
    assert "memory" in text and "WARNING" not in text
    plan = resolve_plan(config, int(devices), config.model.vocab_size)
    assert f"{plan.micro_rows} x {plan.accumulation}" == shape
    assert (f"{plan.tokens_per_step:,}", f"{plan.steps:,}") == (tokens, steps)
    assert f"accumulation = {plan.accumulation}   [" in text


@pytest.mark.parametrize("line", GPU_TABLE, ids=line_id)
def test_it_fits_one_gpu_and_keeps_its_pipeline_busy(line):
    name, options, devices, _, _, _, _, documented_gb = line
    config = config_of(name, options)
    plan = resolve_plan(config, int(devices), config.model.vocab_size)
    total = max(stage.total for stage in memory_of_stages(config, plan, torch.bfloat16))
    assert total <= FILLS * GPU_GB * 1e9 and f"{total / 1e9:.0f}" == documented_gb
    assert plan.bubble < 0.2
    assert (config.precision.fp8 != "off") == ("fp8" in name or name in SPEEDRUNS)
    assert config.model.sequence_len == 2048 and config.model.head_size == 128
    assert config.model.vocab_size == (49152 if name in ("speedrun_public", "speedrun") else 32768)


@pytest.mark.parametrize("line", [line for line in GPU_TABLE if line[1]], ids=line_id)
def test_a_variant_changes_only_the_layout_and_the_rows_per_micro_batch(line):
    keys = [setting.partition("=")[0] for setting in settings_of(line[1])]
    assert set(keys) <= {"parallel.tensor", "parallel.pipeline", "batch.micro_rows", "batch.recompute"}
    vocab_size = config_of(line[0], "").model.vocab_size
    base = resolve_plan(config_of(line[0], ""), 8, vocab_size)
    variant = resolve_plan(config_of(*line[:2]), int(line[2]), vocab_size)
    assert (variant.tokens_per_step, variant.steps) == (base.tokens_per_step, base.steps)


def test_run_6_is_nanochats_plan_number_by_number():
    """nanochat 92d63d4 with --depth=24 --target-param-data-ratio=8 --device-batch-size=16 --fp8 on 8 GPUs, with the
    formulas of its scripts/base_train.py and nanochat/gpt.py.
    """
    config = config_of("speedrun_run6", "")
    plan = resolve_plan(config, 8, 32768)
    dims = plan.dims
    width, heads, layers, vocabulary = 1536, 12, 24, 32768
    assert (dims.width, dims.heads, dims.kv_heads, dims.depth, dims.vocab_size) == (
        width,
        heads,
        heads,
        layers,
        vocabulary,
    )
    assert dims.windows == (512, 512, 512, 2048) * 6, "SSSL; short windows are a quarter, in multiples of 128"

    def scaling(depth: int) -> int:  # matrices of the blocks with the gates of value embeddings, and lm_head
        return 12 * depth * (64 * depth) ** 2 + 12 * (depth // 2) ** 2 + vocabulary * 64 * depth

    counts = plan.parameters
    assert counts["matrices"] + counts["lm_head"] == scaling(24) == 729_810_624
    assert counts["lm_head"] == counts["wte"] == vocabulary * width
    assert counts["value_embeds"] == 12 * vocabulary * width
    assert counts["total"] == scaling(24) + 13 * vocabulary * width + 2 * layers + 24 + 2
    tokens, reference = 8 * scaling(24), 8 * scaling(12)
    batch = 2 ** round(math.log2(2**19 * (tokens / reference) ** 0.383))
    assert plan.tokens_per_step == batch == 2**20 and (plan.rows_per_step, plan.micro_rows, plan.accumulation) == (
        512,
        16,
        4,
    )
    assert plan.steps == tokens // batch == 5568 and plan.total_tokens == 5568 * 2**20
    attention = sum(12 * heads * 128 * min(window, 2048) for window in dims.windows)
    assert plan.flops_per_token == 6 * (scaling(24) + 24) + attention
    assert plan.total_flops == pytest.approx(2.788e19, rel=1e-3)
    by_batch = (batch / 2**19) ** 0.5
    by_width = (width / 768) ** -0.5
    expected = {
        "matrix": 0.02 * by_batch,
        "unembedding": 0.008 * by_batch * by_width,
        "embedding": 0.3 * by_batch * by_width,
        "value_embedding": 0.15 * by_batch * by_width,
        "resid": 0.005 * by_batch,
        "x0": 0.5 * by_batch,
        "smear": 0.2,
    }
    assert {name: plan.rates[name] for name in expected} == pytest.approx(expected)
    assert plan.weight_decay == pytest.approx(0.28 * by_batch * reference / tokens)
    optimizer = config.optimizer
    assert (optimizer.warmup_steps, optimizer.warmdown_ratio, optimizer.final_lr_fraction) == (40, 0.65, 0.05)
    assert (optimizer.momentum_start, optimizer.momentum_top, optimizer.momentum_end) == (0.85, 0.97, 0.9)
    assert optimizer.momentum_warmup_steps == 400 and optimizer.muon_beta2 == 0.9 and optimizer.clip_norm == 0
    assert optimizer.embedding_betas == (0.8, 0.995) and optimizer.unembedding_betas == (0.8, 0.96)
    assert optimizer.x0_betas == (0.96, 0.95) and optimizer.adamw_epsilon == 1e-10
    assert config.precision.fp8 == "tensorwise" and plan.evaluation_rows * 2048 == 80 * 2**19
    assert config.model_dump(exclude={"run"}) == config_of("d24_fp8", "").model_dump(exclude={"run"})


def test_the_public_recipe_has_its_published_settings():
    """nanochat's pull request 830, with what megachat has of it; ours adds n-gram values and changes nothing else."""
    public, ours = config_of("speedrun_public", ""), config_of("speedrun", "")
    assert (public.model.depth, public.model.vocab_size, public.horizon.ratio) == (22, 49152, 9.4)
    assert (public.batch.micro_rows, public.optimizer.warmdown_ratio, public.optimizer.final_lr_fraction) == (
        32,
        0.85,
        0,
    )
    changed = {section for section, values in ours if values != getattr(public, section)}
    assert changed == {"ngram"} and ours.ngram.blocks


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
