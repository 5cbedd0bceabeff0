"""`megachat explain`: every setting and number of the plan, what moves them, changes, and names that are wrong."""

import json
from functools import partial

import pytest

from megachat.commands import main as cli
from megachat.config import known_keys, load_config
from megachat.errors import UserError
from megachat.planning.hardware import parse_gpus
from megachat.planning.influence import influenced, moved, numbers_of, with_value
from megachat.planning.memory import Memory
from megachat.planning.names import describe_names
from megachat.planning.numbers import NUMBERS, with_numbers
from megachat.planning.plan import resolve_plan
from megachat.planning.probe import read_probe
from megachat.planning.time_numbers import TIME_NUMBERS, Timing
from megachat.programs.explain import describe_explanation, explain
from megachat.programs.preflight import rank_checkpoint_bytes
from tests.runs.job import ROOT
from tests.unit.planning.test_probe import written

# A small model that has every part.
ALL = {
    "model": {"depth": 3, "head_size": 64, "sequence_len": 256, "vocab_size": 97, "norm_scales": ["mlp"]},
    "batch": {"tokens": 8192, "micro_rows": 2},
    "lookup": {"after_blocks": [1], "max_rows_per_token": 8},
    "ngram": {"blocks": [0, 2]},
}
D24 = str(ROOT / "configs" / "d24_fp8.json")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("explain") / "all.json"
    path.write_text(json.dumps(ALL))
    return str(path)


@pytest.mark.parametrize("section", sorted({key.partition(".")[0] for key in known_keys()}))
def test_every_setting_is_explained(section, config, monkeypatch):
    one = Memory(0, *[1] * 6)  # counting takes long, and the next test but one does it
    monkeypatch.setattr("megachat.planning.influence.memory_of_stages", lambda *_: [one])
    for key in known_keys():
        if key.startswith(f"{section}."):
            shown = json.loads(json.dumps(explain(key, config, [], [], 4)))
            setting = shown["setting"]
            assert setting["key"] == key and setting["meaning"], key
            assert setting["origin"] == (config if key.partition(".")[2] in ALL.get(section, {}) else "default")
            text = describe_explanation(shown)
            assert text.startswith(f"{key} = ") and ("a change moves: " in text or "no number of this plan" in text)


def test_a_setting_that_moves_no_number_shows_its_warning(config):
    shown = explain("reliability.replay_every", config, ["reliability.replay_every=1"], [], 4)
    assert "reliability.replay_every (1) makes the training about 50% longer" in describe_explanation(shown)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_explained(name, config):
    shown = explain(name, config, [], [], 4)
    number = shown["number"]
    assert number["meaning"] and number["formula"] and number["value"] is not None
    assert number["moved_by"] or name.startswith("memory.") or name in ("layout.tensor", "vocab_size"), "has 3 heads"
    assert f"{name} = " in describe_explanation(json.loads(json.dumps(shown)))


def test_the_list_of_names_is_complete(config):
    plan = numbers_of(load_config(config), 4, 97, memory=True)
    assert list(plan.keys() - NUMBERS.keys()) == [] and NUMBERS.keys() == plan.keys()
    assert {line.strip() for line in describe_names().splitlines()} >= {*known_keys(), *NUMBERS}


def test_a_formula_with_numbers_is_the_number(config):
    """Every formula that is arithmetic, evaluated."""
    evaluated = 0
    for name in NUMBERS:
        number = explain(name, config, [], [], 4)["number"]
        if number["with_numbers"]:
            assert eval(number["with_numbers"].replace("^", "**"), {}) == number["value"], name
            evaluated += 1
    assert evaluated >= 4
    assert with_numbers("a * b / c", {"a": 2, "b": 3, "c": 4}) == "2 * 3 / 4"
    assert with_numbers("a * unknown", {"a": 2}) is None and with_numbers("largest divisor of a", {"a": 2}) is None


def test_what_a_setting_moves_is_what_resolve_changes():
    numbers = partial(numbers_of, world=8, vocab_size=32768, memory=False)
    config = load_config(D24)
    assert influenced(config, "optimizer.matrix_lr", numbers) == ["rates.matrix"]
    assert influenced(config, "horizon.ratio", numbers) == ["steps", "stop_step", "total_tokens", "total_flops"]
    assert influenced(config, "log.every", numbers) == []
    assert {"layout.data", "layout.tensor", "accumulation"} == set(influenced(config, "parallel.tensor", numbers))
    assert moved({"a": 1, "b": 2}, {"b": 3, "c": 4}) == {"a": (1, None), "b": (2, 3), "c": (None, 4)}
    memory = influenced(config, "batch.recompute", partial(numbers_of, world=8, vocab_size=32768, memory=True))
    assert memory == ["memory.activations", "memory.workspace", "memory.total"]
    assert with_value(config, "batch.recompute", "block").batch.recompute == "block"


def test_a_change_shows_every_number_that_moves(capsys):
    def run(*words: str) -> str:
        cli._run(["explain", *words])
        return capsys.readouterr().out

    out = run("horizon.ratio", "--config", "d24_fp8", "--set", "horizon.ratio=12")
    assert out.startswith("horizon.ratio = 12.0   (from --set") or out.startswith("horizon.ratio = 12   (from --set")
    assert "5,568" in out and "8,352" in out, "steps before and after"
    shown = json.loads(run("steps", "--config", "d24_fp8", "--change", "horizon.ratio=12", "--json"))
    numbers = shown["change"]["numbers"]
    assert set(numbers) == {"steps", "stop_step", "total_tokens", "total_flops"}
    assert numbers["steps"] == {"before": 5568, "after": 8352}
    assert shown["number"]["formula"].startswith("target_tokens / tokens_per_step = ")
    assert f"from {D24}" in run("batch.micro_rows", "--config", "d24_fp8")
    assert "no number of the plan moves" in run("log.every", "--config", "d24_fp8", "--change", "log.every=3")
    assert "assumed: a vocabulary of 32,768 tokens" in run("optimizer.matrix_lr", "--set", "data.tokenizer=none")
    assert "layout.tensor = 2" in run("layout.tensor", "--config", "d24_fp8", "--layout", "tp=2,dp=4")


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["matrix_rl"], "did you mean optimizer.matrix_lr, rates.matrix?"),
        (["model.steps"], "did you mean horizon.steps, steps"),
        (["xyzzy"], "`megachat explain` without a name lists all of them"),
        (["lookup.mean_rows"], "this plan has no lookup.mean_rows: it belongs to lookup layers"),
        (["depth", "--change", "model.depht=2"], "unknown key model.depht"),
        (["depth", "--world", "0"], "--world is 0"),
        (["time.step"], "time.step depends on the machine: give --gpus 8xH100, or --probe FILE"),
        (["price", "--gpus", "8xH100"], "price depends on the price of a GPU-hour: give --price"),
        (["price", "--price", "2"], "--price needs a machine"),
        (["time.step", "--gpus", "8xH100", "--world", "4"], "has 8 GPUs, but 4 ranks are requested"),
        (["time.step", "--gpus", "8xH100", "--probe", "p.json"], "name two machines"),
        (["micro_rows", "--config", "d24_fp8", "--world", "7"], "cannot share evenly"),
    ],
)
def test_a_wrong_name_gets_the_near_ones(words, fact):
    with pytest.raises(UserError) as error:
        cli._run(["explain", *words])
    assert fact in str(error.value) and "\n" not in str(error.value)


def test_predicted_numbers_are_explained(config, tmp_path):
    """Formulas of what is arithmetic give the number; what moves a number is not written down; a probe works alike."""
    timing = Timing(parse_gpus("4xH100"), 2.5, rank_checkpoint_bytes)
    loaded = load_config(config)
    numbers = timing.numbers(loaded, resolve_plan(loaded, 4, 97))
    assert numbers.keys() == TIME_NUMBERS.keys()
    for name in ("time.step", "time.clock_hours", "price"):
        number = explain(name, config, [], [], 4, timing)["number"]
        assert eval(number["with_numbers"], {}) == pytest.approx(number["value"]) == pytest.approx(numbers[name])
        assert {"model.depth", "batch.recompute"} <= set(number["moved_by"]) and "data sheet" in number["source"]
    assert explain("time.data_axis", config, [], [], 4, timing)["number"]["used_by"] == ["time.step"]
    moved_numbers = explain("steps", config, [], ["horizon.steps=9"], 4, timing)["change"]["numbers"]
    assert {"time.clock_hours", "time.wall_hours", "price"} <= set(moved_numbers) and "time.step" not in moved_numbers
    probe = read_probe(written(tmp_path))
    shown = explain("time.step", "configs/d4_cpu.json", [], [], 2, Timing(probe, None, rank_checkpoint_bytes))
    assert shown["number"]["source"].startswith("measured speeds in ")
