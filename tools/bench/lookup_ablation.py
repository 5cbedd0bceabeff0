"""Trains models with and without lookup tables and n-gram tables on one text, and compares their bits per byte.

Each variant is trained by launch/pretrain.py with several seeds of the initial weights, over the same tokens in the
same order, and validated on the same rows. Seconds are not taken from these runs, which may share their machine:
steps of all variants are timed in turn afterwards.
"""

import contextlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from megachat.activity import log_line
from megachat.config import load_config
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.errors import UserError
from megachat.files import write_atomically
from megachat.job.join import start_mesh
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.job.local_ranks import set_options
from megachat.planning.memory import memory_of_stages
from megachat.planning.plan import resolve_plan
from megachat.prepare.lookup_allocation import sample_documents
from megachat.studies.curves import interval_of_ratios, student_95
from megachat.studies.runs import load_run, newest_start
from megachat.text import text_table
from megachat.train.build import build_training_model
from megachat.train.lookup_rows import read_or_allocate, with_allocation
from megachat.train.step import set_schedules, update
from tools.bench.lookup_picture import draw_curves
from tools.bench.turns import round_ratios, time_in_turn
from tools.bench.whole_runs import PRETRAIN

BASELINE = "none"
DEFAULT = "none lzw frequency uniform bigram bigram-trigram both"
# A model that one core trains in about a minute, far below the unigram entropy; --set overrides.
SIZE = (
    "model.aspect_ratio=24",
    "model.head_size=32",
    "model.sequence_len=256",
    "batch.tokens=2048",
    "batch.micro_rows=8",
    "horizon.steps=160",
    "optimizer.warmup_steps=10",
    "evaluate.every=32",
    "evaluate.tokens=32768",
    "evaluate.prompts=[]",
    "checkpoint.every=0",
    "log.every=16",
    "data.tokenizer_threads=1",
)


def _l3(*settings: str, after: int = 1) -> list[str]:
    """Returns the settings of an L3 layer; 4 rows per token of the vocabulary, allocated by LZW."""
    sample = "lookup.sample_tokens=1000000"  # more than a run sees
    return [f"lookup.after_blocks=[{after}]", "lookup.allocation=lzw", sample, *settings]


def _ngram(orders: str, rows: int = 16384) -> list[str]:
    """Returns the settings of n-gram tables in one block; by default as many rows as L3 has with 4,096 tokens."""
    return ["ngram.blocks=[1]", f"ngram.orders=[{orders}]", f"ngram.rows={rows}"]


_SCALES = 'model.norm_scales=["attention","mlp","query","key"]'
# The parts of the speedrun's recipe, for models of RECIPE_SIZE. batch-1.5 sees as many tokens.
RECIPE_SIZE = ("batch.tokens=1024", "batch.micro_rows=4", "horizon.steps=120", "evaluate.tokens=16384")
RECIPE: dict[str, list[str]] = {
    "scales": ['model.norm_scales=["attention","mlp"]'],
    "qk-clip": ['model.norm_scales=["query","key"]', "optimizer.qk_clip=10"],  # 8.1 with scales of 1
    "z-loss": ["optimizer.z_loss=0.0001"],
    "batch-1.5": ["batch.tokens=1536", "batch.micro_rows=6", "horizon.steps=80"],
    "final-0": ["optimizer.final_lr_fraction=0"],
    "warmdown-0.85": ["optimizer.warmdown_ratio=0.85"],
}
# Variant -> what it changes. The last settings of a list override earlier ones.
VARIANTS: dict[str, list[str]] = {
    BASELINE: [],
    "none-longer": ["horizon.steps=208"],  # 1.3 times the steps: what a variant's time or FLOPs buy without tables
    "lzw": _l3(),
    "lzw-published": _l3("lookup.allocation=lzw_published"),
    "frequency": _l3("lookup.allocation=frequency"),
    "uniform": _l3("lookup.allocation=uniform"),
    "bigram": _ngram("2"),
    "bigram-trigram": _ngram("2,3"),
    "both": [*_l3(), *_ngram("2,3")],
    "bigram-x4": _ngram("2", 65536),
    # for depth 6
    "early": _l3(after=0),
    "middle": _l3(after=2),
    "late": _l3(after=4),
    "middle-sqrt": _l3("lookup.score_scale=sqrt", after=2),
    "middle-untied": _l3("lookup.tied=false", after=2),
    **RECIPE,
    "together": [*(setting for settings in RECIPE.values() for setting in settings), _SCALES, *_ngram("2,3")],
}


def bench_lookup(arguments: Namespace) -> dict:
    """Trains what is not trained yet in --folder, times steps, prints the table, and draws the curves into --out."""
    variants = (arguments.variants or DEFAULT).split()
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise UserError(f"--variants has {unknown[0]}, which is not one of {', '.join(VARIANTS)}")
    if BASELINE not in variants:
        raise UserError(f"--variants must have {BASELINE}, with which the others are compared")
    if not arguments.folder:
        raise UserError("--folder is missing: name a folder for the runs; a second call repeats none that is finished")
    folder = Path(arguments.folder)
    seeds = [int(seed) for seed in arguments.seeds.split()]
    runs = [train_variant(arguments, folder, name, seed) for seed in seeds for name in variants]
    with contextlib.redirect_stdout(sys.stderr):  # stdout has the JSON only
        ratios = time_variants(arguments, variants) if arguments.rounds else {}
    return ablation_result(arguments, runs, ratios)


def ablation_result(arguments: Namespace, runs: list[dict], ratios: dict) -> dict:
    """Returns the result of an ablation; prints its table, and draws the curves into --out. Without runs: of times."""
    if not runs:
        log_line("\n".join(times_table(ratios)))
        return {"what": "time per token, relative to none", "variants": ratios}
    result = {"what": f"bits per byte on {arguments.data}", "variants": summarize(runs, ratios), "runs": runs}
    log_line("\n".join(ablation_table(result["variants"])))
    if arguments.out:
        draw_curves(Path(arguments.out), result["what"], result["variants"])
    return result


def settings_of(arguments: Namespace, variant: str, seed: int) -> list[str]:
    """Returns the settings of a run, without its folder."""
    data = [f"data.folder={arguments.data}", f"data.tokenizer={arguments.tokenizer}"]
    return [*SIZE, *data, *arguments.set, *VARIANTS[variant], f"run.seed={seed}"]


def train_once(arguments: Namespace, folder: Path, variant: str, seed: int, train: Callable[[list[str]], dict]) -> dict:
    """Returns what a variant reached: from `folder` if it is there, else by `train(settings)`, and keeps it there.

    Raises UserError if `folder` has a run of this name with other settings.
    """
    settings, record = settings_of(arguments, variant, seed), folder / f"{variant}-{seed}.json"
    if record.exists():
        finished = json.loads(record.read_text())
        if finished["settings"] != settings:
            raise UserError(f"{record} is of a run with other settings: give another --folder, or remove it")
        return finished
    finished = {"variant": variant, "seed": seed, "settings": settings} | train(settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps(finished).encode())
    log_line(f"{record.stem}: {finished['curve'][-1]['bpb']:.4f} bits per byte")
    return finished


def train_variant(arguments: Namespace, folder: Path, variant: str, seed: int) -> dict:
    """Trains one model in `folder`, unless a run with the same settings is finished there. Returns what it reached.

    Raises UserError if the run fails, or if `folder` has a run of this name with other settings.
    """

    def train(settings: list[str]) -> dict:
        run = folder / f"{variant}-{seed}"
        shutil.rmtree(run, ignore_errors=True)  # an interrupted run
        named = [*settings, f"run.folder={folder}", f"run.name={run.name}"]
        command = [sys.executable, PRETRAIN, "--config", arguments.config, *set_options(named)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(f"{run.name} failed: {lines[-1] if lines else done.returncode}")
        result = collect_run(run)
        shutil.rmtree(run / "checkpoints")
        return result

    return train_once(arguments, folder, variant, seed, train)


def collect_run(run: Path) -> dict:
    """Returns the validation curve, parameters by kind, bytes and commit of a finished run."""
    record = load_run(run)
    return {
        "curve": [
            {"step": line["step"], "flops": line["total_training_flops"], "bpb": line["val/bpb"]}
            for line in record.lines_with("val/bpb")
        ],
        "parameters": record.plan["parameters"],
        "peak_bytes": max(record.values("train/peak_memory_bytes")),
        "commit": newest_start(run)["commit"],
    }


def time_variants(arguments: Namespace, variants: Sequence[str]) -> dict[str, dict]:
    """Returns for each variant the seconds of a step, their ratio to the baseline's, the same per token with its
    interval (studies.curves.interval_of_ratios), and the estimated bytes of a rank.

    All variants take turns on the first rows of the training text, whose frequencies decide what a lookup costs. With
    one thread (OMP_NUM_THREADS=1) on a CPU these are processor seconds, which other work on the machine disturbs less.
    """
    device, tokenizer = choose_device(bootstrap_environment()), load_tokenizer(arguments.tokenizer)
    mesh = start_mesh(load_config(arguments.config, settings_of(arguments, BASELINE, seed=1)), device)
    actions, memory, tokens = {}, {}, {}
    for name in variants:
        config = load_config(arguments.config, settings_of(arguments, name, seed=1))
        plan = resolve_plan(config, 1, tokenizer.vocab_size)
        if plan.dims.lookup:
            allocation = read_or_allocate(config, plan.dims.lookup.rows, tokenizer)
            plan = resolve_plan(config, 1, tokenizer.vocab_size, with_allocation(plan.dims.lookup, allocation))
        training = build_training_model(config, plan, mesh, torch.from_numpy(tokenizer.token_bytes()))
        set_schedules(training, 0)
        tokens[name] = plan.tokens_per_step
        rows = first_rows(arguments.data, tokenizer, (plan.rows_per_step, plan.dims.sequence_len + 1))
        actions[name] = lambda training=training, rows=rows: update(training, rows)[0].item()
        memory[name] = sum(
            stage.total for stage in memory_of_stages(config, plan, training.compute_dtype, on_gpu=False)
        )
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    seconds = time_in_turn(actions, arguments.rounds, time.process_time if alone else time.perf_counter)
    ratios = {name: round_ratios(values, seconds[BASELINE]) for name, values in seconds.items()}
    baseline = statistics.median(seconds[BASELINE])
    per_token = {
        name: interval_of_ratios([ratio * tokens[BASELINE] / tokens[name] for ratio in values])
        for name, values in ratios.items()
    }
    return {
        name: {
            "step_s": baseline * statistics.median(ratios[name]),
            "ratio": statistics.median(ratios[name]),
            "ratios": ratios[name],
            "per_token": per_token[name],
            "estimated_bytes": memory[name],
        }
        for name in variants
    }


def first_rows(folder: str, tokenizer: Tokenizer, shape: tuple[int, int]) -> torch.Tensor:
    """Returns the first tokens of the training text as rows, int64 `shape`; documents follow each other."""
    documents = sample_documents(folder, tokenizer, math.prod(shape))
    return torch.from_numpy(np.concatenate([ids.astype(np.int64) for ids in documents])).view(shape)


def summarize(runs: Sequence[Mapping], seconds: Mapping[str, Mapping]) -> dict[str, dict]:
    """Returns for each variant means and standard errors over seeds, and the differences to the baseline by seed.

    seconds: variant -> {"step_s", "ratio"} as `time_variants` returns it; may be empty.
    """
    by_variant: dict[str, dict[int, Mapping]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], {})[run["seed"]] = run
    baseline = by_variant[BASELINE]
    results = {}
    for variant, by_seed in by_variant.items():
        some, finals = next(iter(by_seed.values())), {seed: run["curve"][-1]["bpb"] for seed, run in by_seed.items()}
        points = list(zip(*(run["curve"] for run in by_seed.values()), strict=True))
        differences = [bpb - baseline[seed]["curve"][-1]["bpb"] for seed, bpb in finals.items() if seed in baseline]
        results[variant] = {
            "seeds": len(finals),
            "bpb": mean_and_error(finals.values()),
            "difference": mean_and_error(differences),
            "steps": some["curve"][-1]["step"],
            "flops": some["curve"][-1]["flops"],
            "parameters": some["parameters"],
            "peak_bytes": statistics.median(run["peak_bytes"] for run in by_seed.values()),
            "curve": [
                {"step": point[0]["step"], "flops": point[0]["flops"]}
                | dict(zip(("bpb", "error"), mean_and_error(each["bpb"] for each in point), strict=True))
                for point in points
            ],
        } | seconds.get(variant, {})
    return results


def mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error, which is unknown for one value."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _with_error(mean: float, error: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + ("" if error is None else f" +- {error:.4f}")


def _verdict(mean: float, error: float | None, seeds: int) -> str:
    """Returns better or worse for a difference whose 95 % interval over the paired seeds is beyond 0, else cannot tell.

    The interval is Student's: with three seeds 4.3 standard errors to each side, with two 12.7.
    """
    if error is None or abs(mean) <= student_95(seeds - 1) * error:
        return "cannot tell"
    return "better" if mean < 0 else "worse"


def _time(variant: Mapping) -> str:
    """Returns the time per token relative to the baseline's, with its interval."""
    ratio = variant["per_token"]
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def times_table(variants: Mapping[str, Mapping]) -> list[str]:
    """Returns one line per variant: the time per token relative to the baseline's, with its 95 % interval, and slower
    or faster if that is beyond 1. With fewer than six rounds the interval is narrower, and nothing is said.
    """
    words = {"better": "faster", "worse": "slower"}
    rows = [("variant", "time per token", "verdict")]
    for name, variant in variants.items():
        certain = name != BASELINE and len(variant["ratios"]) >= 6
        verdict = variant["per_token"].verdict if certain else ""
        rows.append((name, _time(variant), words.get(verdict, verdict)))
    return text_table(rows, right=(1,))


def ablation_table(variants: Mapping[str, Mapping]) -> list[str]:
    """Returns one line per variant: bits per byte, difference to the baseline, and what it costs."""
    rows = [("variant", "seeds", "bits per byte", "difference to none", "verdict", "time", "FLOPs", "parameters", "MB")]
    reference = variants[BASELINE]
    for name, variant in variants.items():
        rows.append(
            (
                name,
                str(variant["seeds"]),
                _with_error(*variant["bpb"]),
                "" if name == BASELINE else _with_error(*variant["difference"], "+"),
                "" if name == BASELINE else _verdict(*variant["difference"], variant["seeds"]),
                _time(variant) if "per_token" in variant else "",
                f"{variant['flops'] / reference['flops']:.3f}",
                f"{variant['parameters']['total']:,}",
                f"{variant.get('estimated_bytes', variant['peak_bytes']) / 1e6:,.0f}",
            )
        )
    return text_table(rows, right=(1, 2, 3, 5, 6, 7, 8))
