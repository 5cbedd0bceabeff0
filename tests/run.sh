#!/usr/bin/env bash
# Sets up what the tests need and runs all of them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh test

# The two hosts of tests/runs/test_multinode.py are made on this machine with sshd and pdsh; where these are not and cannot be installed,
# those tests are skipped and say so.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v pdsh && command -v ip && [ -x /usr/sbin/sshd ]; } >/dev/null; then
    echo "installing openssh-server, pdsh and iproute2 for the tests on two hosts (log: .venv/apt.log)"
    policy=/usr/sbin/policy-rc.d # no ssh server is to be started by its installation
    if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; fi
    quick=(-qq -o Acquire::http::Timeout=15 -o Acquire::Retries=1)
    if ! { timeout 90 apt-get "${quick[@]}" update &&
        DEBIAN_FRONTEND=noninteractive timeout 180 apt-get "${quick[@]}" install -y --no-install-recommends openssh-server pdsh iproute2; } \
        >.venv/apt.log 2>&1; then
        echo "that failed: the tests on two hosts will be skipped"
    fi
    if [ -n "$(trap -p EXIT)" ]; then rm -f "$policy" && trap - EXIT; fi
fi
# Three files at a time, because much of a test with several ranks or hosts is waiting; `-n 0` runs one after the other. Files in their order: the
# long ones come first.
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
