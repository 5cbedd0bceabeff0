"""Compare a run's validation loss with the unigram entropy of the text, the best result of a model without context.

    python tools/unigram.py --data data/python --tokenizer data/tokenizer [--run runs/demo]

Both are in bits per byte. A model below the unigram entropy has learned more than token frequencies.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import user_errors_end_the_program  # noqa: E402


@user_errors_end_the_program
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--run", type=Path, help="run folder to compare; exit status 1 if its loss is not below")
    options = parser.parse_args(arguments)
    from megachat.programs.unigram import compare_with_unigram

    return compare_with_unigram(options.data, options.tokenizer, options.run)


if __name__ == "__main__":
    main()
