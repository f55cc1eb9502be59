#!/usr/bin/env bash
# Everything a session on a GPU machine without network should bring home, in under 10 minutes:
# the GPU tests, the compile check, the kernel benchmark (rows are appended to RESULTS), and a short
# table last. It needs torch, Triton and pytest, nothing else. Each step runs even
# when an earlier one failed; the exit status is the number of failures.
#
#   benchmarks/gpu_session.sh [RESULTS [WHEELS]]
#
#   RESULTS  folder for logs and rows (benchmarks/results)
#   WHEELS   folder of wheels of peers, made where there is a network with
#            pip download --no-deps --only-binary=:all: -d WHEELS liger-kernel cut-cross-entropy ...
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
wheels=${2:-}
python=${PYTHON:-python3}
mkdir -p "$results"
failures=0
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

step() { # name, seconds, command...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    # KILL after TERM: a process that waits for the device may not see the first.
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$results/$name.log"
    local status=$?
    if ((status)); then
        echo "FAILED: $name, status $status (124: over its $limit s)"
        failures=$((failures + 1))
    fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
"$python" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"

peers=()
if [[ -n $wheels ]]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
    peers=(--peers all)
fi

# pytest may be missing here; then the benchmark's own gate is all there is.
if "$python" -c "import pytest" 2>/dev/null; then
    # Without conftest.py, whose fixtures serve other tests and import transformers.
    step gpu_tests 140 "$python" -m pytest -m gpu tests/test_kernels_gpu.py -q \
        --noconftest -o addopts="" -p no:cacheprovider
else
    echo "FAILED: gpu_tests: pytest is not installed"
    failures=$((failures + 1))
fi
# The architecture of this machine alone: the others are checked without a GPU.
step compile_check 90 "$python" -m benchmarks.compile_check --arch 90
step advantages 40 "$python" -m benchmarks.kernels group_advantages \
    --rounds 30 --warmup 5 --results "$results"
step spans 120 "$python" -m benchmarks.kernels span_cross_entropy \
    --budget 75 --rounds 9 --results "$results" "${peers[@]}"
step objective 90 "$python" -m benchmarks.kernels linear_objective \
    --budget 55 --rounds 9 --results "$results" "${peers[@]}"
step accuracy 30 "$python" -m benchmarks.accuracy --rows 256 --hidden 256 --dtypes bf16 \
    --results "$results"
step logprob 45 "$python" -m benchmarks.kernels linear_logprob \
    --budget 25 --rounds 9 --results "$results" "${peers[@]}"

echo "== table"
tail -n 3 "$results/gpu_tests.log"
grep -h "configurations" "$results/compile_check.log"
grep -hE "^[a-z0-9_]+[:,] |^  (usual|confident|logits|intfast|eager|QuACK|Liger|CCE|TRL|verl|F\.|torch)" \
    "$results"/{accuracy,advantages,spans,objective,logprob}.log | cut -c1-150 | head -n 120
echo "failures: $failures"
exit "$failures"
