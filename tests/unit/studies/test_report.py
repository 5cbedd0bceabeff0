"""A report is one file that needs no network; a real browser draws it where there is one."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from megachat.commands import main as cli
from megachat.errors import UserError
from tests.limits import limit_s
from tests.unit.studies.test_runs import make_run

pytest.importorskip("plotly", reason="plotly is not installed: pip install 'megachat[report]'")
from megachat.studies.report_figures import plotly_script  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of two runs, with every section but CORE."""
    folder = tmp_path_factory.mktemp("runs")
    for name, speed in (("base", 1.0), ("faster", 1.3)):
        run = make_run(folder / name, speed=speed, evaluate__prompts=["<b>"])
        plan = json.loads((run / "plan.json").read_text())
        extra = {"stages": [[0, 3], [3, 5]], "parameters": {"wte": 7, "matrices": 9, "total": 16}}
        (run / "plan.json").write_text(json.dumps(plan | extra))
        (run / "environment.json").write_text(
            json.dumps([{"commit": "abc", "packages": {"torch": "2"}, "diff": "+ a"}])
        )
        (run / "samples").mkdir()
        (run / "samples/step_000040.json").write_text(json.dumps({"<b>": "<b> bold? & more"}))
    cli.start("report", [str(folder / "faster"), "--against", str(folder / "base")], "megachat")
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
        "Steps and layout",
        "Parameters",
        "Samples",
        "Settings",
        "Environ",
    ):
        assert f"<h2>{title}" in text
    assert "&lt;b&gt; bold? &amp; more" in text and "<b> bold" not in text.split("<script")[0]
    assert "verdict on faster: better" in text and "uncommitted changes" in text and "<th>setting</th>" in text


def test_a_run_without_steps_and_a_missing_plotly_are_refused(tmp_path, monkeypatch, page):
    make_run(tmp_path / "fresh", done=0, saved=())
    with pytest.raises(UserError, match="no recorded step"):
        cli.start("report", [str(tmp_path / "fresh")], "megachat")
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(UserError, match=r"pip install 'megachat\[report\]'"):
        cli.start("report", [str(page.parent)], "megachat")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_draws_it_without_errors_or_requests(page, tmp_path):
    """Hovering over a curve shows its value, and the button for time changes the axis."""
    check = """<script>addEventListener('load', () => {
        const plots = document.querySelectorAll('.js-plotly-plot');
        Plotly.Fx.hover(plots[0], [{curveNumber: 0, pointNumber: 3}]);
        const button = plots[0].layout.updatemenus[0].buttons[1];
        Plotly.update(plots[0], ...button.args).then(() => new Promise(done => setTimeout(done, 1000))).then(() => {
            const wide = [...plots].filter(plot => plot.scrollWidth > plot.parentElement.clientWidth + 1).length;
            document.title = [plots.length, document.querySelectorAll('.hovertext').length, wide,
                plots[0].layout.xaxis.title.text, performance.getEntriesByType('resource').length].join('|');
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
