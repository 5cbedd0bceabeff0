"""Writes requirements.lock: every package that setup.py may install, pinned, with the hashes of all its files.

    pip install uv && python tools/lock.py

uv resolves for every Python and platform at once (environment markers), from PyPI alone. launch/setup.sh installs the
sections that it needs: core, torch and cuda (what torch's build for GPUs requires), and one for each extra of setup.py.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a clone that was not installed

from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402

LOCK = ROOT / "requirements.lock"
CPU_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
EXTRAS = ("hf", "mpi", "wandb", "trackers", "sweep", "postgresql", "report", "test", "notebook", "completion", "docs")
_CUDA = re.compile(r"(nvidia|cuda)-[a-z0-9-]+|triton")


def resolve(torch: str, extras: tuple[str, ...], pins: str) -> dict[str, str]:
    """Returns requirement line -> its entry with hashes, for setup.py with these extras and the pins chosen before."""
    if not shutil.which("uv"):
        raise UserError("there is no uv, which resolves for all platforms at once: pip install uv")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(f"torch=={torch}\n{pins}")
        options = "--universal --generate-hashes --no-header --no-annotate --no-config --python-version 3.10 --quiet"
        line = ["uv", "pip", "compile", *options.split(), "--default-index", "https://pypi.org/simple"]
        line += [word for extra in extras for word in ("--extra", extra)]
        done = subprocess.run(
            [*line, "--constraints", constraints, ROOT / "setup.py"], capture_output=True, text=True, cwd=folder
        )
    if done.returncode:
        raise UserError(f"uv cannot choose a set of packages: {' '.join(done.stderr.split())}")
    entries = re.findall(r"^\S.*(?:\n\s+.*)*", done.stdout, re.MULTILINE)
    return {entry.partition(" \\\n")[0]: entry for entry in entries}


def cpu_wheels(torch: str) -> list[tuple[str, str]]:
    """Returns (file, SHA-256) of torch's CPU builds for Linux: from their index, or from the lock if that is not there.

    Raises UserError if neither has any of this version.
    """
    start = f"torch-{re.escape(torch)}(?:%2B|[+])cpu-cp3"
    try:
        with urllib.request.urlopen(CPU_INDEX, timeout=30) as answer:
            page = answer.read().decode()
        wheels = re.findall(rf"({start}\d+-cp3\d+-manylinux_\w+[.]whl)#sha256=([0-9a-f]{{64}})", page)
    except OSError as error:
        print(f"note: {CPU_INDEX} cannot be read ({error}): the hashes of CPU builds in {LOCK.name} are kept")
        lines = re.findall(rf"^# +([0-9a-f]{{64}}) +({start}\S+)$", LOCK.read_text(), re.MULTILINE)
        wheels = [(name, digest) for digest, name in lines]
    if not wheels:
        raise UserError(f"no hash of a CPU build of torch {torch} is known: run this where {CPU_INDEX} can be read")
    return sorted({(name.replace("%2B", "+"), digest) for name, digest in wheels})


def lock(torch: str) -> str:
    """Returns the text of the lock."""
    core = resolve(torch, (), "")
    sections = {"core": {}, "torch": {}, "cuda": {}}
    for requirement, entry in core.items():
        name = re.split("[=; ]", requirement)[0]
        kind = "torch" if name == "torch" else "cuda" if _CUDA.fullmatch(name) else "core"
        sections[kind][requirement] = entry
    known = dict(core)
    for extra in EXTRAS:
        sections[extra] = resolve(torch, (extra,), "\n".join(known))
        sections[extra] = {each: entry for each, entry in sections[extra].items() if each not in core}
        known |= sections[extra]
    wheels = cpu_wheels(torch)
    hashes = "".join(f" \\\n    --hash=sha256:{digest}" for _, digest in wheels)
    table = "\n".join(f"#   {digest}  {name}" for name, digest in wheels)
    text = "# Made by tools/lock.py; launch/setup.sh installs it with --require-hashes --no-deps.\n"
    for name, entries in sections.items():
        text += f"\n# === {name}\n" + "\n".join(entries.values()) + "\n"
        if name == "torch":
            text = f"{text.rstrip()}{hashes}\n# The last {len(wheels)} hashes are those of {CPU_INDEX}:\n{table}\n"
    return text


@user_errors_end_the_program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="2.13.0", metavar="VERSION", help="torch's version (default: %(default)s)")
    text = lock(parser.parse_args().torch)
    LOCK.write_text(text)
    print(f"{LOCK.name}: {len(re.findall('^[a-z].*==', text, re.MULTILINE))} pins, {text.count('--hash=')} hashes")


if __name__ == "__main__":
    main()
