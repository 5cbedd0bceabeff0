"""Hostfiles and launch scripts without a second host: what is refused before a start, and what the scripts start."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.forked import Ranks
from tests.runs.job import BIN, ROOT, begin, command, finish, free_port, losses

DOORS = ("data.sh", "tensor.sh", "pipeline.sh", "three_d.sh")  # each calls run.sh with a layout
SCRIPTS = ("run.sh", *DOORS, "hostfile.sh", "no_ssh.sh", "mpirun.sh", "torchrun.sh", "slurm.sbatch")
IN_PATH = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def test_a_hostfile_that_does_not_exist_is_refused(place):
    """DeepSpeed itself only warns, and trains on this host."""
    for launcher, option in (
        ([BIN / "deepspeed"], ["--hostfile", "nowhere"]),
        ([sys.executable, "-m", "deepspeed.launcher.runner"], ["-H=nowhere"]),
    ):
        line = [*launcher, *option, "--master_port", free_port(), *command(place, "nowhere")]
        done = finish(begin(line))
        assert done.status == 2, done.err
        (error,) = done.errors
        assert error.startswith("error: ") and "hostfile nowhere does not exist" in error and "--hostfile" in error
        assert not (place.runs / "nowhere").exists()


def test_mistakes_in_a_hostfile_end_the_check_at_once(place):
    path = place.runs / "hostfile"
    path.write_text("worker-1 slots=2\nworker-2 slot=2\nworker-1 slots=2\n")
    done = finish(begin([sys.executable, "launch/check_hosts.py", path]))
    assert (done.status, done.out) == (2, "") and done.err.splitlines() == done.errors
    assert [re.search(r"line (\d)", error)[1] for error in done.errors] == ["2", "3"]
    done = finish(begin(["bash", "launch/no_ssh.sh", path, "0", "localhost", "configs/d4_cpu.json"], IN_PATH))
    assert done.status == 2 and len(done.errors) == 2
    path.write_text("worker-1 slots=2\n")
    done = finish(begin(["bash", "launch/no_ssh.sh", path, "1", "localhost", "configs/d4_cpu.json"], IN_PATH))
    assert (done.status, done.err) == (
        2,
        f"error: node rank 1 is not in {path}, which has 1 host with 2 ranks: give 0 to 0\n",
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_say_how_they_are_used(script):
    path = ROOT / "launch" / script
    for arguments, status in (["-h"], 0), (["--help"], 0), ([], 2):
        done = subprocess.run(["bash", path, *arguments], capture_output=True, text=True, cwd="/")
        assert done.returncode == status and not done.stderr
        assert "Usage: " in done.stdout and script in done.stdout
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--severity=warning", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_script_for_data_parallelism_trains_as_any_launcher(two, place):
    program = command(place, "script")
    variables = IN_PATH | {"RANKS": "2", "MASTER_PORT": str(free_port())}
    done = finish(begin(["bash", "launch/data.sh", program[2], "--set", "log.every=2"], variables))
    assert done.status == 0, done.err
    assert losses(place.runs / "script") == {
        step: loss for step, loss in losses(two).items() if step % 2 == 0 or step == max(losses(two))
    }


def test_a_script_requests_its_layout(place):
    """The layouts themselves are tested in tests/ranks and tests/runs/test_layouts.py."""
    config = command(place, "three_d")[2]
    done = finish(begin(["bash", "launch/three_d.sh", config, "--dry-run", "--world", "8"], IN_PATH | {"RANKS": "1"}))
    assert done.status == 0, done.err
    assert "layout = data 2 x tensor 2 x pipeline 2" in done.out


EVERY_SCRIPT = [path for folder in ("launch", "tests") for path in sorted((ROOT / folder).glob("*.sh"))]
EVERY_SCRIPT += sorted((ROOT / "launch").glob("*.py"))


@pytest.mark.parametrize("path", EVERY_SCRIPT, ids=lambda path: path.name)
def test_every_script_helps_before_anything_is_installed(path, tmp_path):
    """-S: without site-packages. The copy has no .venv."""
    for folder in ("launch", "megachat", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    copy = tmp_path / path.relative_to(ROOT)
    program = ["bash"] if path.suffix == ".sh" else [sys.executable, "-S", "-E"]
    for option in ("-h", "--help"):
        done = subprocess.run([*program, copy, option], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "") and "usage" in done.stdout.lower(), path
    assert not (tmp_path / ".venv").exists()


@pytest.fixture
def stubs(tmp_path):
    """A folder with a python that prints a launcher's arguments, and all that the scripts may use without GPUs."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name in "bash dirname sed head tail tr mktemp od".split():
        (folder / name).symlink_to(shutil.which(name))
    launcher = 'megachat.job.launcher_process) shift 3; echo "$DS_ACCELERATOR${TEST:+${#MEGACHAT_SECRET}}" "$@"; exit'
    (folder / "python").write_text(f'#!/bin/sh\ncase "$2" in {launcher} ;; esac\nexec {sys.executable} "$@"\n')
    for name in ("deepspeed", "torchrun"):  # searched only
        (folder / name).write_text("")
    for name in ("python", "deepspeed", "torchrun"):
        (folder / name).chmod(0o755)
    return folder


def test_what_each_script_starts_on_a_machine_without_gpus(stubs):
    pretrain = "launch/pretrain.py --config x.json"
    tensor, pipeline = "--set parallel.tensor={}", "--set parallel.pipeline={}"
    for script, layout, ranks, options in (
        ("run.sh", {}, 2, ""),
        ("data.sh", {"TENSOR": "2", "PIPELINE": "2"}, 2, ""),  # a door sets the axes in its name and no other
        ("run.sh", {"TENSOR": "3"}, 3, tensor.format(3)),
        ("tensor.sh", {"PIPELINE": "2"}, 2, tensor.format(2)),
        ("pipeline.sh", {"PIPELINE": "3"}, 3, pipeline.format(3)),
        ("run.sh", {"TENSOR": "2", "PIPELINE": "2"}, 4, f"{tensor.format(2)} {pipeline.format(2)}"),
        ("three_d.sh", {}, 4, f"{tensor.format(2)} {pipeline.format(2)}"),
        ("three_d.sh", {"TENSOR": "4", "RANKS": "16"}, 16, f"{tensor.format(4)} {pipeline.format(2)}"),
        ("run.sh --layout tp=2,pp=3", {}, 6, "--layout tp=2,pp=3"),
        ("run.sh --layout=dp=3", {}, 3, "--layout=dp=3"),
        ("run.sh --layout tp=2", {"RANKS": "8"}, 8, "--layout tp=2"),
        ("run.sh --layout tp=two", {}, 2, "--layout tp=two"),  # pretrain explains the mistake
    ):
        script, *more = script.split()
        line = [stubs / "bash", ROOT / "launch" / script, "x.json", *more, "--set", "log.every=2"]
        variables = {"PATH": str(stubs), "MASTER_PORT": "1234"} | layout
        done = subprocess.run(line, env=variables, capture_output=True, text=True)
        start = f"cpu --quiet --num_accelerators {ranks} --master_port 1234"
        assert (done.stdout.split(), done.stderr) == (f"{start} {pretrain} {options} --set log.every=2".split(), "")


@pytest.mark.parametrize(
    ("script", "counts"),
    [("run.sh", {name: value}) for name, value in (("RANKS", "0"), ("RANKS", "-1"), ("TENSOR", "x"))]
    + [("torchrun.sh", {name: value}) for name, value in (("NODES", "0"), ("RANKS", "x"), ("PIPELINE", "2.5"))],
)
def test_ranks_are_whole_numbers(stubs, script, counts):
    line = [stubs / "bash", ROOT / "launch" / script, "x.json", "x.json"]
    done = subprocess.run(line, env={"PATH": str(stubs)} | counts, capture_output=True, text=True)
    ((name, value),) = counts.items()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {name} is '{value}': give a whole number of at least 1\n"


def test_what_torchrun_starts_on_each_machine(stubs):
    line = [stubs / "bash", ROOT / "launch/torchrun.sh", "worker-1:29400", "x.json", "--set", "log.every=2"]
    meet = "--rdzv-backend c10d --rdzv-endpoint worker-1:29400 --rdzv-id"
    program, last = "launch/pretrain.py --config x.json", "--set log.every=2"
    for variables, start, layout in (
        ({}, f"64 --nnodes 1 --nproc-per-node 1 {meet} megachat", ""),
        ({"NODES": "2", "RANKS": "4", "JOB": "b"}, f"0 --nnodes 2 --nproc-per-node 4 {meet} b", ""),
        ({"NODES": "2", "TENSOR": "2"}, f"0 --nnodes 2 --nproc-per-node 1 {meet} megachat", "--set parallel.tensor=2"),
    ):
        done = subprocess.run(line, env={"PATH": str(stubs), "TEST": "1"} | variables, capture_output=True, text=True)
        assert (done.stdout.split(), done.stderr) == (f"{start} {program} {layout} {last}".split(), "")


def test_scripts_take_a_free_port_and_find_files_from_any_folder(stubs, tmp_path):
    """A path is relative to the caller's folder first, then to the project's."""
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfworker-1 slots=2\r\n")
    run, no_ssh = [ROOT / "launch/run.sh"], [ROOT / "launch/no_ssh.sh", "hosts", "0", "localhost"]
    with socket.socket() as taken:
        taken.bind(("", 0))
        for script in (run, no_ssh):
            for config, path in (("mine.json", tmp_path / "mine.json"), ("configs/d4_cpu.json",) * 2):
                line = [stubs / "bash", *script, config]
                variables = {"PATH": str(stubs), "TMPDIR": str(tmp_path)}
                done = subprocess.run(line, env=variables, cwd=tmp_path, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                words = done.stdout.split()
                assert words[words.index("--config") + 1] == str(path)
                port = int(words[words.index("--master_port") + 1])
                assert port == 29500 if script is no_ssh else port not in (29500, taken.getsockname()[1])
    hostfile = Path(words[words.index("--hostfile") + 1])
    assert hostfile.read_bytes() == b"worker-1 slots=2\n", "deepspeed takes the mark for a part of the name"


def test_a_hostfile_cannot_give_options_to_ssh(stubs, tmp_path):
    (tmp_path / "hosts").write_text("-oProxyCommand=touch${IFS}owned slots=1\n")
    for script, *arguments in (("hostfile.sh",), ("no_ssh.sh", "0", "localhost"), ("mpirun.sh",)):
        line = [stubs / "bash", ROOT / "launch" / script, tmp_path / "hosts", *arguments, "configs/d4_cpu.json"]
        done = subprocess.run(line, env={"PATH": f"{stubs}:{BIN}"}, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "is no host name" in done.stderr and not done.stdout, done.stderr
        assert not (tmp_path / "owned").exists()


# launch/pretrain.py, of which rank 0 waits until two ranks are there
ABSENT = """
import runpy
from tests.unit.job.clock import Clock

Clock(2)
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


def test_a_rank_that_is_never_started_is_named(place):
    (place.runs / "absent.py").write_text(ABSENT)
    program = [place.runs / "absent.py", *command(place, "absent", "--set", "parallel.rendezvous_s=600")[1:]]
    with Ranks(program, 3, start=[0, 2]) as ranks:
        assert ranks.end() == [2, 2] and "Traceback" not in ranks.err, ranks.err
    errors = [line for line in ranks.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2, "each rank reports it"
    for error in errors:
        assert "rank 1 of 3 did not arrive within 600 s, here are ranks 0,2 on " in error
    assert not (place.runs / "absent").exists()
