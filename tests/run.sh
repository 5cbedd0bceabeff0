#!/usr/bin/env bash
# Sets up what the tests need and runs all of them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh test
exec python -m pytest "$@"
