#!/usr/bin/env bash
# Regenerates all of results/, and the figures in docs/images/: bash scripts/results.sh DATA_DIR
# DATA_DIR must contain ImageNet 64×64 and PG-19 (docs/data.md); the other data sets of the claims are generated there. Takes
# many hours on 2 CPU cores. Run again, it skips finished training runs, which lie in runs/, and resumes interrupted ones.
# Benchmarks need an otherwise idle machine.
set -euo pipefail

if [[ $# -ne 1 ]]; then
    echo 'usage: bash scripts/results.sh DATA_DIR' >&2
    exit 2
fi
mkdir -p "$1"
data=$(cd "$1" && pwd -P)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/scripts/setup.sh"
cd "$root"
python=.venv/bin/python

"$python" scripts/bench.py --lengths 256,512,1024,2048,4096,8192,16384 --dense_up_to 4096 --fit_from 2048 --repeats 5 \
    --out results/bench.json
"$python" scripts/plot_bench.py results/bench.json --out docs/images/bench.png
"$python" scripts/bench.py data --out results/data_bench.json
"$python" scripts/bench.py packed --repeats 7 --out results/packed_bench.json
"$python" scripts/bench.py saving --out results/save_bench.json
bash "$root/scripts/setup.sh" tpu-aot # a compiler for TPUs, which need not be present
rm -f results/memory.json # its plans would be kept
"$python" -m experiments.tables.memory --topology v5p:1x1x1 \
    --rows cifar-10/combiner-mixture-12-layers,cifar-10/performer-12-layers,cifar-10/combiner-axial,cifar-10/reformer-12-layers,cifar-10/routing-12-layers
rm -f results/compile.json # as above
"$python" scripts/compile.py --report # and docs/accelerators.md with its picture
"$python" -m experiments.figures.figure1
"$python" -m experiments.figures.figure2
"$python" -m experiments.figures.figure3

# Large pages from the C library (Linux) avoid most page faults of a training step on a CPU.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
"$python" -m experiments.tables.photos
"$python" -m experiments.tables.recall
cp runs/recall/recall.json runs/recall/recall.md results/
"$python" -m experiments.figures.recall
"$python" -m combiner.data.generate lra_listops --data_dir "$data"
"$python" -m combiner.data.generate lra_pathfinder16_easy --data_dir "$data" --limit 6000
"$python" -m experiments.claims.photographs
"$python" -m experiments.claims.prose
"$python" -m experiments.claims.tiles --data_dir "$data"
"$python" -m experiments.claims.tiles --data_dir "$data" --rows '*logsparse' --seeds 5 # its seeds differ more
"$python" -m experiments.claims.books --data_dir "$data"
"$python" -m experiments.claims.listops --data_dir "$data"
"$python" -m experiments.claims.pathfinder --data_dir "$data"
cp runs/claims/claims_*.json runs/claims/claims_*.md runs/claims/claims_*.png results/
rm results/*_costs.json # the tables contain them
