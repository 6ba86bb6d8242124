#!/usr/bin/env bash
# A first look at a GPU, in two calls of less than ten minutes, on a machine without a network:
#
#   bash benchmarks/gpu_session.sh correct     # checks, every test of a device, compute-sanitizer
#   bash benchmarks/gpu_session.sh fast        # times beside the peers', hardware counters
#
# In the root of a checkout. Needs python3 with torch (2.10 or newer, with CUDA), triton and pytest,
# and brings along what is not there: masked_loss/_C.so (else it is built, which needs nvcc), and
# wheels in .whl/: of the peers (liger_kernel, cut_cross_entropy) and of expecttest, which PyTorch's
# own test samples need. docs/cuda.md says how to get them.
# Logs and results go to $OUT, or benchmarks/results: gpu_correct.txt and gpu.* are to be kept. A step
# that fails ends nothing but itself.
# With MASKED_LOSS_SESSION_DEVICE=cpu it walks through everything that needs no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in correct | fast) ;; *) echo "usage: $0 correct|fast" >&2; exit 2 ;; esac
out=${OUT:-benchmarks/results}
mkdir -p "$out"
device=${MASKED_LOSS_SESSION_DEVICE:-cuda}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$PWD:$PWD/lint:$site PYTHONUNBUFFERED=1
for tools in /usr/local/cuda/bin /opt/nvidia/nsight-compute/*; do PATH=$PATH:$tools; done

step() {  # step NAME SECONDS COMMAND...
  local name=$1 seconds=$2 status
  shift 2
  echo "== $(date +%T) $name"
  timeout "$seconds" "$@"
  status=$?
  [ "$status" = 124 ] && echo "== $name: not done after $seconds s"
  [ "$status" = 0 ] || echo "FAILED: $name ($status)" >>"$site/failed"
}

with_gpu() { [ "$device" = cuda ]; }

tests() {  # tests NAME SECONDS ARGUMENTS...: an older pytest will do, and fewer or other plugins
  local name=$1 seconds=$2
  shift 2
  local workers=()
  python3 -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)")
  step "$name" "$seconds" python3 -m pytest -q -p no:cacheprovider -p no:benchmark -o minversion=1 \
    "${workers[@]}" "$@"
}

machine() {
  with_gpu && nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
  python3 -c 'import sys, torch, pytest; print(sys.version.split()[0], "torch", torch.__version__,
      "CUDA", torch.version.cuda, "pytest", pytest.__version__)'
}

library() {
  if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl ||
      echo "the wheels in .whl do not install here; without what they bring"
  fi
  python3 -c 'import masked_loss' && return
  local cuda=1
  with_gpu || cuda=0
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} MASKED_LOSS_CUDA=$cuda \
    python3 setup.py -q build_ext --inplace && python3 -c 'import masked_loss'
}

correct() {
  if with_gpu; then
    step checks 60 python3 benchmarks/gpu.py --check-only
  else
    step checks 60 python3 -c 'import sys; sys.path.append("benchmarks"); import gpu_check
found = gpu_check.check("cpu", tokens=16); print(*found, sep="\n"); sys.exit(bool(found))'
  fi
  local files=(tests/losses tests/autograd/test_gradients.py
    tests/kernels/test_{cuda,determinism,large,rounding}.py)
  with_gpu || files=(tests/losses/test_{semantics,special_numbers,statistics}.py)
  sanitize &
  tests "every test of a device" 330 --maxfail=100 -k "$device" "${files[@]}"
  wait
  cat "$site"/*.sanitizer 2>/dev/null
}

# All of its tools at a time, beside the tests.
sanitize() {
  if ! with_gpu || ! command -v compute-sanitizer >/dev/null; then
    step "every kernel; there is no compute-sanitizer" 60 python3 benchmarks/gpu_sanitize.py "$device"
    return
  fi
  # Freed memory goes back to the device: what a cache hands out again would look initialized.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local tool
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" 300 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      python3 benchmarks/gpu_sanitize.py >"$site/$tool.sanitizer" 2>&1 &
  done
  wait
}

fast() {
  if ! with_gpu; then
    step shapes 60 python3 benchmarks/gpu_shapes.py cpu
    return
  fi
  touch "$site/begun"
  step benchmark 345 python3 benchmarks/gpu.py --minutes 4.75
  # The checkout may hold an earlier run's.
  find benchmarks/results -name "gpu.*" -newer "$site/begun" -exec cp -f {} "$out"/ \; 2>/dev/null
  if command -v ncu >/dev/null; then
    step counters 160 ncu --clock-control none --set full --csv --page raw --log-file "$out/ncu.csv" \
      -k "regex:(rows|forward|values|divergence|weigh|reduce|scale)\w*_kernel" python3 benchmarks/gpu_shapes.py
    step "what they say" 10 python3 benchmarks/gpu_counters.py "$out/ncu.csv"
  fi
}

# Of a log: the machine, the steps, the last line of each tool, what failed.
said='^(== |NVIDIA|[0-9.]+ torch|checks:|.*[0-9]+ passed|=+ (ERROR|RACECHECK) SUMMARY|FAILED|ERROR)'

{
  echo "== $(date '+%F %T') machine"
  machine
  echo "== $(date +%T) library"
  if library; then
    "$1"
  else
    echo "FAILED: library" >>"$site/failed"
  fi
  echo "== $(date +%T) done"
  ! cat "$site/failed" 2>/dev/null
} 2>&1 | tee "$out/$1.log"
status=$?
[ "$1" = fast ] || grep -E "$said" "$out/$1.log" >"$out/gpu_$1.txt"
exit "$status"
