"""What a host has: this project's code, versions, cores, memory, GPUs, a free port.

It uses the standard library only, so that `ssh host python - ROOT PORT < megachat/job/host_probe.py` also runs where
nothing else is installed.
"""

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "numpy")


def code_hashes(root: Path) -> dict[str, str]:
    """Returns file -> 12 hex digits of its SHA-256, for every .py of megachat/ and launch/pretrain.py below root."""
    paths = [*sorted((root / "megachat").rglob("*.py")), root / "launch" / "pretrain.py"]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in paths
        if path.is_file()
    }


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Returns the versions of python and PACKAGES, "none" where a package is not installed."""
    return {"python": platform.python_version()} | {name: installed_version(name) or "none" for name in PACKAGES}


def gpu_count() -> int:
    """Returns the number of GPUs that the NVIDIA driver lists; 0 without a driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def port_is_free(port: int) -> bool:
    """Returns whether a server could listen on the TCP port now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError:
            return False
    return True


def probe_host(root: Path, port: int) -> dict:
    """Returns all of it as JSON values. memory_bytes is the host's physical memory."""
    return {
        "host": socket.gethostname(),
        "code": code_hashes(root),
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpu_count(),
        "port_is_free": port_is_free(port),
    }


if __name__ == "__main__":
    print(json.dumps(probe_host(Path(sys.argv[1]), int(sys.argv[2]))))
