"""requirements.lock agrees with setup.py: every requirement is in it, pinned inside its range, with hashes."""

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import lock

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "requirements.lock").read_text()
ENTRY = re.compile(
    r"^([a-z0-9.-]+==\S+(?: ; [^\\\n]+)?) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)
PLATFORMS = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.4", "sys_platform": system}
    | {"platform_machine": machine, "platform_python_implementation": "CPython"}
    for minor in (10, 11, 12, 13)
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]


def sections() -> dict[str, dict[Requirement, int]]:
    """Section -> its requirements, with the number of hashes of each."""
    _, *parts = re.split(r"^# === (\S+)$", TEXT, flags=re.MULTILINE)
    return {
        name: {Requirement(line): hashes.count("--hash") for line, hashes in ENTRY.findall(body)}
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


SECTIONS = sections()


def setup_requirements() -> dict[str, list[Requirement]]:
    """Extra, or "core", -> the requirements of setup.py."""
    (call,) = [
        n
        for n in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if getattr(n, "keywords", None) and ast.unparse(n.func) == "setup"
    ]
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = ast.literal_eval(keywords["extras_require"])
    return {
        name: [Requirement(text) for text in texts]
        for name, texts in (extras | {"core": ast.literal_eval(keywords["install_requires"])}).items()
    }


def pins(names: tuple[str, ...], environment: dict[str, str]) -> dict[str, str]:
    """Package -> its only version in these sections, on one platform."""
    versions: dict[str, set[str]] = {}
    for name in names:
        for pin in SECTIONS[name]:
            if pin.marker is None or pin.marker.evaluate(environment):
                (specifier,) = pin.specifier
                assert specifier.operator == "=="
                versions.setdefault(canonicalize_name(pin.name), set()).add(specifier.version)
    assert all(len(each) == 1 for each in versions.values()), versions
    return {name: version for name, (version,) in versions.items()}


def test_every_line_of_the_lock_is_a_pin_with_hashes():
    rest = ENTRY.sub("", TEXT)
    assert all(not line or line.startswith("#") for line in rest.splitlines())
    assert all(count > 0 for section in SECTIONS.values() for count in section.values())
    assert set(SECTIONS) == {"core", "torch", "cuda", *setup_requirements()} and set(lock.EXTRAS) < set(SECTIONS)


@pytest.mark.parametrize("environment", PLATFORMS, ids=lambda each: " ".join(list(each.values())[1:4]))
def test_every_requirement_of_setup_py_is_pinned_inside_its_range(environment):
    for extra, requirements in setup_requirements().items():
        pinned = pins(("core", "torch", "cuda", extra), environment)
        assert "setuptools" in pinned, "packages without wheels are built with it"
        for requirement in requirements:
            if requirement.marker is None or requirement.marker.evaluate(environment):
                name = canonicalize_name(requirement.name)
                assert name in pinned and pinned[name] in requirement.specifier, f"{requirement}: tools/lock.py"


def test_what_the_installed_packages_require_is_in_the_lock():
    """On this Python and platform: pip installs the lock without looking at requirements."""
    environment = default_environment()
    here = {key: str(value) for key, value in environment.items()}
    pinned = pins(tuple(SECTIONS), here)
    checked = 0
    for name, version in pinned.items():
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for text in package.requires or [] if package.version == version else []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(here | {"extra": ""}):
                required = canonicalize_name(requirement.name)
                assert required in pinned and requirement.specifier.contains(pinned[required], prereleases=True), text
                checked += 1
    assert checked > 20 or metadata.version("numpy") != pinned["numpy"]


def test_the_hashes_of_the_cpu_builds_are_those_of_torch():
    torch = next(line for line in ENTRY.findall(TEXT) if line[0].startswith("torch=="))
    listed = re.findall(r"^# +([0-9a-f]{64}) +torch-([0-9.]+)[+]cpu-(cp3\d+)-", TEXT, re.MULTILINE)
    assert {f"torch=={version}" for _, version, _ in listed} == {torch[0]}
    assert {python for _, _, python in listed} >= {"cp310", "cp311", "cp312", "cp313"}
    assert all(f"sha256:{digest}" in torch[1] for digest, *_ in listed)


def test_the_lock_is_made_again_from_what_uv_prints(tmp_path, monkeypatch):
    """A uv that prints two packages, and no network: the hashes of CPU builds are kept."""
    uv = tmp_path / "uv"
    digest = "a" * 64
    uv.write_text(
        f"#!/bin/sh\nprintf 'numpy==1.0 \\\\\\n    --hash=sha256:{digest}\\ntorch==2.13.0 \\\\\\n"
        f"    --hash=sha256:{digest}\\nnvidia-nccl-cu13==2.0 \\\\\\n    --hash=sha256:{digest}\\n'\n"
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(lock, "CPU_INDEX", "http://127.0.0.1:9/torch/")
    text = lock.lock("2.13.0")
    order = [
        text.index(part) for part in ("# === core\nnumpy==1.0", "# === torch\ntorch==2.13.0", "# === cuda\nnvidia-")
    ]
    assert order == sorted(order) and text.count("# === ") == 3 + len(lock.EXTRAS)
    kept = re.findall(r"^#   [0-9a-f]{64}  torch-.*$", TEXT, re.MULTILINE)
    assert kept and all(line in text for line in kept)
