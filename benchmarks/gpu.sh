#!/usr/bin/env bash
# The GPU suite: one call, under 9 minutes, on an offline host with an NVIDIA GPU. Results go to
# $OUT (default: benchmarks/gpu-out). Later issues add their stages below; each stage is timed and
# its exit code recorded, and a failed stage does not hide the ones after it.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-benchmarks/gpu-out}"
mkdir -p "$OUT"
PYTHON="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1
summary="$OUT/summary.txt"
: >"$summary"
failed=0

stage() { # stage NAME COMMAND...: run it, log it, time it
  local name="$1" start code
  shift
  start=$(date +%s)
  "$@" >"$OUT/$name.log" 2>&1
  code=$?
  echo "$name: exit $code after $(($(date +%s) - start)) s" | tee -a "$summary"
  [ "$code" -eq 0 ] || { failed=1; tail -20 "$OUT/$name.log"; }
}

describe() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv
  command -v nvcc && nvcc --version | tail -1
  ldconfig -p | grep -i nvinfer || echo "no libnvinfer on this machine"
  "$PYTHON" --version
}

build() { # the package with its kernels, where the virtual environment may be read-only
  "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --target "$OUT/.site" .
}

contracts() {
  PYTHONPATH="$OUT/.site:tests" "$PYTHON" -m pytest -q tests/contracts
}

kernels() { # the CPU kernel on this host, beside which GPU figures will stand
  PYTHONPATH="$OUT/.site" "$PYTHON" benchmarks/fused_kernel.py
}

stage describe describe
stage build build
stage contracts contracts
stage kernels kernels
rm -rf "$OUT/.site" # it must not travel back
exit "$failed"
