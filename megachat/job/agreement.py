"""What must be equal on every rank before training: code, versions, settings, tokenizer, data. Ranks compare hashes."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from megachat.config import Config
from megachat.data.shards import DataSummary
from megachat.data.tokenizer import Tokenizer
from megachat.installation import ROOT
from megachat.job.host_probe import code_hashes, versions
from megachat.job.launch import LaunchEnvironment, use_network_of
from megachat.job.rendezvous import Arrival, RankFacts, meet

_PATHS = ("run.folder", "data.folder", "data.tokenizer", "evaluate.core_bundle")  # may differ between hosts
# kind of fact -> (what differs, the fix); a kind comes before those that differ because of it
_DISAGREEMENTS = {
    "code": ("other code than", "copy the same files of the project to every host"),
    "versions": ("other packages than", "install the same versions on every host"),
    "config": ("another config than", "start all ranks with the same --config and --set"),
    "tokenizer": ("another tokenizer than", "copy data.tokenizer of rank 0 to its host"),
    "data": ("other data than", "copy data.folder of rank 0 to its host"),
    "checkpoint": ("another checkpoint than", "copy the same files to every host, or give all ranks one --checkpoint"),
    "bundle": ("another CORE bundle than", "copy rank 0's to its host"),
    "evaluation": ("other options than", "start all ranks with the same options"),
}


@contextlib.contextmanager
def meet_ranks(environment: LaunchEnvironment, facts: RankFacts, rendezvous_s: float) -> Iterator[None]:
    """Waits until all ranks are here and have equal facts; torch.distributed is to be initialized inside the block.

    Raises UserError that names a rank that is absent or differs.
    """
    meeting = meet(environment, facts, find_disagreement, rendezvous_s)
    if meeting.address:
        use_network_of(meeting.address, environment)
    try:
        yield
    finally:
        del meeting  # it held the port, which torch's store has taken over by now


def rank_facts(
    config: Config, tokenizer: Tokenizer, data: DataSummary | None, root: Path = ROOT, **others: dict[str, str]
) -> RankFacts:
    """Returns what this rank has, for find_disagreement. others: facts of further kinds."""
    settings = {
        f"{section}.{key}": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
        if f"{section}.{key}" not in _PATHS
    }
    data_facts = data and {
        "train": data.train_fingerprint[:12],
        "validation": str(data.validation_documents),
        "bytes": str(data.size_bytes),
    }
    return {
        "code": code_hashes(root),
        "versions": versions(),
        "config": settings,
        "tokenizer": {"fingerprint": tokenizer.fingerprint[:12]},
        "data": data_facts or {},
    } | others


def find_disagreement(arrivals: list[Arrival]) -> str | None:
    """Returns in one sentence how the first rank that differs from rank 0 differs, or which ranks share a GPU.

    None when all are equal.
    """
    first = arrivals[0]
    for kind, (has, fix) in _DISAGREEMENTS.items():
        expected = first.facts.get(kind, {})
        for other in arrivals:
            facts = other.facts.get(kind, {})
            names = sorted(name for name in expected.keys() | facts.keys() if expected.get(name) != facts.get(name))
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                if kind == "versions":
                    names = [f"{name} {facts.get(name)}, not {expected.get(name)}" for name in names]
                return (
                    f"rank {other.rank} on {other.host} has {has} rank 0 on {first.host} "
                    f"({', '.join(names[:3])}{more}): {fix}"
                )
    users: dict[str, int] = {}  # GPU -> its first rank
    for arrival in arrivals:
        gpu = arrival.facts.get("gpu", {}).get("id", f"rank {arrival.rank} has none")
        if users.setdefault(gpu, arrival.rank) != arrival.rank:
            return (
                f"ranks {users[gpu]} and {arrival.rank} on {arrival.host} use the same GPU ({gpu}): start one rank per "
                "GPU, and set LOCAL_RANK where every rank sees all of them"
            )
    return None
