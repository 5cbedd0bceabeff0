"""Texts that are not UTF-8 in a job: skipped, logged and counted alike on every layout."""

import pytest

from megachat.checkpoint.facts import read_facts
from tests.runs.forked import run_forked
from tests.runs.job import Place, command, losses, make_place
from tests.unit.data.corpus import random_texts, write_texts


def test_a_job_skips_counts_and_logs_texts_that_are_not_utf8(tmp_path):
    place = make_place(tmp_path)
    place = Place(tmp_path / "bad", place.tokenizer, place.runs)
    place.data.mkdir()
    contents = [text.encode() + (b"\xff" if index % 5 == 3 else b"") for index, text in enumerate(random_texts(120, 1))]
    for index in range(3):
        write_texts(place.data / f"shard_{index}.parquet", contents[40 * index : 40 * index + 40])
    facts, curves = [], []
    for world in (1, 2):
        changes = {"data": {"on_bad_text": "skip"}, "horizon": {"steps": 2}, "evaluate": {"prompts": []}}
        done = run_forked(command(place, f"skip_{world}", config=changes), world)
        assert done.status == 0, done.printed
        places = [line for line in done.out.splitlines() if line.startswith("skipped: ")]
        assert f"skipped: {place.data}/shard_0.parquet, row group 0, row 3 (counted from 0) is not UTF-8" in done.out
        assert len(set(places)) == len(places)
        facts.append(read_facts(place.runs / f"skip_{world}" / "checkpoints" / "step_000002"))
        curves.append(losses(place.runs / f"skip_{world}"))
        total = facts[-1]["skipped_texts"]
        assert f"step 00002 | {total} texts that are not UTF-8 were skipped so far" in done.out
    assert facts[0]["skipped_texts"] == facts[1]["skipped_texts"] > 10
    assert facts[0]["ledger"] == facts[1]["ledger"] and curves[0] == pytest.approx(curves[1], rel=1e-4)
