"""The wheel, installed into an environment without the repository: the command, its configs and a short run."""

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.limits import limit_s
from tests.runs.forked import environment, free_port
from tests.runs.job import ROOT

PACKAGED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "configs", "megachat")


def run(*line, folder: Path, status: int = 0) -> str:
    """Runs a command line in a folder, without this repository on the path. Returns what it printed."""
    variables = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in line], cwd=folder, env=variables, capture_output=True, text=True, timeout=limit_s()
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """bin/ of a new environment with the wheel, which shares all other packages with this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside its source
    source.mkdir()
    caches = shutil.ignore_patterns("__pycache__")  # other processes write into them now
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=caches)
        else:
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, folder=folder)
    venv.create(folder / "env", with_pip=False)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "shared.pth").write_text("\n".join(shared) + "\n")
    (wheel,) = folder.glob("megachat-*.whl")
    options = ("--no-deps", "--no-index", "--ignore-installed")
    run(*pip, "--python", folder / "env/bin/python", "install", *options, wheel, folder=folder)
    return folder / "env" / "bin"


def test_the_wheel_has_what_a_package_index_shows(programs):
    (metadata,) = programs.parent.glob("lib/python*/site-packages/megachat-*.dist-info")
    text = (metadata / "METADATA").read_text()
    assert re.search("^License: Apache-2.0", text, re.MULTILINE) and (metadata / "licenses" / "LICENSE").exists()
    assert "Description-Content-Type: text/markdown" in text and "# megachat" in text
    extras = set(re.findall("^Provides-Extra: (.*)", text, re.MULTILINE))
    assert extras == {
        "test",
        "hf",
        "mpi",
        "wandb",
        "trackers",
        "sweep",
        "postgresql",
        "report",
        "notebook",
        "completion",
        "docs",
    }
    configs = metadata.parent / "megachat" / "configs"
    assert {path.name for path in configs.iterdir()} == {path.name for path in (ROOT / "configs").glob("*.json")}


# The commands that a newcomer types after the demo, by the console script's function in one process.
LOOKS = """
import contextlib, io, json, megachat
from megachat.commands import main

def printed(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main._run(list(words)) == 0
    return out.getvalue()

assert "import os" in printed("generate", "--checkpoint", "runs/demo", "--prompt", "import os")
bpb = json.loads(printed("evaluate", "--checkpoint", "runs/demo", "--bpb", "--json"))["bpb"]["bpb"]
traps = json.loads(printed("doctor", "--json"))["traps"]
facts = json.loads(printed("inspect", "runs/far", "--json", "--quiet"))
model = megachat.load("runs/demo")
print(json.dumps([bpb, traps, facts["folder"], facts["form"], model.step, model.logits("a b").shape[1]]))
"""


def test_a_newcomer_in_an_empty_folder(programs, tmp_path):
    """A short demo, two ranks under `torchrun -m megachat`, then the checkpoints on the command line and in Python."""
    command, python = programs / "megachat", programs / "python"
    assert re.fullmatch(r"megachat \d+\.\d+\.\d+\n", run(command, "--version", folder=tmp_path))
    assert "bench" not in run(command, "--help", folder=tmp_path)
    settings = ["batch.tokens=1024", "batch.micro_rows=2", "horizon.steps=2", "evaluate.tokens=1024"]
    words = [word for setting in settings for word in ("--set", setting)]
    out = run(command, "demo", "--ranks", 1, *words, folder=tmp_path, status=1)  # two steps beat no unigram
    assert "of the unigram entropy" in out and "finished step 2" in out
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "megachat"]
    settings = ["run.name=far", "model.aspect_ratio=128"]  # 6 heads: the demo's 3 cannot be divided by 2
    words += [word for setting in settings for word in ("--set", setting)]
    run(python, *ranks, "pretrain", "--config", "demo", "--layout", "dp=1,tp=2", *words, folder=tmp_path)
    plan = json.loads((tmp_path / "runs/far/plan.json").read_text())
    assert plan["layout"] == {"data": 1, "tensor": 2, "pipeline": 1}
    bpb, *others = json.loads(run(python, "-c", LOOKS, folder=tmp_path))
    assert 2 < bpb < 5 and others == [[], "runs/far/checkpoints/step_000002", "megachat", 2, 4096]
