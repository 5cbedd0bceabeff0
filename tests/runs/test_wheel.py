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
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 40


def run(*line, folder: Path) -> str:
    """Runs a command line in a folder, without this repository on the path. Returns what it printed."""
    variables = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in line], cwd=folder, env=variables, capture_output=True, text=True, timeout=limit_s()
    )
    assert done.returncode == 0, done.stdout + done.stderr
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
    assert extras == {"test", "hf", "mpi", "wandb", "sweep", "report", "notebook", "completion", "docs"}
    configs = metadata.parent / "megachat" / "configs"
    assert {path.name for path in configs.iterdir()} == {path.name for path in (ROOT / "configs").glob("*.json")}


def test_a_run_far_from_the_repository(programs, tmp_path):
    """Data, tokenizer, two ranks under `torchrun -m megachat`, and a continuation."""
    command, python = programs / "megachat", programs / "python"
    assert re.fullmatch(r"megachat \d+\.\d+\.\d+\n", run(command, "--version", folder=tmp_path))
    assert "bench" not in run(command, "--help", folder=tmp_path)
    assert json.loads(run(command, "doctor", "--json", folder=tmp_path))["traps"] == []
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} {TEXT}")
    run(command, "data", "--source", "text", "--input", "texts", "--shards", 1, "--out", "data/texts", folder=tmp_path)
    run(command, "tokenizer", "--data", "data/texts", "--vocab-size", "300", "--out", "data/tokenizer", folder=tmp_path)
    settings = ["data.folder=data/texts", "data.streams=1", "data.tokenizer_threads=1", "model.sequence_len=64"]
    settings += ["batch.tokens=256", "batch.micro_rows=2", "horizon.steps=2", "evaluate.tokens=256", "run.name=far"]
    words = [word for setting in settings for word in ("--set", setting)]
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "megachat"]
    run(python, *ranks, "pretrain", "--config", "d2_cpu", "--layout", "dp=1,tp=2", *words, folder=tmp_path)
    plan = json.loads((tmp_path / "runs/far/plan.json").read_text())
    assert plan["layout"] == {"data": 1, "tensor": 2, "pipeline": 1}
    facts = json.loads(run(command, "inspect", "runs/far", "--json", "--quiet", folder=tmp_path))
    assert facts["folder"] == "runs/far/checkpoints/step_000002" and facts["form"] == "megachat"
