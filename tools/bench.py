"""Measurements, side by side in one run, as ratios: timings on shared machines are noisy and their ratios less so.

python tools/bench.py KIND --config configs/d4_cpu.json [...]; KIND is one that --help names. Prints one JSON object with hardware and commit.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megachat.config import load_config  # noqa: E402
from megachat.device import this_device  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.job.launch import bootstrap_environment, choose_device, describe_environment, free_port  # noqa: E402
from megachat.job.local_ranks import run_with_torchrun, set_options  # noqa: E402
from tools.bench.gpu import bench_gpu  # noqa: E402


def in_turn(actions: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each action, `rounds` times, taken in turn so that a busy neighbour slows all alike; the first round is not counted."""
    seconds = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def compare(seconds: dict[str, list[float]], baseline: str, amount: int = 1) -> dict:
    """Medians as rates of `amount` a second, and each one's ratio to the baseline: the median over rounds of their ratio in that round."""
    found = {
        name: {"per_sec": amount / statistics.median(values), "rounds": len(values)} for name, values in seconds.items()
    }
    for name, values in seconds.items():
        ratios = [slow / fast for slow, fast in zip(seconds[baseline], values, strict=True)]
        found[name]["times_faster_than_" + baseline] = round(statistics.median(ratios), 3)
    return found


def bench_dtype(arguments) -> dict:
    """Tokens a second of whole training steps (forward, backward, both optimizers) of one model in bfloat16 and in float32, eager."""
    from tools.bench.step import training_steps

    actions, plan = training_steps(
        arguments, {dtype: [f"precision.compute={dtype}"] for dtype in ("float32", "bfloat16")}
    )
    return {"what": "training step, tokens a second"} | compare(
        in_turn(actions, arguments.rounds), "float32", plan.tokens_per_step
    )


def bench_recompute(arguments) -> dict:
    """Tokens a second of whole training steps, and the most bytes that one makes, by what blocks compute again in the backward pass."""
    from tools.bench.step import step_bytes, training_steps

    actions, plan = training_steps(
        arguments, {kind: [f"batch.recompute={kind}"] for kind in ("none", "selective", "block")}
    )
    found = compare(in_turn(actions, arguments.rounds), "none", plan.tokens_per_step)
    for kind, action in actions.items():
        found[kind]["bytes_in_a_step"] = step_bytes(action)
    return {"what": "training step, tokens a second and bytes", "rows_at_a_time": plan.micro_rows} | found


def bench_attention(arguments) -> dict:
    """Forward and backward passes a second of attention with windows on this CPU: under a mask, by tiles, and without windows."""
    from tools.bench.step import attention_actions

    made = {}
    for tokens, windows in ((2048, (768, 512, 128)), (512, (128,))):
        made |= attention_actions(tokens, windows, heads=4, head_size=64)
    return {
        "what": "attention, passes a second",
        "found": {name: compare(in_turn(ways, arguments.rounds), "mask") for name, ways in made.items()},
    }


def bench_nanochat(arguments) -> dict:
    """Tokens a second of whole training steps on this CPU: ours in bfloat16 through the engine, nanochat's own float32 compiled one, both with
    their optimizers, at one config's shapes. nanochat takes the rows at a time that suit it best."""
    import torch

    from tools.bench.nanochat import nanochat_steps, open_nanochat
    from tools.bench.step import training_steps

    gpt, _ = open_nanochat(arguments.nanochat)
    compiled = {"bfloat16": "false", "bfloat16 compiled": "true"}
    actions, plan = training_steps(
        arguments, {name: ["precision.compute=bfloat16", f"precision.compile={on}"] for name, on in compiled.items()}
    )
    actions |= nanochat_steps(arguments, plan, load_config(arguments.config, arguments.set).model.window_pattern)
    seconds = in_turn(actions, arguments.rounds)
    best = min(seconds.keys() - compiled.keys(), key=lambda name: statistics.median(seconds[name]))
    found = compare(seconds, best, plan.tokens_per_step)
    facts = {
        "threads": torch.get_num_threads(),
        "nanochat_computes_in": str(gpt.COMPUTE_DTYPE),
        "rows_at_a_time": plan.micro_rows,
        "baseline": best,
    }
    return {"what": "training step, tokens a second"} | facts | found


def bench_start(arguments) -> dict:
    """Seconds from the start of `python launch/pretrain.py` to the end of its first optimizer step, and the start-up part of it."""
    found = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                str(ROOT / "launch" / "pretrain.py"),
                "--config",
                arguments.config,
                "--set",
                f"run.folder={folder}",
            ]
            command += ["--set", "horizon.stop_step=1", *set_options(arguments.set)]
            begin = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("step 00000/"):
                    found.append(time.perf_counter() - begin)
            errors = process.stderr.read()
            if process.wait():
                raise UserError(f"pretrain.py failed: {errors.strip().splitlines()[-1]}")
    return {"what": "seconds to the end of the first step", "median_s": statistics.median(found), "all_s": found}


def bench_loader(arguments) -> dict:
    """Tokens a second: packing and the whole loader, beside a plain implementation that scans the buffer for every placement."""
    from tools.bench.packing import measure

    asked = {
        "row_tokens": arguments.row_tokens,
        "rows": arguments.rows,
        "streams": 8,
        "buffer_documents": 1000,
        "threads": 2,
    }
    found = measure(arguments.data, arguments.tokenizer, **asked)
    ratios = {
        "packing_times_faster": found["our_packing"]["tokens_per_sec"] / found["plain_packing"]["tokens_per_sec"],
        "loader_times_faster": found["our_loader"]["tokens_per_sec"] / found["plain_with_tokenizing"]["tokens_per_sec"],
    }
    return {"what": "tokens a second", "asked": asked, "found": found} | {
        name: round(ratio, 2) for name, ratio in ratios.items()
    }


def bench_layouts(arguments) -> dict:
    """Loss curves of one process and of each layout in float32, from the same start over the same rows: the largest difference of any step."""
    curves, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("dp=1", *arguments.layouts.split()):
            sizes = {"dp": 1, "tp": 1, "pp": 1} | {
                axis: int(size) for axis, size in (part.split("=") for part in layout.split(","))
            }
            settings = [
                f"run.folder={folder}",
                f"run.name={layout}",
                "precision.compute=float32",
                f"horizon.stop_step={arguments.steps}",
            ]
            settings += [
                f"parallel.tensor={sizes['tp']}",
                f"parallel.pipeline={sizes['pp']}",
                "checkpoint.every=0",
                "evaluate.every=0",
            ]
            settings += [
                f"data.folder={arguments.data}",
                f"data.tokenizer={arguments.tokenizer}",
                "data.tokenizer_threads=1",
                *arguments.set,
            ]
            # one core for one process: as many threads as each of the ranks has, because threads change the order of sums
            pinned = ["taskset", "-c", "0"] if layout == "dp=1" else []
            command = [
                *pinned,
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(sizes["dp"] * sizes["tp"] * sizes["pp"]),
            ]
            command += [
                "--master-port",
                str(free_port()),
                str(ROOT / "launch" / "pretrain.py"),
                "--config",
                arguments.config,
            ]
            done = subprocess.run([*command, *set_options(settings)], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{layout} failed: {(done.stderr or done.stdout).strip().splitlines()[0]}")
            lines = [json.loads(line) for line in (Path(folder) / layout / "metrics.jsonl").read_text().splitlines()]
            curves[layout] = [line["train/loss"] for line in lines if "train/loss" in line]
            seconds[layout] = statistics.median(line["train/dt"] for line in lines if "train/loss" in line)
    found = {}
    for layout, curve in curves.items():
        apart = [abs(one - other) for one, other in zip(curve, curves["dp=1"], strict=True)]
        found[layout] = {
            "largest_difference": max(apart),
            "at_step": apart.index(max(apart)),
            "last_loss": curve[-1],
            "step_s": seconds[layout],
        }
    return {"what": f"loss over {arguments.steps} steps against one process", "found": found}


def bench_checkpoint(arguments) -> dict:
    """Seconds for which training waits for a save, and until it is complete, beside torch.save of each rank's state; loading; bytes."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        program = [
            str(ROOT / "tools" / "bench" / "checkpoint.py"),
            "--config",
            arguments.config,
            "--vocab-size",
            str(arguments.vocab_size),
        ]
        program += ["--rounds", str(arguments.rounds), "--folder", folder, *set_options(arguments.set)]
        told = run_with_torchrun("the ranks", arguments.ranks, program)
    return {"what": "seconds of saving and loading, of the slowest rank"} | json.loads(told.strip().splitlines()[-1])


def bench_generation(arguments) -> dict:
    """Greedy tokens a second of one process in float32, with the KV cache and without one."""
    from tools.bench.generation import actions

    choose_device(bootstrap_environment())
    made, facts = actions(load_config(arguments.config, arguments.set), arguments.vocab_size, arguments.tokens)
    found = {
        name: compare(in_turn(ways, arguments.rounds), "anew", facts["rows"][name] * arguments.tokens)
        for name, ways in made.items()
    }
    return {"what": f"new tokens a second, {arguments.tokens} a row", "facts": facts, "found": found}


def bench_profile(arguments) -> dict:
    """Where the time of a training step goes."""
    from tools.bench.step_profile import bench_profile

    return bench_profile(arguments)


def bench_core(arguments) -> dict:
    """CORE's examples a second of one process, in full batches and one at a time, both with the same answers."""
    from tools.bench.core import actions

    if not arguments.checkpoint or not arguments.bundle:
        raise UserError("core needs --checkpoint and --bundle")
    ways, facts = actions(Path(arguments.checkpoint), Path(arguments.bundle), arguments.set, arguments.max_per_task)
    found = compare(in_turn(ways, arguments.rounds), "one by one", facts["examples"])
    return {"what": "examples a second", "facts": facts, "found": found}


@user_errors_end_the_program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = {
        "dtype": bench_dtype,
        "start": bench_start,
        "loader": bench_loader,
        "layouts": bench_layouts,
        "checkpoint": bench_checkpoint,
    }
    kinds |= {
        "generation": bench_generation,
        "core": bench_core,
        "gpu": bench_gpu,
        "recompute": bench_recompute,
        "attention": bench_attention,
    }
    kinds |= {"profile": bench_profile, "nanochat": bench_nanochat}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--config", default=str(ROOT / "configs" / "d4_cpu.json"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--vocab-size", type=int, default=4096, help="where the config leaves it to a tokenizer")
    parser.add_argument("--data", default="data/python", help="for loader and layouts")
    parser.add_argument("--tokenizer", default="data/tokenizer", help="for loader and layouts")
    parser.add_argument(
        "--layouts", default="dp=2 tp=2 pp=2 dp=2,tp=2 dp=2,pp=2 tp=2,pp=2 dp=2,tp=2,pp=2", help="for layouts"
    )
    parser.add_argument("--layout", default="dp=1", help="for profile: one, as in --layouts")
    parser.add_argument("--steps", type=int, default=30, help="for layouts")
    parser.add_argument("--row-tokens", type=int, default=513, help="for loader")
    parser.add_argument("--rows", type=int, default=2000, help="for loader")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of all kinds that take turns; for profile: steps looked at"
    )
    parser.add_argument("--tokens", type=int, default=16, help="for generation: new tokens a row")
    parser.add_argument("--checkpoint", help="for core")
    parser.add_argument("--bundle", help="for core: a folder or zip")
    parser.add_argument("--max-per-task", type=int, default=-1, help="for core")
    parser.add_argument("--ranks", type=int, default=2, help="for checkpoint")
    parser.add_argument(
        "--folder", help="for checkpoint: on the storage to be measured; default: the system's temporary folder"
    )
    parser.add_argument("--minutes", type=float, default=12, help="for gpu: cases that do not fit are left out")
    parser.add_argument(
        "--nanochat", help="for gpu and nanochat: a clone of nanochat, whose own model is then measured, too"
    )
    parser.add_argument(
        "--nanochat-rows",
        default="1 2 4 8",
        help="for nanochat: rows at a time that its own model takes, the best of which counts",
    )
    parser.add_argument(
        "--out",
        help="for gpu: Markdown file with the two marker comments to write the table between; for profile: an SVG picture",
    )
    parser.add_argument("--checks", help="for gpu: the report of tests/gpu, to keep beside the numbers")
    parser.add_argument("--checks-log", help="for gpu: what pytest said of tests/gpu")
    arguments = parser.parse_args(["profile" if word == "--profile" else word for word in sys.argv[1:]])
    import torch

    result = kinds[arguments.kind](arguments)
    where = describe_environment(this_device())
    kept = {key: where[key] for key in ("commit", "uncommitted_changes", "device", "cpu_cores")} | {
        "torch": torch.__version__
    }
    print(json.dumps({"bench": arguments.kind} | result | {"where": kept}, indent=1))


if __name__ == "__main__":
    main()
