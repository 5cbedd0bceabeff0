"""Runs a launcher that is a Python program: python -m megachat.job.launcher_process deepspeed|torchrun ARGUMENTS

A launcher imports torch for seconds before it handles signals. Ctrl-C in that time ends it here with one line and
status 130 in place of a traceback. deepspeed has two processes on a host: here the first one waits after Ctrl-C, until
the second one has ended the ranks, which save before.
"""

import os
import runpy
import signal
import subprocess
import sys
from types import FrameType

_HOST = "deepspeed.launcher.launch"  # deepspeed's process on each host
_LAUNCHER_MODULES = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}
_INTERRUPTED_STATUS = 130


def launcher_line(name: str) -> list[str]:
    """Returns the words that start a launcher; its arguments follow them."""
    return [sys.executable, "-u", "-m", "megachat.job.launcher_process", name]


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(_INTERRUPTED_STATUS)


class _Popen(subprocess.Popen):
    """Starts deepspeed's process of this host by launcher_line, too, and leaves Ctrl-C to it from then on."""

    interrupted = False

    def __init__(self, args, **options):
        if isinstance(args, list) and args[0] == sys.executable and _HOST in args:
            args = [*launcher_line(_HOST), *args[args.index(_HOST) + 1 :]]
            if signal.getsignal(signal.SIGINT) is _end:
                signal.signal(signal.SIGINT, _note_interrupt)  # not SIG_IGN, which a child inherits
        super().__init__(args, **options)


def _note_interrupt(number: int, frame: FrameType | None) -> None:
    _Popen.interrupted = True


def main() -> None:
    """Runs the launcher that the first argument names, and ends with its status."""
    del sys.argv[0]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell ignores it, as for `&`
        signal.signal(signal.SIGINT, _end)
    if sys.argv[0] == "deepspeed":
        subprocess.Popen = _Popen  # type: ignore[misc, assignment]
    try:
        runpy.run_module(_LAUNCHER_MODULES.get(sys.argv[0], sys.argv[0]), run_name="__main__", alter_sys=True)
    finally:
        if _Popen.interrupted:
            sys.exit(_INTERRUPTED_STATUS)


if __name__ == "__main__":
    main()
