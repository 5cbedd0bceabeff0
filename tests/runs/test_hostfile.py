"""Hostfiles and launch scripts without a second host: what is refused before anything is started, and what the scripts start."""

import math
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.runs.job import BIN, ROOT, begin, command, finish, free_port, launched, losses

SCRIPTS = ("data.sh", "tensor.sh", "pipeline.sh", "three_d.sh", "hostfile.sh", "no_ssh.sh", "mpirun.sh", "slurm.sbatch")
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
        assert done.errors == [
            "error: the hostfile nowhere does not exist, so deepspeed would train on this host alone: name an existing file, or leave --hostfile out"
        ]
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
    for arguments, status in (["-h"], 0), ([], 1):
        done = subprocess.run(["bash", path, *arguments], capture_output=True, text=True, cwd="/")
        assert done.returncode == status and not done.stderr
        assert "Usage: " in done.stdout and script in done.stdout
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_script_for_data_parallelism_trains_as_any_launcher(two, place):
    program = command(place, "script")
    done = finish(begin(["bash", "launch/data.sh", program[2], "--set", "log.every=2"], IN_PATH | {"RANKS": "2"}))
    assert done.status == 0, done.err
    assert losses(place.runs / "script") == {
        step: loss for step, loss in losses(two).items() if step % 2 == 0 or step == max(losses(two))
    }


@pytest.mark.parametrize(
    "script, axes", [("tensor.sh", (1, 2, 1)), ("pipeline.sh", (1, 1, 2)), ("three_d.sh", (1, 2, 2))]
)
def test_the_scripts_for_layouts_ask_for_them(script, axes, place):
    """The layouts themselves are tests/ranks' and tests/runs/test_layouts.py's."""
    program = command(place, script)
    few = {} if script == "tensor.sh" else {"RANKS": "1"}  # importing torch once is quicker; the plan is for --world
    done = finish(
        begin(["bash", f"launch/{script}", program[2], "--dry-run", "--world", str(math.prod(axes))], IN_PATH | few)
    )
    assert done.status == 0, done.err
    assert "layout = data {} x tensor {} x pipeline {}".format(*axes) in done.out


def test_a_rank_that_is_never_started_is_named(place):
    program = launched("python", 1, command(place, "absent", "--set", "parallel.rendezvous_s=5"))
    told = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [begin(program, told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 2)]
    ended = [finish(rank, 90) for rank in ranks]
    for done in ended:
        assert done.status == 2 and "Traceback" not in done.err
        (error,) = done.errors
        assert "rank 1 of 3 did not come within 5 s, here are rank 0, 2" in error.replace("ranks 0, 2", "rank 0, 2")
    assert not (place.runs / "absent").exists()
