"""Measures launch/pretrain.py from outside: the time to the first step, and the loss curves of several layouts."""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from megachat.errors import UserError
from megachat.job.launch import free_port
from megachat.job.local_ranks import set_options
from megachat.planning.layouts import parse_layout
from megachat.studies.metrics import read_metrics

PRETRAIN = str(Path(__file__).resolve().parents[2] / "launch" / "pretrain.py")


def bench_start(arguments: Namespace) -> dict:
    """Measures the seconds from the start of `python launch/pretrain.py` to the end of its first optimizer step."""
    times = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"run.folder={folder}", "horizon.stop_step=1", *arguments.set]
            command = [sys.executable, PRETRAIN, "--config", arguments.config, *set_options(settings)]
            begin = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("step 00000/"):
                    times.append(time.perf_counter() - begin)
            errors = process.stderr.read()
            if process.wait():
                raise UserError(f"pretrain.py failed: {errors.strip().splitlines()[-1]}")
    return {"what": "seconds to the end of the first step", "median_s": statistics.median(times), "all_s": times}


def bench_layouts(arguments: Namespace) -> dict:
    """Compares each layout's loss curve with one process, in float32 from the same start over the same rows."""
    losses, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("dp=1", *arguments.layouts.split()):
            train_layout(arguments, layout, folder)
            steps = [line for line in read_metrics(Path(folder) / layout) if "train/loss" in line]
            losses[layout] = [line["train/loss_raw"] for line in steps]
            seconds[layout] = statistics.median(line["train/dt"] for line in steps)
    results = {}
    for layout, curve in losses.items():
        differences = [abs(loss - reference) for loss, reference in zip(curve, losses["dp=1"], strict=True)]
        results[layout] = {
            "largest_difference": max(differences),
            "at_step": differences.index(max(differences)),
            "last_loss": curve[-1],
            "step_s": seconds[layout],
        }
    return {"what": f"loss over {arguments.steps} steps against one process", "found": results}


def train_layout(arguments: Namespace, layout: str, folder: str) -> None:
    """Trains `arguments.steps` steps on a layout such as "dp=2,tp=2", in the run folder `folder`/`layout`."""
    sizes = parse_layout(layout)
    settings = [
        f"run.folder={folder}",
        f"run.name={layout}",
        "precision.compute=float32",
        f"horizon.stop_step={arguments.steps}",
        f"parallel.tensor={sizes['tensor']}",
        f"parallel.pipeline={sizes['pipeline']}",
        "checkpoint.every=0",
        "evaluate.every=0",
        f"data.folder={arguments.data}",
        f"data.tokenizer={arguments.tokenizer}",
        "data.tokenizer_threads=1",
        *arguments.set,
    ]
    # The process of dp=1 gets one core, so that it has as many threads as a rank: threads change the order of sums.
    pinned = ["taskset", "-c", "0"] if layout == "dp=1" else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={math.prod(sizes.values())}"]
    torchrun.append(f"--master-port={free_port()}")
    command = [*pinned, *torchrun, PRETRAIN, "--config", arguments.config, *set_options(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{layout} failed: {(done.stderr or done.stdout).strip().splitlines()[0]}")
