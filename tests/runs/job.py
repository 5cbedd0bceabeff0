"""A tiny job as a user starts it: text, a tokenizer, a config file, the launchers, and what a run leaves behind."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from megachat.checkpoint.index import read_index
from megachat.checkpoint.storage import load_checkpoint
from megachat.data.tokenizer import Tokenizer, save_tokenizer
from tests.limits import limit_s, until
from tests.runs.forked import ROOT, Done, environment, free_port, run_forked

PROGRAM = "launch/pretrain.py"
BIN = Path(sys.executable).parent  # where pip puts the launchers beside the interpreter
STEPS = 6
CONFIG = {
    "model": {"depth": 2, "aspect_ratio": 16, "head_size": 16, "sequence_len": 64},
    "batch": {"tokens": 6 * 64, "micro_rows": 1},  # 6 rows are shared evenly by 1, 2 and 3 ranks
    "horizon": {"steps": STEPS},
    "optimizer": {"scale_to_batch": False, "warmup_steps": 2},
    "precision": {"compute": "float32"},
    "evaluate": {"every": 3, "tokens": 7 * 64, "prompts": ["the old"], "sample_tokens": 4},  # 7 rows are not
    "checkpoint": {"every": 2},
}
_WORDS = (
    "the old river carried small boats past seven quiet towns while people on its banks sang "
    "about rain bread and winter"
).split()


@dataclass(frozen=True)
class Place:
    """Where the tests' inputs lie; every job gets its own config file and run folder under `runs`."""

    data: Path
    tokenizer: Path
    runs: Path


def write_shard(path: Path, documents: int, seed: int) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choice(_WORDS) for _ in range(rng.randint(3, 40))) + "." for _ in range(documents)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=20)


def make_place(folder: Path) -> Place:
    place = Place(folder / "data", folder / "tokenizer", folder / "runs")
    place.data.mkdir()
    place.runs.mkdir()
    for index, documents in enumerate((60, 60, 30)):
        write_shard(place.data / f"shard_{index:05d}.parquet", documents, seed=index)
    save_tokenizer(place.tokenizer, Tokenizer({bytes([byte]): byte for byte in range(256)}), {"source": "tests"})
    return place


def command(place: Place, name: str, *arguments: str, config: dict | None = None) -> list[str]:
    """PROGRAM with a config file of this run; `config` overrides CONFIG key by key."""
    merged = {section: dict(values) for section, values in CONFIG.items()}
    merged["data"] = {"folder": str(place.data), "tokenizer": str(place.tokenizer), "streams": 4}
    merged["run"] = {"folder": str(place.runs)}
    for section, values in (config or {}).items():
        merged.setdefault(section, {}).update(values)
    path = place.runs / f"{name}.json"
    path.write_text(json.dumps(merged))
    return [PROGRAM, "--config", str(path), *arguments]


def launched(launcher: str, world: int, program: list[str]) -> list[str]:
    """The command line that starts `program` on `world` ranks of this machine."""
    return {
        "python": [sys.executable],
        "deepspeed": [BIN / "deepspeed", "--num_accelerators", world, "--master_port", free_port()],
        "torchrun": [BIN / "torchrun", "--nproc-per-node", world, "--master-port", free_port()],
        "mpirun": [
            BIN / "mpirun",
            "-n",
            world,
            "--allow-run-as-root",
            "--oversubscribe",
            "--bind-to",
            "none",
            sys.executable,
        ],
        "mpiexec": ["mpiexec.hydra", "-n", world, "-env", "MASTER_PORT", free_port(), sys.executable],
    }[launcher] + program


def begin(line: list, variables: dict[str, str] | None = None, stdout: int = subprocess.PIPE) -> subprocess.Popen:
    """Start a command line from the repository's root, in a session of its own, with more environment variables."""
    line, variables = [str(part) for part in line], environment() | (variables or {})
    return subprocess.Popen(
        line, cwd=ROOT, env=variables, stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process) -> Done:
    """Waits for the end of a subprocess.Popen or a warm.Launcher."""
    try:
        out, err = process.communicate(timeout=limit_s())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"no end in {limit_s():.0f} s; it printed:\n{out}\n{err}") from None
    return Done(process.returncode, out, err)


def train(
    place: Place, name: str, *arguments: str, launcher: str | None = None, world: int = 1, config: dict | None = None
) -> Path:
    """Run a job that must succeed, on forked ranks if no launcher is named; returns its run folder."""
    program = command(place, name, *arguments, config=config)
    done = finish(begin(launched(launcher, world, program))) if launcher else run_forked(program, world)
    assert done.status == 0, f"{launcher} on {world} ended with {done.status}:\n{done.out}\n{done.err}"
    return place.runs / name


def refused(place: Place, name: str, *arguments: str, config: dict | None = None) -> str:
    """Run one process, which must be refused with one sentence and print nothing else; returns the sentence."""
    done = run_forked(command(place, name, *arguments, config=config))
    assert done.status == 2, f"ended with {done.status}:\n{done.out}\n{done.err}"
    assert done.err == f"{''.join(done.errors)}\n" and len(done.errors) == 1, done.err
    return done.errors[0].removeprefix("error: ")


def processes_of(config: str) -> dict[int, str | None]:
    """Process id -> rank, None for the launchers, of all that were started with this config file."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (
                (folder / "cmdline").read_bytes().split(b"\0"),
                (folder / "environ").read_bytes().split(b"\0"),
            )
        except OSError:  # it has ended
            continue
        environ = dict(line.split(b"=", 1) for line in variables if b"=" in line)
        rank = environ.get(b"RANK", environ.get(b"OMPI_COMM_WORLD_RANK"))
        if config.encode() in words:
            ranks[int(folder.name)] = rank.decode() if rank else None
    return ranks


def unread(reader: int) -> int:
    """Returns how many bytes lie in a pipe."""
    return int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder)


def freeze(pid: int) -> None:
    """Stops a process, and waits until all of its threads stand still."""
    os.kill(pid, signal.SIGSTOP)

    def stands_still() -> bool:
        try:
            stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        except OSError:  # one of them has just ended
            return False
        return {stat.rpartition(")")[2].split()[0] for stat in stats} == {"T"}

    until(stands_still, f"stop of process {pid}", every_s=0.001)


def logged(run: Path) -> list[dict]:
    """The lines of metrics.jsonl so far, of a job that may be writing one now."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


# ---- what a run left behind


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path, key: str = "train/loss_raw") -> dict[int, float]:
    """Step -> training loss of that step alone; a step that is logged twice is an error."""
    pairs = [(line["step"], line[key]) for line in metrics(run) if key in line]
    assert len({step for step, _ in pairs}) == len(pairs), "a step is logged twice"
    return dict(pairs)


def bits_per_byte(run: Path) -> dict[int, float]:
    return {line["step"]: line["val/bpb"] for line in metrics(run) if "val/bpb" in line}


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def copy_until(run: Path, place, name: str, step: int) -> Path:
    """A copy of a run folder whose newest checkpoint is of `step`."""
    copy = place.runs / name
    shutil.copytree(run, copy)
    for later in checkpoints(copy):
        if later > checkpoint(copy, step).name:
            shutil.rmtree(copy / "checkpoints" / later)
    return copy


def facts(path: Path) -> dict:
    return json.loads((path / "checkpoint.json").read_text())


def state(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by name: weights and both optimizers."""
    whole = {name: torch.full(entry["shape"], torch.nan) for name, entry in read_index(path).items()}
    load_checkpoint(
        path,
        {
            name: (tuple(tensor.shape), [((0,) * tensor.ndim, tuple(tensor.shape), tensor)])
            for name, tensor in whole.items()
        },
    )
    return whole


def different(actual: Path, wanted: Path) -> list[str]:
    """Names of the tensors of two checkpoints that differ in any bit."""
    one, other = state(actual), state(wanted)
    assert one.keys() == other.keys() and len(one) > 20
    return [name for name in one if not torch.equal(one[name], other[name])]


def ledgers(path: Path) -> dict[str, bytes]:
    """Stream file -> running hash of the documents that it has given out."""
    hashes = {}
    for file in sorted((path / "loader").glob("stream_*.npz")):
        with np.load(file) as arrays:
            hashes[file.name] = arrays["ledger"].tobytes()
    return hashes
