import itertools
import json
import random
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megachat.data import loader as loader_module
from megachat.data import reader as reader_module
from megachat.data.loader import Loader
from megachat.data.loader_state import load_loader_state, save_loader_state, step_of_run
from megachat.data.packing import REFILL_DOCUMENTS, saving_rank, streams_of_rank
from megachat.data.shards import open_shards, split_shards
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.prepare.tokenizer_training import import_nanochat
from tests.limits import until
from tests.unit.data.corpus import (
    ENGLISH,
    NANOCHAT,
    byte_tokenizer,
    needs_shared,
    random_texts,
    write_folder,
    write_texts,
)
from tools.bench.scan_packing import scan_rows

ROW, ROWS = 40, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    texts = random_texts(260, 3)
    texts[5] = texts[17] = texts[100] = ""
    return write_folder(tmp_path_factory.mktemp("loader") / "data", [texts[:90], texts[90:210], texts[210:]])


def build(folder, tokenizer=None, **changes):
    settings = {"split": "train", "row_tokens": ROW, "rows": ROWS, "streams": 3, "buffer_documents": 25, **changes}
    return Loader(folder, tokenizer or byte_tokenizer(), **settings)


def steps_of(loader, steps):
    """Rows of some steps of one rank, [steps, rows / ranks, row_tokens]."""
    return torch.stack([next(loader) for _ in range(steps)])


def global_rows(folder, ranks, steps, states=None, **changes):
    """(rows of all ranks, [steps, rows, row_tokens]; the ledgers of all streams; a state of each rank)."""
    out = torch.zeros(steps, ROWS, ROW, dtype=torch.long)
    ledgers, after = {}, []
    for rank in range(ranks):
        with build(folder, ranks=ranks, rank=rank, state=states[rank] if states else None, **changes) as loader:
            out[:, rank::ranks] = steps_of(loader, steps)
            for stream, ledger in loader.ledger().items():
                assert ledgers.setdefault(stream, ledger) == ledger
            after.append(loader.state())
    return out, ledgers, after


@pytest.mark.parametrize("streams", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", [None, 7])
def test_rows_do_not_depend_on_ranks(folder, streams, seed):
    expected, ledgers, _ = global_rows(folder, 1, 9, streams=streams, seed=seed)
    assert (expected[:, :, 0] == byte_tokenizer().bos).all() and len(ledgers) == streams
    for ranks in (2, 3, 4):
        rows, other_ledgers, _ = global_rows(folder, ranks, 9, streams=streams, seed=seed)
        assert torch.equal(rows, expected) and other_ledgers == ledgers


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_rows_do_not_depend_on_the_type_of_string(folder, tmp_path, kind):
    for path in folder.glob("*.parquet"):
        column = pq.read_table(path)["text"].combine_chunks()
        column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
        pq.write_table(pa.table({"text": column}), tmp_path / path.name, row_group_size=7)
    with build(folder) as loader, build(tmp_path) as other:
        assert torch.equal(steps_of(loader, 5), steps_of(other, 5))


def save_by_owners(folder, states, ranks, streams):
    for rank, state in enumerate(states):
        mine = [
            stream
            for stream in streams_of_rank(rank, ranks, streams, ROWS)
            if saving_rank(stream, ranks, streams, ROWS) == rank
        ]
        save_loader_state(folder, state, mine)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 1), (2, 3), (3, 2), (4, 3)])
@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_a_resume_on_any_ranks_goes_on_with_the_same_rows(folder, tmp_path, before, after, stop):
    streams = 5
    expected, ledgers, _ = global_rows(folder, 1, 14, streams=streams, seed=1)
    states = []
    for rank in range(before):
        with build(folder, ranks=before, rank=rank, streams=streams, seed=1) as loader:
            for step in range(stop):
                assert torch.equal(next(loader), expected[step, rank::before])
            states.append(loader.state())
    save_by_owners(tmp_path, states, before, streams)
    loaded = [load_loader_state(tmp_path, streams_of_rank(rank, after, streams, ROWS)) for rank in range(after)]
    rows, other_ledgers, _ = global_rows(folder, after, 14 - stop, loaded, streams=streams, seed=1)
    assert torch.equal(rows, expected[stop:]) and other_ledgers == ledgers


def test_state_is_of_the_last_batch_however_far_the_thread_is(folder):
    expected, _, _ = global_rows(folder, 1, 8)
    with build(folder, prefetch_steps=4) as loader:
        steps_of(loader, 2)
        until(loader._packed.full, "rows that are packed ahead", every_s=0.005)
        state = loader.state()
        assert loader.step == state["header"]["step"] == 2
    with build(folder, state=state) as loader:
        assert torch.equal(steps_of(loader, 6), expected[2:])
        assert loader.step == 8


def test_state_files_hold_no_pickle_and_the_header_is_json(folder, tmp_path):
    with build(folder) as loader:
        next(loader)
        save_loader_state(tmp_path, loader.state(), [0, 1, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "loader.json",
        "stream_00000.npz",
        "stream_00001.npz",
        "stream_00002.npz",
    ]
    for path in tmp_path.glob("*.npz"):
        with np.load(path, allow_pickle=False) as file:
            assert file["tokens"].dtype == np.uint16 and len(file["sequence"]) == len(file["lengths"]) == len(
                file["documents"]
            )


def test_state_files_that_cannot_be_used(folder, tmp_path):
    with build(folder) as loader:
        next(loader)
        save_loader_state(tmp_path, loader.state(), [0, 1, 2])
        next(loader)
        save_loader_state(tmp_path, loader.state(), [2])
    load_loader_state(tmp_path, [0, 1])
    with pytest.raises(UserError, match="stream_00002.npz is not of step 1"):
        load_loader_state(tmp_path, [2])
    with pytest.raises(UserError, match="3 packing streams, not stream 3"):
        load_loader_state(tmp_path, [3])
    path = tmp_path / "stream_00001.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="stream_00001.npz is damaged"):
        load_loader_state(tmp_path, [1])
    path.unlink()
    with pytest.raises(UserError, match="stream_00001.npz is missing"):
        load_loader_state(tmp_path, [1])
    (tmp_path / "loader.json").write_text("{")
    with pytest.raises(UserError, match="loader.json is damaged"):
        load_loader_state(tmp_path, [0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("counters", np.array([-1, 0, 4, 0, 0])),
        ("counters", np.array([1.0, 0.0, 4.0, 0.0, 0.0])),
        ("counters", np.array([True, False, True, True, True])),
        ("sequence", "repeat"),
        ("documents", "negative"),
        ("lengths", "negative"),
        ("lengths", np.array([[3]])),
        ("tokens", "float"),
        ("ledger", np.zeros(3, np.uint8)),
    ],
)
def test_numbers_that_no_loader_saved_are_refused(name, value, folder, tmp_path):
    """Signed again, only the numbers can show it: none of them may lose or repeat a document."""
    with build(folder) as loader:
        next(loader)
        save_loader_state(tmp_path, loader.state(), [0, 1, 2])
    path = tmp_path / "stream_00001.npz"
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    changes = {
        "repeat": lambda array: np.full_like(array, array[0]),
        "negative": lambda array: -array - 1,
        "float": lambda array: array.astype(np.float32),
    }
    arrays[name] = changes[value](arrays[name]) if isinstance(value, str) else value
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="stream_00001.npz is damaged"):
        load_loader_state(tmp_path, [1])


@pytest.mark.parametrize(
    "change", [{"streams": 0}, {"streams": True}, {"step": -1}, {"rows": 1.0}, {"documents": 0}, {"row_tokens": "x"}]
)
def test_a_header_that_no_loader_saved_is_refused(change, folder, tmp_path):
    with build(folder) as loader:
        next(loader)
        save_loader_state(tmp_path, loader.state(), [0, 1, 2])
    path = tmp_path / "loader.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="loader.json is damaged"):
        load_loader_state(tmp_path, [0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row_tokens": 41}, "tokens per row 40 but this run has 41"),
        ({"rows": 24}, "rows per step 12 but this run has 24"),
        ({"streams": 4}, "packing streams (data.streams) 3 but this run has 4"),
        ({"seed": 5}, "data seed (data.shuffle, run.seed) None but this run has 5"),
        ({"buffer_documents": 26}, "documents in a buffer (data.buffer_documents) 25 but this run has 26"),
        ({"split": "validation"}, "split train but this run has validation"),
        ({"tokenizer": Tokenizer({bytes([byte]): 255 - byte for byte in range(256)})}, "tokenizer (SHA-256)"),
    ],
)
def test_a_state_of_other_settings_is_refused(folder, changes, words):
    with build(folder) as loader:
        state = loader.state()
    with pytest.raises(UserError) as caught:
        build(folder, state=state, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_state_of_other_data_is_refused(folder, tmp_path):
    with build(folder) as loader:
        state = loader.state()
    with pytest.raises(UserError, match="training shards .* but this run has"):
        build(write_folder(tmp_path / "other", [["abc"] * 20, ["d"] * 20]), state=state)


@pytest.mark.parametrize("buffer_documents", [3, 25, 1000])
def test_one_stream_packs_like_the_plain_implementation(folder, buffer_documents):
    tokenizer = byte_tokenizer()
    texts = [text for text in random_texts(260, 3)[:210]]
    texts[5] = texts[17] = texts[100] = ""
    documents = ([tokenizer.bos, *text.encode()] for text in itertools.cycle(texts) if text)
    least, refill = min(buffer_documents, 210 - 105 + 1), 105
    expected = [row for row, _, _ in itertools.islice(scan_rows(documents, ROW, least, refill), 20 * ROWS)]
    with build(folder, streams=1, buffer_documents=buffer_documents) as loader:
        assert steps_of(loader, 20).reshape(-1, ROW).tolist() == expected
        assert loader.epoch > 1 and 0 < loader.cropped_share < 1


def test_validation_is_the_last_shard_and_begins_anew(tmp_path):
    folder = write_folder(tmp_path, [["train"] * 50, ["train"] * 50, ["valid"] * 50])
    with build(folder, split="validation") as loader:
        first = steps_of(loader, 3)
    assert set(byte_tokenizer().decode(first.flatten()).split("<|bos|>")) <= {"", *("valid"[:end] for end in range(6))}
    with build(folder, split="validation", ranks=2, rank=1) as loader:
        assert torch.equal(steps_of(loader, 3), first[:, 1::2])


def short_words(count, seed):
    """Texts of one-letter words, so that many are surely longer than a row; some are empty."""
    rng = random.Random(seed)
    return [" ".join(rng.choice("abcdefgh") for _ in range(rng.choice((0, 3, 9, 25, 60, 60)))) for _ in range(count)]


def state_of(loader):
    """The state as something that can be compared."""
    state = loader.state()
    arrays = {stream: {name: (a.dtype, a.tolist()) for name, a in s.items()} for stream, s in state["streams"].items()}
    return state["header"], arrays


@pytest.mark.parametrize("stop", [1, 2, 6])
@pytest.mark.parametrize("kept", [0, 2000, 1 << 25])
def test_documents_that_are_tokenized_later_change_no_row_and_no_state(tmp_path, monkeypatch, kept, stop):
    folder = write_folder(tmp_path, [short_words(500, 1), ["b"] * 40])
    monkeypatch.setattr(reader_module, "_POSTPONED_CHARACTERS", 0)
    with build(folder) as loader:
        wanted = steps_of(loader, stop), state_of(loader), steps_of(loader, 20), state_of(loader)
    monkeypatch.setattr(reader_module, "_POSTPONED_CHARACTERS", kept)
    encoded, late_by_step = [], {}
    encode, pack = Tokenizer._ids, Loader._pack

    def recording_ids(self, text):
        encoded.append(text)
        return encode(self, text)

    def recording_pack(self, step):  # counted here, because later rows are packed while the first is looked at
        rows = pack(self, step)
        late_by_step[step] = sum(len(text) > 2 * ROW for text in encoded)
        return rows

    monkeypatch.setattr(Tokenizer, "_ids", recording_ids)
    monkeypatch.setattr(Loader, "_pack", recording_pack)
    with build(folder) as loader:
        actual = steps_of(loader, stop), state_of(loader), steps_of(loader, 20), state_of(loader)
    late = late_by_step[0]
    assert late == 0 if kept > 2000 else late > 5, "none of them is in the first rows"
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(actual, wanted, strict=True))


def test_what_was_postponed_is_tokenized_after_the_first_step(tmp_path):
    folder = write_folder(tmp_path, [short_words(500, 1), ["b"] * 40])
    with build(folder, tokenizer_threads=1) as loader:
        next(loader)
        postponed = [d for s in loader._streams.values() for d in s.state().buffer.values() if hasattr(d, "least")]
        assert any(document._encode for document in postponed)
        next(loader)
        until(lambda: not any(document._encode for document in postponed), "tokens of all of them", every_s=0.005)


def test_no_batch_is_shared_and_rows_are_int64(folder):
    with build(folder) as loader:
        first = next(loader)
        copy = first.clone()
        second = next(loader)
    assert first.dtype == torch.int64 and first.shape == (ROWS, ROW)
    assert torch.equal(first, copy) and first.data_ptr() != second.data_ptr()


def test_epoch_counts_documents_placed_or_cropped(tmp_path):
    folder = write_folder(tmp_path, [["abcdefg"] * 40, ["x"] * 40])
    with Loader(folder, byte_tokenizer(), split="train", row_tokens=16, rows=4, streams=2) as loader:
        epochs = []
        for _ in range(11):
            epochs.append(loader.epoch)
            next(loader)
    assert epochs == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]  # 8 documents of 8 tokens a step


def test_settings_that_do_not_fit(folder):
    with pytest.raises(UserError, match="12 rows per step .* 5 data-parallel ranks"):
        build(folder, ranks=5)
    with pytest.raises(
        UserError,
        match="210 documents in .*shard_00001.parquet, fewer than 211 packing streams: set data.streams to 210",
    ):
        build(folder, streams=211)
    with pytest.raises(UserError, match="does not exist"):
        build(folder / "nowhere")


def test_a_stream_of_empty_documents_is_an_error_of_next(tmp_path):
    folder = write_folder(tmp_path, [["a", ""] * 10, ["b"] * 4])
    with build(folder, streams=2) as loader:
        with pytest.raises(UserError, match="all documents of packing stream 1 .* are empty"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_damage_met_while_reading_is_an_error_of_next(tmp_path):
    folder = write_folder(tmp_path, [random_texts(300, 1), ["b"] * 40], group=100)
    path = folder / "shard_00000.parquet"
    whole = bytearray(path.read_bytes())
    whole[4 : len(whole) // 2] = bytes(len(whole) // 2 - 4)
    path.write_bytes(whole)
    with build(folder) as loader, pytest.raises(UserError, match="shard_00000.parquet is damaged in row group"):
        next(loader)


def test_other_errors_of_the_thread_keep_their_type(folder, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("in the thread")

    monkeypatch.setattr(loader_module.PackingStream, "pack", fail)
    with build(folder) as loader, pytest.raises(ZeroDivisionError, match="in the thread"):
        next(loader)


def test_close_ends_the_threads(folder):
    before = set(threading.enumerate())
    with build(folder) as loader:
        next(loader)
        started = set(threading.enumerate()) - before
        assert {thread.name.split("_")[0] for thread in started} == {"loader-train", "tokenizer"}
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(StopIteration):
        next(loader)


@needs_shared
@pytest.mark.parametrize("row_tokens", [513, 2049])
@pytest.mark.slow
def test_default_streams_crop_no_more_than_plain_packing(row_tokens):
    tokenizer, rows = import_nanochat(NANOCHAT), 800
    with Loader(ENGLISH, tokenizer, split="train", row_tokens=row_tokens, rows=16) as loader:
        for _ in range(rows // 16):
            next(loader)
        ours = loader.cropped_share
    plain = scan_rows(english_documents(tokenizer), row_tokens, 1000, REFILL_DOCUMENTS)
    _, read, cropped = next(itertools.islice(plain, rows - 1, None))
    assert ours < cropped / read + 0.01


def english_documents(tokenizer):
    for shard in itertools.cycle(split_shards(open_shards(ENGLISH), "train")):
        for tokens in tokenizer.encode_batch(pq.read_table(shard.path)["text"].to_pylist(), 2):
            yield tokens.tolist()


@pytest.fixture(scope="module")
def bad_folders(tmp_path_factory):
    """Two folders: texts some of which are not UTF-8, and the same with empty texts in their place."""
    contents = [text.encode() for text in random_texts(260, 3)]
    folders = []
    for name, bad in (("bad", b"abc \xff\xfe def"), ("empty", b"")):
        folder = tmp_path_factory.mktemp(name)
        texts = [bad if index % 9 in (2, 3) else text for index, text in enumerate(contents)]
        for index, part in enumerate((texts[:90], texts[90:210], texts[210:])):
            write_texts(folder / f"shard_{index:05d}.parquet", part)
        folders.append(folder)
    return folders


def test_texts_that_are_not_utf8_are_refused_with_their_place(bad_folders):
    with build(bad_folders[0]) as loader, pytest.raises(UserError) as caught:
        next(loader)
    message = str(caught.value)
    assert f"{bad_folders[0]}/shard_00000.parquet, row group 0, row 2 (counted from 0) is not UTF-8 text" in message
    assert "set data.on_bad_text=skip" in message and "\n" not in message


@pytest.mark.parametrize("seed", [None, 7])
def test_skipped_texts_are_like_empty_ones_on_every_layout_and_counted(bad_folders, seed):
    bad, empty = bad_folders
    expected, ledgers, _ = global_rows(empty, 1, 14, streams=5, seed=seed)
    counts = None
    for ranks in (1, 2, 3, 4):
        lines: list[str] = []
        changes = {"streams": 5, "seed": seed, "on_bad_text": "skip", "log": lines.append}
        rows, other_ledgers, states = global_rows(bad, ranks, 14, **changes)
        assert torch.equal(rows, expected) and other_ledgers == ledgers
        skipped = {stream: saved["skipped_texts"] for state in states for stream, saved in state["streams"].items()}
        assert sum(skipped.values()) > 60 and skipped == (counts := counts or skipped)
        places = [line for line in lines if "row group" in line]
        assert len(set(places)) == len(places) > 9  # each text is logged by one rank


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
def test_a_resume_counts_skipped_texts_as_if_there_was_no_stop(bad_folders, tmp_path, before, after):
    changes = {"streams": 5, "seed": 1, "on_bad_text": "skip"}
    expected, ledgers, whole = global_rows(bad_folders[0], 1, 14, **changes)
    _, _, states = global_rows(bad_folders[0], before, 6, **changes)
    save_by_owners(tmp_path, states, before, 5)
    loaded = [load_loader_state(tmp_path, streams_of_rank(rank, after, 5, ROWS)) for rank in range(after)]
    rows, other_ledgers, resumed = global_rows(bad_folders[0], after, 8, loaded, **changes)
    assert torch.equal(rows, expected[6:]) and other_ledgers == ledgers
    for state in resumed:
        for stream, saved in state["streams"].items():
            assert saved["skipped_texts"] == whole[0]["streams"][stream]["skipped_texts"]


def test_a_stream_of_texts_that_are_not_utf8_ends(tmp_path):
    for name in ("a", "b"):
        write_texts(tmp_path / f"{name}.parquet", [b"text", b"\xff"] * 10)
    with build(tmp_path, streams=2, on_bad_text="skip") as loader:
        with pytest.raises(UserError, match="all documents of packing stream 1 .* are empty"):
            next(loader)


def test_steps_that_are_left_out_are_packed_recorded_and_resumed_on_any_number_of_ranks(folder, tmp_path):
    whole, ledgers, _ = global_rows(folder, 1, 7)
    left = [{"header": {"step": 0, "left_out": [2, 3]}, "streams": None}] * 2
    rows, changed, states = global_rows(folder, 2, 5, left)
    assert torch.equal(rows, whole[[0, 1, 4, 5, 6]]) and all(changed[stream] != ledgers[stream] for stream in ledgers)
    assert states[0]["header"]["step"] == 7 and step_of_run(states[0]["header"]) == 5
    _, _, before = global_rows(folder, 2, 2, left)
    for rank, state in enumerate(before):
        save_loader_state(tmp_path, state, streams_of_rank(rank, 2, 3, ROWS))
    resumed = load_loader_state(tmp_path, range(3))
    assert step_of_run(resumed["header"]) == 2
    again, ledgers_again, _ = global_rows(folder, 3, 3, [resumed] * 3)
    assert torch.equal(again, rows[2:]) and ledgers_again == changed


def test_the_documents_of_each_row(folder):
    texts = [text for path in sorted(folder.glob("*.parquet"))[:-1] for text in pq.read_table(path)["text"].to_pylist()]
    tokenizer = byte_tokenizer()
    with build(folder, ranks=2, rank=1) as loader:
        for _ in range(3):
            rows, documents = next(loader), loader.documents()
            assert len(documents) == len(rows) == ROWS // 2
            for row, parts in zip(rows, documents, strict=True):
                tokens = [tokenizer.encode(texts[part["document"]], bos=True)[: part["tokens"]] for part in parts]
                assert np.array_equal(np.concatenate(tokens), row.numpy())
                assert [part["start"] for part in parts] == [0, *np.cumsum([len(each) for each in tokens])[:-1]]
                assert all(part["epoch"] == 1 and ".parquet" in part["place"] for part in parts)
