"""A report is one file that needs no network; a real browser draws it where there is one."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest

from megachat.commands import main as cli
from megachat.config import Config
from megachat.errors import UserError
from megachat.files import write_json
from megachat.planning.explain import plan_values
from megachat.planning.plan import resolve_plan
from megachat.settings import LogConfig
from megachat.studies.predicted import predict, try_predict, wall_clock
from megachat.studies.report import report_html, report_line
from megachat.studies.runs import load_run
from tests.limits import limit_s
from tests.unit.planning.test_probe import document
from tests.unit.studies.test_runs import make_run

pytest.importorskip("plotly", reason="plotly is not installed: pip install 'megachat[report]'")
from megachat.studies.report_figures import check_report, plotly_script, thinned  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


CONFIG = {
    "model": {"depth": 4, "aspect_ratio": 64, "head_size": 64, "sequence_len": 64},
    "batch": {"tokens": 512, "micro_rows": 1},
    "horizon": {"steps": 40},
    "parallel": {"tensor": 2, "pipeline": 2},
    "evaluate": {"prompts": ("<b>",)},
}


def planned_run(folder, **how):
    """A run of four ranks whose plan is real, with time stamps: a step takes 0.5 s, a validation 0.1 s."""
    run = make_run(folder, **how)
    write_json(run / "config.json", CONFIG | {"run": {"name": folder.name}})
    write_json(run / "plan.json", plan_values(resolve_plan(Config.model_validate(CONFIG), 4, 512)))
    lines, now = [], 1000.0
    for text in (run / "metrics.jsonl").read_text().splitlines()[:-1]:
        line = json.loads(text)
        now += 0.1 if "val/bpb" in line else 0.5
        step = {"train/dt": 0.5, "train/peak_memory_bytes": 3e9} if "train/loss" in line else {}
        lines.append(json.dumps(line | step | {"time": now}))
    slow = {"ranks/slowest": 3, "ranks/slowest_host": "node7", "ranks/slowest_ratio": 1.4}
    lines.append(json.dumps({"step": 40, "ranks/work_s_median": 0.4, "ranks/work_s_p95": 0.5} | slow | {"time": now}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    start = {"commit": "abc", "packages": {"torch": "2", "wandb": None}, "diff": "+ a", "time": 999.0, "cuda": None}
    start["tokenizer"] = {"fingerprint": "f" * 64, "vocab_size": 512, "origin": {"max_chars": 9000}}
    start["data"] = {"folder": "data/x", "source": "text", "shards": {"shard_0": "1" * 64, "shard_1": "2" * 64}}
    start["launch"] = {"world_size": 4, "local_size": 2, "launcher": "torchrun", "attempt": 1}
    write_json(run / "environment.json", [start | {"device": "a CPU", "compute_dtype": "torch.bfloat16"}])
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of two runs, with every section but CORE."""
    folder = tmp_path_factory.mktemp("runs")
    for name, speed in (("base", 1.0), ("faster", 1.3)):
        run = planned_run(folder / name, speed=speed)
        (run / "samples").mkdir()
        for step in (20, 40):
            (run / f"samples/step_{step:06d}.json").write_text(json.dumps({"<b>": f"<b> bold {step}? & more"}))
    probe = document()
    write_json(folder / "probe.json", probe | {"sets": [*probe["sets"], probe["sets"][-1] | {"ranks": 4}]})
    words = [str(folder / "faster"), "--against", str(folder / "base")]
    cli.start("report", [*words, "--probe", str(folder / "probe.json"), "--price", "2"], "megachat")
    return folder / "faster/report.html"


def test_the_page_is_complete_and_refers_to_nothing_outside(page):
    text = page.read_text()
    assert len(text) < 6e6 and text.count(plotly_script()) == 1
    text = text.replace(plotly_script(), "")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", text)
    for title in (
        "Summary",
        "Comparison",
        "Curves",
        "Predicted and measured",
        "Time",
        "Layout and parameters",
        "Samples",
        "Settings",
        "Environ",
    ):
        assert f"<h2>{title}" in text
    assert "&lt;b&gt; bold 40? &amp; more" in text and "<summary>step 000020</summary>" in text
    assert "<b> bold" not in text.split("<script")[0]
    for row in ("time per step", "wall clock", "price at 2 per machine-hour", "memory of rank 0"):
        assert f"<td>{row}</td>" in text
    assert "Work of the ranks per step" in text and '[3,"node7",1.4]' in text
    assert "A step by part, predicted, not measured" in text and "rank %{y}, layer %{x}" in text
    for value in (
        "1970-01-01 00:16:39 UTC",
        "512 tokens, fingerprint ffffffffffff, trained on up to 9,000 characters",
        "data/x, from text; 1 train shard and shard_1 for validation",
        "4 ranks on hosts of 2, started by torchrun, restarted 1 time",
        "torch 2",
        "finished: all 40 steps are done",
    ):
        assert f"<td>{value}</td>" in text
    assert "None" not in text.split("<h2>Environment")[1] and "lower is better" in text
    assert "verdict on faster: better" in text and "uncommitted changes" in text and "<th>setting</th>" in text


def test_predicted_beside_measured(page):
    """The planner's numbers for the run's config and layout, and the seconds of its lines by what they went to."""
    run = load_run(page.parent)
    predicted = predict(run, page.parent.parent / "probe.json")
    assert len(predicted.memory) == 2 and predicted.time.step.total > 0 and predicted.units == 1
    owners = [line for line in predicted.owners if line.owner is not None]
    assert {line.owner for line in owners} == {0, 1, 2, 3}, "each rank of both stages orthogonalizes"
    assert try_predict(run)[0].time is None, "a CPU without a probe"
    start = [{"time": 999.0}]
    assert wall_clock(run.lines, start) == pytest.approx({"training steps": 20.0, "validation": 2.0, "rest": 1.1})
    later = [line | {"time": line["time"] + 500 * (line["step"] >= 30)} for line in run.lines]
    assert sum(wall_clock(later, start).values()) == pytest.approx(523.1), "one job"
    between = [*start, {"time": later[-1]["time"] - 0.5 * 10 - 0.1 * 6 - 0.2}]
    assert sum(wall_clock(later, between).values()) == pytest.approx(23.1, abs=0.6), "the time between two jobs"
    old, why = try_predict(load_run(make_run(page.parent.parent / "old", model__depth="x")))
    assert old is None and why.startswith("no prediction: ") and "model.depth" in why


def test_the_report_of_a_long_run_stays_small(page):
    """30,000 steps; of a curve its first and its last point are there."""
    run = load_run(page.parent)
    (first,) = [line for line in run.lines if line["step"] == 0 and "train/loss" in line]
    lines = [first | {"step": step, "train/loss": 3 + 1 / (1 + step) ** 0.5} for step in range(30_000)]
    assert len(report_html(dataclasses.replace(run, lines=lines))) < 6e6
    assert [line["step"] for line in thinned(lines, 5)] == [0, 7500, 15000, 22499, 29999]
    assert thinned(lines[:5], 5) == lines[:5]


def test_what_prevents_a_report_is_one_line_at_the_end_of_a_job(tmp_path):
    run = make_run(tmp_path / "fresh", done=0, saved=())
    line = report_line(run)
    assert line.startswith(f"{run}/report.html is not written (UserError: ") and "\n" not in line


def test_a_job_with_log_report_needs_plotly_before_it_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_report(LogConfig())
    with pytest.raises(UserError, match=r"log.report is true, but plotly .*pip install 'megachat\[report\]', or set"):
        check_report(LogConfig(report=True))


def test_a_run_without_steps_and_a_missing_plotly_are_refused(tmp_path, monkeypatch, page):
    make_run(tmp_path / "fresh", done=0, saved=())
    with pytest.raises(UserError, match="no recorded step"):
        cli.start("report", [str(tmp_path / "fresh")], "megachat")
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(UserError, match=r"pip install 'megachat\[report\]'"):
        cli.start("report", [str(page.parent)], "megachat")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_draws_it_without_errors_or_requests(page, tmp_path):
    """Hovering over a curve shows its value, the button for time changes the axis, nothing is wider than a window of
    1280 pixels or a phone's 400, where no label lies on another."""
    check = """<script>addEventListener('load', () => {
        const plots = document.querySelectorAll('.js-plotly-plot');
        Plotly.Fx.hover(plots[0], [{curveNumber: 0, pointNumber: 3}]);
        const button = plots[0].layout.updatemenus[0].buttons[1];
        Plotly.update(plots[0], ...button.args).then(() => new Promise(done => setTimeout(done, 1000))).then(() => {
            const overflows = () => [...plots].filter(
                plot => plot.scrollWidth > plot.parentElement.clientWidth + 1).length;
            const hovered = document.querySelectorAll('.hovertext').length, wide = overflows();
            document.body.style.width = '376px';
            return Promise.all([...plots].map(Plotly.Plots.resize)).then(() => {
                const overlaps = [...plots].map(plot => {
                    const boxes = [...plot.querySelectorAll('.gtitle, .xtitle, .ytitle, .legendtext, .xtick text')]
                        .map(text => text.getBoundingClientRect()).filter(box => box.width);
                    return boxes.filter((one, number) => boxes.slice(number + 1).some(two =>
                        one.left < two.right - 1 && two.left < one.right - 1 &&
                        one.top < two.bottom - 2 && two.top < one.bottom - 2)).length;
                }).reduce((sum, count) => sum + count, 0);
                document.title = [plots.length, hovered, wide + overflows() + overlaps,
                    plots[0].layout.xaxis.title.text, performance.getEntriesByType('resource').length].join('|');
            });
        });
    })</script>"""
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", f"{check}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, copy.as_uri()], capture_output=True, text=True, timeout=limit_s())
    plots, hovered, wide, axis, requests = re.search("<title>(.*?)</title>", done.stdout)[1].split("|")
    assert (int(plots) >= 4, int(hovered) >= 1, wide, axis, requests) == (True, True, "0", "training time (s)", "0")
    assert "CONSOLE" not in done.stderr, done.stderr
