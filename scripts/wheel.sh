#!/usr/bin/env bash
# Builds the wheel, installs it under the exact pins into an empty virtual environment, and uses it there, away from this
# repository: the README's first example, every command's --help, and two steps of examples/forkme.
#
#     bash scripts/wheel.sh
#
# The pins are those that scripts/setup.sh would take: by the version of Python, or with STACK=newest the newest ones.
# PYTHON=/path/to/python picks a Python (default: python3).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH
constraints=$root/constraints-newest.txt
if [[ -z ${STACK:-} && $(python --version) == 'Python 3.11.'* ]]; then
  constraints=$root/constraints.txt
fi
python -m pip wheel -qq --no-deps --wheel-dir "$folder/dist" "$root"
python -m pip install -qq --constraint "$constraints" "$folder"/dist/*.whl
cp -r "$root/examples/forkme" "$folder/mine"
cd "$folder/mine"

where=$(python -c 'import combiner; print(combiner.__file__)')
[[ $where == "$folder"/venv/* ]] || { echo "combiner was imported from $where, not from the wheel" >&2; exit 1; }
sed -n '/^```python$/,/^```$/ { /^```/d; p }; /^```$/q' "$root/README.md" >example.py
[[ -s example.py ]] || { echo 'README.md has no example in Python before the first other block' >&2; exit 1; }
python example.py
for command in "$folder"/venv/bin/combiner-*; do
  "$command" --help >help.txt
  grep -q -e '--' help.txt || { echo "$(basename "$command") --help names no flag" >&2; exit 1; }
done
combiner-train --config config.py:steps=2 --workdir runs/mine
echo "$(basename "$folder"/dist/*.whl) works on $(python --version)"
