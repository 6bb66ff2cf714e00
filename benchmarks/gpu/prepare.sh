#!/usr/bin/env bash
# Before the call: what can be compiled without a GPU, into the ignored folder .kit, which travels with the checkout
# (64 MB in all): variants of the learned kernel, and the library for that machine's Python, should the build fail there.
#
#   benchmarks/gpu/prepare.sh TORCH_DIR [PYTHON]
#
# TORCH_DIR is the folder of the torch package to build against, that of the GPU machine's version
# (build/torch_versions/2.11.0/lib/python3.11/site-packages/torch after tests/torch_versions.sh 2.11.0); PYTHON
# (default: python3.12) is of the same release as that machine's. The last lines say how to call.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '5p' "$0" >&2
  exit 2
fi
torch=$(cd "$1" && pwd)
python=${2:-python3.12}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
rm -rf .kit  # what an older source was compiled to
mkdir .kit

echo "--- variants"
python3 benchmarks/gpu/variants.py build .kit/variants

echo "--- library"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
git ls-files -co --exclude-standard -z | xargs -0 cp --parents -t "$work"
XCOS_TORCH_DIR=$torch XCOS_CUDA=on XCOS_CUDA_ARCHITECTURES=90-real "$work/venv/bin/python" -m pip wheel -q --no-deps -w "$work" "$work"
python3 - "$work" <<'PYTHON'
import pathlib, sys, zipfile

with zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl"))) as wheel:
    (name,) = [name for name in wheel.namelist() if name.startswith("xcos_ext/_C.")]
    pathlib.Path(".kit", pathlib.Path(name).name).write_bytes(wheel.read(name))
PYTHON
ls -l .kit/_C.*

echo "--- rehearsal"
benchmarks/gpu_kit.sh "$work/results" --dry-run
benchmarks/gpu_tune.sh "$work/results" --dry-run

total=$(($(git ls-files -co --exclude-standard -z | xargs -0 du -cb | tail -n 1 | cut -f1) + $(du -sb .kit | cut -f1)))
echo
echo "What travels: $((total / 1000000)) MB of 67. With .kit carried, run there:"
echo "  XCOS_COMMIT=$(git rev-parse HEAD) bash benchmarks/gpu_kit.sh \"\$OUT\"     limit 540 s"
echo "  XCOS_COMMIT=$(git rev-parse HEAD) bash benchmarks/gpu_tune.sh \"\$OUT\"    limit 240 s"
