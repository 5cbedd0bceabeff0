"""What the options of all commands have in common: spelling, mistakes, and options that several commands share."""

import argparse
import contextlib
import gc
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from megachat.activity import announced, log_line, print_line
from megachat.errors import UserError
from megachat.installation import CHECKOUT, config_path
from megachat.job.launchers import launcher_rank, launcher_world
from megachat.planning.layouts import parse_layout


class Parser(argparse.ArgumentParser):
    """A parser that accepts --old_spellings of --new-ones, and reports a mistake as a UserError."""

    def __init__(self, **how):
        super().__init__(**({"formatter_class": argparse.RawDescriptionHelpFormatter} | how))

    def parse_known_args(self, args=None, namespace=None):
        """Parses as argparse does, with underscores in the names of known options taken for dashes."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words[:end] = [self._current_spelling(word) for word in words[:end]]
        return super().parse_known_args(words, namespace)

    def _current_spelling(self, word: str) -> str:
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        known = name not in self._option_string_actions and dashed in self._option_string_actions
        return dashed + equals + value if word.startswith("--") and known else word

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}: `{self.prog} --help` lists the options")


def add_set(parser: argparse.ArgumentParser, about: str = "override a setting; values are JSON; repeatable") -> None:
    """Adds --set; its value is a list of SECTION.KEY=VALUE."""
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=about)


def add_config(parser: argparse.ArgumentParser, about: str = "", **how) -> None:
    """Adds --config, a file or the name of a config that comes with megachat."""
    about = about or "JSON file with what differs from the defaults, or one of megachat's, such as d24"
    parser.add_argument("--config", type=config_path, help=about, **how)


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Adds --layout, for one layout."""
    about = "sizes of the axes data, tensor and pipeline, as dp=2,tp=2,pp=2: the same as --set parallel.tensor=2 ..."
    parser.add_argument("--layout", metavar="LAYOUT", help=about)


def add_quiet(parser: argparse.ArgumentParser, **how) -> None:
    """Adds --quiet."""
    parser.add_argument("--quiet", action="store_true", help="print errors only, and the document of --json", **how)


def add_no_color(parser: argparse.ArgumentParser, **how) -> None:
    """Adds --no-color."""
    parser.add_argument("--no-color", action="store_true", help="no colors, as with the variable NO_COLOR", **how)


def passed_on(options: argparse.Namespace) -> list[str]:
    """Returns the options of every command that are set, for another command that does a part of the work."""
    return [f"--{name.replace('_', '-')}" for name in ("quiet", "no_color") if getattr(options, name)]


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Adds the option that the deepspeed launcher sets."""
    parser.add_argument("--local-rank", type=int, default=-1, help=argparse.SUPPRESS)


@contextlib.contextmanager
def importing(*, logged: bool = False) -> Iterator[None]:
    """Announces the imports of a command, which may take seconds: on standard error if it is a terminal, or in the log.

    Garbage is not collected meanwhile: scanning the new objects, which all stay, would take a sixth of the time.
    """
    first, shown = "torch" not in sys.modules, launcher_rank() == 0
    write = print_line if logged else log_line
    if first:
        gc.disable()
    try:
        with announced("importing torch", shown=shown and (logged or sys.stderr.isatty()), write=write):
            yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


def check_inputs(options: argparse.Namespace) -> None:
    """Raises UserError for mistakes in --config and --set and for a checkpoint that is no folder, before anything heavy
    is imported."""
    if getattr(options, "config", None) and "set" in options:
        from megachat.config import load_config

        layout = getattr(options, "layout", None)
        load_config(options.config, options.set + (layout_settings(layout) if isinstance(layout, str) else []))
    if isinstance(checkpoint := getattr(options, "checkpoint", None), Path):
        from megachat.checkpoint.facts import require_checkpoint_folder

        require_checkpoint_folder(checkpoint)


def layout_settings(layout: str | None) -> list[str]:
    """Returns a layout's tensor and pipeline sizes as settings. Raises UserError for text that is no layout."""
    if layout is None:
        return []
    sizes = parse_layout(layout)
    return [f"parallel.{axis}={sizes[axis]}" for axis in ("tensor", "pipeline")]


def layout_ranks(layout: str | None) -> int | None:
    """Returns the number of ranks of a layout, with one on axes that it does not name; None without a layout."""
    return math.prod(parse_layout(layout).values()) if layout else None


def check_layout_ranks(layout: str | None) -> None:
    """Raises UserError if a layout that names the data axis has another number of ranks than the launcher started."""
    wanted, started = layout_ranks(layout), launcher_world()
    if layout and "dp" in layout and wanted != started:
        raise UserError(
            f"--layout {layout} has {wanted} ranks, but {started} {'were' if started > 1 else 'was'} started: "
            f"start {wanted}, or leave dp out, which is then what remains"
        )


def require_minimum(options: argparse.Namespace, **minimum: int) -> None:
    """Raises UserError for an option that is below its minimum."""
    for name, least in minimum.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give {least} or more")


def print_result(options: argparse.Namespace, values: object, *lines: str) -> None:
    """Prints the values as one JSON document with --json, else the lines."""
    print(json.dumps(values, indent=1) if options.json else "\n".join(lines))


@contextlib.contextmanager
def text_moved(options: argparse.Namespace) -> Iterator[None]:
    """Moves what is printed for people out of the way: nowhere with --quiet, to standard error with --json."""
    if options.quiet or options.json:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if options.quiet else sys.stderr):
            yield
    else:
        yield


def add_checkout_to_path(command: str) -> None:
    """Makes the folder tools/ importable. Raises UserError where megachat was installed without it."""
    if CHECKOUT is None:
        raise UserError(
            f"`megachat {command}` measures with the programs in tools/, which are not in the installed package: "
            "run it in a clone of the repository"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
