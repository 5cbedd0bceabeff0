"""How much a model has learnt beyond token frequencies: a run's validation bits per byte beside the corpus's unigram entropy.

python tools/unigram.py --data data/python --tokenizer data/tokenizer [--run runs/demo]
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
from megachat.prepare.tokenizer_training import read_texts  # noqa: E402

_SAMPLE_CHARS = 10_000_000


def unigram_entropy(folder: Path, tokenizer: Tokenizer) -> tuple[float, float]:
    """(nats a token, bits per byte) of the validation text under its own token frequencies: what no model without context can beat."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for text in read_texts(folder, "validation", _SAMPLE_CHARS, _SAMPLE_CHARS):
        counts += np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size)
    share = counts[counts > 0] / counts.sum()
    nats = float(-(share * np.log(share)).sum())
    size = float((tokenizer.token_bytes() * counts).sum() / counts.sum())
    return nats, nats / (math.log(2) * size)


def final_bpb(run: Path) -> float:
    """The last validation bits per byte of the run. Raises UserError when it has none."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"{run} has no metrics.jsonl: give a run folder, as runs/demo") from None
    found = [values["val/bpb"] for values in map(json.loads, lines) if "val/bpb" in values]
    if not found:
        raise UserError(f"{run} has no validation yet: let it reach evaluate.every steps, or its end")
    return found[-1]


@user_errors_end_the_program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--run", type=Path, help="compare with this run's last validation; exit status 1 when it is not below"
    )
    arguments = parser.parse_args()
    nats, bits = unigram_entropy(arguments.data, load_tokenizer(arguments.tokenizer))
    print(f"unigram entropy of the validation text: {nats:.4f} nats a token, {bits:.4f} bits per byte")
    if arguments.run:
        bpb = final_bpb(arguments.run)
        print(f"the model: {bpb:.4f} bits per byte, {bpb / bits:.3f} of it")
        sys.exit(0 if bpb < bits else 1)


if __name__ == "__main__":
    main()
