#!/usr/bin/env bash
# Compiles what includes torch's headers against those of another version, without installing it: CI does so with 2.11,
# which brings a pybind11 of its own that the stable ABI cannot be built with.
#
#   tests/torch_headers.sh VERSION [FOLDER]
#
# FOLDER (default: a temporary one) keeps include/ of that version's wheel, so that a second run downloads nothing; it
# serves as XCOS_TORCH_DIR where nothing has to be linked.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '5p' "$0" >&2
  exit 2
fi
version=$1
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
folder=${2:-$work/headers}
mkdir -p "$folder"

if [ ! -f "$folder/torch/version.py" ]; then
  python -m pip download -q --no-deps -d "$work" "torch==$version"
  python - "$work" "$folder" <<'PYTHON'
import pathlib, sys, zipfile

wheel = next(pathlib.Path(sys.argv[1]).glob("torch-*.whl"))
with zipfile.ZipFile(wheel) as archive:
    names = [n for n in archive.namelist() if n.startswith("torch/include/")]
    archive.extractall(sys.argv[2], [*names, "torch/version.py"])
PYTHON
fi

cmake -S "$repo" -B "$work/build" -G Ninja "-DXCOS_TORCH_DIR=$folder/torch" "-DPython_EXECUTABLE=$(command -v python)" \
  "-DXCOS_CUDA_ARCHITECTURES=90-real" >"$work/log" || { cat "$work/log"; exit 1; }
grep -- '-- xcos_ext' "$work/log"
objects=$(ninja -C "$work/build" -t targets all | sed -n 's/^\(CMakeFiles\/_C\.dir\/\(python_bindings\|csrc\/ops\)\/[^:]*\.o\):.*/\1/p')
[ -n "$objects" ]
# shellcheck disable=SC2086
ninja -C "$work/build" $objects
echo "torch $version: $(echo "$objects" | wc -l) files compile against its headers"
