#!/usr/bin/env bash
# Trains the default model in a given time, from a folder of `python -m recipes.pack`:
#
#   recipes/train_default.sh --device cuda --minutes 8 --out FOLDER [--data .carry]
#
# On a machine that was lent: carry the data's folder and .kit, whose library (benchmarks/gpu/prepare.sh) is used where
# the package is not built, and .wheels, if it lacks a package: pip download -d .wheels --no-deps pydantic ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=.carry
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2; shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
python=${PYTHON:-python3}
if ! ls xcos_ext/_C.* >/dev/null 2>&1; then
  cp .kit/_C.* xcos_ext/
fi
if ! "$python" -c 'import pydantic' 2>/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --target .packages .wheels/*.whl
  export PYTHONPATH=$PWD/.packages${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m recipes.in_minutes "$data" "${arguments[@]}"
