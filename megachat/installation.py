"""Where megachat is installed: its version and commit, its configs, and whether it is a clone of the repository."""

import subprocess
from pathlib import Path

import megachat

DEEPSPEED_VERSION = "0.19.8"  # the version that setup.py pins
# Transformer Engine and its parts, which must have one version
TE_PACKAGES = ("transformer_engine", "transformer_engine_torch", "transformer_engine_cu12", "transformer_engine_cu13")
PACKAGE = Path(megachat.__file__).resolve().parent
ROOT = PACKAGE.parent  # relative to it, files of the code have the same names on every host
# The clone that the package is used from, None for a package that was installed without it.
CHECKOUT = ROOT if (ROOT / "setup.py").is_file() else None


def config_folder() -> Path:
    """Returns the folder with megachat's configs."""
    return CHECKOUT / "configs" if CHECKOUT else PACKAGE / "configs"


def config_path(text: str) -> str:
    """Returns the path of a config: the given file, else megachat's config of this name (d24, configs/d24.json)."""
    path = Path(text)
    bundled = (config_folder() / path.name).with_suffix(".json")
    named = path.parent == Path() or path.parent == Path("configs")
    return str(bundled) if named and not path.exists() and bundled.is_file() else text


def git(*arguments: str) -> str | None:
    """Returns what git prints about the clone, None for an installed package and without git."""
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def version_text() -> str:
    """Returns the version, and of a clone its commit and whether files were changed since."""
    commit = git("rev-parse", "--short", "HEAD")
    changed = " with changes" if commit and git("status", "--porcelain", "--untracked-files=no") else ""
    return f"megachat {megachat.__version__}" + (f" (commit {commit}{changed})" if commit else "")


def pretrain_program() -> list[str]:
    """Returns the program of pretrain's ranks for torchrun, and its first arguments."""
    # a clone need not be installed: its file finds the package
    return [str(CHECKOUT / "launch" / "pretrain.py")] if CHECKOUT else ["-m", "megachat", "pretrain"]
