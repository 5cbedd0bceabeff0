"""The table of runs, comparisons of run folders, and what may be removed, on folders as the trainer writes them."""

import fcntl
import json
import os

import pytest

from megachat.checkpoint.facts import write_facts
from megachat.commands import main as cli
from megachat.errors import UserError
from megachat.studies.comparison import compare_curves, curve_lines, load_runs
from megachat.studies.runs import config_differences, filter_runs, find_runs, load_run, run_row, state_text


def make_run(folder, *, steps=40, done=40, saved=(40,), speed=1.0, seconds=0.5, flops=1e9, **settings):
    """A run folder with a curve that learns `speed` times as fast and whose steps take `seconds`."""
    folder.mkdir(parents=True)
    config = {"run": {"name": folder.name}, "batch": {"tokens": 512}}
    for key, value in settings.items():
        section, name = key.split("__")
        config.setdefault(section, {})[name] = value
    layout = {"data": 2, "tensor": 1, "pipeline": 1}
    plan = {"steps": steps, "stop_step": steps, "tokens_per_step": 512, "layout": layout, "dims": {"sequence_len": 64}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "plan.json").write_text(json.dumps(plan))
    lines = []
    for step in range(done + 1):
        totals = {
            "step": step,
            "total_training_flops": flops * step,
            "total_training_time": seconds * max(0, step - 10),
        }
        if step % 2 == 0:
            lines.append(totals | {"val/bpb": 0.8 + 2 * (1 + speed * step / 4) ** -0.5})
        if step < done:
            lines.append(totals | {"train/loss": 5.0, "train/mfu": 40.0})
    text = "".join(json.dumps(line) + "\n" for line in lines) if done else ""
    (folder / "metrics.jsonl").write_text(text + '{"step": 41, "val/b')  # a running job has not finished this line
    for step in saved:
        checkpoint = folder / f"checkpoints/step_{step:06d}"
        checkpoint.mkdir(parents=True)
        write_facts(checkpoint, {"step": step, "files": {}, "tokenizer": {"fingerprint": "a"}})
    return folder


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "runs/base", saved=(20, 40))
    make_run(tmp_path / "runs/faster", speed=1.3, optimizer__matrix_lr=0.03)
    make_run(tmp_path / "runs/half", done=20, saved=(20,))
    make_run(tmp_path / "runs/dead", done=30, saved=(20,))
    make_run(tmp_path / "runs/fresh", done=0, saved=())
    return tmp_path / "runs"


def test_states_and_results(runs):
    with open(runs / "half/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert load_run(runs / "half").state == "running"
    records = find_runs(runs)
    assert {run.folder.name: run.state for run in records} == {
        "base": "finished",
        "dead": "crashed",
        "faster": "finished",
        "fresh": "new",
        "half": "stopped",
    }
    row = run_row(records[0])
    assert (row["step"], row["steps"], row["tokens"], row["layout"], row["mfu"]) == (40, 40, 20480, "dp=2", 40.0)
    assert row["hours"] == pytest.approx(15 / 3600) and row["bpb"] == pytest.approx(0.8 + 2 * 11**-0.5)
    assert config_differences(records) == {"optimizer.matrix_lr": [None, None, 0.03, None, None]}
    assert [run.folder.name for run in filter_runs(records, ["f*", "state=finished"])] == ["faster"]
    assert [run.folder.name for run in filter_runs(records, ["optimizer.matrix_lr=0.03"])] == ["faster"]
    with pytest.raises(UserError, match="no run has 'optimizer.lr'"):
        filter_runs(records, ["optimizer.lr=1"])


def test_damaged_files_are_noted_and_do_not_hide_the_other_runs(runs):
    (runs / "dead/plan.json").write_text("{")
    (runs / "half/metrics.jsonl").write_text("no json\n")
    notes = [note for run in find_runs(runs) for note in run.notes]
    (runs / "base/evaluations").mkdir()
    (runs / "base/evaluations/step_000040.json").write_text("{")
    row = run_row(load_run(runs / "base"))
    assert row["core"] is None and "step_000040.json is not a valid evaluation" in row["notes"][0]
    assert len(notes) == 2 and "plan.json" in notes[0] and "metrics.jsonl line 1 is damaged" in notes[1]


def test_a_faster_recipe_is_better_on_steps_and_flops_alone(runs):
    first, second = load_runs([runs / "base"]), load_runs([runs / "faster"])
    comparison = compare_curves(first, second)
    assert comparison["axes"]["steps"]["value"] == pytest.approx(1 / 1.3, rel=0.02)
    assert comparison["verdict"] == "better" and comparison["warnings"] == []
    text = "\n".join(curve_lines(comparison))
    assert "verdict on faster: better" in text and "a side has one run" in text
    with pytest.raises(UserError, match="given twice"):
        load_runs([runs / "base", runs / "base"])


def test_a_state_is_a_sentence_and_the_watch_of_a_run_that_has_ended_ends(runs, monkeypatch, capsys):
    early = make_run(runs / "early", done=20, saved=(20,))
    _change(early, "plan.json", lambda plan: plan | {"stop_step": 20})
    sentences = {
        "base": "finished: all 40 steps are done",
        "early": "stopped at step 20 of 40 by horizon.stop_step",
        "half": "stopped at step 20 of 40, which is saved: start it again with --resume auto to continue",
        "dead": "crashed at step 30 of 40: start it again with --resume auto to continue from its newest checkpoint, "
        "of step 20",
        "fresh": "no step is recorded yet",
    }
    assert {name: state_text(load_run(runs / name)) for name in sentences} == sentences

    def restarted(seconds):
        """Where the watch would wait: the run is trained to its end meanwhile."""
        _change(runs / "half", "plan.json", lambda plan: plan | {"stop_step": 20})

    monkeypatch.setattr("time.sleep", restarted)
    cli.start("watch", [str(runs / "half")], "megachat")
    assert capsys.readouterr().out.splitlines()[-1] == "half: stopped at step 20 of 40 by horizon.stop_step"
    for path in (runs / "dead").iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("still waiting"))
    cli.start("watch", [str(runs / "dead")], "megachat")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("dead: crashed at step 30 of 40: ") and "; no job holds it, no new line for " in last
    cli.start("runs", [str(runs), "--filter", "early"], "megachat")
    assert "finished (stop_step)" in capsys.readouterr().out


def test_a_run_beside_itself_and_losses_of_other_tokenizers_are_warned_about(tmp_path, capsys):
    base, other = (make_run(tmp_path / name, speed=speed) for name, speed in (("base", 1.0), ("other", 1.2)))
    assert compare_curves(load_runs([base]), load_runs([base]))["warnings"][0].startswith(f"run: {base} is on both")
    UNFAIR["tokenizer"](other)
    text = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(text.replace('"train/loss": 5.0', '"train/loss": 4.0'))
    with pytest.raises(
        UserError, match="tokenizer: .*base has a, .*other has b; .* train/loss .per token. and numbers"
    ):
        cli.start("compare", [str(base), str(other), "--metric", "train/loss"], "megachat")
    cli.start("compare", [str(base), str(other), "--json"], "megachat")
    assert "evaluation" in json.loads(capsys.readouterr().out)["core_not_compared"]


def _change(run, name, change):
    """Rewrites a JSON file of a run folder."""
    path = run / name
    path.write_text(json.dumps(change(json.loads(path.read_text()) if path.exists() else None)))


UNFAIR = {
    "tokenizer": lambda run: write_facts(
        run / "checkpoints/step_000040", {"step": 40, "files": {}, "tokenizer": {"fingerprint": "b"}}
    ),
    "validation rows": lambda run: _change(run, "plan.json", lambda plan: plan | {"evaluation_rows": 9}),
    "row length": lambda run: _change(run, "plan.json", lambda plan: plan | {"dims": {"sequence_len": 128}}),
    "packing": lambda run: _change(run, "config.json", lambda config: config | {"data": {"streams": 3}}),
    "cropped share": lambda run: (run / "metrics.jsonl").write_text(
        (run / "metrics.jsonl").read_text().replace('"train/mfu": 40.0', '"data/cropped_share": 0.4')
    ),
    "device": lambda run: _change(run, "environment.json", lambda starts: [{"device": "NVIDIA H200"}]),
    "layout": lambda run: _change(
        run, "plan.json", lambda plan: plan | {"layout": {"data": 1, "tensor": 2, "pipeline": 1}}
    ),
}


@pytest.mark.parametrize("trait", UNFAIR)
def test_each_thing_that_makes_a_comparison_unfair_is_named_and_refused_by_strict(trait, tmp_path, capsys):
    runs = [make_run(tmp_path / name) for name in ("base", "other")]
    words = [str(run) for run in runs]
    cli.start("compare", [*words, "--strict"], "megachat")
    UNFAIR[trait](runs[1])
    cli.start("compare", words, "megachat")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith(f"warning: {trait}: {runs[0]} has "), said
    with pytest.raises(UserError, match=f"--strict: {trait}: "):
        cli.start("compare", [*words, "--strict"], "megachat")


def test_the_shard_of_the_validation_rows_counts_and_not_its_place(tmp_path):
    """The same shard in another folder is no difference, another shard in the same folder is one."""
    runs = [make_run(tmp_path / name, data__folder=str(tmp_path / f"data_{name}")) for name in ("base", "other")]
    records = [[record] for record in load_runs(runs)]
    assert [text[:15] for text in compare_curves(*records)["warnings"]] == ["validation rows"]

    def stamp(run, digest):
        _change(run, "environment.json", lambda starts: [{"data": {"shards": {"shard_0": "x", "shard_1": digest}}}])

    stamp(runs[0], "a" * 64)
    stamp(runs[1], "a" * 64)
    assert compare_curves(*records)["warnings"] == []
    stamp(runs[1], "b" * 64)
    assert "shard_1 bbbbbbbbbbbb" in compare_curves(*records)["warnings"][0]
    for run, share in zip(runs, (0.254, 0.256), strict=True):  # each rank counts its rows
        text = (run / "metrics.jsonl").read_text().replace('"train/mfu": 40.0', f'"data/cropped_share": {share}')
        (run / "metrics.jsonl").write_text(text)
    assert len(compare_curves(*([record] for record in load_runs(runs)))["warnings"]) == 1


def test_the_command_lists_compares_and_cleans(runs, capsys, monkeypatch):
    make_run(runs / "long_rows", data__folder="elsewhere")
    plan = json.loads((runs / "long_rows/plan.json").read_text())
    (runs / "long_rows/plan.json").write_text(json.dumps(plan | {"dims": {"sequence_len": 128}}))

    def call(*words):
        cli.start(words[0], [str(word) for word in words[1:]], "megachat")
        return capsys.readouterr().out

    table = call("runs", runs, "--sort", "bpb").splitlines()
    assert table[1].startswith("faster") and "optimizer.matrix_lr=0.03" in table[1]
    assert [row["name"] for row in json.loads(call("runs", runs, "--filter", "fr*", "--json"))] == ["fresh"]
    with pytest.raises(UserError, match=f"^{runs} is no run folder"):
        call("compare", runs / "base", runs)
    said = call("compare", runs / "base", runs / "long_rows")
    assert "warning: row length" in said and "warning: validation rows" in said and "CORE is not compared" in said
    assert json.loads(call("compare", runs / "base", runs / "faster", "--json"))["curves"]["verdict"] == "better"
    with pytest.raises(UserError, match="--strict: validation rows"):
        call("compare", runs / "base", runs / "long_rows", "--strict")

    for name in ("base/checkpoints/step_000060.aside", "base/checkpoints/step_000041.tmp"):
        (runs / name).mkdir()
    (runs / "base/config.json.part").write_text("x" * 1000)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    said = call("runs", runs, "--clean")
    assert said.count("no terminal for an answer; --yes") == 3 and (runs / "base/checkpoints/step_000020").exists()
    with open(runs / "base/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call("runs", runs, "--clean") == "nothing to remove\n"
    call("runs", runs, "--clean", "--yes")
    assert sorted(path.name for path in (runs / "base").rglob("*") if path.is_dir()) == ["checkpoints", "step_000040"]
    assert not (runs / "base/config.json.part").exists() and (runs / "base/metrics.jsonl").exists()
    assert {run.state for run in find_runs(runs)} == {"finished", "stopped", "crashed", "new"}


def test_of_a_run_with_one_value_the_last_values_are_compared(runs, capsys):
    file = runs / "faster/metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()[:-1]]
    kept = [line for line in lines if "val/bpb" not in line or line["step"] == 40]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    cli.start("compare", [str(runs / "base"), str(runs / "faster")], "megachat")
    out = capsys.readouterr().out
    last = [0.8 + 2 * (1 + speed * 10) ** -0.5 for speed in (1.0, 1.3)]
    assert f"faster   {last[1]:.4f}\nfaster ends {last[1] - last[0]:+.4f} from base; whether that is more than" in out
    assert f"{runs}/faster has one value of val/bpb, and a curve needs 2: validate more often (evaluate.every)" in out
    cli.start("compare", [str(runs / "base"), str(runs / "faster"), "--json"], "megachat")
    curves = json.loads(capsys.readouterr().out)["curves"]
    assert curves["verdict"] == "cannot tell" and curves["last"] == [[pytest.approx(value)] for value in last]
    with pytest.raises(UserError, match="fresh: 0 values"):
        cli.start("compare", [str(runs / "fresh"), str(runs / "faster")], "megachat")


@pytest.mark.parametrize(
    "words, problem",
    [
        (["runs", "nowhere"], "nowhere is no folder"),
        (["runs", "."], "contains no run"),
        (["runs", ".", "--yes"], "--yes belongs to --clean"),
        (["compare", "a"], "1 runs were given"),
        (["compare", "a", "b"], "a does not exist"),
        (["compare", "fresh", "fresh2"], "fresh: 0 values of val/bpb are recorded, and a curve needs 2"),
    ],
)
def test_mistakes(words, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fresh", "fresh2") if "fresh" in words else ():
        make_run(tmp_path / name, done=0, saved=())
    with pytest.raises(UserError, match=problem):
        cli.start(words[0], words[1:], "megachat")


def test_the_terminal_shows_the_curve_and_the_newest_values(runs, capsys):
    pytest.importorskip("plotext", reason="plotext is not installed: pip install 'megachat[report]'")

    def call(*words):
        cli.start("watch", [*map(str, words), "--once"], "megachat")
        return capsys.readouterr().out

    shown = call(runs / "dead")
    assert shown.startswith("dead: crashed, step 30 of 40 (75.0 %), dp=2\n") and "\033" not in shown
    assert "val/bpb" in shown and "22" in shown and "train/loss 5  " in shown and len(shown.splitlines()) > 10
    assert "0 values of val/bpb so far" in call(runs / "fresh")
    with pytest.raises(UserError, match="has no train/los: it has .*train/loss"):
        call(runs / "dead", "--metric", "train/los")
    with pytest.raises(UserError, match="--every is 0"):
        call(runs / "dead", "--every", 0)
