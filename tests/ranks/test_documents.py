"""A resume that would repeat or skip a document is refused on all ranks, unless a restart is allowed and recorded."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megachat.data.loader_state import combined_ledger, save_loader_state
from megachat.data.packing import saving_rank, streams_of_rank
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.parallel.build import start_collectives
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import build_mesh
from megachat.planning.plan import resolve_plan
from megachat.train.documents import build_loader, resume_documents
from tests.harness import run_ranks
from tests.runs.job import write_shard
from tests.training import small_config

STREAMS, STEP = 4, 3
WAY_OUT = ", or set data.resume=restart, which restarts from the first document"


def tokenizer() -> Tokenizer:
    return Tokenizer({bytes([byte]): byte for byte in range(256)})


class Ranks:
    """One of the ranks that resume, without a model."""

    def __init__(self, folder: Path, **changes: dict):
        start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
        self.mesh = build_mesh(torch.device("cpu"))
        data = {"folder": str(folder / "data"), "streams": STREAMS} | changes.pop("data", {})
        self.config = small_config(data=data, **changes)
        self.plan = resolve_plan(self.config, self.mesh.world.size, 257)

    def documents(self, checkpoint: Path):
        return resume_documents(checkpoint, facts(checkpoint), self.config, self.plan, self.mesh, tokenizer())

    def loader(self, state=None):
        return build_loader(self.config, self.plan, self.mesh, tokenizer(), state)

    def save(self, checkpoint: Path, loader, step: int, **more) -> str:
        """Save the state of the documents as a job does; returns the ledger."""
        size, rank, rows = self.mesh.data.size, self.mesh.data.rank, self.plan.rows_per_step
        mine = [
            stream
            for stream in streams_of_rank(rank, size, STREAMS, rows)
            if saving_rank(stream, size, STREAMS, rows) == rank
        ]
        save_loader_state(checkpoint / "loader", loader.state(), mine)
        ledger = combined_ledger(
            {
                stream: value
                for part in all_gather_objects(loader.ledger(), self.mesh.world)
                for stream, value in part.items()
            }
        )
        (checkpoint / "facts.json").write_text(json.dumps({"step": step, "ledger": ledger} | more))
        return ledger


def facts(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "facts.json").read_text())


def rows_of(loader, steps: int) -> torch.Tensor:
    return torch.stack([next(loader) for _ in range(steps)])


def saved(folder: Path) -> None:
    for name, steps, data in (("checkpoint", STEP, {}), ("later", STEP + 1, {}), ("shuffled", STEP, {"shuffle": True})):
        ranks = Ranks(folder, data=data)
        (folder / name).mkdir(exist_ok=True)
        with ranks.loader() as loader:
            rows_of(loader, steps)
            ranks.save(folder / name, loader, steps)


def uncompressed(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=20, compression="none", use_dictionary=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Data, and what checkpoints of two ranks have of it: after three steps, after four, and of another seed."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "data").mkdir()
    for index, documents in enumerate((60, 60, 30)):
        write_shard(folder / "data" / f"shard_{index:05d}.parquet", documents, seed=index)
    first = folder / "data" / "shard_00000.parquet"
    uncompressed(first, pq.read_table(first).column("text").to_pylist())
    run_ranks(saved, 2, folder)
    return folder


def resumed(folder: Path, checkpoints: list, changes: list[dict]) -> list:
    """Return for each checkpoint and each change of the config True, or the error."""
    messages = []
    for checkpoint in checkpoints:
        for change in changes:
            try:
                messages.append(Ranks(folder, **change).documents(checkpoint)[1] == [])
            except UserError as error:
                messages.append(str(error))
    return messages


def of_all_ranks(world: int, *arguments) -> list:
    one, *others = run_ranks(resumed, world, *arguments)
    assert all(other == one for other in others), "all ranks say the same"
    return one


def test_other_settings_and_other_data_are_refused(place, tmp_path):
    for name in ("missing", "changed"):
        shutil.copytree(place / "data", tmp_path / name)
    (tmp_path / "missing" / "shard_00001.parquet").unlink()
    shard = tmp_path / "changed" / "shard_00000.parquet"
    size, texts = shard.stat().st_size, pq.read_table(shard).column("text").to_pylist()
    uncompressed(shard, [text.upper() for text in texts])
    assert shard.stat().st_size == size
    changes = {
        "training shards (SHA-256 of names, sizes and document counts) ": {
            "data": {"folder": str(tmp_path / "missing")}
        },
        "texts in shards of the same names and sizes (SHA-256 of the files' footers) ": {
            "data": {"folder": str(tmp_path / "changed")}
        },
        "data seed (data.shuffle, run.seed) None but this run has 42": {"data": {"shuffle": True}},
        "packing streams (data.streams) 4 but this run has 2": {"data": {"streams": 2}},
        "packing streams (data.streams) 4 but this run has 5": {"data": {"streams": 5}},
        "documents in a buffer (data.buffer_documents) 1000 but this run has 20": {"data": {"buffer_documents": 20}},
        "tokens per row 161 but this run has 81": {"model": {"sequence_len": 80}},
        "rows per step 12 but this run has 24": {"batch": {"tokens": 160 * 24}},
    }
    messages = of_all_ranks(2, place, [place / "checkpoint"], [{}, *changes.values()])
    assert messages[0] is True
    for sentence, words in zip(messages[1:], changes, strict=True):
        assert sentence.startswith(f"the checkpoint's loader state has {words}"), sentence
        assert sentence.endswith("start a new run" + WAY_OUT) and "\n" not in sentence


def swap(folder: Path, one: int, other: int) -> None:
    paths = [folder / f"stream_{stream:05d}.npz" for stream in (one, other)]
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)


def test_loader_files_that_are_not_the_checkpoints_are_refused(place, tmp_path):
    def broken(name: str) -> Path:
        return Path(shutil.copytree(place / "checkpoint", tmp_path / name)) / "loader"

    def taken(name: str, source: str, *files: str) -> None:
        for folder in [broken(name)]:
            for file in files:
                shutil.copy(place / source / "loader" / file, folder)

    every = [f"stream_{stream:05d}.npz" for stream in range(STREAMS)]
    shutil.rmtree(broken("no folder"))
    (broken("no file") / every[1]).unlink()
    broken("cut short").joinpath(every[3]).write_bytes((place / "checkpoint" / "loader" / every[3]).read_bytes()[:300])
    swap(broken("swapped"), 1, 3)
    taken("one of another step", "later", every[2])
    taken("all of another step", "later", "loader.json", *every)
    taken("one of another run", "shuffled", every[0])
    facts_in_errors = {
        "no folder": ("/loader/loader.json", "is missing"),
        "no file": ("/loader/stream_00001.npz", "is missing"),
        "cut short": ("/loader/stream_00003.npz", "is damaged (BadZipFile)"),
        "swapped": ("/loader/stream_00001.npz", "documents that do not belong to stream 1"),
        "one of another step": ("/loader/stream_00002.npz", "not of step 3"),
        "all of another step": ("/loader", "of step 4", "of step 3"),
        "one of another run": ("/loader", "the ledger "),
    }
    messages = of_all_ranks(3, place, [tmp_path / name for name in facts_in_errors], [{}])
    for message, (name, (path, *words)) in zip(messages, facts_in_errors.items(), strict=True):
        assert f"{tmp_path / name}{path} " in message and all(word in message for word in words), message
        assert message.endswith(" load another checkpoint" + WAY_OUT), message


def restarted_state(folder: Path, target: Path, source: str) -> tuple:
    """Resume with a smaller buffer and data.resume=restart, train two steps, save, and resume twice more.

    Returns the remarks and the ledger of the first resume, the last loader.json, and the restarts after all of them.
    """
    (target / "second").mkdir(parents=True, exist_ok=True)
    (target / "third").mkdir(exist_ok=True)
    changes = {"data": {"buffer_documents": 20, "resume": "restart"}}
    ranks = Ranks(folder, **changes)
    state, messages = ranks.documents(folder / source)
    with ranks.loader(state) as loader:
        first = rows_of(loader, 2)
        ledger = ranks.save(target / "second", loader, STEP + 2)
    with ranks.loader() as loader:
        assert torch.equal(rows_of(loader, 2), first), "the order of this run, from its beginning"
        assert ledger != combined_ledger(
            {s: t for part in all_gather_objects(loader.ledger(), ranks.mesh.world) for s, t in part.items()}
        )
        rest = rows_of(loader, 2)
    state, again = ranks.documents(target / "second")
    assert again == [], "documents that can continue do, whatever data.resume is"
    with ranks.loader(state) as loader:
        assert torch.equal(rows_of(loader, 2), rest)
        ranks.save(target / "third", loader, STEP + 4)
    assert Ranks(folder, data={"buffer_documents": 20}).documents(target / "third")[1] == []
    once_more, _ = Ranks(folder, data={"buffer_documents": 30, "resume": "restart"}).documents(target / "third")
    return (
        messages,
        ledger,
        json.loads((target / "third" / "loader" / "loader.json").read_text()),
        once_more["header"]["restarts"],
    )


def test_documents_that_restart_continue_exactly_from_then_on(place, tmp_path):
    before = facts(place / "checkpoint")["ledger"]
    (messages, ledger, header, restarts), *others = run_ranks(restarted_state, 2, place, tmp_path, "checkpoint")
    assert [other[:2] for other in others] == [(messages, ledger)]
    (remark,) = messages
    assert remark.startswith(
        "documents restart from the first one at step 3 and may repeat earlier ones (data.resume=restart"
    )
    assert "documents in a buffer (data.buffer_documents) 1000 but this run has 20" in remark
    assert header["restarts"] == [{"step": 3, "ledger": before}] and header["step"] == 4
    assert restarts == [*header["restarts"], {"step": 7, "ledger": facts(tmp_path / "third")["ledger"]}]
    assert [answer[1] for answer in run_ranks(restarted_state, 3, place, tmp_path / "three", "checkpoint")] == [
        ledger
    ] * 3, "on any number of ranks"


def test_documents_of_an_imported_checkpoint_restart(place, tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps({"step": 20, "imported": {"format": "nanochat"}}))
    ((remark,),) = run_ranks(imported, 1, place, tmp_path)
    assert remark.startswith("documents restart from the first one at step 20 and may repeat earlier ones")
    assert f"{tmp_path} was imported" in remark


def imported(folder: Path, checkpoint: Path) -> list[str]:
    return Ranks(folder).documents(checkpoint)[1]
