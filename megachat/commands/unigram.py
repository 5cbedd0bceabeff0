"""Compare a run's validation loss with the unigram entropy of the text, the best result of a model without context.

    megachat unigram --data data/python --tokenizer data/tokenizer --run runs/demo

Both are in bits per byte. A model below the unigram entropy has learned more than token frequencies. Exit status: 1 if
the run is not below it.
"""

import argparse
from pathlib import Path

from megachat.commands.options import Parser, print_result


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat unigram`."""
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--run", type=Path, help="run folder to compare")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    """Prints the comparison; returns the exit status."""
    from megachat.programs.unigram import unigram_comparison, unigram_lines

    comparison = unigram_comparison(options.data, options.tokenizer, options.run)
    print_result(options, comparison, *unigram_lines(comparison))
    return 1 if comparison["below"] is False else 0
