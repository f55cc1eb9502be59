#!/usr/bin/env bash
# The vLLM engine on a GPU machine, without network and in under 10 minutes: sharing, decode graphs,
# the KV memory released and taken back, the cost of an update, a whole InT -> SFT -> RL run. Each
# part is a process of its own, and runs even when an earlier one failed; the exit status is the
# number of failures. HAS NEVER BEEN RUN: there was no GPU to run it on.
#
#   benchmarks/gpu_vllm.sh [RESULTS [SITE]]
#
#   RESULTS  folder for logs and rows (benchmarks/results)
#   SITE     folder with an unpacked vLLM 0.26 to 0.33, where it is not installed
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$results"
failures=0
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${2:+:$2}${PYTHONPATH:+:$PYTHONPATH}"

step() { # name, seconds, command...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.log"
    local status=$?
    if ((status)); then
        echo "FAILED: $name, status $status (124: over its $limit s)"
        failures=$((failures + 1))
    fi
}

bench() { # name, seconds, arguments...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" -m benchmarks vllm --dtype bfloat16 --results "$results" \
        --prompt 512 --new 256 --context 4096 "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
bench vllm_eager 90 --shape 0.6b --eager --cache-gib 8 --rounds 2 --warmup 1
bench vllm_graphs 90 --shape 0.6b --cache-gib 8 --rounds 3 --warmup 1
bench vllm_sleep 90 --shape 0.6b --sleep --cache-gib 8 --rounds 2 --warmup 1
bench vllm_4b 180 --shape 4b --sleep --cache-gib 30 --batch 128 --samples 8 --rounds 2 --warmup 1
run=$(mktemp -d)
step vllm_run 120 "$python" -m intfast.train configs/quickstart_short.toml run="$run/run" \
    model.device=cuda model.dtype=bfloat16 rollout.engine=vllm rollout.sleep=true

echo "== table"
grep -hE "gate:|times as fast|tokens per second" "$results"/vllm_*.log
echo "failures: $failures"
exit "$failures"
