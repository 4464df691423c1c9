#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under 8 minutes, on a machine without network.
#
#     bash bench/gpu.sh [DIR]              results go to DIR, default bench/results
#     bash bench/gpu.sh --dry-run [DIR]    the same at tiny sizes on a CPU in about a minute; DIR defaults to a temporary one
#
# Writes at most 6 flat files, each as soon as its part ends: gpu-machine.json (device, driver, versions, commit,
# ceilings), gpu-tests.txt, gpu-kernels.json, gpu-train.json, gpu-log.txt, gpu-table.txt. A part that runs out of its time
# or fails does not stop the next; the exit code is 1 if one failed.
#
# What the machine lacks travels as wheels in .whl/ (not in git), named for its Python; for 3.12 on x86-64:
#
#     pip download -d .whl --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#         --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
#         setuptools==84.2.1 pybind11==3.1.0 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types \
#         typing-inspection eai-sparsify natsort simple-parsing docstring-parser
#
# The last four are for the comparison with sparsify only (its modules also import accelerate, einops, transformers,
# huggingface-hub and safetensors; its trainer, which is not run, datasets and schedulefree).
set -u
cd "$(dirname "$0")/.."
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ -n "$dry" ]; then out=${1:-$(mktemp -d)}; else out=${1:-bench/results}; fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu-log.txt
: >"$log"
failed=0
python=${PYTHON:-python3}
# before CUDA starts: cuBLAS repeats bit by bit
export CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1

# part NAME SECONDS COMMAND...: run, log, go on
part() {
    local name=$1 limit=$2 code=0
    shift 2
    printf '== %s (at %ss, at most %ss)\n' "$name" "$SECONDS" "$limit" | tee -a "$log"
    timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || code=$?
    if [ "$code" -ne 0 ]; then
        echo "   $name: exit code $code$([ "$code" -eq 124 ] && echo ', out of time'); the end of its output:"
        tail -n 5 "$log" | sed 's/^/   /'
        failed=1
    fi
}

if [ -n "$dry" ]; then
    echo "== carried wheels, build in place: left out of a dry run"
elif compgen -G '.whl/*.whl' >/dev/null; then
    wheels=$(mktemp -d)
    part "carried wheels" 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$wheels" .whl/*.whl
    export PYTHONPATH=$wheels${PYTHONPATH:+:$PYTHONPATH}
fi

if [ -n "$dry" ]; then
    device=cpu tests=(tests/benchmark/test_l2.py) kernels=(--dry-run)
    # a busy machine may take long: the limits are wide, the work is small
    train=(--config tiny --processes --device cpu --first 3 --seconds 200) sizes=tiny
    limits=(120 200 250)
else
    part "build in place" 90 "$python" -m pip install -q --no-build-isolation --no-deps --no-index -e .
    device=cuda kernels=(--config A B)
    # only these files: others import what the machine may lack
    mapfile -t tests < <(grep -rl 'mark\.gpu' tests --include='test_*.py')
    train=(--config A B --each 80) sizes="A B"
    limits=(100 110 0)
fi

commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || commit="$commit, with changes"
part "ceilings" 60 "$python" -P bench/gpu_report.py machine --device "$device" --config $sizes --commit "$commit" \
    --out "$out/gpu-machine.json"

# a test on a GPU is mostly compilation, which processes beside each other share through Triton's cache
if [ -z "$dry" ] && "$python" -c 'import xdist' 2>/dev/null; then tests=(-n 12 "${tests[@]}"); fi
part "tests" "${limits[0]}" bash -c '"$0" -P -m pytest -q -m gpu -p no:cacheprovider "${@:2}" >"$1" 2>&1' \
    "$python" "$out/gpu-tests.txt" "${tests[@]}"
tail -n 1 "$out/gpu-tests.txt" 2>/dev/null

part "kernels" "${limits[1]}" "$python" -P bench/bench_kernels.py "${kernels[@]}" --out "$out/gpu-kernels.json"
if [ -z "$dry" ]; then
    # what is left of 8 minutes
    left=$((455 - SECONDS))
    train+=(--seconds "$left")
    limits[2]=$((left + 15))
fi
part "steps" "${limits[2]}" "$python" -P bench/bench_train.py "${train[@]}" --out "$out/gpu-train.json"

"$python" -P bench/gpu_report.py table "$out" | tee "$out/gpu-table.txt"
echo "$SECONDS s; results in $out"
exit "$failed"
