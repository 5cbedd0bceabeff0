"""The command `megachat`: help, mistakes, spellings, documents; that it is light; what docs/command_line.md says."""

import argparse
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megachat
from megachat import errors
from megachat.commands import main as cli
from megachat.commands.options import check_layout_ranks, layout_settings
from megachat.console import styled
from megachat.errors import UserError
from megachat.installation import config_path
from megachat.job import local_job
from megachat.prepare.download import HUB_SOURCES
from tests.limits import limit_s
from tests.runs.job import ROOT
from tests.training import SMALL_VOCAB

PAGE = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
LIGHT = """
import sys
from megachat.commands import main
for name in main.COMMANDS:
    main.build_parser(name, name)
main.help_text()
print([name for name in ("torch", "deepspeed", "numpy", "pyarrow", "pydantic", "requests") if name in sys.modules])
"""

LIGHT_MISTAKES = """
import json
import sys
from megachat.commands import main
from megachat.errors import UserError
for words in json.loads(sys.argv[1]):
    try:
        main._run(words)
    except UserError:
        continue
    print(words, "are no mistake")
print([name for name in ("torch", "deepspeed", "pyarrow", "requests") if name in sys.modules])
"""


def run(*words: str) -> int:
    """Returns the exit status of a command in this process. Raises UserError where the command would end with 2."""
    return cli._run([str(word) for word in words])


def python(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables}
    )


def test_the_help_groups_all_commands(capsys):
    assert run("--help") == run() == 0
    listed = re.findall(r"^  ([\w-]+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == 2 * list(cli.COMMANDS)
    assert {path.stem for path in (ROOT / "megachat/commands").glob("*.py")} == {
        *(name.replace("-", "_") for name in cli.COMMANDS),
        "__init__",
        "main",
        "options",
    }


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    out = capsys.readouterr().out
    assert not end.value.code and out.startswith(f"usage: megachat {name}") and "--quiet" in out
    assert not re.search(r"--\w+_\w+", out), "options have dashes"


def test_no_help_loads_a_heavy_package():
    done = python("-c", LIGHT)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_mistake_is_reported_before_a_heavy_package_is_imported():
    """Config, settings, layout, and a tokenizer or checkpoint that does not exist. A tokenizer needs numpy, 0.1 s."""
    tokenizer = f"data.tokenizer={ROOT / 'tests/fixtures/tokenizer'}"
    mistakes = [
        ["pretrain", "--config", "none.json"],
        ["pretrain", "--config", "d4_cpu", "--set", "model.depht=3"],
        ["pretrain", "--config", "d4_cpu", "--layout", "dp=3"],
        ["pretrain", "--config", "d4_cpu", "--set", "data.tokenizer=none"],
        ["convert", "to-hf", "none", "out"],
        ["report", "none"],
        ["plan", "--config", "d4_cpu", "--set", "model.depth=-1", "--gpus", "8xH100"],
        ["verify", "--config", "d4_cpu", "--layout", "tp=2", "--set", "a.b=1"],
        ["demo", "--set", "model.depht=3"],
        ["supervise", "--config", "d4_cpu", "--set", "model.depht=3"],
        ["evaluate", "--checkpoint", "none", "--sample"],
        ["evaluate", "--checkpoint", "."],
        ["generate", "--checkpoint", "none"],
        ["inspect", "none"],
        ["pretrain", "--config", "d4_cpu", "--resume", "none", "--set", tokenizer],
        ["plan", "--config", "d4_cpu", "--world", "3", "--set", tokenizer],
        ["verify", "--config", "d4_cpu", "--layout", "tp=3"],
        ["verify", "--config", "d4_cpu", "--layout", "pp=5", "--dry"],
        ["explain", "model.depht"],
        ["speedrun", "--set", "a.b=1"],
    ]
    done = python("-c", LIGHT_MISTAKES, json.dumps(mistakes))
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_version_has_the_commit(capsys, monkeypatch, tmp_path):
    """Of a clone of the test, because the checkout may get another commit meanwhile."""
    plain = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    author = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    commit = [*author, "commit", "-q", "--allow-empty", "-m", "one"]
    for words in (["init", "-q"], commit, ["rev-parse", "--short", "HEAD"]):
        done = subprocess.run(["git", *words], cwd=tmp_path, env=plain, capture_output=True, text=True, check=True)
    monkeypatch.setattr("megachat.installation.CHECKOUT", tmp_path)
    run("--version")
    version = re.search(r'version="(.*?)"', (ROOT / "setup.py").read_text())[1]
    assert capsys.readouterr().out == f"megachat {version} (commit {done.stdout.strip()})\n"
    monkeypatch.setattr("megachat.installation.CHECKOUT", None)
    run("--version")
    assert capsys.readouterr().out == f"megachat {version}\n"


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["pretrian"], "pretrian is not a command of megachat: did you mean pretrain?"),
        (["xyz"], "`megachat --help` lists the commands"),
        (["pretrain"], "the following arguments are required: --config: `megachat pretrain --help` lists"),
        (["pretrain", "--config", "d12", "--nope"], "unrecognized arguments: --nope"),
        (["pretrain", "--config", "none.json"], "none.json"),
        (["pretrain", "--config", "d12", "--json"], "--json prints the plan of --dry-run"),
        (["pretrain", "--config", "d12", "--verbose"], "--verbose shows all of a plan with --dry-run"),
        (["plan", "--config", "d12", "--gpu", "H10"], "H10 is no known GPU: the near ones are H100"),
        (["plan", "--config", "d12", "--gpu", "H100", "--memory-gb", "3"], "in place of --memory-gb: give one of the"),
        (["pretrain", "--config", "d12", "--layout", "dp=3"], "--layout dp=3 has 3 ranks, but 1 was started"),
        (["plan", "--config", "d12", "--layout", "xp=3"], "layout xp=3: 'xp=3' is not an axis"),
        (["plan", "--config", "d12", "--world", "0"], "--world is the number of ranks"),
        (["supervise", "--resume", "runs/x", "--config", "d12"], "--resume runs/x would go back there"),
        (["evaluate", "--checkpoint", "{empty}"], "nothing to evaluate: give one or more of --core, --bpb"),
        (["evaluate", "--checkpoint", "{none}", "--bpb"], "{none}"),
        (["generate", "--checkpoint", "{none}", "--prompt", "x"], "{none} is not a folder"),
        (["generate", "--checkpoint", "{empty}", "--prompt", "x"], "{empty} is not a complete checkpoint"),
        (["inspect", "{empty}"], "{empty} is not a complete checkpoint"),
        (["convert", "to-hf", "{none}", "out"], "{none} is not a folder"),
        (["convert"], "the following arguments are required: COMMAND"),
        (["compare", "{none}"], "1 runs were given"),
        (["compare", "{none}", "{empty}"], "{none}"),
        (["data", "--source", "text", "--input", "{none}", "--out", "{empty}/out"], "{none}"),
        (["data", "--source", "python", "--out", "x", "--shards", "0"], "--shards is 0: give 1 or more"),
        (["tokenizer", "--data", "{none}", "--out", "x"], "the data folder {none} does not exist"),
        (["lookup", "--data", "{none}", "--tokenizer", "{none}"], "no tokenizer at {none}"),
        (["verify", "--config", "d12"], "give a --layout"),
        (["doctor", "--set", "a=b"], "--set overrides a setting of --config"),
        (["doctor", "--hostfile", "{none}"], "the hostfile {none} cannot be read"),
        (["demo", "--ranks", "0"], "--ranks is 0"),
        (["supervise", "--ranks", "0", "--config", "d12"], "--ranks is 0"),
        (["supervise", "--restarts", "-1", "--config", "d12"], "--restarts is -1"),
        (["supervise", "--hosts", "x", "--meet", "a", "--config", "d12"], "--hosts is x: give the number of hosts"),
        (["bench", "warp"], "invalid choice: 'warp'"),
        (["partition", "--rounds", "0"], "--rounds is 0"),
        (["probe", "--config", "d4_cpu", "--ranks", "1,x"], "1,x: give numbers of ranks"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(words, fact, tmp_path):
    places = {"none": tmp_path / "none", "empty": tmp_path}
    with pytest.raises(UserError) as error:
        run(*(word.format(**places) for word in words))
    assert fact.format(**places) in str(error.value) and "\n" not in str(error.value)


# What does not exist, a folder that is no run, a file that is no JSON: by each command.
NOT_THERE = [
    (["demo", "--set", "horizon.steps"], "horizon.steps"),
    (["doctor", "--config", "{none}"], "{none}"),
    (["doctor", "--config", "{file}"], "{file}"),
    (["data", "--source", "parquet", "--input", "{file}", "--out", "{empty}/out"], "{file}"),
    (["tokenizer", "--data", "{empty}", "--out", "{empty}/out"], "{empty}"),
    (["tokenizer", "--import-nanochat", "{none}", "--out", "{empty}/out"], "{none}"),
    (["lookup", "--data", "{none}", "--tokenizer", "{file}"], "{file}"),
    (["plan", "--config", "{none}"], "{none}"),
    (["plan", "--config", "{file}"], "{file}"),
    (["explain", "--config", "{none}", "steps"], "{none}"),
    (["pretrain", "--config", "{file}"], "{file}"),
    (["pretrain", "--config", "d2_cpu", "--set", "data.tokenizer={none}"], "{none}"),
    (["supervise", "--config", "d12", "--hosts", "2"], "--meet"),
    (["evaluate", "--checkpoint", "{empty}", "--bpb"], "{empty}"),
    (["evaluate", "--checkpoint", "{file}", "--core"], "{file}"),
    (["runs", "{none}"], "{none}"),
    (["report", "{empty}"], ""),  # the run, or plotly
    (["watch", "{empty}"], ""),  # the run, or plotly
    (["ladder", "--config", "{none}", "--depths", "2", "--set", "run.seed=1"], "{none}"),
    (["sweep", "--config", "demo", "--space", "{none}"], "{none}"),
    (["compare", "{empty}", "{file}"], "{empty}"),
    (["record", "{empty}"], "{empty}"),
    (["speedrun", "--data", "{none}"], "{none}"),
    (["replay", "{none}"], "{none} is no capsule"),
    (["unigram", "--data", "{none}", "--tokenizer", "{none}"], "{none}"),
    (["generate", "--checkpoint", "{file}", "--prompt", "x"], "{file}"),
    (["inspect", "{file}"], "{file}"),
    (["inspect", "{none}", "--json"], "{none}"),
    (["convert", "verify", "{none}"], "{none}"),
    (["convert", "diff", "{empty}", "{none}"], "{empty}"),
    (["convert", "from-nanochat", "{empty}", "{empty}/out"], "{empty}"),
    (["verify", "--config", "{none}", "--layout", "tp=2"], "{none}"),
    (["bench", "core", "--checkpoint", "{none}", "--bundle", "{none}"], "{none}"),
    (["probe", "--config", "{none}"], "{none}"),
    (["probe", "--config", "d4_cpu", "--out", "{file}/probe.json"], "{file}"),
    (["fp8-check", "--config", "{none}"], "{none}"),
    (["fp8-check", "--config", "d4_cpu", "--set", "data.tokenizer={none}", "--steps", "0"], "{none}"),
    (["partition", "--json", "{file}/out.json"], "{file}"),
    (["completion"], "SHELL"),
]


@pytest.mark.parametrize(("words", "fact"), NOT_THERE, ids=lambda value: " ".join(value) if type(value) is list else "")
def test_what_is_not_there_is_one_sentence(words, fact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("{no json")
    places = {"none": tmp_path / "none", "empty": tmp_path, "file": tmp_path / "file"}
    with pytest.raises(UserError) as error:
        run(*(word.format(**places) for word in words))
    assert fact.format(**places) in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is written"


def test_no_command_takes_a_wrong_option():
    assert {words[0] for words, _ in NOT_THERE} == set(cli.COMMANDS)
    needed = {"supervise": ["--config", "d12"], "convert": ["verify", "x"], "bench": ["loader"], "completion": ["bash"]}
    for name in cli.COMMANDS:
        with pytest.raises(UserError, match="--wrong-option|arguments are required") as error:
            run(name, *needed.get(name, []), "--wrong-option")
        assert "\n" not in str(error.value) and "--help` lists the options" in str(error.value)


def test_a_mistake_ends_the_process_with_2():
    done = python("-m", "megachat", "--local_rank=0", "pretrain", "--nope")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and line.startswith("error: the following arguments are required")


def test_a_command_that_needs_a_clone_says_so(monkeypatch):
    monkeypatch.setattr("megachat.commands.options.CHECKOUT", None)
    monkeypatch.setattr(cli, "CHECKOUT", None)
    monkeypatch.setattr("megachat.commands.bench.CHECKOUT", None)
    for name in ("bench", "partition"):
        assert f"  {name}" not in cli.help_text()
        with pytest.raises(UserError, match="run it in a clone"):
            run(name)


def test_old_spellings_are_accepted():
    def parse(name: str, *words: str) -> dict:
        return vars(cli.build_parser(name, name).parse_args(words))

    assert parse("doctor", "--master_port=4", "--ssh_port", "5") == parse(
        "doctor", "--master-port", "4", "--ssh-port=5"
    )
    assert parse("evaluate", "--checkpoint", "x", "--local_rank=3", "--max_per_task", "2")["max_per_task"] == 2
    assert parse("generate", "--checkpoint", "x", "--prompt", "--top_k is no option")["prompt"] == [
        "--top_k is no option"
    ]
    with pytest.raises(UserError, match="--no_such_option"):
        parse("doctor", "--no_such_option")


def test_a_layout_is_settings_and_a_number_of_ranks(monkeypatch, capsys):
    assert layout_settings("tp=2,pp=3") == ["parallel.tensor=2", "parallel.pipeline=3"] and layout_settings(None) == []
    check_layout_ranks("tp=2")  # the data axis is what remains
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_layout_ranks("dp=2,tp=2")
    with pytest.raises(UserError, match="has 2 ranks, but 4 were started"):
        check_layout_ranks("dp=2")


def test_a_plan_as_text_and_as_a_document(capsys):
    plan = ["plan", "--config", "d2_cpu", "--set", f"model.vocab_size={SMALL_VOCAB}", "--layout", "dp=2,tp=2"]
    assert run(*plan[:-1], "pp=2") == 0 and "layout = data 1 x tensor 1 x pipeline 2" in capsys.readouterr().out
    assert run(*plan) == 0 and "layout = data 2 x tensor 2 x pipeline 1" in capsys.readouterr().out
    assert run(*plan, "--json", "--quiet") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["layout"] == {"data": 2, "tensor": 2, "pipeline": 1}
    assert document["config"]["model"]["depth"] == 2 and document["memory"][0]["weights"] > 0
    assert {line["optimizer"] for line in document["parameters"]} == {"muon", "adamw"}
    assert run(*plan, "--quiet") == 0 and capsys.readouterr().out == ""


def test_megachats_configs_have_names(tmp_path, monkeypatch):
    assert config_path("d24") == config_path("d24.json") == str(ROOT / "configs" / "d24.json")
    monkeypatch.chdir(tmp_path)
    assert config_path("configs/d24.json") == str(ROOT / "configs" / "d24.json")
    assert config_path("other/d24.json") == "other/d24.json" and config_path("d99") == "d99"
    assert megachat.resolve("d24", 8).dims.depth == 24
    (tmp_path / "d24").write_text("{}")
    assert config_path("d24") == "d24"


def test_the_demo_starts_ranks_and_compares(tmp_path, monkeypatch):
    """The launcher and what comes before and after it, with stand-ins for the work."""
    from megachat.commands import demo
    from megachat.programs import demo_size

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_size, "passes_per_second", lambda config, vocab_size: 1000.0)
    lines, status = [], 0

    class Process:
        def __init__(self, line, env):
            assert env["MEGACHAT_SECRET"] == "x" * 32 and env["DS_ACCELERATOR"] == "cpu"
            lines.append(line)

        def wait(self) -> int:
            return status

    begun = cli.start
    monkeypatch.setattr(cli, "start", lambda name, words, prog: lines.append([name, *words]) or name == "unigram")
    monkeypatch.setattr(local_job.subprocess, "Popen", Process)
    monkeypatch.setattr(local_job.shutil, "which", lambda name: None)
    monkeypatch.setenv("MASTER_PORT", "4321")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("MEGACHAT_SECRET", "x" * 32)
    assert begun("demo", ["--quiet", "--no-color", "--set", "horizon.steps=20"], "demo") == 1
    data, tokenizer, ranks, unigram = lines
    assert data == ["data", "--source", "python", "--out", "data/python"] and tokenizer[0] == "tokenizer"
    assert unigram[0] == "unigram" and unigram[-4:] == ["--run", "runs/demo", "--quiet", "--no-color"]
    config = str(ROOT / "configs" / "demo.json")
    assert ranks[ranks.index("--num_accelerators") :] == (
        ["--num_accelerators", "2", "--master_port", "4321", "--module", "megachat", "pretrain", "--config", config]
        + ["--resume", "auto", "--quiet", "--no-color", "--set", "horizon.steps=20"]
    )
    demo.DEMO_TOKENIZER.mkdir(parents=True)
    (demo.DEMO_TOKENIZER / "tokenizer.json").touch()
    lines.clear()
    assert begun("demo", ["--set", "run.name=mine", "--set", "data.folder=texts"], "demo") == 1
    assert lines[-1] == ["unigram", "--data", "texts", "--tokenizer", "data/tokenizer", "--run", "runs/mine"]
    words = lines[1][lines[1].index("pretrain") :]
    assert words.index("batch.tokens=4096") < words.index("run.name=mine"), "a slow machine; the user's come after"
    lines.clear()
    assert begun("demo", ["--dry-run"], "demo") == 0 and len(lines) == 2, "there is no run to compare"
    lines.clear()
    status = -15
    assert begun("demo", ["--ranks", "3"], "demo") == 143
    assert len(lines) == 2 and "3" in lines[1], "the tokenizer is there"


@pytest.mark.parametrize(
    "variables, words, colored",
    [({}, [], True), ({"NO_COLOR": ""}, [], True), ({"NO_COLOR": "1"}, [], False), ({"TERM": "dumb"}, [], False)]
    + [({}, ["--no-color"], False)],
)
def test_colors_are_for_terminals_that_want_them(variables, words, colored, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    screen, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as file, monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(sys, "stderr", file)
        cli.main(["plan", "--bogus", *words])
    shown = os.read(screen, 4096)
    os.close(screen)
    assert ended.value.code == 2 and (b"\x1b[31merror:\x1b[0m the" if colored else b"error: the") in shown
    assert (b"\x1b" in shown) is colored
    assert "\x1b" not in styled("text", "bold"), "standard output is no terminal"


def test_hub_sources_are_those_of_the_downloader():
    from megachat.commands.data import HUBS

    assert HUBS == tuple(HUB_SOURCES)


def test_without_argcomplete_the_command_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(UserError, match="pip install 'megachat.completion.'"):
        run("completion", "bash")
    cli._answer_completion()  # a shell that asks gets no answer


def program_in(folder: Path) -> dict[str, str]:
    """Makes a program named megachat of this checkout; returns variables with which shells find it."""
    pytest.importorskip("argcomplete")
    (folder / "megachat").write_text(f'#!/bin/sh\nexec {sys.executable} -m megachat "$@"\n')
    (folder / "megachat").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(folder)}


def needs(shell: str):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"no {shell} here: apt-get install {shell}")


BASH = """eval "$(megachat completion bash)"; complete -p megachat >/dev/null || exit 1
ask() { COMP_LINE="$*" COMP_POINT=${#COMP_LINE} COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_TYPE=9
_python_argcomplete megachat; echo ${COMPREPLY[@]}; }
ask megachat pre; ask megachat evaluate --max"""
FISH = """megachat completion fish | source; complete -C "megachat pre"; complete -C "megachat evaluate --max" """


@pytest.mark.parametrize(
    ("shell", "code"),
    [pytest.param("bash", BASH, marks=needs("bash")), pytest.param("fish", FISH, marks=needs("fish"))],
)
def test_a_shell_completes_commands_and_options(shell, code, tmp_path):
    done = subprocess.run([shell, "-c", code], env=program_in(tmp_path), capture_output=True, text=True)
    assert [line.split()[0] for line in done.stdout.split("\n") if line] == ["pretrain", "--max-per-task"], done.stderr


@needs("zsh")
def test_zsh_completes_commands_and_options(tmp_path):
    """It completes on a terminal only."""
    controller, terminal = pty.openpty()
    zsh = subprocess.Popen(
        ["zsh", "-f", "-i"], env=program_in(tmp_path), stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown, deadline = b"", time.monotonic() + limit_s()

    def type_until(text: bytes, answer: bytes) -> None:
        nonlocal shown
        shown = b""
        os.write(controller, text)
        while answer not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([controller], [], [], 0.2)[0]:
                shown += os.read(controller, 4096)

    try:
        start = b'autoload -Uz compinit; compinit -u; eval "$(megachat completion zsh)"; echo rea""dy\n'
        type_until(start, b"ready")
        type_until(b"megachat pre\t", b"megachat pretrain")
        type_until(b"\x15megachat evaluate --max\t", b"--max-per-task")
    finally:
        zsh.kill()
        zsh.wait()
        os.close(controller)


def test_the_page_lists_commands_options_and_statuses():
    rows = dict(re.findall(r"^\| `megachat ([\w-]+)` \| (.*?) \|", PAGE, re.MULTILINE))
    assert rows == {name: command.about for name, command in cli.COMMANDS.items()}
    for path in re.findall(r"`((?:launch|tools)/\w+\.(?:py|sh))", PAGE):
        assert (ROOT / path).exists(), path
    parsers = {name: cli.build_parser(name, name) for name in cli.COMMANDS}
    for option, listed in re.findall(r"^\| `(--[\w-]+).*?` \| (.*?) \|", PAGE, re.MULTILINE):
        having = [name for name, parser in parsers.items() if option in parser._option_string_actions]
        assert having == (list(cli.COMMANDS) if listed == "all" else listed.split(", ")), option
    statuses = {int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    values = {value for name, value in vars(errors).items() if name.endswith("_STATUS")}
    assert statuses == {0, 1, 130, *values}


def test_every_option_has_help():
    for name in cli.COMMANDS:
        for action in cli.build_parser(name, name)._actions:
            shown = action.help or isinstance(action, argparse._SubParsersAction) or action.metavar == "CHECKPOINT"
            assert shown, f"{name} {action.dest}"
