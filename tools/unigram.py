"""Compare a run's validation loss with the unigram entropy of the text, the best result of a model without context.

    python tools/unigram.py --data data/python --tokenizer data/tokenizer [--run runs/demo]

Both are in bits per byte. A model below the unigram entropy has learned more than token frequencies.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.files import METRICS_NAME  # noqa: E402
from megachat.prepare.tokenizer_training import read_texts  # noqa: E402

_SAMPLE_CHARS = 10_000_000


def unigram_entropy(folder: Path, tokenizer: Tokenizer) -> tuple[float, float]:
    """Return (nats per token, bits per byte) of the validation text under its token frequencies."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for text in read_texts(folder, "validation", _SAMPLE_CHARS, _SAMPLE_CHARS):
        counts += np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size)
    if not counts.any():
        raise UserError(f"{folder} has no validation text: prepare it again with more text")
    frequencies = counts[counts > 0] / counts.sum()
    nats = float(-(frequencies * np.log(frequencies)).sum())
    bytes_per_token = float((tokenizer.token_bytes() * counts).sum() / counts.sum())
    return nats, nats / (math.log(2) * bytes_per_token)


def final_bpb(run: Path) -> float:
    """Return the last validation bits per byte of a run. Raises UserError if it has none."""
    try:
        lines = (run / METRICS_NAME).read_text(encoding="utf-8").splitlines()
        values = [metrics["val/bpb"] for metrics in map(json.loads, lines) if "val/bpb" in metrics]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run / METRICS_NAME} cannot be read ({error}): give a run folder like runs/demo") from None
    if not values:
        raise UserError(f"{run} has no validation yet: let it run for evaluate.every steps or to its end")
    return values[-1]


@user_errors_end_the_program
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--run", type=Path, help="run folder to compare; exit status 1 if its loss is not below")
    options = parser.parse_args(arguments)
    nats, bits = unigram_entropy(options.data, load_tokenizer(options.tokenizer))
    print(f"unigram entropy of the validation text: {nats:.4f} nats per token, {bits:.4f} bits per byte")
    if not options.run:
        return 0
    bpb = final_bpb(options.run)
    print(f"the model: {bpb:.4f} bits per byte, {bpb / bits:.3f} of the unigram entropy")
    return 0 if bpb < bits else 1


if __name__ == "__main__":
    main()
