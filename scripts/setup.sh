#!/usr/bin/env bash
# Makes .venv at the repository's root and installs this project into it under the exact pins of constraints.txt:
#
#     bash scripts/setup.sh [EXTRA]        EXTRA: dev, cuda, tpu, slurm or tpu-aot (setup.py); none: what running needs
#
# STACK=newest takes the pins of constraints-newest.txt instead, and makes .venv-newest.
#
# Needs Python 3.11 to 3.14, for STACK=newest from 3.12 on (PYTHON=/path/to/python picks one) and, the first time, a
# network. Later calls return at once as long as setup.py and the pins stay as they were.
set -euo pipefail

extra=${1:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
stack=${STACK:-}
venv=$root/.venv${stack:+-$stack}
python=$venv/bin/python
constraints=$root/constraints${stack:+-$stack}.txt
oldest=11 # Python 3.11
if [[ $stack == newest ]]; then
  oldest=12
fi
if [[ ! -f $constraints ]]; then
  echo "STACK=$stack: there is no $constraints; leave STACK unset, or STACK=newest" >&2
  exit 2
fi
marker=$venv/setup-running # holds our process id while we work: left behind only by a set-up that was cut short
stamp=$venv/setup-done # holds what was installed; an extra has a stamp of its own, setup-done-EXTRA, beside it

usable() {
  "$1" -c "import ensurepip, sys, venv; sys.exit(not (3, $oldest) <= sys.version_info < (3, 15))" >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
    if usable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.$oldest to 3.14 with the venv module was found. Install one (on Debian and Ubuntu: python3 and" >&2
  echo 'python3-venv) or name it: PYTHON=/path/to/python bash scripts/setup.sh' >&2
  return 1
}

# All that the installation depends on. The root is part of it because an editable install points to the folder by name.
wanted=$(echo "$root" && cat "$root/setup.py" "$constraints")
if [[ ! -e $marker && -x $python && $(cat "$stamp${extra:+-$extra}" 2>/dev/null) == "$wanted" ]]; then
  exit
fi

if [[ -e $marker ]]; then
  other=$(cat "$marker")
  if [[ $other != "$$" && $(ps -p "$other" -o args= 2>/dev/null) == *setup.sh* ]]; then
    echo "Process $other is setting up $venv already; try again when it is done." >&2
    exit 1
  fi
fi
if [[ -e $marker ]] || ! usable "$python" || ! "$python" -c 'import pip' 2>/dev/null; then
  base=$(find_python)
  echo "Making $venv with $("$base" --version)"
  rm -rf "$venv" # what an interrupted pip leaves behind looks installed to the next pip
  mkdir "$venv"
  echo $$ >"$marker"
  "$base" -m venv "$venv"
fi

echo "Installing ${extra:+with the extra '$extra' }into $venv (a few minutes, once)"
echo $$ >"$marker"
if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
  rm -f "$stamp"*
fi
cd "$root"
"$python" -m pip install -qq --disable-pip-version-check --constraint "$constraints" --editable ".${extra:+[$extra]}"
echo "$wanted" | tee "$stamp" "$stamp${extra:+-$extra}" >/dev/null
rm "$marker"
