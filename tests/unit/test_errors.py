"""How programs end, each in its own process."""

import subprocess
import sys

import pytest

from tests.limits import limit_s
from tests.runs.job import ROOT

PROGRAM = """
import atexit, sys
from megachat.errors import UserError, user_errors_end_the_program

class Finalized:
    def __del__(self):
        print("finalized")

finalized = Finalized()
atexit.register(print, "exit function")

@user_errors_end_the_program{how}
def main():
    print("worked", end=" ")
    if "wrong" in sys.argv:
        raise UserError("first is wrong\\nsecond too")
    if "interrupt" in sys.argv:
        raise KeyboardInterrupt

main()
"""


def ended(how: str, *words: str):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(how=how), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit_s(),
    )


@pytest.mark.parametrize("how, end", [("", "exit function\nfinalized\n"), ("(rank=lambda: 0)", "exit function\n")])
@pytest.mark.parametrize(
    "word, status, error",
    [
        ("", 0, ""),
        ("wrong", 2, "error: first is wrong\nerror: second too\n"),
        ("interrupt", 130, "error: interrupted\n"),
    ],
)
def test_output_and_exit_functions_are_kept_and_only_a_tool_is_finalized(how, end, word, status, error):
    done = ended(how, word)
    assert (done.returncode, done.stdout, done.stderr) == (status, "worked " + end, error)


def test_another_rank_prints_its_number():
    assert ended("(rank=lambda: 3)", "wrong").stderr == "error: [rank 3] first is wrong\nerror: [rank 3] second too\n"


@pytest.mark.parametrize("lines, printed", [(1, ""), (100_000, "worked")])
def test_a_tool_whose_reader_has_closed_the_output_ends_silently(lines, printed):
    program = PROGRAM.format(how="").replace('print("worked", end=" ")', f"[print('worked') for _ in range({lines})]")
    tool = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    read = tool.stdout.read(len(printed))
    tool.stdout.close()
    assert read == printed and tool.stderr.read() == "" and tool.wait(limit_s()) == 141


def test_another_broken_pipe_is_an_error():
    program = PROGRAM.format(how="").replace("raise KeyboardInterrupt", "raise BrokenPipeError('a socket')")
    done = subprocess.run(
        [sys.executable, "-c", program, "interrupt"], cwd=ROOT, capture_output=True, text=True, timeout=limit_s()
    )
    assert done.returncode == 1 and "BrokenPipeError: a socket" in done.stderr
