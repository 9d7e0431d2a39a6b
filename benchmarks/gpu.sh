#!/usr/bin/env bash
# The GPU suite: one call, under 9 minutes, on an offline host with an NVIDIA GPU, Python with torch
# and cuda-core, and (for cubins ahead of time) nvcc.
#
#   bash benchmarks/gpu.sh [STAGE...]            runs every stage, or those named after describe,
#                                                carry and build; files go to $OUT (default
#                                                benchmarks/gpu-out)
#   bash benchmarks/gpu.sh --dry-run [STAGE...]  prints the commands and checks, without a GPU, that
#                                                what they name exists: files, tests, options
#
# $CARRY (default .carry) may hold what the host lacks: *.tar.xz of packages (onnxruntime-gpu), and
# wheels (pycuda). $CADA_COMMIT names the commit in the rows where a copy has no history. Each stage
# has a time limit and their sum is below 540 s; a failed stage hides none of the others. The
# summary says what ran, what did not and why. In $OUT: summary.txt, stages.jsonl, logs.txt, and the
# benchmarks' rows. Exits 1 when a stage failed, 5 when only targets were missed, 3 without a GPU.
set -uo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
# name, limit in seconds: the most telling first
stages="describe:10 carry:20 build:60 contracts:90 fused_gpu:95 end_to_end:45 kernels:25 latency:70
pycuda_layer:40 bench:15 memcheck:30 racecheck:30"
dry="" asked=""
for argument in "$@"; do
  case " ${stages//$'\n'/ }" in
    *" $argument:"*) asked+=" $argument " ;;
    *) [ "$argument" = "--dry-run" ] ||
      { echo "unknown argument $argument; expected --dry-run, or stages of" $stages >&2; exit 2; }
      dry=1 ;;
  esac
done
PYTHON="${PYTHON:-python3}"
CARRY="${CARRY:-$root/.carry}"
device=cuda:0
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
site="$work/site" carried="$work/carried"
mkdir -p "$work/logs" "$work/cwd" "$site" "$carried"
if [ -z "$dry" ]; then
  OUT="$(mkdir -p "${OUT:-$root/benchmarks/gpu-out}" && cd "${OUT:-$root/benchmarks/gpu-out}" && pwd)"
else
  OUT="$work/out"
fi
if [ -z "$dry" ] && ! nvidia-smi >/dev/null 2>&1; then
  echo "not run: nvidia-smi finds no GPU; see bash benchmarks/gpu.sh --dry-run"
  exit 3
fi

# The package that is tested is the one that `build` installs, never the checkout beside it: so no
# command runs in the checkout, where Python would find that first.
cd "$work/cwd" || exit 1
[ -n "$asked" ] && [ -z "$dry" ] && asked=" describe  carry  build $asked"
if [ -z "$dry" ]; then
  export PYTHONPATH="$site:$carried"
  # The CUDA libraries that came with torch's wheels, for ONNX Runtime and NVRTC.
  libraries="$("$PYTHON" -c 'import glob, sysconfig
print(":".join(sorted(glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib"))))')"
  export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  export XDG_CACHE_HOME="$work/cache" # every kernel is compiled here and now
fi
export CADA_BENCHMARK_RESULTS="$OUT" PYTHONUNBUFFERED=1
export root dry PYTHON CARRY device work site carried OUT
workers="$(($(nproc) < 8 ? $(nproc) : 8))"
export workers

# --- how a stage calls things, so that a dry run can look at it instead ---------------------------

py() { # Python; in a dry run: do the script, the tests, the options exist?
  if [ -z "$dry" ]; then
    "$PYTHON" "$@"
    return
  fi
  echo "    python $*"
  case "$1 ${2:-}" in
    "-m pytest") "$PYTHON" "$@" --collect-only -q -q >"$work/collected" 2>&1 ||
      { tail -5 "$work/collected"; return 1; } ;;
    "-m pip" | "-m cada_deploy") options_exist "$1" "$2" "$3" -- "${@:4}" ;;
    -m*) echo "      python -m $2 is not known to the dry run"; return 1 ;;
    -c*) "$PYTHON" -c 'import ast, sys; ast.parse(sys.argv[1])' "$2" ;;
    *) [ -f "$1" ] || { echo "      there is no $1"; return 1; }
      options_exist "$1" -- "${@:2}" ;;
  esac
}

options_exist() { # COMMAND... -- ARGUMENTS...: every --option among them is in the command's help
  local command=() help
  while [ "$1" != "--" ]; do command+=("$1"); shift; done
  shift
  help="$("$PYTHON" "${command[@]}" --help 2>&1)" || { echo "      ${command[*]} --help fails: $help"; return 1; }
  for argument in "$@"; do
    case "$argument" in
      --*) grep -q -e "${argument%%=*}\b" <<<"$help" ||
        { echo "      ${command[*]} has no ${argument%%=*}"; return 1; } ;;
    esac
  done
}

tool() { # another program; in a dry run it is printed
  if [ -z "$dry" ]; then "$@"; else echo "    $*"; fi
}

lacks() { # WORDS -- COMMAND...: says what is lacking when the command fails; never in a dry run
  local words="$1"
  shift 2
  [ -n "$dry" ] && return 1
  "$@" >/dev/null 2>&1 && return 1
  echo "not run: $words"
}

tests() { # pytest over the installed package; other versions' warnings are no errors here
  local parallel=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$workers")
  CADA_TEST_CUDA="$device" py -m pytest -q -c "$root/pyproject.toml" --rootdir "$root" \
    -o pythonpath="$root/tests" -o filterwarnings=default -p no:cacheprovider --tb=short \
    "${parallel[@]}" "$@" || return 1 # pytest's other codes mean other things here
}

sanitizer() { # compute-sanitizer, wherever the toolkit has put it
  command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null
}

# --- the stages -----------------------------------------------------------------------------------

describe() {
  tool nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv
  tool nvcc --version || echo "no nvcc: no cubins ahead of time"
  tool sh -c "ldconfig -p | grep -i nvinfer || echo 'no libnvinfer: TensorRT cannot run here'"
  py -c 'import importlib.metadata as m, sys
print("python", sys.version.split()[0])
for name in ("torch", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "cupy-cuda13x", "numpy",
             "onnx", "onnxruntime", "opencv-python-headless", "pillow", "triton", "nvidia-cudnn-cu13"):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "is not there")'
}

carry() { # what came along in $CARRY
  lacks "there is no folder $CARRY" -- test -d "$CARRY" && return 3
  local wheels=() archive
  for archive in "$CARRY"/*.tar.xz; do
    [ -e "$archive" ] && tool tar -xf "$archive" -C "$carried"
  done
  for archive in "$CARRY"/*.whl; do [ -e "$archive" ] && wheels+=("$archive"); done
  [ ${#wheels[@]} -eq 0 ] && [ -z "$dry" ] && return
  py -m pip install --quiet --no-index --no-deps --target "$carried" "${wheels[@]}"
}

build() { # the package with its kernels, and cubins for this GPU (CADA_CUDA_ARCHITECTURES=native)
  py -m pip install --quiet --no-build-isolation --no-deps --no-index \
    --config-settings=build-dir="$work/build" --target "$site" "$root" || return
  tool ls -l "$site/cada_deploy/kernel_sources/cubins" || echo "no cubins ahead of time"
}

contracts() { # every fused back end, both CUDA layers, engines and policies
  tests "$root/tests/contracts" --ignore="$root/tests/contracts/test_device_on_stand_in.py"
}

kernels() {
  tests "$root/tests/kernels/test_cuda_plans.py" "$root/tests/kernels/test_preprocess_cuda.py"
}

pycuda_layer() { # the kernels through the other layer
  lacks "no PyCUDA; put its wheel into $CARRY" -- "$PYTHON" -c 'import pycuda.driver' && return 3
  CADA_CUDA_LAYER=pycuda tests "$root/tests/contracts/test_fused.py" \
    "$root/tests/kernels/test_cuda_plans.py" -k cuda
}

fused_gpu() { py "$root/benchmarks/fused_gpu.py" --record; }

end_to_end() { py "$root/benchmarks/gpu_end_to_end.py" --device "$device" --record; }

latency() { py "$root/benchmarks/latency.py" --device "$device" --record; }

bench() { # the command, on the demo's model
  py -m cada_deploy bench "$root/cada_deploy/demo_model/scenes19.onnx" --device "$device" \
    --duration 2 --warm-up 3 --threads "$workers" --json "$OUT/bench.json"
}

watched() { # TOOL: every kernel once under compute-sanitizer
  lacks "no compute-sanitizer on this machine" -- sanitizer && return 3
  py "$root/benchmarks/sanitizer_driver.py" --device "$device" || return
  tool "$(sanitizer || echo compute-sanitizer)" --tool "$1" --report-api-errors no \
    --error-exitcode 9 "$PYTHON" "$root/benchmarks/sanitizer_driver.py" --device "$device"
}
memcheck() { watched memcheck; }
racecheck() { watched racecheck; }

# --- running them ---------------------------------------------------------------------------------

export -f py options_exist tool lacks tests sanitizer describe carry build contracts kernels \
  pycuda_layer fused_gpu end_to_end latency bench watched memcheck racecheck
worst=0 total=0
began=$(date +%s)
[ -z "$dry" ] && : >"$OUT/stages.jsonl"
report=""
for entry in $stages; do
  name="${entry%:*}" limit="${entry#*:}"
  total=$((total + limit))
  [ -z "$asked" ] || [[ "$asked" == *" $name "* ]] || continue
  log="$work/logs/$name.log"
  if [ -n "$dry" ]; then
    echo "$name, at most $limit s:"
    "$name" || { echo "    MISSING, see above"; worst=1; }
    continue
  fi
  start=$(date +%s)
  timeout --kill-after=3 "$limit" bash -c "$name" >"$log" 2>&1
  code=$?
  seconds=$(($(date +%s) - start))
  case $code in
    0) verdict="ran" ;;
    3) verdict="NOT RUN: $(grep -m1 'not \(run\|measured\)' "$log" || tail -1 "$log")" ;;
    5) verdict="ran, BELOW TARGET: $(grep -c 'BELOW TARGET' "$log") of its targets missed"
      [ "$worst" -eq 0 ] && worst=5 ;;
    124 | 137) verdict="FAILED: not done after $limit s"; worst=1 ;;
    *) verdict="FAILED: exit $code: $(tail -1 "$log")"; worst=1 ;;
  esac
  report+="$name: $verdict ($seconds s)"$'\n'
  echo "$name: $verdict ($seconds s)"
  [ $code -ne 0 ] && [ $code -ne 3 ] && tail -12 "$log"
  echo "{\"stage\": \"$name\", \"exit\": $code, \"seconds\": $seconds, \"limit\": $limit}" >>"$OUT/stages.jsonl"
done
if [ -n "$dry" ]; then
  echo "all stages: at most $total s"
  [ "$total" -lt 540 ] || { echo "    that is more than 9 minutes"; worst=1; }
  exit $worst
fi
{
  grep -h . "$work/logs/describe.log"
  echo
  printf '%s' "$report"
  echo "all of it: $(($(date +%s) - began)) s"
  echo
  grep -h 'target [<>]=' "$work"/logs/*.log || echo "no target was measured"
} >"$OUT/summary.txt"
for log in "$work"/logs/*.log; do
  echo "=== $(basename "$log" .log)"
  cat "$log"
done >"$OUT/logs.txt"
exit $worst
