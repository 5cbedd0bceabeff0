"""Print what makes a shell complete the commands and options of megachat. It needs the package argcomplete
(pip install 'megachat[completion]').

    bash: eval "$(megachat completion bash)"        in ~/.bashrc
    zsh:  eval "$(megachat completion zsh)"         in ~/.zshrc, after compinit
    fish: megachat completion fish | source         in ~/.config/fish/config.fish
"""

import argparse

from megachat.commands.options import Parser
from megachat.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")


def run(options: argparse.Namespace) -> None:
    """Prints the shell code."""
    try:
        import argcomplete
    except ImportError:
        raise UserError(
            "completion needs the package argcomplete, which is not installed: pip install 'megachat[completion]'"
        ) from None
    print(argcomplete.shellcode(["megachat"], shell=options.shell))
