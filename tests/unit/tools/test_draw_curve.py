"""tools/draw_curve.py draws what metrics.jsonl has; the committed picture of the demo has the numbers of its table."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.draw_curve import draw_curve, main

ROOT = Path(__file__).resolve().parents[3]
SVG = "{http://www.w3.org/2000/svg}"


def labels(picture: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def points(picture: str) -> list[list[tuple[float, float]]]:
    """The lines of both panels, as places in the picture."""
    lines = [element.get("points") for element in ElementTree.fromstring(picture).iter(f"{SVG}polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_lines_go_through_the_values():
    losses, bits = [(0, 4.0), (5, 3.0), (10, 2.0)], [(5, 2.0), (10, 1.0)]
    picture = draw_curve("runs/x", losses, bits, 3.0)
    left, right = points(picture)
    (x0, y0), (x1, y1), (x2, y2) = left
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y0 < y2
    assert len(right) == 2 and right[0][1] < right[1][1]
    assert {"2.000", "1.000", "token frequencies alone: 3.000", "10", "4.00", "2.00"} <= set(labels(picture))


def test_the_program_reads_a_run(tmp_path, monkeypatch, capsys):
    lines = [{"step": 0, "train/loss": 3.0}, {"step": 1, "train/loss": 2.5}, {"step": 2, "val/bpb": 1.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("sys.argv", ["draw_curve.py", str(tmp_path), "--out", str(tmp_path / "curve.svg")])
    main()
    assert "1.250" in labels((tmp_path / "curve.svg").read_text())
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2 and "no validation yet" in capsys.readouterr().err


def test_the_pages_have_the_numbers_of_the_picture():
    shown = labels((ROOT / "docs" / "pictures" / "demo.svg").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| after \d+ steps \| ([\d.]+) \|", page, re.M)
    assert len(rows) == 4 and set(rows) <= set(shown)
    (entropy,) = re.findall(r"^\| token frequencies alone .*?\| ([\d.]+) \|", page, re.M)
    assert f"token frequencies alone: {entropy}" in shown
