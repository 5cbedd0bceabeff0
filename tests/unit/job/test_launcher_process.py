"""Ctrl-C to deepspeed's launcher, of which a package of the same name stands in that takes its time to import."""

import os
import signal
import subprocess

import pytest

from megachat.job.launcher_process import launcher_line
from tests.limits import limit_s
from tests.runs.forked import ROOT, environment

WAITS = "import time; print('here', flush=True); time.sleep(600)\n"
STARTS_HOST = """\
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-u", "-m", "deepspeed.launcher.launch", *sys.argv[1:]]).wait())
"""
HANDLES_IT = "import signal, sys\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(1))\n"


INTERRUPTED = "error: interrupted\n"


@pytest.mark.parametrize(
    "runner, host, error",
    [(WAITS, "", INTERRUPTED), (STARTS_HOST, WAITS, INTERRUPTED), (STARTS_HOST, HANDLES_IT + WAITS, "")],
    ids=["first import", "second import", "training"],
)
def test_an_interrupt_is_one_line_and_a_status(runner, host, error, tmp_path):
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for path, text in {"../__init__": "", "__init__": "", "runner": runner, "launch": host}.items():
        (package / f"{path}.py").write_text(text)
    process = subprocess.Popen(
        launcher_line("deepspeed"),
        env=environment() | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C
    assert (process.communicate(timeout=limit_s())[1], process.returncode) == (error, 130)
