#!/usr/bin/env bash
# Regenerates results/ and the figures in docs/images/, stage by stage; without arguments, lists the stages.
#
#     bash scripts/results.sh DATA_DIR [STAGE…]
#
# Without a stage, all are run, in the order of the list. DATA_DIR holds prepared data sets (docs/data.md): CIFAR-10, ImageNet
# 64×64, Wiki-40B, PG-19 and IMDb; the other sets are generated there. Every stage can be repeated: finished training runs,
# which lie in runs/, are skipped, and interrupted ones resume. If a row of a table fails, the other rows and all later
# stages are still run, and the exit status is 1. Benchmarks need an otherwise idle machine.
set -euo pipefail

# name, hours, what it makes
stages=(
    'speed 2 benchmarks of the attentions, the data pipeline, packing and saving'
    'plans 3 memory and cost on TPUs, compiled without them'
    'figures 0.2 figures 1 to 3'
    'photos 1 bits/dim of photographs by mechanism'
    'recall 2 associative recall by mechanism, and its figure'
    'claims 12 small tests of the claims of the paper'
    'data 0.2 generates ListOps and Pathfinder of reduced sizes'
    'table1 6 Table 1 at scale=small, both columns'
    'table3 2 Table 3 at scale=small'
    'pg19 1 PG-19 at scale=small'
    'table4 14 Table 4 at scale=small: ListOps, Text, Image, Pathfinder'
    'table5 3 Table 5 at scale=small'
    'table2 2 a longer run for Table 2'
    'page 0 the tables and the ranking of photographs in docs/results.md'
)
if [[ $# -eq 0 ]]; then
    echo 'usage: bash scripts/results.sh DATA_DIR [STAGE…]; hours on one CPU core:' >&2
    for stage in "${stages[@]}"; do
        read -r name hours what <<< "$stage"
        printf '    %-8s %5s  %s\n' "$name" "$hours" "$what" >&2
    done
    exit 2
fi
chosen=("${@:2}")
if [[ ${#chosen[@]} -eq 0 ]]; then
    for stage in "${stages[@]}"; do chosen+=("${stage%% *}"); done
fi
for name in "${chosen[@]}"; do
    if ! printf '%s\n' "${stages[@]%% *}" | grep -qx -- "$name"; then
        echo "unknown stage $name; known: ${stages[*]%% *}" >&2
        exit 2
    fi
done
mkdir -p "$1"
data=$(cd "$1" && pwd -P)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/scripts/setup.sh"
cd "$root"
python=.venv${STACK:+-$STACK}/bin/python
# Large pages from the C library (Linux) avoid most page faults of a training step on a CPU.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

failed=0

note() { # takes the exit status of a table's command: after failed rows, 1, the script goes on; any other ends it
    if [[ $1 -ne 1 ]]; then exit "$1"; fi
    failed=1
}

keep() { # puts the files of a table into results/ if it has results: only then it has a picture
    if [[ -e $1/$2.png ]]; then cp "$1/$2.json" "$1/$2.md" "$1/$2.png" results/; fi
}

speed() {
    "$python" scripts/bench.py --lengths 256,512,1024,2048,4096,8192,16384 --dense_up_to 4096 --fit_from 2048 --repeats 5 \
        --out results/bench.json
    "$python" scripts/plot_bench.py results/bench.json --out docs/images/bench.png
    "$python" scripts/bench.py data --out results/data_bench.json
    "$python" scripts/bench.py packed --repeats 7 --out results/packed_bench.json
    "$python" scripts/bench.py saving --out results/save_bench.json
}

plans() {
    bash scripts/setup.sh tpu-aot # a compiler for TPUs, which need not be present
    rm -f results/compile.json # its results would be kept
    "$python" scripts/compile.py --report # and docs/accelerators.md with its picture
    "$python" -m experiments.tables.hours --write
    "$python" scripts/generate_docs.py # docs/choosing.md has a table of them
}

figures() {
    "$python" -m experiments.figures.figure1
    "$python" -m experiments.figures.figure2
    "$python" -m experiments.figures.figure3
}

photos() {
    "$python" -m experiments.tables.photos || note $?
    keep runs/photos photos
}

recall() {
    "$python" -m experiments.tables.recall || note $?
    keep runs/recall recall
    "$python" -m experiments.figures.recall
}

claims() {
    "$python" -m combiner.data.generate lra_listops --data_dir "$data"
    "$python" -m combiner.data.generate lra_pathfinder16_easy --data_dir "$data/limited" --limit 6000
    "$python" -m experiments.claims.photographs || note $?
    "$python" -m experiments.claims.prose || note $?
    "$python" -m experiments.claims.tiles --data_dir "$data" || note $?
    # The seeds of these rows differ more.
    "$python" -m experiments.claims.tiles --data_dir "$data" --rows '*logsparse' --seeds 5 || note $?
    "$python" -m experiments.claims.books --data_dir "$data" || note $?
    "$python" -m experiments.claims.listops --data_dir "$data" || note $?
    "$python" -m experiments.claims.pathfinder --data_dir "$data/limited" || note $?
    for name in photographs prose tiles books listops pathfinder; do keep runs/claims "claims_$name"; done
}

data() {
    "$python" -m combiner.data.generate lra_listops_short --data_dir "$data"
    "$python" -m combiner.data.generate lra_pathfinder12_easy --data_dir "$data" --limit 100000
}

small=(--scale small --workdir runs/small --data_dir "$data")

table1() {
    "$python" -m experiments.tables.table1 "${small[@]}" --seeds 3 || note $?
    keep runs/small table1
}

table2() {
    "$python" -m experiments.tables.table2 "${small[@]}" --rows cifar-10/combiner-axial || note $?
    keep runs/small table2
}

table3() {
    "$python" -m experiments.tables.table3 "${small[@]}" --seeds 3 || note $?
    keep runs/small table3
}

pg19() {
    "$python" -m experiments.tables.pg19 "${small[@]}" --seeds 3 || note $?
    keep runs/small pg19
}

table4() {
    "$python" -m experiments.tables.table4 "${small[@]}" --seeds 3 --rows 'listops/*,text/*,image/*,pathfinder/*' \
        || note $?
    keep runs/small table4
    "$python" -m experiments.tables.table4_pretrained "${small[@]}" --seeds 3 --rows pathfinder/combiner-fixed || note $?
    keep runs/small table4_pretrained
}

table5() {
    "$python" -m experiments.tables.table5 "${small[@]}" --seeds 3 || note $?
    keep runs/small table5
}

page() {
    "$python" -m experiments.tables.page
}

for name in "${chosen[@]}"; do
    echo "stage $name" >&2
    "$name"
done
if [[ $failed -ne 0 ]]; then
    echo 'some rows failed, see above; the same command takes them up again' >&2
fi
exit "$failed"
