#!/usr/bin/env bash
# Sets up the project, trains a Combiner on real photographs, evaluates it, samples from it and draws pictures.
# Run again, it resumes where it stopped. JAX picks the device (JAX_PLATFORMS=cpu bash scripts/quickstart.sh to choose).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/scripts/setup.sh"
cd "$root"
python=.venv${STACK:+-$STACK}/bin/python
# Large pages from the C library (Linux) avoid most page faults of a training step on a CPU.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
workdir=runs/quickstart

echo 'Training on photographs'
"$python" -m combiner.train --config configs/photos.py --workdir "$workdir"
echo 'Evaluating on photographs never trained on'
"$python" -m combiner.evaluate --workdir "$workdir"
echo 'Completing the lower half of test images'
"$python" -m combiner.sample --workdir "$workdir"
echo 'Drawing'
"$python" scripts/plot_attention.py --out "$workdir/attention.png"
"$python" scripts/plot_curve.py --workdir "$workdir"

echo
echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Everything is in $root/$workdir:"
ls "$workdir"
