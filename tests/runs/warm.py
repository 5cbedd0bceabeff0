"""Launchers of ranks without the seconds that each of their Python processes takes to import torch and DeepSpeed.

The launcher is forked from a warm process, and every Python process that it starts is forked from the launcher. They
are the launcher's real children, with its real signals and the command line and variables that a start would give them;
only `exec` is missing. tests/runs/test_launchers.py has the launchers as a user starts them.
"""

import ctypes
import inspect
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path

from tests.harness import end_with_the_tests, warm_context
from tests.limits import limit_s
from tests.runs.forked import ROOT, Output, environment, print_to

_exec_child = subprocess.Popen._execute_child
_EXEC_SIGNATURE = inspect.signature(_exec_child)
_CLONE_FS, _PR_SET_PDEATHSIG = 0x200, 1  # of Linux's headers


class Launcher:
    """What tests use of subprocess.Popen, for a Python program in a session of its own.

    line: as for job.begin: the interpreter and its arguments, or a Python script of the environment.
    ignored: signals that it inherits as ignored. host: process 1 of a host of tests/runs/network.py, on which it runs.
    """

    def __init__(
        self,
        line: list,
        variables: dict[str, str] | None = None,
        ignored: Iterable[signal.Signals] = (),
        host: int | None = None,
    ):
        context, words = warm_context(), [str(word) for word in line]
        words = words if words[0] == sys.executable else [sys.executable, *words]
        self._out, self._err = Output(context), Output(context)
        senders = (self._out.sender, self._err.sender)
        self._process = context.Process(
            target=_launch, args=(words, environment() | (variables or {}), tuple(ignored), host, *senders)
        )
        self._process.start()
        self.pid = self._process.pid
        for output in (self._out, self._err):
            output.sender.close()
            output.reader.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a warm launcher", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits until the launcher and all that write to its streams have ended."""
        timeout = limit_s() if timeout is None else timeout
        self.wait(timeout)
        for output in (self._out, self._err):
            output.reader.join(timeout)
            if output.reader.is_alive():
                raise subprocess.TimeoutExpired("a warm launcher", timeout)
        return self._out.text(), self._err.text()


def _launch(words: list[str], variables: dict[str, str], ignored: tuple, host: int | None, out, err) -> None:
    end_with_the_tests()
    os.setsid()
    if host is not None:
        _enter(host)
    os.chdir(ROOT)
    print_to(out, err)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    subprocess.Popen._execute_child = _fork_python
    _run_as(words, variables)


def _enter(host: int) -> None:
    """Goes on in a child of this process that is on the host, as nsenter does, and ends with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = [os.open(f"/proc/{host}/ns/{kind}", os.O_RDONLY) for kind in ("pid", "net", "uts", "mnt")]
    for failed in (libc.unshare(_CLONE_FS), *(libc.setns(space, 0) for space in spaces)):
        if failed:
            raise OSError(ctypes.get_errno(), f"the namespaces of process {host} cannot be entered")
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _fork_python(process: subprocess.Popen, *given) -> None:
    """In place of Popen._execute_child: forks what would be another Python process of the same interpreter."""
    arguments = _EXEC_SIGNATURE.bind(process, *given).arguments
    words = arguments["args"]
    if isinstance(words, (str, bytes)) or str(words[0]) != sys.executable or str(words[1]) == "-c":
        _exec_child(process, *given)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    process.pid = os.fork()
    if process.pid == 0:
        try:
            if arguments["start_new_session"]:
                os.setsid()
            if arguments["cwd"] is not None:
                os.chdir(arguments["cwd"])
            for source, stream in ((arguments["c2pwrite"], 1), (arguments["errwrite"], 2)):
                if source not in (-1, stream):
                    os.dup2(source, stream)
            _let_go_of_files()
            _run_as([str(word) for word in words], dict(os.environ if arguments["env"] is None else arguments["env"]))
        finally:
            os._exit(1)
    process._child_created = True
    ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    process._close_pipe_fds(*(arguments[end] for end in ends))


def _let_go_of_files() -> None:
    """Has all file descriptors above stderr lead nowhere, as exec would close them.

    They stay taken, because objects of the launcher would otherwise close a later file of the same number.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != nowhere and Path(f"/proc/self/fd/{name}").exists():
            os.dup2(nowhere, int(name), inheritable=False)


def _run_as(words: list[str], variables: dict[str, str]) -> None:
    """Runs `words`, an interpreter and its arguments, in this process and ends it."""
    os.environ.clear()
    os.environ.update(variables)
    _show(words, variables)
    _default_signals()
    words = [word for word in words[1:3] if word != "-u"] + words[3:]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    status: object = 0
    try:
        exec(variables.get("TESTS_FIRST", ""))  # tests/runs/pause.py
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    sys.stdout.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT}:
        if callable(signal.getsignal(number)) and not isinstance(signal.getsignal(number), signal.Handlers):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _show(words: list[str], variables: dict[str, str]) -> None:
    """Writes command line and variables where /proc shows them, as far as there is room."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    launch_first = sorted(variables, key=lambda name: (name != "RANK", name))
    lines = words, [f"{name}={variables[name]}" for name in launch_first]
    for strings, begin, end in zip(lines, map(int, fields[45:49:2]), map(int, fields[46:50:2]), strict=True):
        room = end - begin
        text = b""
        for string in strings:
            if len(text) + len(string.encode()) + 1 < room:
                text += string.encode() + b"\0"
        ctypes.memmove(begin, text.ljust(room, b"\0"), room)
