#!/usr/bin/env bash
# On a machine with one H100 or H200: sets up, runs tests/gpu and the performance matrix, and writes docs/benchmarks.md and docs/benchmarks_gpu.json,
# with the three recipes of the speedrun (tokens per second, MFU, peak memory) beside nanochat's, in at most 20 minutes after the installation.
# Usage: bash tests/run_gpu.sh [--wheels FOLDER] [--nanochat FOLDER] [--minutes N] [--part checks|performance]
# --wheels: what is missing is installed from here, for a machine without a network (../shared/gpu/wheels if it is there). To fill it elsewhere, with
# the same Python: pip wheel --no-deps -w FOLDER deepspeed==VERSION_OF_setup.py hjson; and Transformer Engine's wheels. --nanochat: a clone of
# nanochat, to be measured beside. --minutes: of tests and measurements together (20). --part: one of the two alone, for a machine that breaks long
# commands off; performance then tells of the checks made before. PYTHON names the interpreter, whose torch is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base=${PYTHON:-python3} wheels='' nanochat='' minutes=20 part=both
fail() { echo "error: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' tests/run_gpu.sh; exit ;; esac
    [ $# -gt 1 ] || fail "$1 lacks its value, or is no option: there are --wheels, --nanochat, --minutes and --part"
    case $1 in
        --wheels) wheels=$(cd "$2" 2>/dev/null && pwd) || fail "--wheels $2 is no folder" ;;
        --nanochat) nanochat=$(cd "$2" 2>/dev/null && pwd) || fail "--nanochat $2 is no folder" ;;
        --minutes) minutes=$2; [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--minutes $2 is no whole number of minutes" ;;
        --part) part=$2; [[ $2 =~ ^(checks|performance)$ ]] || fail "--part $2 is neither checks nor performance" ;;
        *) fail "unknown option $1: there are --wheels, --nanochat, --minutes and --part" ;;
    esac
    shift 2
done
[ -n "$wheels" ] || ! [ -d ../shared/gpu/wheels ] || wheels=$(cd ../shared/gpu/wheels && pwd)

{ nvidia-smi -L | grep -q ^GPU; } 2>/dev/null ||
    fail "this machine has no NVIDIA GPU, which these tests are for: run them on one, or bash tests/run.sh here"
command -v "$base" >/dev/null || fail "no $base on this machine: install python 3.10 or newer, or set PYTHON"
"$base" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    fail "$base has no torch that sees the GPU: install one for this driver (pytorch.org), or set PYTHON"

# an environment of its own that also sees the interpreter's packages (which may be in an environment, too), so that its torch stays
venv=.venv-gpu log=.venv-gpu/install.log python=.venv-gpu/bin/python
if [ ! -e $venv/made ]; then
    rm -rf $venv
    "$base" -m venv $venv >/dev/null 2>&1 || "$base" -m venv --clear --without-pip $venv # Debian's python has no pip to give; its own is seen from below
    "$base" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
        >"$($python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/below.pth"
    $python -m pip --version >/dev/null 2>&1 || fail "$base has no pip: install it (Debian: python3-pip), or set PYTHON"
    touch $venv/made
fi
if [ -n "$wheels" ] && ls "$wheels"/transformer_engine-*.whl >/dev/null 2>&1 && ! $python -c 'import torch, transformer_engine.pytorch' 2>/dev/null; then
    $python -m pip install --no-index --no-deps --no-compile "$wheels"/*.whl >$log 2>&1 || {
        tail -n 3 $log >&2
        echo "the wheels in $wheels do not fit this Python ($log): without Transformer Engine its tests are skipped"
    }
fi
missing=$($python tests/gpu/missing.py)
if [ -n "$missing" ]; then
    echo "installing $missing (log: $log)"
    # shellcheck disable=SC2086
    { [ -n "$wheels" ] && $python -m pip install --no-index --no-deps --find-links "$wheels" $missing; } >>$log 2>&1 ||
        $python -m pip install --no-build-isolation --retries 1 --timeout 15 $missing >>$log 2>&1 || {
        tail -n 3 $log >&2
        fail "installing $missing failed, see $log; on a machine without a network put their wheels into a folder and name it with --wheels"
    }
fi

checks=$venv/checks.jsonl checks_log=$venv/checks.log status=0 limit=$((minutes * 60))
SECONDS=0
if [ "$part" != performance ]; then
    rm -f $checks && touch $checks
    [ "$part" = checks ] || limit=$((limit / 2))
    echo "checks (tests/gpu), at most $limit s"
    MEGACHAT_GPU_REPORT=$PWD/$checks timeout -k 10 $limit $python -m pytest tests/gpu -q -rs -p no:cacheprovider 2>&1 | tee $checks_log || status=$?
    [ $status != 124 ] || echo "the checks were broken off: their time was over"
fi
[ "$part" = checks ] && exit $status
touch $checks $checks_log
left=$((minutes * 60 - SECONDS))
echo "performance, $left s"
$python tools/bench.py gpu --checks $checks --checks-log $checks_log --out docs/benchmarks.md --minutes "$((left / 60)).$((left % 60 * 10 / 60))" \
    ${nanochat:+--nanochat "$nanochat"} >$venv/bench.json
echo "written: docs/benchmarks.md and docs/benchmarks_gpu.json"
exit $status
