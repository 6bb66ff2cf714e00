#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: builds from source, runs every test marked cuda, compute-sanitizer over a
# small subset, and all benchmarks. Writes <folder>/<gpu>.json (machine, driver, clocks, commit, versions, spread),
# <folder>/bench/<gpu>.json (from photographs to a score, by stage and runtime) and <folder>/gpu_kit.log. Needs nvcc, CMake, Ninja, pybind11, pytest and a CUDA build of torch >= 2.10; no network.
#
#   benchmarks/gpu_kit.sh [folder]        default: benchmarks/results
#
# XCOS_KIT_BUDGET: seconds a benchmark case (default 3). The whole is meant to take some fifteen minutes on a recent machine.
set -uo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$repo/benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu_kit.log
: >"$log"
status=0
begin=$SECONDS

step() {
  local name=$1
  shift
  local from=$SECONDS
  printf '\n=== %s\n' "$name" | tee -a "$log"
  "$@" 2>&1 | tee -a "$log" | tail -n 25
  local code=${PIPESTATUS[0]}
  printf '=== %s: %s after %s s\n' "$name" "$([ "$code" = 0 ] && echo ok || echo "FAILED ($code)")" $((SECONDS - from)) | tee -a "$log"
  [ "$code" = 0 ] || status=1
  return "$code"
}

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu_kit: this torch (%s) sees no GPU" % torch.__version__)' || exit 2
nvidia-smi >>"$log" 2>&1
XCOS_COMMIT=${XCOS_COMMIT:-$(git -C "$repo" rev-parse HEAD 2>/dev/null || echo unknown)}
export XCOS_COMMIT PYTHONUNBUFFERED=1

cd "$repo" || exit 2
XCOS_CUDA=on step "build and install" "$python" -m pip install --no-build-isolation --no-deps --force-reinstall . || exit 1

# Not from the source folder, where the package without its library would be found first.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 2
tests=$repo/tests
common=(-p no:cacheprovider -q -m "cuda and not tensorrt" --ignore "$tests/cuda_emulator")
step "tests marked cuda" "$python" -m pytest "${common[@]}" "$tests"

if "$python" -c 'import tensorrt, onnx, onnxscript' 2>>"$log"; then
  step "tests marked tensorrt" "$python" -m pytest -p no:cacheprovider -q -m tensorrt "$tests/test_tensorrt_gpu.py"
else
  echo "=== TensorRT (tensorrt, onnx, onnxscript): not on this machine, left out" | tee -a "$log"
fi

if command -v compute-sanitizer >/dev/null; then
  # Small on purpose: a kernel under the sanitizer runs some hundred times slower.
  chosen='(test_matches_the_reference or test_gradients_match_the_reference) and cuda and (contiguous or channels_last) and logits-'
  chosen+=' and (float16 or float32)'
  chosen_matrix='cuda and (fill_no_tile or matches_the_reference or ties_go_to or test_min_score) and not float64'
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes application-only \
      "$python" -m pytest "${common[@]}" -x -k "$chosen" "$tests/test_xcos_score.py"
    step "compute-sanitizer $tool, all pairs" timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --target-processes application-only "$python" -m pytest "${common[@]}" -x -k "$chosen_matrix" \
      "$tests/test_xcos_matrix.py" "$tests/test_xcos_topk.py"
  done
else
  echo "=== compute-sanitizer: not on this machine, left out" | tee -a "$log"
fi

gpu=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-"))')
step "benchmarks" "$python" "$repo/benchmarks/run.py" --device cuda --budget "${XCOS_KIT_BUDGET:-3}" --out "$out/$gpu.json"
if "$python" -c 'import click, rich' 2>>"$log"; then
  mkdir -p "$out/bench"
  step "end to end: xcos bench by stage and runtime" "$python" "$repo/benchmarks/bench_deployment.py" --device cuda \
    --seconds 0.5 --out "$out/bench/$gpu.json"
else
  echo "=== xcos bench (click, rich): not on this machine, left out" | tee -a "$log"
fi
nvidia-smi >>"$log" 2>&1

echo "=== gpu_kit: $([ $status = 0 ] && echo "all ok" || echo "something FAILED") after $((SECONDS - begin)) s; $out/$gpu.json, $log" | tee -a "$log"
exit $status
