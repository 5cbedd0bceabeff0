"""The one way a user's mistake is reported: one sentence on stderr, exit status 2, no traceback; and what the other exit statuses mean."""

import atexit
import functools
import os
import select
import sys
import time
from collections.abc import Callable

EXIT_STATUS = 2
LOST_RANK_STATUS = 3  # another rank died, failed or cannot be reached
STALL_STATUS = 4  # the job stood still for parallel.stall_s
SAVED_STATUS = 75  # told to stop by SIGTERM or SIGUSR1, and saved: sysexits.h calls it a temporary failure, try again
UNREAD_STATUS = 141  # who read a tool's output has gone (128 + 13, as a shell counts SIGPIPE)
STOPPED_STATUS = 143  # told to stop by SIGTERM (128 + 15, as a shell counts it), or the launcher has gone
_OTHER_RANKS_WAIT_S = 3.0


class UserError(Exception):
    """Something the user can repair. The message is one sentence: what is wrong, where, and what to change it to.

    A message may hold several lines where several mistakes were found at once, one a line.
    """


def summary(error: BaseException) -> str:
    """An error of somebody else's in one line: its kind, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def user_errors_end_the_program(main=None, *, rank: Callable[[], int] | None = None):
    """Wrap a program's `main()`: a `UserError` is printed as `error: ...` on stderr and ends with exit status 2.

    rank: tells the process's place in a job, and that the program is one of several ranks. Ranks after the first wait a moment before they
    speak: what all found is said once, because the launcher ends them when the first has gone, and what only one found is still said.
    A rank ends at once where its `main()` ends. A tool whose reader has gone, as `head` does, ends without a word. main: returns its exit status,
    None for 0.
    """
    if main is None:
        return functools.partial(user_errors_end_the_program, rank=rank)

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        leave = sys.exit if rank is None else _end_at_once
        try:
            status = main(*args, **kwargs) or 0
            sys.stdout.flush()
        except UserError as error:
            sys.stdout.flush()
            who = rank() if rank else 0
            if who:
                time.sleep(_OTHER_RANKS_WAIT_S)
            for line in str(error).splitlines():
                print(f"error: {f'[rank {who}] ' if who else ''}{line}", file=sys.stderr, flush=True)
            status = EXIT_STATUS
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr, flush=True)
            status = 130
        except BrokenPipeError:
            if rank or not _reader_has_gone():
                raise
            status = UNREAD_STATUS
        if status or rank:
            leave(status)

    return wrapped


def _reader_has_gone() -> bool:
    """Whether it was the output that broke; then what is left of it goes nowhere, or Python's end would complain."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _end_at_once(status: int) -> None:
    """End without taking the interpreter apart, which aborts a process now and then after its work is done.

    A thread of torch.distributed may just then let go of the last collective's tensor, asks for an interpreter that is going, and is ended by it
    in the middle of C++ ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
