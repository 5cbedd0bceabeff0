"""tools/ holds programs only: each one answers --help, and their parts are in packages."""

import ast
import runpy
import sys

import pytest

from tests.runs.job import ROOT

PROGRAMS = sorted((ROOT / "tools").glob("*.py"))
STARTED_BY_BENCH = {"checkpoint.py", "gpu.py", "step_profile.py"}  # on each rank, or for each case


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_tool_answers_help(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    output = capsys.readouterr()
    assert end.value.code in (0, None) and not output.err
    assert output.out.startswith(f"usage: {path.name}") and "--help" in output.out


def test_only_programs_have_a_main():
    def has_main(path) -> bool:
        return "__main__" in path.read_text(encoding="utf-8")

    assert all(map(has_main, PROGRAMS))
    assert {path.name for path in (ROOT / "tools" / "bench").glob("*.py") if has_main(path)} == STARTED_BY_BENCH


def test_no_tool_imports_tests():
    for path in (ROOT / "tools").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "tests" for name in names), path
