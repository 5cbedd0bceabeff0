"""Console output: every text can be printed, and a console that fails does not end a job.

A console fails when the reader of a pipe has ended, the terminal is gone, or the disk of the log file is full.
"""

import contextlib
import io
import os
import select
import sys
from typing import TextIO

_NAMES = ("stdout", "stderr")
_STYLES = {"bold": "1", "red": "31", "yellow": "33"}  # codes of the terminal (ECMA-48)
_color_allowed = False


class Console(io.RawIOBase):
    """The stream of one descriptor. From the first error on, output is discarded; `error` is this error.

    drop: the error itself is not raised. It is reported on stderr, if that is another stream.
    """

    _os_write = staticmethod(os.write)  # finalizers print after this module's names are gone

    def __init__(self, name: str, descriptor: int, *, drop: bool):
        self.name, self.descriptor, self.drop = name, descriptor, drop
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data) -> int:
        """Writes all of the data. Raises OSError once, unless it is dropped."""
        view = memoryview(data).cast("B")
        rest = view
        while rest and self.error is None:
            try:
                rest = rest[self._os_write(self.descriptor, rest) :]
            except BlockingIOError:  # a terminal that another program made non-blocking
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.error = error
                if not self.drop:
                    raise
                if self.name != "stderr":
                    with contextlib.suppress(OSError):
                        text = f"note: {self.name} takes no more output ({error.strerror}): continuing without it\n"
                        os.write(2, text.encode())
        return len(view)


def protect_console(*, drop: bool) -> None:
    """Replaces sys.stdout and sys.stderr at a program's start: characters that they cannot encode are escaped.

    drop: errors of stdout are dropped; errors of stderr always are. Streams that a caller has replaced stay as they
    are.
    """
    for name in _NAMES:
        stream = getattr(sys, name)
        if stream is None:  # the program was started with a closed descriptor
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif stream is getattr(sys, f"__{name}__") and console_of(stream) is None:
            console = Console(name, stream.fileno(), drop=drop or name == "stderr")
            # as Python does: without a buffer under -u
            buffer = console if stream.write_through else io.BufferedWriter(console)
            text = io.TextIOWrapper(
                buffer,
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, text)
            setattr(sys, f"__{name}__", text)  # Python returns to it while it ends


def console_of(stream: TextIO) -> Console | None:
    """Returns the Console below a stream that protect_console made, None for another one."""
    buffer = getattr(stream, "buffer", None)
    console = getattr(buffer, "raw", buffer)
    return console if isinstance(console, Console) else None


def console_error() -> OSError | None:
    """Returns stdout's first error, None while it takes output."""
    console = console_of(sys.stdout)
    return console.error if console else None


def allow_color(allowed: bool) -> None:
    """Allows or forbids colors on terminals in this process; they are forbidden until a command allows them."""
    global _color_allowed
    _color_allowed = allowed


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """Returns the text in a style of _STYLES where `stream` (default: sys.stdout) is a terminal and may have colors."""
    if _color_allowed and (stream or sys.stdout).isatty():
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"
    return text
