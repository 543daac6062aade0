#!/usr/bin/env bash
# Makes .venv at the repository's root and installs this project into it under the exact pins of constraints.txt:
#
#     bash scripts/setup.sh [EXTRA]
#
# EXTRA: dev, docs, tpu, tpu-aot, cuda, cuda12, gpu-aot, slurm, gcs, wandb; several with commas: cuda,slurm; none: what
# running needs
#
# On Python 3.11 it takes the pins of constraints.txt, on later ones those of constraints-newest.txt. STACK=newest takes
# these in any case, and makes .venv-newest.
#
# Needs Python 3.11 to 3.14, for STACK=newest from 3.12 on (PYTHON=/path/to/python picks one) and, the first time, a
# network. Later calls return at once unless setup.py or the pins have changed.
set -euo pipefail

extra=${1:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
stack=${STACK:-}
venv=$root/.venv${stack:+-$stack}
python=$venv/bin/python
oldest=11 # Python 3.11
if [[ $stack == newest ]]; then
  oldest=12
elif [[ -n $stack ]]; then
  echo "STACK=$stack is unknown; leave STACK unset, or STACK=newest" >&2
  exit 2
fi
if (($# > 1)); then
  echo "Write several extras with commas: $(IFS=, && echo "$*")" >&2
  exit 2
fi
extras=$(sed -n "/extras_require={/,/^    }/s/^        '\([a-z0-9-]*\)': .*/\1/p" "$root/setup.py")
IFS=, read -ra chosen <<<"$extra"
for each in "${chosen[@]}"; do
  if ! grep -qxF -e "$each" <<<"$extras"; then # pip would only warn
    echo "There is no extra '$each'; choose from ${extras//$'\n'/, }" >&2
    exit 2
  fi
done
marker=$venv/setup-running # holds our process id while we work; remains only after an interrupted set-up
stamp=$venv/setup-done # holds what was installed; each extra has its own stamp, setup-done-EXTRA

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

# Each set of pins is tested on these versions of Python.
constraints() {
  if [[ -z $stack && $("$python" --version) == 'Python 3.11.'* ]]; then
    echo "$root/constraints.txt"
  else
    echo "$root/constraints-newest.txt"
  fi
}

# Everything that the installation depends on, including the root, which an editable install refers to by name.
wanted() {
  echo "$root"
  cat "$root/setup.py" "$(constraints)"
}

if [[ ! -e $marker && -x $python && $(cat "$stamp${extra:+-$extra}" 2>/dev/null) == "$(wanted)" ]]; then
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
  rm -rf "$venv" # the next pip would take the remains of an interrupted one for installed packages
  mkdir "$venv"
  echo $$ >"$marker"
  "$base" -m venv "$venv"
fi

echo "Installing ${extra:+with the extra '$extra' }into $venv (a few minutes, once)"
echo $$ >"$marker"
wanted=$(wanted)
if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
  rm -f "$stamp"*
fi
cd "$root"
"$python" -m pip install -qq --disable-pip-version-check --constraint "$(constraints)" --editable ".${extra:+[$extra]}"
echo "$wanted" | tee "$stamp" "$stamp${extra:+-$extra}" >/dev/null
rm "$marker"
