"""launch/setup.sh and demo.sh with stubs for python and deepspeed: what is installed from where, what is passed on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.limits import limit_s

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/bash
echo "python $*" >>"$LOG"
case "$*" in
  *"-c import torch"*) exit "$NO_TORCH" ;;
  *whl/cpu*) exit "$NO_INDEX" ;;
  *requirements.txt*)
    tries=0
    until [ -z "${SHOWN:-}" ] || grep -q "starting pip" "$SHOWN" || [ $((tries++)) = 3000 ]; do sleep 0.1; done
    cat "$VENV/requirements.txt" >>"$LOG.lock"
    ;;
  *import\\ socket*) echo 4321 ;;
esac
"""
CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"


class Project:
    """A copy of the scripts with a .venv of stubs."""

    def __init__(self, folder: Path):
        self.folder, self.log, self.output = folder, folder / "log", folder / "output"
        for name in ("setup.py", "requirements.lock", "launch", "configs"):
            (folder / name).symlink_to(ROOT / name)
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "python").write_text(PYTHON)
        (programs / "deepspeed").write_text('#!/bin/bash\necho "deepspeed $*" >>"$LOG"\n')
        for path in programs.iterdir():
            path.chmod(0o755)
        for (
            name
        ) in "awk bash cat cksum cut dirname grep od rm sed sleep tail tee touch tr uname".split():  # and no nvidia-smi
            (programs / name).symlink_to(shutil.which(name))

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        """Returns exit status, output and the calls of python and deepspeed."""
        self.log.write_text("")
        venv = self.folder / ".venv"
        given = {"LOG": str(self.log), "VENV": str(venv), "PYTHON": str(venv / "bin/python")}
        given |= {"PATH": str(venv / "bin"), "NO_TORCH": "0", "NO_INDEX": "0"} | variables
        line = ["bash", self.folder / "launch" / script, *arguments]
        with self.output.open("w") as output:
            done = subprocess.run(line, env=given, stdout=output, stderr=subprocess.PIPE, text=True, timeout=limit_s())
        return done.returncode, self.output.read_text() + done.stderr, self.log.read_text().splitlines()


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


def pip_calls(calls: list[str]) -> list[str]:
    return [call for call in calls if "-m pip install" in call]


def test_the_demo_passes_its_arguments_on(project):
    status, output, calls = project.run("demo.sh", "--set", "horizon.steps=20")
    assert status == 0, output
    assert calls[-1] == "python -m megachat demo --set horizon.steps=20"
    assert not any("--set" in call for call in pip_calls(calls)), "they are no extras"


def test_everything_is_installed_by_hash_and_torch_from_one_index(project):
    status, output, calls = project.run("setup.sh", "test,wandb", NO_TORCH="1")
    assert status == 0, output
    *locked, editable = pip_calls(calls)
    assert all("--require-hashes --no-deps" in call for call in locked) and "--no-deps" in editable
    assert sum(CPU_INDEX in call for call in locked) == 1 and not any("extra-index-url" in call for call in calls)
    lock = (project.folder / "log.lock").read_text()
    assert "\nwandb==" in lock and "\npytest==" in lock and "\nnvidia-" not in lock and "\ntorch==" not in lock
    assert project.run("setup.sh", "test,wandb")[2] == [calls[0]], "a second call only asks for python's version"


def test_a_long_installation_shows_what_pip_does(project):
    status, output, _ = project.run("setup.sh", SHOWN=str(project.output), PROGRESS_S="1")
    assert status == 0 and re.search(r"^  \d+ s: starting pip$", output, re.MULTILINE), output
    assert "python" not in output, "the rest is in the log"


def test_without_the_cpu_index_the_gpu_build_is_installed_by_hash(project):
    status, output, calls = project.run("setup.sh", NO_TORCH="1", NO_INDEX="1")
    assert status == 0 and "installing the build for GPUs, several GB" in output
    lock = (project.folder / "log.lock").read_text()
    assert "\ntorch==" in lock and "\nnvidia-nccl" in lock and "\npytest==" not in lock
    assert all("--require-hashes" in call for call in pip_calls(calls)[:-1])


def test_the_lock_can_be_left_out_and_a_torch_is_kept(project):
    status, output, calls = project.run("setup.sh", "hf", LOCKED="no")
    assert status == 0, output
    (call,) = pip_calls(calls)
    assert call.endswith(f"pip install -e {project.folder}[hf]")
    _, _, calls = project.run("setup.sh", "mpi", LOCKED="no", NO_TORCH="1")
    assert f"--no-deps {CPU_INDEX}" in pip_calls(calls)[0] and "torch==" in pip_calls(calls)[0]


def test_wrong_extras_are_refused(project):
    status, output, calls = project.run("setup.sh", "--set")
    assert (status, calls) == (2, []) and output.startswith("error: there is no extra '--set': give test, hf, mpi,")
    assert project.run("setup.sh", LOCKED="maybe")[:2] == (2, "error: LOCKED is 'maybe': set it to yes or no\n")
