"""tools/ holds programs only: each one answers --help, and their parts are in packages."""

import ast
import runpy
import sys

import pytest

from tests.runs.job import ROOT

TOOLS = sorted((ROOT / "tools").glob("*.py"))
PROGRAMS = [*TOOLS, *sorted((ROOT / "launch").glob("*.py"))]
# started by bench on each rank, or for each case; certificates takes hours, so it is started by name
STARTED_BY_BENCH = {"certificates.py", "checkpoint.py", "gpu.py", "step_profile.py"}


SLOW_IMPORTS = {"torch", "deepspeed", "transformers"}  # seconds each


@pytest.fixture
def fresh_imports(monkeypatch):
    """As in a new process: megachat is imported again where a program needs it. A slow import raises ImportError."""

    def remove() -> dict:
        names = [name for name in sys.modules if name.split(".")[0] in ("megachat", "tools")]
        return {name: sys.modules.pop(name) for name in names}

    before = remove()
    for name in SLOW_IMPORTS:
        monkeypatch.setitem(sys.modules, name, None)
    yield
    remove()
    sys.modules.update(before)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_answers_help_before_slow_imports(path, fresh_imports, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    output = capsys.readouterr()
    assert end.value.code in (0, None) and not output.err
    assert output.out.startswith(f"usage: {path.name}") and "--help" in output.out


def test_only_programs_have_a_main():
    def has_main(path) -> bool:
        return "__main__" in path.read_text(encoding="utf-8")

    assert all(map(has_main, TOOLS))
    assert {path.name for path in (ROOT / "tools" / "bench").glob("*.py") if has_main(path)} == STARTED_BY_BENCH


def test_no_tool_imports_tests():
    for path in (ROOT / "tools").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "tests" for name in names), path
