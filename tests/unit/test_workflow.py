"""The workflow for GitHub Actions says what README, setup.py and mkdocs.yml say."""

import re
import subprocess

import pytest
import yaml

from tests.runs.job import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
JOBS = WORKFLOW["jobs"]


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_the_tests_are_those_of_the_readme_on_every_python():
    (command,) = commands("tests")
    assert f"\n    {command} " in (ROOT / "README.md").read_text(encoding="utf-8")
    pythons = JOBS["tests"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    assert f'python_requires=">={pythons[0]}"' in SETUP and 'target-version = "py310"' in (
        ROOT / "pyproject.toml"
    ).read_text(encoding="utf-8")


def test_wheel_and_pages_are_built_with_the_packages_of_setup_py():
    wheel, docs, build = commands("package")
    assert "pip wheel --no-deps" in wheel and build == "python -m mkdocs build --strict"
    (package,) = re.findall(r'"docs": \["(.*?)"\]', SETUP)
    assert f'"{package}"' in docs


@pytest.mark.parametrize("job", JOBS)
def test_a_job_has_a_limit_and_its_lines_are_shell(job):
    assert JOBS[job]["timeout-minutes"] <= 60 and JOBS[job]["steps"][0]["uses"].startswith("actions/checkout@v")
    for command in commands(job):
        subprocess.run(["bash", "-n", "-c", command], check=True)
