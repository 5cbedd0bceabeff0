"""Text that a console cannot show, and consoles that fail, each in its own process."""

import fcntl
import os
import pty
import subprocess
import sys

import pytest

from tests.limits import limit_s, until
from tests.runs.job import ROOT, unread

PROGRAM = """
import sys, time
from megachat.errors import UserError, user_errors_end_the_program

@user_errors_end_the_program{how}
def main():
    {body}

main()
"""
RANK, TOOL = "(rank=lambda: 0)", ""
WORK = """
    for number in range(3):
        print(number, flush=True)
        print(number, file=sys.stderr)
    open(sys.argv[1], "w").write("worked")
    time.sleep(0.01)
    print("end")
"""


def line(how, body, *arguments, options=()):
    return [sys.executable, *options, "-c", PROGRAM.format(how=how, body=body.strip()), *map(str, arguments)]


@pytest.mark.parametrize("how", [RANK, TOOL])
@pytest.mark.parametrize("options", [[], ["-u"]])
def test_text_that_the_console_cannot_show_is_escaped(how, options):
    body = """print("caf\\xe9 \\udcff"); raise UserError("caf\\xe9")"""
    done = subprocess.run(
        line(how, body, options=options),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=limit_s(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "caf\\xe9 \\udcff\n", "error: caf\\xe9\n")


def dead_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def dead_terminal():
    screen, terminal = pty.openpty()
    os.close(screen)
    return terminal


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("options", [[], ["-u"]])
@pytest.mark.parametrize(
    "console, problem",
    [(dead_pipe, "Broken pipe"), (dead_terminal, "Input/output error"), (full_disk, "No space left on device")],
)
def test_a_job_continues_without_its_console(console, problem, options, tmp_path):
    descriptor = console()
    done = subprocess.run(
        line(RANK, WORK, tmp_path / "file", options=options),
        cwd=ROOT,
        stdout=descriptor,
        stderr=subprocess.PIPE,
        text=True,
        timeout=limit_s(),
    )
    note = f"note: stdout takes no more output ({problem}): continuing without it"
    assert done.returncode == 0 and sorted(done.stderr.splitlines()) == ["0", "1", "2", note]
    assert (tmp_path / "file").read_text() == "worked"
    both = subprocess.run(
        line(RANK, WORK, tmp_path / "both"), cwd=ROOT, stdout=descriptor, stderr=descriptor, timeout=limit_s()
    )
    assert both.returncode == 0 and (tmp_path / "both").exists()
    os.close(descriptor)


def test_a_job_started_with_closed_descriptors_works(tmp_path):
    command = ["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *line(RANK, WORK, tmp_path / "file")]
    assert subprocess.run(command, cwd=ROOT, timeout=limit_s()).returncode == 0 and (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "console, status, error",
    [
        (dead_pipe, 141, ""),
        (dead_terminal, 141, ""),
        (full_disk, 2, "error: the output could not be written (No space left on device): free space there\n"),
    ],
)
def test_a_tool_ends_quietly_without_its_reader(console, status, error, tmp_path):
    descriptor = console()
    for body in ("print('a result')", "print('the help'); sys.exit(0)"):
        done = subprocess.run(
            line(TOOL, body), cwd=ROOT, stdout=descriptor, stderr=subprocess.PIPE, text=True, timeout=limit_s()
        )
        assert done.stderr in (error, "") and (done.returncode == status or "help" in body)
    os.close(descriptor)
    # a dead stderr, for example of a progress bar, does not end it
    done = subprocess.run(line(TOOL, WORK, tmp_path / "file"), cwd=ROOT, stdout=subprocess.PIPE, stderr=dead_pipe())
    assert done.returncode == 0 and done.stdout == b"0\n1\n2\nend\n"


def test_all_is_written_to_a_console_that_does_not_block(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    room = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
    job = subprocess.Popen(line(RANK, "print('x' * 1_000_000)"), cwd=ROOT, stdout=writer)
    os.close(writer)
    until(lambda: job.poll() is not None or unread(reader) == room, "full pipe", every_s=0.01)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"x" * 1_000_000 + b"\n"
    assert job.wait(limit_s()) == 0
