"""Ranks that differ are named, the cause before its consequences."""

import json
import shutil
from pathlib import Path

import pytest

from megachat.config import Config
from megachat.data.shards import DataSummary
from megachat.data.tokenizer import Tokenizer
from megachat.job.agreement import find_disagreement, rank_facts
from megachat.job.rendezvous import Arrival
from megachat.settings import DataConfig, HorizonConfig, ModelConfig, RunConfig

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
DATA = DataSummary(Path("data"), 2, 100, 10, 5000, None, "ab" * 32)


def disagreement(mine: dict, other: dict) -> str | None:
    return find_disagreement([Arrival(0, "a", mine), Arrival(1, "a", mine), Arrival(2, "b", other)])


@pytest.fixture(scope="module")
def mine() -> dict:
    return rank_facts(Config(), TOKENIZER, DATA)


def test_equal_ranks_agree_wherever_their_files_lie(mine):
    moved = Config(run=RunConfig(folder="/x"), data=DataConfig(folder="/y", tokenizer="/z"))
    assert disagreement(mine, rank_facts(moved, TOKENIZER, DATA)) is None
    assert len(json.dumps(mine)) < 20_000, "every rank of the job sends this to rank 0"


def test_settings_are_named(mine):
    other = Config(model=ModelConfig(depth=3), horizon=HorizonConfig(steps=5))
    assert disagreement(mine, rank_facts(other, TOKENIZER, DATA)) == (
        "rank 2 on b has another config than rank 0 on a (horizon.steps, model.depth): "
        "start all ranks with the same --config and --set"
    )


def test_code_comes_before_what_follows_from_it(mine, tmp_path):
    shutil.copytree(ROOT / "megachat", tmp_path / "megachat", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "pretrain.py", tmp_path / "launch")
    same = rank_facts(Config(), TOKENIZER, DATA, root=tmp_path)
    assert disagreement(mine, same) is None
    (tmp_path / "megachat" / "model" / "gpt.py").write_text("pass\n")
    (tmp_path / "megachat" / "new.py").write_text("pass\n")
    other = rank_facts(Config(model=ModelConfig(depth=3)), TOKENIZER, DATA, root=tmp_path)
    assert disagreement(mine, other) == (
        "rank 2 on b has other code than rank 0 on a (megachat/model/gpt.py, megachat/new.py): "
        "copy the same files of the project to every host"
    )


def test_versions_tokenizer_and_data(mine):
    older = mine | {"versions": mine["versions"] | {"torch": "2.0"}}
    assert disagreement(mine, older) == (
        f"rank 2 on b has other packages than rank 0 on a (torch 2.0, not {mine['versions']['torch']}): "
        "install the same versions on every host"
    )
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    assert "another tokenizer than rank 0 on a" in disagreement(mine, rank_facts(Config(), Tokenizer(ranks), DATA))
    grown = DataSummary(Path("data"), 2, 100, 10, 5001, None, "ab" * 32)
    assert "other data than rank 0 on a (bytes): copy data.folder" in disagreement(
        mine, rank_facts(Config(), TOKENIZER, grown)
    )


def test_what_an_evaluation_needs(mine):
    facts = rank_facts(
        Config(), TOKENIZER, None, checkpoint={"content": "1"}, bundle={"digest": "2"}, evaluation={"parts": "3"}
    )
    assert disagreement(facts, facts) is None
    for kind, what in (
        ("checkpoint", "another checkpoint than"),
        ("bundle", "another CORE bundle than"),
        ("evaluation", "other options than"),
    ):
        assert what in disagreement(facts, facts | {kind: {next(iter(facts[kind])): "4"}})
    assert "another CORE bundle than rank 0 on a (digest)" in disagreement(mine | {"bundle": {"digest": "2"}}, mine)


def test_ranks_that_share_a_gpu_are_named():
    """A launcher that sets no local rank, or one visible GPU per rank that is the same one."""
    alone = [Arrival(rank, "a", {"gpu": {"id": f"GPU-{rank}"}}) for rank in range(3)]
    assert find_disagreement(alone) is None and find_disagreement([Arrival(rank, "a", {}) for rank in range(3)]) is None
    shared = find_disagreement([*alone[:2], Arrival(2, "a", {"gpu": {"id": "GPU-1"}})])
    assert "ranks 1 and 2 on a use the same GPU (GPU-1): start one rank per GPU" in shared
