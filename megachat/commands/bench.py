"""Run one measurement and print it as JSON, with the hardware and the commit."""

import argparse
import importlib.util
from types import ModuleType

from megachat.commands.options import Parser, add_checkout_to_path
from megachat.installation import CHECKOUT


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat bench`, those of the clone's tools/bench.py."""
    if CHECKOUT:
        tool = _load_tool()
        parser.description = tool.__doc__
        tool.add_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Measures and prints the result."""
    add_checkout_to_path("bench")
    _load_tool().run(options)


def _load_tool() -> ModuleType:
    """Loads the file tools/bench.py, which is beside a package of the same name."""
    assert CHECKOUT
    spec = importlib.util.spec_from_file_location("bench_tool", CHECKOUT / "tools" / "bench.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool
