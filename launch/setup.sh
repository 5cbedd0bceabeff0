#!/usr/bin/env bash
# Makes .venv beside the project and installs megachat into it, once; a later call with the same needs does nothing.
# Usage: source launch/setup.sh [EXTRAS]      EXTRAS as in setup.py, e.g. test; PYTHON names the interpreter to build on.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-}
base=${PYTHON:-python3}

command -v "$base" >/dev/null || { echo "error: no $base on this machine: install python 3.10 or newer, or set PYTHON" >&2; exit 2; }
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $("$base" --version) is too old: python 3.10 or newer is needed; set PYTHON" >&2; exit 2; }

stamp="$root/.venv/megachat-${extras:-core}-$(cksum <"$root/setup.py" | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    if [ ! -x "$root/.venv/bin/python" ]; then
        "$base" -m venv "$root/.venv" || { rm -rf "$root/.venv"; echo "error: $base cannot make a virtual environment: install its venv package (Debian: python3-venv)" >&2; exit 2; }
    fi
    log="$root/.venv/install.log"
    echo "installing into $root/.venv (log: $log)"
    # torch first and by version: without a GPU the small CPU build is taken where its index can be reached, and an open range never pulls another
    torch=(torch==2.13.0)
    if ! command -v nvidia-smi >/dev/null && [ "$(uname -s)" = Linux ]; then
        torch+=(--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15)
    fi
    {
        "$root/.venv/bin/python" -c 'import torch' 2>/dev/null || "$root/.venv/bin/python" -m pip install "${torch[@]}"
        "$root/.venv/bin/python" -m pip install -e "$root${extras:+[$extras]}"
    } >"$log" 2>&1 || { tail -n 15 "$log" >&2; echo "error: installing failed, see $log above; check the network and run this again" >&2; exit 2; }
    touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
