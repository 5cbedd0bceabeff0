#!/usr/bin/env bash
# Makes .venv in the project folder and installs megachat into it, once. A later call with the same extras does nothing.
# Usage: [PYTHON=python3] source launch/setup.sh [EXTRAS]      EXTRAS as in setup.py, for example test.
# PYTHON: the interpreter that .venv is based on.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-}
base=${PYTHON:-python3}

fail() { echo "error: $1" >&2; exit 2; }
command -v "$base" >/dev/null || fail "there is no $base on this machine: install Python 3.10 or newer, or set PYTHON"
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$base" --version) is too old: Python 3.10 or newer is required; set PYTHON"

stamp="$root/.venv/megachat-${extras:-core}-$(cksum <"$root/setup.py" | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    if [ ! -x "$root/.venv/bin/python" ]; then
        "$base" -m venv "$root/.venv" || {
            rm -rf "$root/.venv"
            fail "$base cannot make a virtual environment: install its venv package (Debian: python3-venv)"
        }
    fi
    log="$root/.venv/install.log"
    echo "installing into $root/.venv (log: $log)"
    # torch first, with its version, so that no other requirement pulls in another one. Without a GPU the small CPU
    # build is installed if its index can be reached.
    torch=(torch==2.13.0)
    if ! command -v nvidia-smi >/dev/null && [ "$(uname -s)" = Linux ]; then
        torch+=(--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15)
    fi
    {
        "$root/.venv/bin/python" -c 'import torch' 2>/dev/null ||
            "$root/.venv/bin/python" -m pip install "${torch[@]}"
        "$root/.venv/bin/python" -m pip install -e "$root${extras:+[$extras]}"
    } >"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        fail "the installation failed, see the end of $log above; check the network and run this again"
    }
    touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
