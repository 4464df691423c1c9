#!/usr/bin/env bash
# Everything that only a GPU can show, in parts of at most 8 minutes, on a machine without network.
#
#     bash bench/gpu.sh PART... [--out DIR] [--seconds N]
#                                               parts: tests, kernels, "steps A", "steps B", or all; DIR defaults to bench/results;
#                                               N is the most seconds for each part, 470 unless given
#     bash bench/gpu.sh --dry-run PART...       the same at tiny sizes on a CPU; DIR defaults to a temporary one
#
# A part keeps within its time, and writes each result as soon as it is there, so that a kill at any moment loses nothing.
# Called again with the same DIR, a part goes on where it stopped: tests that have passed, operations and contestants that
# are measured are not run again. For other sources or another machine choose another DIR, or delete the files.
#
# At most 7 flat files: gpu-machine.json (device, driver, versions, commit, ceilings), gpu-tests.txt, gpu-kernels.json,
# gpu-train-A.json, gpu-train-B.json, gpu-log.txt, gpu-table.txt. A part that fails does not stop the next; the exit code
# is 1 if one failed or ran out of time.
#
# What the machine lacks travels as wheels in .whl/ (not in git), named for its Python; for 3.12 on x86-64:
#
#     pip download -d .whl --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#         --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
#         setuptools==84.2.1 pybind11==3.1.0 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types \
#         typing-inspection typing-extensions eai-sparsify natsort simple-parsing docstring-parser
#
# Where the copy of the sources has no .git, COMMIT names the commit that gpu-machine.json records. The last four wheels
# are for the comparison with sparsify only (its modules also import accelerate, einops, transformers, huggingface-hub and
# safetensors; its trainer, which is not run, datasets and schedulefree).
set -u
cd "$(dirname "$0")/.."
# budget: seconds for a part, with the preparation that the first of a call waits for
dry="" out="" parts=() budget=470
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1 ;;
        --out) out=${2:?--out needs a directory}; shift ;;
        --seconds) budget=${2:?--seconds needs a number}; shift ;;
        all) parts+=(tests kernels "steps A" "steps B") ;;
        tests | kernels | "steps A" | "steps B") parts+=("$1") ;;
        *) echo "bench/gpu.sh: no part '$1'; there are tests, kernels, 'steps A', 'steps B' and all" >&2; exit 2 ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || { echo "bench/gpu.sh: name a part: tests, kernels, 'steps A', 'steps B' or all" >&2; exit 2; }
if [ -z "$out" ]; then if [ -n "$dry" ]; then out=$(mktemp -d); else out=bench/results; fi; fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu-log.txt
failed=0
python=${PYTHON:-python3}
# before CUDA starts: cuBLAS repeats bit by bit
export CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: run, log, go on
step() {
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
else
    if compgen -G '.whl/*.whl' >/dev/null; then
        wheels=$(mktemp -d)
        step "carried wheels" 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
            --target "$wheels" .whl/*.whl
        export PYTHONPATH=$wheels${PYTHONPATH:+:$PYTHONPATH}
    fi
    step "build in place" 90 "$python" -m pip install -q --no-build-isolation --no-deps --no-index -e .
fi

if [ ! -f "$out/gpu-machine.json" ]; then
    commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
    [ -n "${COMMIT-}" ] || [ -z "$(git status --porcelain 2>/dev/null)" ] || commit="$commit, with changes"
    if [ -n "$dry" ]; then device=cpu sizes=(tiny); else device=cuda sizes=(A B); fi
    step "ceilings" 60 "$python" -P bench/gpu_report.py machine --device "$device" --config "${sizes[@]}" \
        --commit "$commit" --out "$out/gpu-machine.json"
fi

run_tests() { # SECONDS
    # only these files: others import what the machine may lack
    if [ -n "$dry" ]; then files=(tests/benchmark/test_l2.py); else
        mapfile -t files < <(grep -rl 'mark\.gpu' tests --include='test_*.py')
        # a test on a GPU is mostly compilation, which processes beside each other share through Triton's cache
        "$python" -c 'import xdist' 2>/dev/null && files=(-n 16 "${files[@]}")
    fi
    "$python" -P bench/gpu_report.py passed "$out/gpu-tests.txt" >"$out/.passed"
    # interrupted before its time is up, pytest still prints what failed
    step tests "$1" bash -c 'timeout --foreground --signal=INT "$3" "$0" -P -m pytest -v -m gpu -p no:cacheprovider "@$2" "${@:4}" >>"$1" 2>&1; code=$?
        [ "$code" -eq 5 ] && code=0   # nothing left
        exit "$code"' "$python" "$out/gpu-tests.txt" "$out/.passed" \
        "$(($1 - 25))" "${files[@]}"
    rm -f "$out/.passed"
    tail -n 1 "$out/gpu-tests.txt"
}

run_kernels() { # SECONDS
    if [ -n "$dry" ]; then given=(--dry-run); else given=(--config A B); fi
    step kernels "$1" "$python" -P bench/bench_kernels.py "${given[@]}" --resume --out "$out/gpu-kernels.json"
}

run_steps() { # SIZE SECONDS
    if [ -n "$dry" ]; then given=(--config tiny --processes --device cpu --first 3); else given=(--config "$1" --each 80); fi
    # ends by itself before it is ended
    step "steps $1" "$2" "$python" -P bench/bench_train.py "${given[@]}" --seconds $(($2 - 40)) --resume \
        --out "$out/gpu-train-$1.json"
}

began=0
for part in "${parts[@]}"; do
    left=$((budget - (SECONDS - began)))
    case $part in
        tests) run_tests "$left" ;;
        kernels) run_kernels "$left" ;;
        "steps A") run_steps A "$left" ;;
        "steps B") run_steps B "$left" ;;
    esac
    began=$SECONDS
    # at once: the call may be cut off in the next part
    "$python" -P bench/gpu_report.py table "$out" >"$out/gpu-table.txt"
done
cat "$out/gpu-table.txt"
echo "$SECONDS s; results in $out"
exit "$failed"
