"""The proof of a conversion: both models' logits on fixed token rows, every tensor compared, and the certificate that says so."""

import hashlib
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata

import torch

from megachat.checkpoint.facts import hash_files
from megachat.convert.architecture import build_model, dims_of
from megachat.convert.difference import differences_of
from megachat.convert.opened import Opened
from megachat.model.gpt import logits, run_layers
from megachat.planning.dimensions import Dimensions

SHORT_ROWS, SHORT_TOKENS = 3, 64
CHUNK_POSITIONS = 256  # of which float64 softmaxes exist at once
_VERSIONS = ("megachat", "torch", "numpy", "safetensors", "transformers")

Logits = Callable[[torch.Tensor], torch.Tensor]  # ids [1, tokens] int64 -> [tokens, vocab_size] float32


@dataclass(frozen=True)
class Tolerance:
    """Largest difference of a logit; largest mean Kullback-Leibler divergence in nats; least share of positions with the same argmax."""

    logit: float = 1e-5
    kl: float = 1e-8
    argmax: float = 1.0


def token_rows(dims: Dimensions) -> list[torch.Tensor]:
    """The rows [1, tokens] int64 on which models are compared, the same for all of one vocabulary and length: one as long as the model
    allows, so that every window matters, and some short ones."""
    generator = torch.Generator().manual_seed(20)
    lengths = [dims.sequence_len, *[min(SHORT_TOKENS, dims.sequence_len)] * SHORT_ROWS]
    return [torch.randint(0, dims.vocab_size, (1, length), generator=generator) for length in lengths]


def logits_of(opened: Opened) -> Logits:
    """megachat's model in float32, with the weights read back from the checkpoint's files."""
    dims, layers = dims_of(opened.facts), build_model(opened)

    def compute(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return logits(run_layers(layers, ids), dims)[0]

    return compute


def compare_logits(
    build_source: Callable[[], Logits], build_target: Callable[[], Logits], rows: list[torch.Tensor]
) -> dict:
    """Largest logit difference, mean KL of target from source in nats, share of equal argmax. Only one of the models is in memory at a time."""
    model = build_source()
    wanted = [model(row) for row in rows]
    model = build_target()
    largest, kl, same, positions = 0.0, 0.0, 0, 0
    for row, source in zip(rows, wanted, strict=True):
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
    source: Opened,
    target: Opened,
    tolerance: Tolerance,
    *,
    expected: Opened | None = None,
    build_source=None,
    build_target=None,
    remarks=(),
) -> tuple[dict, str | None]:
    """(JSON values of the certificate, what differed first or None when it passed). Tensors and facts that both can hold must be equal to the bit.

    expected: the source as the target should hold it, where the conversion changes something on purpose. build_source, build_target: other
    models than megachat's own.
    """
    different = [found for found in differences_of(expected or source, target) if found.counts]
    tensors = [found for found in different if found.kind in ("tensor", "shape", "only")]
    rows = token_rows(dims_of(source.facts))
    numbers = compare_logits(
        build_source or (lambda: logits_of(source)), build_target or (lambda: logits_of(target)), rows
    )
    problems = [f"{found.kind} {found}" for found in different]
    for key, limit, good in (
        ("largest_logit_difference", tolerance.logit, numbers["largest_logit_difference"] <= tolerance.logit),
        ("mean_kl_nats", tolerance.kl, numbers["mean_kl_nats"] <= tolerance.kl),
        ("argmax_agreement", tolerance.argmax, numbers["argmax_agreement"] >= tolerance.argmax),
    ):
        if not good:
            problems.append(f"{key} is {numbers[key]:.3g}, beyond {limit:g}")
    told = {
        "passed": not problems,
        "first_difference": problems[0] if problems else None,
        "numbers": numbers,
        "tolerance": asdict(tolerance),
        "rows": {
            "tokens": [row.shape[1] for row in rows],
            "sha256": hashlib.sha256(b"".join(row.numpy().tobytes() for row in rows)).hexdigest(),
        },
        "tensors": {
            "compared": len((expected or source).entries.keys() & target.entries.keys()),
            "different": len(tensors),
        },
        "source": side(source),
        "target": side(target),
        "remarks": [*source.remarks, *remarks],
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _VERSIONS},
    }
    return told, problems[0] if problems else None


def side(opened: Opened) -> dict:
    """What a certificate says of one side: form, folder, step and the SHA-256 of every file."""
    return {
        "form": opened.form,
        "folder": str(opened.folder),
        "step": opened.facts.get("step"),
        "files": hash_files(opened.folder, opened.files),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
