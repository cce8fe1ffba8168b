#!/usr/bin/env bash
# The first minutes on a GPU, from a bare checkout: needs torch, triton, numpy, pytest, pytest-xdist
# and, for models, timm. Nothing is installed.
#
#   benchmarks/gpu.sh                              # every stage, in order of value
#   benchmarks/gpu.sh -o /tmp/out -m 5 tiny tests  # these two, 5 minutes each at most
#
#   -o FOLDER   results: a log and JSON files of each stage, written at once; /tmp/irpe_gpu
#   -m MINUTES  for each stage, instead of its own
#   -p PYTHON   python3
#   -t          toy sizes in all stages, to try this script without a GPU
#
# Stages: tiny tests attention models encoder profile sanitizer. A stage that fails or runs out of
# time keeps what it wrote, and the next one starts; the exit code is 1 then. stages.txt has a line
# for each command: stage, exit code (124: out of time), seconds.
set -u
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
out=/tmp/irpe_gpu minutes="" python=python3 toy=""
usage() { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while getopts o:m:p:t flag; do
    case $flag in
        o) out=$OPTARG ;; m) minutes=$OPTARG ;; p) python=$OPTARG ;; t) toy=1 ;; *) usage ;;
    esac
done
shift $((OPTIND - 1))
all="tiny tests attention models encoder profile sanitizer"
[ $# -gt 0 ] || set -- $all
for stage; do
    case " $all " in *" $stage "*) ;; *) echo "no stage $stage: one of $all" >&2; exit 2 ;; esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
: > "$out/stages.txt"
failed=0

# run COMMAND...: within what is left of the stage's time; its output goes to the log and the screen.
run() {
    local left=$((deadline - SECONDS)) began=$SECONDS code=124
    if [ $left -gt 0 ]; then
        timeout -k 10 "$left" "$@" 2>&1 | tee -a "$out/$stage.log"
        code=${PIPESTATUS[0]}
    fi
    [ "$code" -eq 0 ] || failed=1
    echo "$stage $code $((SECONDS - began)) s: ${*:2}" >> "$out/stages.txt"
}

bench() { run "$python" "benchmarks/$1" --name "$out/$2" "${@:3}"; }

ways="eager compiled graph"
small=(--model test_vit --size 160 --batch 2 --rounds 2 --amp)
suite=(tests/test_triton.py tests/test_text_triton.py tests/test_lookup.py tests/test_plans.py)
pytest=(-m pytest -q -p no:cacheprovider)
few="empty_batch or frozen_parts or one_tensor"

stage_tiny() {
    run "$python" "${pytest[@]}" -x tests/test_triton.py -k "$few"
    bench attention.py tiny_attention --tiny --minutes 3
    bench layer.py tiny_layer --grid 4x4 --batch 2 --steps 1
    bench models.py tiny_models "${small[@]}" --way $ways
    bench models.py tiny_encoder --encoder --grid 3x4 --layers 1 --rounds 2 --amp --way $ways
}
stage_tests() {
    local n
    n=$(env -u OMP_NUM_THREADS nproc)
    run "$python" "${pytest[@]}" -n $((n < 16 ? n : 16)) "${suite[@]}" ${toy:+-k "$few"}
}
stage_attention() { bench attention.py attention --minutes "$given" ${toy:+--tiny}; }
stage_models() {
    if [ "$toy" ]; then bench models.py models "${small[@]}" --way $ways
    else bench models.py models --minutes "$given" --way $ways; fi
}
stage_encoder() {
    local sizes=()
    [ -z "$toy" ] || sizes=(--grid 3x4 --layers 1 --rounds 2 --amp)
    bench models.py encoder --encoder --minutes "$given" --way $ways "${sizes[@]}"
}
stage_profile() { bench layer.py layer ${toy:+--grid 4x4 --batch 2 --steps 1}; }
stage_sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    for check in memcheck racecheck; do
        run "$tool" --tool $check --error-exitcode 1 "$python" "${pytest[@]}" -x \
            tests/test_triton.py -k "head_dims or empty_batch or frozen_parts"
    done
}

for stage; do
    case $stage in
        tiny) given=4 ;; tests) given=6 ;; attention | models) given=8 ;; *) given=5 ;;
    esac
    given=${minutes:-$given}
    deadline=$((SECONDS + given * 60))
    echo "== $stage, $given minutes at most"
    : > "$out/$stage.log"
    "stage_$stage"
done
cat "$out/stages.txt"
exit $failed
