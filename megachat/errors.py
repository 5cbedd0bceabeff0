"""How programs end: a user's mistake is one sentence on stderr and exit status 2, without a traceback; all exit
statuses.
"""

import atexit
import contextlib
import errno
import functools
import os
import sys
import time
from collections.abc import Callable

from megachat.console import console_error, protect_console, styled

EXIT_STATUS = 2
LOST_RANK_STATUS = 3  # another rank died, failed or cannot be reached
STALL_STATUS = 4  # the job made no progress for parallel.stall_s
CORRUPTION_STATUS = 5  # a rank computed or stored wrong numbers without an error: its host needs a test
SAVED_STATUS = 75  # stopped by a signal after saving; sysexits.h: a temporary failure, try again
UNREAD_STATUS = 141  # the reader of a tool's output has closed it (128 + 13, as a shell reports SIGPIPE)
STOPPED_STATUS = 143  # stopped by a signal at once (128 + 15, as a shell reports SIGTERM), or the launcher has ended
_OTHER_RANKS_WAIT_S = 3.0


class UserError(Exception):
    """A mistake that the user can fix. The message is one sentence: what is wrong, where, and what to change.

    A message has several lines for several mistakes, one per line. exit_status: of the program.
    """

    exit_status = EXIT_STATUS


class UnreadableError(UserError):
    """The system refused to read a file or folder, which may be intact: nothing has to be made again."""


class CorruptionError(UserError):
    """Numbers that must be equal are not: a device computes or stores wrong numbers without an error."""

    exit_status = CORRUPTION_STATUS


RESUME_AUTO = "--resume auto"
_how_to_resume = RESUME_AUTO


def start_by(command: str) -> None:
    """Sets that megachat's `command` has started this job: messages name it as what continues the job."""
    global _how_to_resume
    _how_to_resume = same_command(command)


def same_command(command: str) -> str:
    """Returns how messages name the command that has started a job, where the user did not start `pretrain`."""
    return f"the same `megachat {command}` command"


def how_to_resume() -> str:
    """Returns what continues this job after a stop, for messages: --resume auto, or the command that has started it."""
    return _how_to_resume


_NO_ANSWER = (None, errno.ENOENT, errno.EINVAL)  # nothing is there, or a library's complaint about the content
_FIXES = {
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "correct the symbolic links, which lead back to themselves",
    errno.ENOTDIR: "correct the path, a part of it is no folder",
    errno.EISDIR: "give a file instead of a folder",
}


def raise_if_unreadable(path: str | os.PathLike, error: BaseException) -> None:
    """Raises UnreadableError if the error is the system's refusal to read the path; returns for all other errors."""
    if isinstance(error, OSError) and error.errno not in _NO_ANSWER:
        fix = _FIXES.get(error.errno, "check the storage there, then try again")
        raise UnreadableError(f"{path} cannot be read ({os.strerror(error.errno)}): {fix}") from None


def _report_unreadable_places(main: Callable) -> Callable:
    """Wraps a `main()`: what the system refuses to open anywhere in it becomes an UnreadableError that names it."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except OSError as error:
            if error.filename is not None and error.errno in (*_FIXES, errno.EIO, errno.ESTALE):
                raise_if_unreadable(os.fsdecode(error.filename), error)
            raise

    return wrapped


def summary(error: BaseException) -> str:
    """Returns a third-party error in one line: its type and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def user_errors_end_the_program(main: Callable | None = None, *, rank: Callable[[], int] | None = None) -> Callable:
    """Wraps a program's `main()`: a `UserError` is printed as `error: ...` on stderr and ends it with its exit status.

    main: returns its exit status, or None for 0. rank: returns the process's rank; marks the program as one of several
    ranks. Ranks after the first wait a moment before they print. A mistake that all ranks report is printed once,
    because the launcher ends the others when the first has exited; a mistake on one rank is still printed. A rank exits
    at once when its `main()` returns, and continues without a console that fails. A tool whose reader has closed the
    output, as `head` does, ends silently.
    """
    if main is None:
        return functools.partial(user_errors_end_the_program, rank=rank)
    main = _report_unreadable_places(main)

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        protect_console(drop=rank is not None)
        leave = _exit_now if rank else lambda status: sys.exit(status)
        try:
            status = main(*args, **kwargs) or 0
            sys.stdout.flush()
        except SystemExit:  # argparse, after --help
            _flush_stdout()
            raise
        except UserError as error:
            _flush_stdout()
            number = rank() if rank else 0
            if number:
                time.sleep(_OTHER_RANKS_WAIT_S)
            for line in str(error).splitlines():
                mark = styled("error:", "red", sys.stderr)
                print(f"{mark} {f'[rank {number}] ' if number else ''}{line}", file=sys.stderr, flush=True)
            status = error.exit_status
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr, flush=True)
            status = 130
        except OSError as error:
            if error is not console_error():
                raise
            status = UNREAD_STATUS
            if error.errno not in (errno.EPIPE, errno.EIO):
                print(f"error: the output could not be written ({error.strerror}): free space there", file=sys.stderr)
                status = EXIT_STATUS
        if status or rank:
            leave(status)

    return wrapped


def _flush_stdout() -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def _exit_now(status: int) -> None:
    """Exits without finalizing the interpreter, which sometimes aborts a process after its work is done.

    A thread of torch.distributed may just then release the last collective's tensor. It needs the interpreter that is
    being finalized, and is ended by it in the middle of C++ ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
