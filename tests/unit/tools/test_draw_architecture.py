"""The pictures of docs/architecture.md: the committed files are what the script draws today, and show the real plan."""

import re
from xml.etree import ElementTree

import pytest

from tests.runs.job import ROOT
from tools.draw_architecture import draw_all, load

FOLDER = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pictures() -> dict[str, str]:
    return draw_all()


def test_the_committed_pictures_are_up_to_date(pictures):
    # by tools/bench.py lookup, tools/draw_curve.py, megachat sweep and report
    measured = {"lookup_english.svg", "lookup_python.svg", "demo.svg", "sweep.svg", "range_test.svg", "report.png"}
    assert {path.name for path in FOLDER.iterdir()} == set(pictures) | measured
    for name, picture in pictures.items():
        committed = (FOLDER / name).read_text(encoding="utf-8")
        assert committed == picture, f"docs/pictures/{name} is out of date: run python tools/draw_architecture.py"


def test_the_pages_show_every_picture(pictures):
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(pictures/(\w+\.svg)\)", page)) == set(pictures)


def test_texts_stay_inside_the_picture(pictures):
    for name, picture in pictures.items():
        root = ElementTree.fromstring(picture)
        _, _, width, height = map(float, root.get("viewBox").split())
        for element in root.iter(f"{SVG}text"):
            size = 9 if "head" in element.get("class") or "title" in element.get("class") else 6.6
            length = size * len(element.text)
            begin = float(element.get("x")) - (length / 2 if element.get("text-anchor") == "middle" else 0)
            assert 0 < begin and begin + length < width, f"{name}: {element.text}"
            assert 0 < float(element.get("y")) < height


@pytest.mark.parametrize("name, config", [("muon_buckets.svg", "demo"), ("muon_grid.svg", "d4_cpu")])
def test_the_partition_has_a_box_per_fragment(pictures, name, config):
    _, _, partition = load(config, ["parallel.tensor=2"] if config == "d4_cpu" else [], 4)
    boxes = [one for one in ElementTree.fromstring(pictures[name]).iter(f"{SVG}rect") if one.get("rx") == "3"]
    fragments = [(rank, owner) for index, owner in enumerate(partition.owners) for rank, _ in partition.stored(index)]
    legend = 3
    assert len(boxes) == len(fragments) + legend
    away = sum(rank != owner for rank, owner in fragments)
    assert sum(one.get("class") == "away" for one in boxes) == away + 1
