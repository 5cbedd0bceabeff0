"""The proof of a conversion: both models' logits on fixed rows, all tensors, and the certificate of both."""

import hashlib
import platform
from dataclasses import asdict
from functools import partial

import torch

from megachat.checkpoint.facts import hash_files
from megachat.convert.architecture import build_model
from megachat.convert.declaration import BuildLogits, Logits, Tolerance
from megachat.convert.differences import compare_checkpoints, compare_settings
from megachat.convert.reader import CheckpointReader
from megachat.job.host_probe import installed_version
from megachat.model.gpt import logits, run_layers
from megachat.planning.dimensions import Dimensions

SHORT_ROWS, SHORT_TOKENS = 3, 64
CHUNK_POSITIONS = 256  # positions whose float64 softmax exists at once
_VERSIONS = ("megachat", "torch", "numpy", "safetensors", "transformers")


def token_rows(dims: Dimensions) -> list[torch.Tensor]:
    """Returns the rows [1, tokens] int64 on which models are compared. The longest makes every window matter."""
    generator = torch.Generator().manual_seed(20)
    lengths = [dims.sequence_len, *[min(SHORT_TOKENS, dims.sequence_len)] * SHORT_ROWS]
    return [torch.randint(0, dims.vocab_size, (1, length), generator=generator) for length in lengths]


def megachat_logits(checkpoint: CheckpointReader) -> Logits:
    """Builds megachat's model in float32 with the weights from the checkpoint's files."""
    dims, layers = checkpoint.dims, build_model(checkpoint)

    def compute(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return logits(run_layers(layers, ids), dims)[0]

    return compute


def compare_logits(build_source: BuildLogits, build_target: BuildLogits, rows: list[torch.Tensor]) -> dict:
    """Returns the largest logit difference, the target's mean KL from the source in nats, and the equal argmax's share.

    Only one of the models is in memory at a time.
    """
    model = build_source()
    expected = [model(row) for row in rows]
    model = build_target()
    largest, kl, same, positions = 0.0, 0.0, 0, 0
    for row, source in zip(rows, expected, strict=True):
        target = model(row)
        difference = (target - source).abs()
        largest = max(largest, torch.where(difference.isnan(), torch.inf, difference).max().item())
        same += int((target.argmax(-1) == source.argmax(-1)).sum())
        positions += len(source)
        for begin in range(0, len(source), CHUNK_POSITIONS):
            p, q = (x[begin : begin + CHUNK_POSITIONS].double().log_softmax(-1) for x in (source, target))
            kl += (p.exp() * (p - q)).sum().item()
    return {
        "largest_logit_difference": largest,
        "mean_kl_nats": max(0.0, kl / positions),
        "argmax_agreement": same / positions,
        "positions": positions,
    }


def prove(
    source: CheckpointReader,
    target: CheckpointReader,
    tolerance: Tolerance,
    *,
    source_logits: BuildLogits | None = None,
    target_logits: BuildLogits | None = None,
    remarks: tuple[str, ...] = (),
) -> dict:
    """Returns the certificate as JSON values; its "first_difference" is None if the proof passed.

    source: as the target should hold it. source_logits, target_logits: default to megachat's model. All tensors, facts
    and settings that both formats can hold must be equal to the bit.
    """
    differences = [difference for difference in compare_checkpoints(source, target) if difference.counts]
    settings, changed = compare_settings(source.facts, target.facts)
    differences += changed
    rows = token_rows(source.dims)
    numbers = compare_logits(
        source_logits or partial(megachat_logits, source), target_logits or partial(megachat_logits, target), rows
    )
    problems = [f"{difference.kind} {difference}" for difference in differences]
    for key, limit, passed in (
        ("largest_logit_difference", tolerance.logit, numbers["largest_logit_difference"] <= tolerance.logit),
        ("mean_kl_nats", tolerance.kl, numbers["mean_kl_nats"] <= tolerance.kl),
        ("argmax_agreement", tolerance.argmax, numbers["argmax_agreement"] >= tolerance.argmax),
    ):
        if not passed:
            problems.append(f"{key} is {numbers[key]:.3g}, beyond {limit:g}")
    digest = hashlib.sha256(b"".join(row.numpy().tobytes() for row in rows)).hexdigest()
    return {
        "passed": not problems,
        "first_difference": problems[0] if problems else None,
        "numbers": numbers,
        "tolerance": asdict(tolerance),
        "rows": {"tokens": [row.shape[1] for row in rows], "sha256": digest},
        "tensors": {
            "compared": len(source.entries.keys() & target.entries.keys()),
            "different": sum(difference.kind in ("tensor", "shape", "only") for difference in differences),
        },
        "settings": {"compared": settings, "different": len(changed)},
        "source": _describe_side(source),
        "target": _describe_side(target),
        "remarks": [*source.remarks, *remarks],
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in _VERSIONS},
    }


def _describe_side(checkpoint: CheckpointReader) -> dict:
    """Returns format, folder, step and the SHA-256 of every file."""
    return {
        "form": checkpoint.format,
        "folder": str(checkpoint.folder),
        "step": checkpoint.facts.get("step"),
        "files": hash_files(checkpoint.folder, checkpoint.files),
    }
