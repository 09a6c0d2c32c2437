#!/usr/bin/env bash
# Runs the benchmarks of a decode step's kernels on the GPUs of this host, and leaves all results in FOLDER/all.tar:
#   benchmark/decode_kernels.sh FOLDER [SECONDS of tuning]
# PYTHONPATH must lead to the engine; the overlay is added. With two GPUs the tuner has one and the others the other.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: decode_kernels.sh FOLDER [SECONDS]}
limit=${2:-230}
mkdir -p "$out"
export PYTHONPATH="$here/../python:${PYTHONPATH:-}" SGLANG_ENABLE_JIT_DEEPGEMM=0 PYTHONWARNINGS=ignore
last=$(($(nvidia-smi -L | wc -l) - 1))
step() {
  local seconds=$1 name=$2
  shift 2
  echo "== $name"
  timeout "$seconds" python3 "$@" >"$out/$name.log" 2>"$out/$name.err" || { echo "$name: status $?"; tail -n 12 "$out/$name.err"; }
  tail -n 26 "$out/$name.log" | cut -c1-150
}
tune() {
  CUDA_VISIBLE_DEVICES=0 step $((limit + 40)) tune_experts "$here/tune_experts.py" --out "$out/tables" --time-limit "$limit"
}
others() {
  export CUDA_VISIBLE_DEVICES=$last
  step 100 experts_profile "$here/experts_profile.py" --orders server ascending --json "$out/experts_profile.json"
  step 95 router "$here/router.py" --time-limit 85 --json "$out/router.json"
  step 170 fp8_linear "$here/fp8_linear.py" --plans --time-limit 150 --json "$out/fp8_linear.json" --ranks 4 2
  step 120 experts "$here/experts.py" --time-limit 100 --json "$out/experts.json"
}
if ((last > 0)); then
  tune >"$out/tune.txt" &
  others
  wait
  cat "$out/tune.txt"
else
  tune
  others
fi
tar -C "$out" -cf "$out/all.tar" --exclude=all.tar . && find "$out" -mindepth 1 -maxdepth 1 ! -name all.tar -exec rm -rf {} +
