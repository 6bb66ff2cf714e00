#!/usr/bin/env bash
# Builds xcos_ext against a version of torch and runs the tests of operators, contracts, heads and compilation there:
# a range of versions is a promise that has to be run.
#
#   tests/torch_versions.sh VERSION [FOLDER]     e.g. 2.11.0; "newest" is the newest that the package index has
#
# The environment is made in FOLDER/VERSION (default: build/torch_versions), once; a CUDA build of torch takes some
# 5 GB there. The build is that of a copy of the checkout, CPU only unless XCOS_CUDA says otherwise. The last line is
# a row for the table in docs/reliability.md.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '5p' "$0" >&2
  exit 2
fi
version=$1
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${2:-$repo/build/torch_versions}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)/$version
python=$folder/bin/python

if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
fi
wanted=torch==$version
[ "$version" = newest ] && wanted=torch
if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "--- $wanted"
  "$python" -m pip install -q "$wanted"
fi
"$python" -m pip install -q numpy 'safetensors>=0.4.3' 'pytest>=8' 'hypothesis>=6.100' \
  'setuptools>=77,<82' wheel 'cmake>=3.24' ninja 'pybind11>=2.12'

echo "--- build"
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
cd "$repo"
git ls-files -co --exclude-standard -z | xargs -0 cp --parents -t "$source"
cd "$source"
# What the environment has is what is built with: nothing is fetched beside it.
PATH=$folder/bin:$PATH XCOS_CUDA=${XCOS_CUDA:-off} "$python" -m pip install -q --no-build-isolation --no-deps --force-reinstall .

echo "--- test"
# Not from the source folder, where the package without its library would be found first.
cd "$source/tests"
status=0
PATH=$folder/bin:$PATH "$python" -m pytest -q -p no:cacheprovider --show-capture=no \
  ops/test_{grid_cosine,grid_match,xcos_score,xcos_matrix,xcos_topk,xcos_maps,xcos_head,all_pairs_operators}.py \
  ops/test_{templates,contracts,numpy,tracing,forward_mode}.py \
  model/test_nn_{attention,matching,model,residual}.py deploy/test_nn_{compiled,inference}.py 2>&1 | tee "$folder/tests.log" || status=$?

echo "| $("$python" -c 'import torch; print(torch.__version__)') | $("$python" -c 'import platform; print(platform.python_version())') \
| $(date +%F) | $(tail -n 1 "$folder/tests.log") |"
exit "$status"
