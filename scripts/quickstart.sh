#!/usr/bin/env bash
# From nothing to a trained Combiner on real photographs: set-up, training, evaluation, samples, pictures.
# Started again, it goes on where it stopped. JAX picks the device (JAX_PLATFORMS=cpu bash scripts/quickstart.sh to choose).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/scripts/setup.sh"
cd "$root"
python=.venv/bin/python
# On Linux the C library may hand out large pages, which spares a training step on a CPU most of its page faults.
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
