"""`megachat COMMAND`: the table of commands, and how a command is started from a shell or from a file in a clone."""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megachat.commands.options import Parser, add_no_color, add_quiet, check_inputs, layout_settings
from megachat.console import allow_color
from megachat.errors import UserError, user_errors_end_the_program
from megachat.installation import CHECKOUT, version_text
from megachat.job.launchers import completion_requested, launcher_rank, no_color_requested

if TYPE_CHECKING:
    from megachat.config import Config


class Command(NamedTuple):
    """A command. Its module in megachat/commands/ has a docstring, `add_arguments(parser)` and `run(options)`.

    ranks: several processes may run it, each as one rank of a job. passes_on: options that it does not know are passed
    to `run` as `options.rest`.
    """

    about: str
    ranks: bool = False
    passes_on: bool = False
    clone: bool = False  # needs the repository's tools/


COMMAND_GROUPS: dict[str, dict[str, Command]] = {
    "get started": {
        "demo": Command("corpus, tokenizer and a small model from nothing, on this machine", passes_on=True),
        "doctor": Command("what is installed, what a run would choose, what is wrong"),
    },
    "prepare": {
        "data": Command("make a data folder from text, tables or a download"),
        "tokenizer": Command("train a tokenizer, or import nanochat's"),
        "lookup": Command("allocate the rows of a lookup table to tokens"),
    },
    "train": {
        "plan": Command("fit, time, price and layouts of a run, before anything is rented"),
        "explain": Command("a setting or a number of the plan: origin, formula, what depends on it"),
        "pretrain": Command("train a model; launchers start this on every rank", ranks=True),
        "speedrun": Command("data, tokenizer, training, CORE, report, record: GPT-2's CORE in one command"),
        "supervise": Command("pretrain, and restart the ranks after a crash", passes_on=True),
    },
    "evaluate and use": {
        "evaluate": Command("CORE, bits per byte and samples of a checkpoint", ranks=True),
        "runs": Command("the runs of a folder: state, results, and what differs"),
        "watch": Command("a run's curve and newest values in the terminal, while it trains"),
        "report": Command("a run as one HTML file: curves, steps, layout, CORE, samples"),
        "compare": Command("which run is better, on steps, time, FLOPs and CORE, beyond the error?"),
        "record": Command("a record of the speedrun, from runs of one recipe with their evidence"),
        "sweep": Command("search over settings, with the noise of the results"),
        "ladder": Command("try a change at growing depths: does it help, and does the gain last?"),
        "unigram": Command("is a run better than token frequencies?"),
        "generate": Command("continue prompts with a checkpoint"),
    },
    "look into and convert": {
        "inspect": Command("show what a checkpoint of any format contains"),
        "convert": Command("convert checkpoints with a proof; compare or check them"),
        "verify": Command("does a layout compute what one process computes?"),
        "replay": Command("which module, rows and documents made a loss or gradient not finite?"),
    },
    "measure": {
        "probe": Command("measure this machine, for `megachat plan --probe`"),
        "fp8-check": Command("does FP8 pay for a config here? the time to an equal loss"),
        "bench": Command("speed of training, loading, saving and generation", clone=True),
        "partition": Command("the Muon partition beside other ways to distribute Muon", clone=True),
    },
    "shell": {
        "completion": Command("print what makes a shell complete commands and options"),
    },
}
COMMANDS = {name: command for group in COMMAND_GROUPS.values() for name, command in group.items()}
_LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")  # `deepspeed --module megachat` puts it before the command


def listed_groups() -> dict[str, dict[str, Command]]:
    """Returns the commands that this installation has, by group."""
    listed = {
        title: {name: command for name, command in group.items() if CHECKOUT or not command.clone}
        for title, group in COMMAND_GROUPS.items()
    }
    return {title: group for title, group in listed.items() if group}


def help_text() -> str:
    """Returns the text of `megachat --help`."""
    lines = ["usage: megachat COMMAND [OPTIONS]", "", "Trains nanochat's GPT on a laptop's CPU or many GPUs."]
    for title, group in listed_groups().items():
        lines += ["", title, *(f"  {name:<12}{command.about}" for name, command in group.items())]
    lines += [
        "",
        "`megachat COMMAND --help` lists a command's options. `megachat --version` prints version and commit.",
    ]
    return "\n".join(lines)


def build_parser(name: str, prog: str) -> Parser:
    """Returns the parser of a command. prog: the name of the program in its help."""
    command = COMMANDS[name]
    module = _module(name)
    parser = Parser(prog=prog, description=module.__doc__, allow_abbrev=not command.passes_on)
    module.add_arguments(parser)
    add_quiet(parser)
    add_no_color(parser)
    return parser


def check_passed_on(arguments: list[str]) -> "tuple[argparse.Namespace, Config]":
    """Returns the options and the config of `megachat pretrain`.

    Raises UserError for what it would refuse, before ranks are started.
    """
    options = build_parser("pretrain", "megachat pretrain").parse_args(arguments)
    from megachat.config import load_config

    return options, load_config(options.config, options.set + layout_settings(options.layout))


def start(name: str, arguments: list[str], prog: str) -> int:
    """Parses the arguments of a command and runs it; returns its exit status."""
    if "--no-color" in arguments or no_color_requested():
        allow_color(False)  # before a mistake in the options is reported
    parser = build_parser(name, prog)
    options, rest = parser.parse_known_args(arguments)
    if COMMANDS[name].passes_on:
        options.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    check_inputs(options)
    silent = options.quiet and not getattr(options, "json", None)  # a document is printed with --quiet, too
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if silent else sys.stdout):
        return _module(name).run(options) or 0


def door(name: str) -> Callable[[list[str] | None], None]:
    """Returns the `main(arguments=None)` of a file in launch/ or tools/ that is this command."""

    @user_errors_end_the_program(rank=launcher_rank if COMMANDS[name].ranks else None)
    def main(arguments: list[str] | None = None) -> int:
        allow_color(True)
        return start(name, sys.argv[1:] if arguments is None else arguments, Path(sys.argv[0]).name)

    return main


def main(arguments: list[str] | None = None) -> None:
    """Runs the command `megachat` and ends the process with its status, if that is not 0."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    allow_color(True)
    if completion_requested():
        _answer_completion()
    while words and _LOCAL_RANK.fullmatch(words[0]):
        del words[0]
    ranks = bool(words) and words[0] in COMMANDS and COMMANDS[words[0]].ranks
    user_errors_end_the_program(rank=launcher_rank if ranks else None)(_run)(words)


def _run(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(version_text())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "`megachat --help` lists the commands"
        raise UserError(f"{name} is not a command of megachat: {hint}")
    return start(name, words[1:], f"megachat {name}")


def _module(name: str):
    return importlib.import_module(f"megachat.commands.{name.replace('-', '_')}")


def _answer_completion() -> None:
    """Answers a shell that asks for completions, and ends the process. Does nothing without argcomplete."""
    try:
        import argcomplete
    except ImportError:
        return
    parser = argparse.ArgumentParser(prog="megachat")
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers(parser_class=Parser)
    for group in listed_groups().values():
        for name, command in group.items():
            module = _module(name)
            each = commands.add_parser(name, help=command.about)
            module.add_arguments(each)
            add_quiet(each)
            add_no_color(each)
    argcomplete.autocomplete(parser)
