"""Environment variables of a user that would change what tests see."""

import os

_LAUNCHERS = (
    "RANK WORLD LOCAL MASTER OMPI PMIX PMI MPI MV2 HOROVOD FLUX PALS PET SLURM TORCHELASTIC GROUP ROLE CROSS MEGACHAT"
).split()
# git's as a hook of git sets them, proxies for what listens on this machine, and how programs print
_OTHERS = (
    "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_COLOR FORCE_COLOR COLUMNS LINES PYTHONIOENCODING PYTHONOPTIMIZE PYTHONWARNINGS"
).split()


def is_of_launcher(name: str) -> bool:
    """Returns whether a launcher sets the variable for its ranks."""
    return name.split("_")[0] in _LAUNCHERS


def remove_variables() -> None:
    """Removes them from this process's environment."""
    for name in list(os.environ):
        if is_of_launcher(name) and name != "MEGACHAT_GPU_REPORT" or name.startswith("GIT_") or name.upper() in _OTHERS:
            del os.environ[name]
