#!/usr/bin/env bash
# Sets up what the tests need and runs them.
# Usage: tests/run.sh [--quick] [ARGUMENTS OF PYTEST]
#   --quick   without the tests marked slow: most of tests/ranks and tests/runs, and long unit tests; under four minutes on two cores
#   -n N      so many files at a time (default: the cores and one more, 3 to 6); -n 0 runs one after the other
#   Any other argument goes to pytest: a file, -k WORDS, -x, --durations=20.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
arguments=() quick=
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' tests/run.sh; exit ;;
        --quick) quick=yes ;;
        *) arguments+=("$argument") ;;
    esac
done
source launch/setup.sh test

# The two hosts of tests/runs/test_multinode.py are made on this machine with sshd and pdsh; where these are not and cannot be installed,
# those tests are skipped and say so.
if [ -z "$quick" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v pdsh && command -v ip && [ -x /usr/sbin/sshd ]; } >/dev/null; then
    echo "installing openssh-server, pdsh and iproute2 for the tests on two hosts (log: .venv/apt.log)"
    policy=/usr/sbin/policy-rc.d # no ssh server is to be started by its installation
    if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; fi
    apt=(-qq -o Acquire::http::Timeout=15 -o Acquire::Retries=1)
    if ! { timeout 90 apt-get "${apt[@]}" update &&
        DEBIAN_FRONTEND=noninteractive timeout 180 apt-get "${apt[@]}" install -y --no-install-recommends openssh-server pdsh iproute2; } \
        >.venv/apt.log 2>&1; then
        echo "that failed: the tests on two hosts will be skipped"
    fi
    if [ -n "$(trap -p EXIT)" ]; then rm -f "$policy" && trap - EXIT; fi
fi
# More files at a time than cores, because much of a test with several ranks or hosts is waiting. Each file stays in one process: its tests share set-ups.
workers=$(($(nproc 2>/dev/null || sysctl -n hw.ncpu) + 1))
workers=$((workers < 3 ? 3 : workers > 6 ? 6 : workers))
[ -z "$quick" ] || arguments=(-m "not slow" "${arguments[@]}")
exec python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder ${arguments[@]+"${arguments[@]}"}
