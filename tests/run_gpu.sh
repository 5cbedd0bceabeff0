#!/usr/bin/env bash
# On a machine with one H100 or H200: sets up, runs tests/gpu and the performance matrix, and writes docs/benchmarks.md and docs/benchmarks_gpu.json;
# about 20 minutes. PYTHON names the interpreter (its torch is used), NANOCHAT a clone of nanochat to measure beside, MINUTES those of the matrix.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base=${PYTHON:-python3}

command -v "$base" >/dev/null || { echo "error: no $base on this machine: install python 3.10 or newer, or set PYTHON" >&2; exit 2; }
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q ^GPU; then
    echo "error: this machine has no NVIDIA GPU, which these tests are for: run them on one, or bash tests/run.sh here" >&2
    exit 2
fi
"$base" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null || {
    echo "error: $base has no torch that sees the GPU: install one for this driver (pytorch.org), or set PYTHON" >&2
    exit 2
}

# an environment of its own that also sees the interpreter's packages (which may be in an environment, too), so that its torch stays
venv=.venv-gpu log=.venv-gpu/install.log
packages='import sysconfig; print(sysconfig.get_paths()["purelib"])'
if [ ! -x $venv/bin/python ]; then
    "$base" -m venv $venv
    "$base" -c "$packages" >"$($venv/bin/python -c "$packages")/below.pth"
fi
wheels=../shared/gpu/wheels
if [ -d $wheels ] && ! $venv/bin/python -c 'import torch, transformer_engine.pytorch' 2>/dev/null; then
    $venv/bin/python -m pip install --no-index --no-deps --no-compile $wheels/*.whl >$log 2>&1 ||
        echo "the wheels in $wheels do not fit this Python or machine ($log): the tests of Transformer Engine are skipped unless it is installed"
fi
if ! $venv/bin/python -c 'import deepspeed, pyarrow, pydantic, tiktoken, pytest, megachat' 2>/dev/null; then
    echo "installing what is missing (log: $log)"
    $venv/bin/python -m pip install --no-build-isolation -e '.[test]' >>$log 2>&1 ||
        { tail -n 5 $log >&2; echo "error: installing failed, see $log; without a network put the missing wheels into $wheels" >&2; exit 2; }
fi

checks=$venv/checks.jsonl status=0
rm -f $checks
MEGACHAT_GPU_REPORT=$PWD/$checks $venv/bin/python -m pytest tests/gpu -q -rs || status=$?
touch $checks
$venv/bin/python tools/bench.py gpu --checks $checks --out docs/benchmarks.md --minutes "${MINUTES:-12}" ${NANOCHAT:+--nanochat "$NANOCHAT"} >/dev/null
echo "written: docs/benchmarks.md and docs/benchmarks_gpu.json"
exit $status
