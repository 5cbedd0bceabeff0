"""Ranks that are unlike are told apart by hashes, the cause before its consequences."""

import json
import shutil
from pathlib import Path

import pytest

from megachat.config import Config, DataConfig, HorizonConfig, ModelConfig, RunConfig
from megachat.data.shards import DataSummary
from megachat.data.tokenizer import Tokenizer
from megachat.job.agreement import find_disagreement, rank_facts
from megachat.job.rendezvous import Arrival

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
DATA = DataSummary(Path("data"), 2, 100, 10, 5000, None, "ab" * 32)


def told(own: dict, other: dict) -> str | None:
    return find_disagreement([Arrival(0, "a", own), Arrival(1, "a", own), Arrival(2, "b", other)])


@pytest.fixture(scope="module")
def own() -> dict:
    return rank_facts(Config(), TOKENIZER, DATA)


def test_like_ranks_agree_wherever_their_files_lie(own):
    elsewhere = Config(run=RunConfig(folder="/x"), data=DataConfig(folder="/y", tokenizer="/z"))
    assert told(own, rank_facts(elsewhere, TOKENIZER, DATA)) is None
    assert len(json.dumps(own)) < 16_000, "every rank of the job sends this to rank 0"


def test_settings_are_named(own):
    other = Config(model=ModelConfig(depth=3), horizon=HorizonConfig(steps=5))
    assert told(own, rank_facts(other, TOKENIZER, DATA)) == (
        "rank 2 on b has another config than rank 0 on a (horizon.steps, model.depth): start all ranks with the same --config and --set"
    )


def test_code_comes_before_what_follows_from_it(own, tmp_path):
    shutil.copytree(ROOT / "megachat", tmp_path / "megachat", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "pretrain.py", tmp_path / "launch")
    same = rank_facts(Config(), TOKENIZER, DATA, root=tmp_path)
    assert told(own, same) is None
    (tmp_path / "megachat" / "model" / "gpt.py").write_text("pass\n")
    (tmp_path / "megachat" / "new.py").write_text("pass\n")
    other = rank_facts(Config(model=ModelConfig(depth=3)), TOKENIZER, DATA, root=tmp_path)
    assert told(own, other) == (
        "rank 2 on b has other code than rank 0 on a (megachat/model/gpt.py, megachat/new.py): copy the same files of the project to every host"
    )


def test_versions_tokenizer_and_data(own):
    older = own | {"versions": own["versions"] | {"torch": "2.0"}}
    assert told(own, older) == (
        f"rank 2 on b has other packages than rank 0 on a (torch 2.0, not {own['versions']['torch']}): install the same versions on every host"
    )
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    assert "another tokenizer than rank 0 on a" in told(own, rank_facts(Config(), Tokenizer(ranks), DATA))
    grown = DataSummary(Path("data"), 2, 100, 10, 5001, None, "ab" * 32)
    assert "other data than rank 0 on a (bytes): copy data.folder" in told(own, rank_facts(Config(), TOKENIZER, grown))


def test_what_an_evaluation_needs(own):
    mine = rank_facts(
        Config(), TOKENIZER, None, checkpoint={"content": "1"}, bundle={"digest": "2"}, evaluation={"parts": "3"}
    )
    assert told(mine, mine) is None
    for kind, what in (
        ("checkpoint", "another checkpoint than"),
        ("bundle", "another CORE bundle than"),
        ("evaluation", "other options than"),
    ):
        assert what in told(mine, mine | {kind: {next(iter(mine[kind])): "4"}})
    assert "another CORE bundle than rank 0 on a (digest)" in told(own | {"bundle": {"digest": "2"}}, own)
