"""Checks of the Dockerfile without docker: its files exist, its commands are valid, no package of the image is
replaced.
"""

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(
        r"\\\n\s*", "", "\n".join(line for line in TEXT.splitlines() if line.strip() and not line.startswith("#"))
    ).splitlines()
]
IGNORED = (ROOT / ".dockerignore").read_text().split()


def bodies(kind: str) -> list[str]:
    return [body for name, body in INSTRUCTIONS if name == kind]


def is_ignored(path: str) -> bool:
    """Matches as docker does: patterns start at the folder of the Dockerfile, and ** is any number of folders."""
    parts = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    return any(
        fnmatch.fnmatch(part, pattern) or fnmatch.fnmatch(part, pattern.removeprefix("**/")) * pattern.startswith("**/")
        for part in parts
        for pattern in IGNORED
    )


def test_it_is_a_dockerfile_on_a_pinned_image():
    assert INSTRUCTIONS[0][0] == "FROM" and {name for name, _ in INSTRUCTIONS} <= {
        "FROM",
        "SHELL",
        "RUN",
        "ENV",
        "WORKDIR",
        "COPY",
        "CMD",
    }
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", bodies("FROM")[0])
    assert "pipefail" in bodies("SHELL")[0]
    for body in bodies("RUN"):
        done = subprocess.run(["bash", "-n", "-c", body], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "apt-get install" not in body or (
            "--no-install-recommends" in body and body.endswith("rm -rf /var/lib/apt/lists/*")
        )


def test_what_it_copies_is_there_and_is_not_ignored():
    for body in bodies("COPY"):
        *sources, _ = body.split()
        for source in sources:
            assert (ROOT / source).exists() and not is_ignored(source)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    paths = tracked.stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.glob("megachat/**/*.py")]
    assert [path for path in paths if is_ignored(path)] == []
    assert all(
        is_ignored(path)
        for path in (
            ".venv/bin/python",
            "runs/d24/metrics.jsonl",
            "data/climbmix/a.parquet",
            "megachat/__pycache__/x.pyc",
        )
    )


def test_it_installs_beside_the_image_and_tests_last():
    (install,) = (body for body in bodies("RUN") if "pip install" in body)
    extras = re.search(r"'\.\[(.*?)\]'", install)[1].split(",")
    setup = (ROOT / "setup.py").read_text()
    assert "--constraint /opt/image-packages.txt" in install and all(f'"{extra}": [' in setup for extra in extras)
    assert (
        install.index("pip list")
        < install.index("pip install")
        < install.rindex("pip list")
        < install.index("assert before <= after")
    )
    assert "pytest" in bodies("RUN")[-1] and bodies("CMD") == ['["python", "tools/doctor.py"]']
    assert [name for name, _ in INSTRUCTIONS][-3:] == ["COPY", "RUN", "CMD"]


def test_the_check_that_nothing_was_replaced(tmp_path):
    (check,) = re.findall(r"python -c '(.*?)'", TEXT)
    check = check.replace("/opt", str(tmp_path))
    (tmp_path / "image-packages.txt").write_text("torch==2.13.0a0\nnumpy==2.1.0\n")
    for packages, status in (
        ("numpy==2.1.0\npytest==8.0\ntorch==2.13.0a0\n", 0),
        ("numpy==2.2.0\ntorch==2.13.0a0\n", 1),
    ):
        (tmp_path / "all-packages.txt").write_text(packages)
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
        assert done.returncode == status and (not status or "numpy==2.1.0" in done.stderr)
