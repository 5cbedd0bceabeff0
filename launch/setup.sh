#!/usr/bin/env bash
# Makes .venv in the project folder and installs megachat into it, once. A later call with the same extras does nothing.
# Usage: [PYTHON=python3] [LOCKED=no] [PROGRESS_S=10] source launch/setup.sh [EXTRAS]      EXTRAS as in setup.py, for example test.
# PYTHON: the interpreter that .venv is based on. PROGRESS_S: seconds between two lines of progress.
# LOCKED: by default every package has the version and a hash of requirements.lock; "no" takes what setup.py allows.
# Without nvidia-smi, torch's CPU build is installed where its index can be reached. A torch in .venv is kept.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in -h | --help) sed -n '2,/^$/s/^# //p' "$root/launch/setup.sh" && exit ;; esac
extras=${1:-}
base=${PYTHON:-python3}
locked=${LOCKED:-yes}

fail() { echo "error: $1" >&2; exit 2; }
for extra in ${extras//,/ }; do
    case $extra in test | hf | mpi | wandb | trackers | sweep | postgresql | report | notebook | completion | docs) ;; *) fail "there is no extra '$extra': give test, hf, mpi, wandb, trackers, sweep, postgresql, report, notebook, completion, docs, or none" ;; esac
done
case $locked in yes | no) ;; *) fail "LOCKED is '$locked': set it to yes or no" ;; esac
command -v "$base" >/dev/null || fail "there is no $base on this machine: install Python 3.10 or newer, or set PYTHON"
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$base" --version) is too old: Python 3.10 or newer is required; set PYTHON"

# Prints the sections of the lock that are named.
from_lock() { awk -v wanted=" $* " '/^# === /{on = index(wanted, " " $3 " ")} on' "$root/requirements.lock"; }

install() { "$root/.venv/bin/python" -m pip install "$@"; }

# Installs the sections of the lock. --no-deps: it has all dependencies. Sources are built with the locked setuptools.
install_locked() {
    from_lock "$1" >"$root/.venv/requirements.txt"
    shift
    # DeepSpeed is not to look for a CUDA toolkit; pip before 23.1 would not build it as a wheel without USE_PEP517
    DS_ACCELERATOR=cpu PIP_USE_PEP517=1 install --require-hashes --no-deps --no-build-isolation \
        -r "$root/.venv/requirements.txt" "$@"
}

# torch comes from one index, with its version, so that no other requirement pulls in another one.
install_torch() {
    ! "$root/.venv/bin/python" -c 'import torch' || return 0
    local cpu=(--index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15) version
    version=$(from_lock torch | grep -o '^torch==[^ ]*')
    if ! command -v nvidia-smi >/dev/null && [ "$(uname -s)" = Linux ]; then
        if [ "$locked" = yes ]; then ! install_locked torch "${cpu[@]}" || return 0; fi
        if [ "$locked" = no ]; then ! install --no-deps "${cpu[@]}" "$version" || return 0; fi
        echo "torch's CPU build cannot be had here: installing the build for GPUs, several GB" | tee /dev/fd/3
    fi
    if [ "$locked" = yes ]; then install_locked "torch cuda"; else install "$version"; fi
}

install_all() {
    if [ "$locked" = yes ]; then
        from_lock core | awk '/^setuptools==/{on = 1} /^[^ #]/ && !/^setuptools==/{on = 0} on' >"$root/.venv/build.txt"
        install --require-hashes --no-deps -r "$root/.venv/build.txt" &&
            install_locked "core ${extras//,/ }" && install_torch &&
            install --no-deps --no-build-isolation -e "$root" &&
            { "$root/.venv/bin/python" -m pip check || echo "note: the end of $log has conflicts in .venv" >&3; }
    else
        install_torch && install -e "$root${extras:+[$extras]}"
    fi
}

# Reads pip's output and prints the time and what pip is doing, every ${PROGRESS_S:-10} seconds.
show_progress() {
    local line doing="starting pip" shown=$SECONDS begin=$SECONDS status
    while true; do
        status=0
        IFS= read -r -t 1 line || status=$?
        if [ "$status" = 0 ]; then
            case $line in *Collecting\ * | *Downloading\ * | *Building\ * | *Preparing\ * | *Installing\ *) doing=$line ;; esac
        elif [ "$status" -le 128 ]; then # not the time limit: the end, or a bash before 4, which does not tell
            break
        fi
        if [ $((SECONDS - shown)) -ge "${PROGRESS_S:-10}" ]; then
            shown=$SECONDS
            doing=${doing#"${doing%%[! ]*}"}
            echo "  $((SECONDS - begin)) s: ${doing:0:90}"
        fi
    done
    cat >/dev/null
}

stamp="$root/.venv/megachat-${extras:-core}-$locked-$(cat "$root/setup.py" "$root/requirements.lock" | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    if [ ! -x "$root/.venv/bin/python" ]; then
        "$base" -m venv "$root/.venv" || {
            rm -rf "$root/.venv"
            fail "$base cannot make a virtual environment: install its venv package (Debian: python3-venv)"
        }
    fi
    log="$root/.venv/install.log"
    echo "installing into $root/.venv (log: $log)"
    { install_all 2>&1 | tee "$log" | show_progress >&3; } 3>&1 || {
        tail -n 15 "$log" >&2
        hint="check the network and run this again"
        [ "$locked" = no ] || hint="$hint, or install unlocked versions with LOCKED=no (docs/install.md)"
        fail "the installation failed, see the end of $log above; $hint"
    }
    touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
