#!/usr/bin/env bash
# The CPU kernels under sanitizers: a build of a copy of the checkout with AddressSanitizer and
# UndefinedBehaviorSanitizer, another with ThreadSanitizer, and the operator tests on both, for every instruction set
# that this processor has. Before each a fault is planted in the copy and has to be reported.
#
#   tests/sanitizers.sh [--short]     --short: one instruction set, each parameter once; for CI
#
# Needs the installed package (which says what the processor has) and g++. Nothing of the checkout is touched. The last
# lines are rows for the table in docs/reliability.md.
set -euo pipefail

if [ $# -gt 1 ] || { [ $# -eq 1 ] && [ "$1" != --short ]; }; then
  sed -n '6p' "$0" >&2
  exit 2
fi
short=${1:-}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export XCOS_SHARED_DATA=${XCOS_SHARED_DATA:-$repo/../shared/data}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$repo"
git ls-files -co --exclude-standard -z -- CMakeLists.txt cmake csrc python_bindings xcos_ext tests pyproject.toml |
  xargs -0 cp --parents -t "$work"

read -r used sets lacking <<<"$(cd / && python - <<'PYTHON'
import xcos_ext

info = xcos_ext.build_info()
supported = info["isa_supported"]
lacking = [name for name in info["isa_compiled"] if name not in supported]
print(info["isa"], ",".join(reversed(supported)), ",".join(lacking) or "none")
PYTHON
)"
[ -n "$short" ] && sets=$used
processor=$(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -n 1)
echo "--- ${processor:-$(uname -m)}: ${sets//,/, }; not on this processor: ${lacking//,/, }"

# One build for all sets. A Debug build has kernels at -O1 and the rest at -O0, and so takes a third of the time; what is
# checked is the source. ccache, where there is one, finds files of another temporary folder again.
export CCACHE_BASEDIR=$work CCACHE_NOHASHDIR=1
build() { # name, flags
  local launcher=()
  if command -v ccache >/dev/null; then launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
  mkdir -p "$work/$1/xcos_ext"
  cp -r "$work"/xcos_ext/. "$work/$1/xcos_ext"
  cmake -S "$work" -B "$work/$1/build" -G Ninja "${launcher[@]}" -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=Debug \
    "-DCMAKE_CXX_FLAGS_DEBUG=-g1 -fno-omit-frame-pointer $2" "-DXCOS_CPU_ISAS=${sets//,/;}" -DXCOS_CUDA=off \
    "-DPython_EXECUTABLE=$(command -v python)" "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$work/$1/xcos_ext" \
    >"$work/$1/log" 2>&1 || { cat "$work/$1/log"; exit 1; }
  ninja -C "$work/$1/build" ${XCOS_BUILD_JOBS:+-j "$XCOS_BUILD_JOBS"} >"$work/$1/log" 2>&1 || { tail -n 40 "$work/$1/log"; exit 1; }
}

# CPython keeps memory until its end and past it, so leaks are not looked for.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# What torch does with its own threads is not ours to judge, nor could it be: it is not instrumented.
export TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1
runtime() { g++ "-print-file-name=lib$1.so"; }
# What sanitizers write on stderr is wanted, also by a process that they end: nothing is captured.
run_tests() { # build, instruction set, preloaded libraries, arguments of pytest
  local name=$1 isa=$2 preload=$3
  shift 3
  (cd "$work/tests" && PYTHONPATH=$work/$name XCOS_CPU_ISA=$isa "${unrandomised[@]}" env LD_PRELOAD="$preload" \
    python -m pytest -q -x -p no:cacheprovider --capture=no "$@")
}

# A line of xcos_topk.cpp, which is compiled once and quickly, is changed; the tests must fail with these words.
planted() { # build, preloaded libraries, line, its replacement, words
  local file=$work/csrc/cpu/xcos_topk.cpp
  cp -p "$file" "$work/kept.cpp"
  python - "$file" "$3" "$4" <<'PYTHON'
import pathlib, sys

path, line, fault = pathlib.Path(sys.argv[1]), *sys.argv[2:]
text = path.read_text()
assert text.count(line) == 1, f"{path.name} no longer has the line {line!r}: plant the fault elsewhere"
path.write_text(text.replace(line, fault))
PYTHON
  ninja -C "$work/$1/build" >"$work/$1/log" 2>&1 || { tail -n 40 "$work/$1/log"; exit 1; }
  if run_tests "$1" "$used" "$2" ops/test_xcos_topk.py -k exclusions -m "not thorough" >"$work/$1/log" 2>&1 ||
    ! grep -q "$5" "$work/$1/log"; then
    cat "$work/$1/log"
    echo "a planted fault was not reported: $5" >&2
    exit 1
  fi
  cp "$work/kept.cpp" "$file"
  echo "planted: $5, reported"
}

rows=()
check() { # build, sanitizers in words, instruction set, preloaded libraries, arguments of pytest
  local name=$1 words=$2 isa=$3 preload=$4
  shift 4
  echo "--- $words: $isa"
  run_tests "$name" "$isa" "$preload" "$@" 2>&1 | tee "$work/tests.log"
  rows+=("| $words | $isa | $(date +%F) | ${processor:-$(uname -m)} | $(tail -n 1 "$work/tests.log") |")
}

unrandomised=()
workers=()
# Two processes, where xdist is there.
python -c 'import xdist' 2>/dev/null && workers=(-n 2)
# test_devices.py is about commands and networks. Left out where time counts: compiled graphs, which are torch's code, and
# more pairs than are needed. Under ThreadSanitizer every loop runs in two threads (two_threads.cpp), and other values of
# a parameter show it no other schedule.
operators=(ops --ignore=ops/test_devices.py "${workers[@]}")
native="not compile and not opcheck and not many_blocks and not ties_across and not int_can_count"
if [ -n "$short" ]; then
  chosen=("${operators[@]}" --ignore=ops/test_tracing.py -m "not (process or slow or thorough)" -k "$native")
  threaded=("${operators[@]}" -m "not (process or slow)" -k thread)
else
  chosen=("${operators[@]}" -m "not (process or slow)")
  threaded=("${operators[@]}" --ignore=ops/test_tracing.py -m "not (process or slow or thorough)" -k "$native")
fi

echo "--- build: address, undefined"
time build address "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
export OMP_NUM_THREADS=2
asan="$(runtime asan) $(runtime ubsan)"
planted address "$asan" "i < u.exclude_count" "i <= u.exclude_count" heap-buffer-overflow
planted address "$asan" "u.first_index + column" "u.first_index + column + INT64_MAX" "signed integer overflow"
ninja -C "$work/address/build" >/dev/null
for isa in ${sets//,/ }; do
  check address "address, undefined" "$isa" "$asan" "${chosen[@]}"
done

echo "--- build: thread"
time build thread -fsanitize=thread
g++ -std=c++17 -O1 -g -fsanitize=thread -shared -fPIC "$work/tests/support/two_threads.cpp" -o "$work/thread/threads.so" -pthread
export OMP_NUM_THREADS=1
tsan="$(runtime tsan) $work/thread/threads.so"
# Where addresses are drawn from more bits than the sanitizer can do with, they are not drawn.
if ! env LD_PRELOAD="$(runtime tsan)" true 2>/dev/null; then unrandomised=(setarch -R); fi
planted thread "$tsan" "List<A>(u, probe, memory).merge();" \
  "{ static int64_t planted; planted += probe; List<A>(u, probe, memory).merge(); }" "data race"
ninja -C "$work/thread/build" >/dev/null
for isa in ${sets//,/ }; do
  check thread thread "$isa" "$tsan" "${threaded[@]}"
done

printf '%s\n' "${rows[@]}"
