#!/usr/bin/env bash
# Sets up what testing needs, then runs the tests; arguments go to pytest: bash scripts/test.sh tests/test_patterns.py -k causal
# On the newest versions of everything, in .venv-newest: STACK=newest bash scripts/test.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/scripts/setup.sh" dev
cd "$root"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # the tests fake their devices; two workers would fight over one accelerator
exec ".venv${STACK:+-$STACK}/bin/python" -m pytest -n 2 "$@"
