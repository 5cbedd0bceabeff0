"""What a program prints that refuses its arguments."""

from collections.abc import Callable

import pytest


def refused_by(main: Callable[[list[str]], object], capsys, *arguments) -> str:
    """The error on one line with which the program ends, with exit status 2."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
    return message
