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
    for name in PACKAGED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
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


def test_a_newcomer_in_an_empty_folder(programs, tmp_path):
    """A short demo, its model in Python and on the command line, then two ranks under `torchrun -m megachat`."""
    command, python = programs / "megachat", programs / "python"
    assert re.fullmatch(r"megachat \d+\.\d+\.\d+\n", run(command, "--version", folder=tmp_path))
    assert "bench" not in run(command, "--help", folder=tmp_path)
    assert json.loads(run(command, "doctor", "--json", folder=tmp_path))["traps"] == []
    settings = ["batch.tokens=1024", "batch.micro_rows=2", "horizon.steps=2", "evaluate.tokens=1024"]
    words = [word for setting in settings for word in ("--set", setting)]
    out = run(command, "demo", "--ranks", 1, *words, folder=tmp_path, status=1)  # two steps beat no unigram
    assert "of the unigram entropy" in out and "finished step 2" in out
    assert "import os" in run(
        command, "generate", "--checkpoint", "runs/demo", "--prompt", "import os", folder=tmp_path
    )
    results = json.loads(run(command, "evaluate", "--checkpoint", "runs/demo", "--bpb", "--json", folder=tmp_path))
    program = (
        "import megachat; model = megachat.load('runs/demo'); print(model.step, tuple(model.logits('a b').shape)[1])"
    )
    assert run(python, "-c", program, folder=tmp_path) == "2 4096\n" and 2 < results["bpb"]["bpb"] < 5
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "megachat"]
    settings = ["run.name=far", "model.aspect_ratio=128"]  # 6 heads: the demo's 3 cannot be divided by 2
    words += [word for setting in settings for word in ("--set", setting)]
    run(python, *ranks, "pretrain", "--config", "demo", "--layout", "dp=1,tp=2", *words, folder=tmp_path)
    plan = json.loads((tmp_path / "runs/far/plan.json").read_text())
    assert plan["layout"] == {"data": 1, "tensor": 2, "pipeline": 1}
    facts = json.loads(run(command, "inspect", "runs/far", "--json", "--quiet", folder=tmp_path))
    assert facts["folder"] == "runs/far/checkpoints/step_000002" and facts["form"] == "megachat"
