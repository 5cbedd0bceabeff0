"""What must be the same on every rank before training: code, versions, settings, tokenizer, data. Compared by hash where the ranks gather."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from megachat.config import Config
from megachat.data.shards import DataSummary
from megachat.data.tokenizer import Tokenizer
from megachat.job.host_probe import code_hashes, versions
from megachat.job.launch import LaunchEnvironment, use_network_of
from megachat.job.rendezvous import Arrival, meet

_ROOT = Path(__file__).resolve().parents[2]
_PLACES = ("run.folder", "data.folder", "data.tokenizer", "evaluate.core_bundle")  # may lie elsewhere on another host
# kind of fact -> (what a rank has otherwise, what to do), the first that explains the others first
_KINDS = {
    "code": ("other code than", "copy the same files of the project to every host"),
    "versions": ("other packages than", "install the same versions on every host"),
    "config": ("another config than", "start all ranks with the same --config and --set"),
    "tokenizer": ("another tokenizer than", "copy data.tokenizer of rank 0 to its host"),
    "data": ("other data than", "copy data.folder of rank 0 to its host"),
    "checkpoint": ("another checkpoint than", "copy the same files to every host, or give all ranks one --checkpoint"),
    "bundle": ("another CORE bundle than", "copy rank 0's to its host"),
    "evaluation": ("other options than", "start all ranks with the same"),
}


@contextlib.contextmanager
def meet_ranks(environment: LaunchEnvironment, own: dict[str, dict[str, str]], rendezvous_s: float) -> Iterator[None]:
    """All ranks are here and alike; inside, torch.distributed is to be initialised. own: from `rank_facts`.

    Raises UserError naming a rank that is absent or unlike.
    """
    meeting = meet(environment, own, disagreement, rendezvous_s)
    if meeting.address:
        use_network_of(meeting.address, environment)
    try:
        yield
    finally:
        del meeting  # with rank 0's hold on the port, which torch's own store has by now


def rank_facts(
    config: Config, tokenizer: Tokenizer, data: DataSummary | None, root: Path = _ROOT, **others: dict[str, str]
) -> dict[str, dict[str, str]]:
    """What this rank has: kind -> name -> hash or version, for `disagreement`. others: of further kinds."""
    settings = {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
    }
    return {
        "code": code_hashes(root),
        "versions": versions(),
        "config": {name: _short(value) for name, value in settings.items() if name not in _PLACES},
        "tokenizer": {"fingerprint": tokenizer.fingerprint[:12]},
        "data": _data_facts(data) if data else {},
    } | others


def _data_facts(data: DataSummary) -> dict[str, str]:
    return {
        "train": data.train_fingerprint[:12],
        "validation": str(data.validation_documents),
        "bytes": str(data.size_bytes),
    }


def disagreement(arrivals: list[Arrival]) -> str | None:
    """What the first rank that is unlike rank 0 has otherwise, in one sentence; None when all are alike."""
    first = arrivals[0]
    for kind, (has, remedy) in _KINDS.items():
        mine = first.facts.get(kind, {})
        for other in arrivals:
            theirs = other.facts.get(kind, {})
            names = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
            if names:
                shown = (
                    [f"{name} {theirs.get(name)}, not {mine.get(name)}" for name in names]
                    if kind == "versions"
                    else names
                )
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                return f"rank {other.rank} on {other.host} has {has} rank 0 on {first.host} ({', '.join(shown[:3])}{more}): {remedy}"
    return None


def _short(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
