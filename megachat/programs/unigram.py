"""The unigram entropy of the validation text, the best result of a model without context, beside a run's loss."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.errors import UserError
from megachat.prepare.tokenizer_training import SAMPLE_CHARS, read_texts
from megachat.studies.metrics import read_metrics


def unigram_entropy(folder: Path, tokenizer: Tokenizer) -> tuple[float, float]:
    """Returns (nats per token, bits per byte) of the validation text under its token frequencies."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for text in read_texts(folder, "validation", SAMPLE_CHARS, SAMPLE_CHARS):
        counts += np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size)
    if not counts.any():
        raise UserError(f"{folder} has no validation text: prepare it again with more text")
    frequencies = counts[counts > 0] / counts.sum()
    nats = float(-(frequencies * np.log(frequencies)).sum())
    bytes_per_token = float((tokenizer.token_bytes() * counts).sum() / counts.sum())
    return nats, nats / (math.log(2) * bytes_per_token)


def final_bpb(run: Path) -> float:
    """Returns the last validation bits per byte of a run. Raises UserError if it has none."""
    values = [line["val/bpb"] for line in read_metrics(run) if "val/bpb" in line]
    if not values:
        raise UserError(f"{run} has no validation yet: let it run for evaluate.every steps or to its end")
    return values[-1]


def unigram_comparison(data: Path, tokenizer: Path, run: Path | None) -> dict[str, float | bool | None]:
    """Returns the entropy of the validation text, and a run's validation loss: JSON values, None without a run.

    nats_per_token, bits_per_byte: the entropy. run_bits_per_byte: the loss. below: whether that is less.
    """
    nats, bits = unigram_entropy(data, load_tokenizer(tokenizer))
    bpb = None if run is None else final_bpb(run)
    below = None if bpb is None else bpb < bits
    return {"nats_per_token": nats, "bits_per_byte": bits, "run_bits_per_byte": bpb, "below": below}


def unigram_lines(comparison: Mapping[str, Any]) -> list[str]:
    """Returns the comparison as lines of text."""
    nats, bits, bpb = (comparison[key] for key in ("nats_per_token", "bits_per_byte", "run_bits_per_byte"))
    lines = [f"unigram entropy of the validation text: {nats:.4f} nats per token, {bits:.4f} bits per byte"]
    return lines + ([f"the model: {bpb:.4f} bits per byte, {bpb / bits:.3f} of the unigram entropy"] if bpb else [])
