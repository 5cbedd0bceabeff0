"""All commands of README.md, docs/ and configs/README.md: parsed by the program's parser, with a plan of their config
on their ranks; the short ones executed on a small run; the others listed with the reason.
"""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest

from megachat.commands.main import COMMANDS, build_parser
from megachat.commands.options import layout_settings
from megachat.config import load_config
from megachat.planning.layouts import parse_layout
from megachat.planning.plan import resolve_plan
from tests.documented import Line, documented_lines
from tests.runs.job import CONFIG, ROOT
from tests.runs.test_api import executed

LINES = documented_lines()
# Beginning of a line, or "page: beginning" -> why no test runs it and no parser of megachat reads it
NOT_OURS = {
    "bash tests/run.sh": "runs the tests",
    "docker ": "needs docker",
    "kubectl ": "needs a cluster; tests/unit/job/test_kubernetes.py checks the manifest",
    "ssh": "needs other hosts",
    "pip ": "needs the network; tests/runs/test_wheel.py installs the wheel",
    ".venv/bin/pip ": "needs the network",
    "python3 -m venv ": "needs the network for the packages",
    "python -c ": "needs Transformer Engine",
    "lm-eval ": "needs lm-eval; tests/unit/convert/test_lm_eval.py runs it where it is installed",
    "mkdocs ": "tests/unit/test_site.py builds the site",
    "git ": "needs the network, or changes the repository",
    "source": "changes the shell",
    "export ": "changes the shell",
    "eval ": "changes the shell; tests/unit/test_cli.py tests completion",
    "SP=": "changes the shell",
    "(umask 077; openssl ": "writes into the home folder",
    "cat >sweep.txt": "writes the file that is shown",
    "docs/clusters.md: --set ": "a line of that file",
    "docs/clusters.md: END": "its end",
    "docs/coming_from_nanochat.md: ": None,  # nanochat's commands are in a block that is marked as text
    "docs/lookup.md: read = ": "a formula",
    "docs/lookup.md: x    = ": "a formula",
    "docs/lookup.md: v = ": "a formula",
    "docs/lookup.md: --set ngram": "options to add",
    "docs/training.md: step ": "lines of a log",
    "docs/performance.md: gradient norm by": "a line of a log",
    "docs/configuration.md: ": "JSON",
    "{": "JSON",
}
# Commands of megachat that are executed here, unless the line has one of the words of TOO_LONG
EXECUTED = {"generate", "inspect", "runs", "plan", "convert", "evaluate", "data", "tokenizer", "compare", "pretrain"}
TOO_LONG = {
    "climbmix": "network",
    "--import-nanochat": "needs nanochat's tokenizer; tests/unit/prepare tests it",
    "from-nanochat": "needs nanochat's checkpoint; tests/unit/convert tests it",
    "to-hf": "transformers takes seconds to load; tests/unit/convert tests it",
    "--source python": "reads all of Python's source; the demo's test does",
    "--core": "downloads CORE's tasks; tests/runs/test_evaluate.py evaluates small ones",
    "compare runs/a1": "several evaluated runs; tests/unit/evals/test_comparison.py",
    "compare_runs.py": "evaluated runs; tests/unit/evals/test_comparison.py",
    "--probe": "needs the file of a probe; tests/unit/planning/test_search.py plans with one",
    "--dry-run": "the same as `megachat plan`",
    "--ranks 8": "the small model's tables do not divide by 8",
    "configs/d4_cpu.json": "a training of minutes",
    "configs/d12.json": "a training on GPUs",
    "configs/d24_fp8.json": "a training on GPUs",
}
LAUNCHERS = ("deepspeed", "torchrun", "mpirun")
PLACEHOLDERS = {"CONFIG": "configs/d4_cpu.json"}


def line_id(line: Line) -> str:
    return f"{line.page}:{line.number}"


def begins(line: Line, texts) -> bool:
    return any(line.text.startswith(text) or f"{line.page}: {line.text}".startswith(text) for text in texts)


def parts(line: Line) -> list[list[str]]:
    """The words of each command of a line, without `&&` and what a pipe or redirection makes of the output."""
    return [shlex.split(text, comments=True) for text in re.split(r" && | \| ", line.text)]


def program(words: list[str]) -> tuple[str, list[str], int] | None:
    """(command of megachat, its arguments, ranks) of a command line; None if it starts another program."""
    words, world = list(words), 1
    if words[0] in LAUNCHERS:
        launcher, world = words.pop(0), 8
        while words[0].startswith("-") and words[0] not in ("-m", "--module"):
            option = words.pop(0)
            assert option in ("--num_accelerators", "--nproc-per-node", "-n"), option
            world = int(words.pop(0))
        words = words if launcher == "mpirun" else ["python", *words]
    if words[0] == "python":
        del words[0]
        if words[0] in ("-m", "--module"):
            del words[0]
    if words[0] == "megachat":
        return words[1], words[2:], world
    door = (
        re.search(r'^main = door\("(\w+)"\)$', (ROOT / words[0]).read_text(), re.M) if words[0][-3:] == ".py" else None
    )
    return (door[1], words[1:], world) if door else None


def check_script(words: list[str]) -> None:
    """A script of launch/ or a program without a command: its files exist, and it knows the variables and options."""
    scripts = [word for word in words if re.match(r"(launch|tools)/.*\.(sh|sbatch|py)$", word)]
    assert len(scripts) == 1, f"{words[0]} is no program of this repository: list it in NOT_OURS, with the reason"
    script = scripts[0]
    text = "".join((ROOT / path).read_text() for path in {script, "launch/common.sh"})
    before, after = words[: words.index(script)], words[words.index(script) + 1 :]
    for variable in (word.partition("=")[0] for word in before if re.match(r"[A-Z_]+=", word)):
        assert re.search(rf"\b{variable}\b", text), f"{script} does not read {variable}"
    for path in (word for word in after if word.startswith("configs/")):
        load_config(ROOT / path, [after[n + 1] for n, word in enumerate(after) if word == "--set"])


def check_command(name: str, arguments: list[str], world: int) -> None:
    """The parser accepts the arguments; the config loads with the settings and has a plan on these ranks."""
    assert name in COMMANDS, name
    options, rest = build_parser(name, name).parse_known_args(arguments)
    assert COMMANDS[name].passes_on or not rest, rest
    if rest or name == "supervise":
        check_command(
            "pretrain", [*(("--config", "demo") if name == "demo" else ()), *rest], getattr(options, "ranks", 1)
        )
    path = Path(getattr(options, "config", None) or "runs/none")
    if path.parts[0] == "runs":
        return
    layout = getattr(options, "layout", None)
    several = layout if isinstance(layout, list) else [layout] if layout else []
    for text in several:
        parse_layout(text)
    config = load_config(path, [*options.set, *(layout_settings(layout) if isinstance(layout, str) else ())])
    if name in ("plan", "pretrain"):
        resolve_plan(config, getattr(options, "world", None) or world, config.model.vocab_size or 4096)


@pytest.mark.parametrize("line", [each for each in LINES if not begins(each, NOT_OURS)], ids=line_id)
def test_a_command_of_megachat_is_accepted(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in parts(line):
        words = [PLACEHOLDERS.get(word, word) for word in words]
        if begins(Line(line.page, line.number, shlex.join(words)), NOT_OURS):
            continue
        command = program(words) if words[0] in ("megachat", "python", *LAUNCHERS) else None
        check_command(*command) if command else check_script(words)


def test_every_listed_reason_is_needed():
    texts = [line.text for line in LINES] + [f"{line.page}: {line.text}" for line in LINES]
    texts += [shlex.join(words) for line in LINES for words in parts(line)] if LINES else []
    unused = [text for text, why in NOT_OURS.items() if why and not any(each.startswith(text) for each in texts)]
    assert set(unused) <= {"mkdocs ", "git "}, "remove these"


def executable_lines() -> list[tuple[str, list[str]]]:
    """(text, words after `megachat`) of the commands that are executed: of those with the same options, the first."""
    lines = {}
    for line in LINES:
        if begins(line, NOT_OURS) or " | " in line.text or any(text in line.text for text in TOO_LONG):
            continue
        command = program(line.words) if line.words[0] in ("megachat", "python") else None
        if command and command[0] in EXECUTED:
            words = [command[0], *command[1]]
            form = words[0], words[1] if words[0] == "convert" else "", *(word for word in words if word[:2] == "--")
            lines.setdefault(form, (shlex.join(words), words))
    return list(lines.values())


@pytest.mark.slow
def test_short_commands_are_executed(shared_place, tmp_path):
    """In one process, in a folder like the repository's with a small run in place of the demo's and the other runs."""
    lines = executable_lines()
    assert {words[0] for _, words in lines} >= {"generate", "inspect", "runs", "evaluate", "convert", "data"}
    (tmp_path / "configs").mkdir()
    data = {"folder": str(shared_place.data), "tokenizer": str(shared_place.tokenizer), "streams": 4}
    (tmp_path / "configs" / "demo.json").write_text(json.dumps(CONFIG | {"data": data}))
    (tmp_path / "my_texts").mkdir()
    rng = random.Random(0)
    for number in range(20):
        words = ("".join(rng.choices("abcdefghij", k=6)) for _ in range(1500))
        (tmp_path / "my_texts" / f"{number}.txt").write_text(" ".join(words))
    code = "import megachat\nmegachat.pretrain('configs/demo.json', ['horizon.steps=4'])\n"
    for name in sorted({run for text, _ in lines for run in re.findall(r"runs/(\w+)", text)} - {"demo"}):
        code += f"import shutil; shutil.copytree('runs/demo', 'runs/{name}')\n"
    code += "from megachat.commands.main import _run\n"
    for number, (_, words) in enumerate(lines):
        short = ["--set", "data.streams=1"] if words[0] == "pretrain" else []
        code += f"print('STATUS', {number}, _run({[*words, *short]!r}), flush=True)\n"
    out = executed(tmp_path, code)
    status = {int(number): int(code) for number, code in re.findall(r"^STATUS (\d+) (\d+)$", out, re.MULTILINE)}
    assert len(status) == len(lines) and not any(status.values()), out
    shutil.rmtree(tmp_path / "runs")
