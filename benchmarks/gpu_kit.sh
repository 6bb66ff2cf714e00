#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: builds, tests, sanitizes and measures in at most eight minutes, a
# JSON-lines file a stage (benchmarks/gpu/kit.py). Needs nvcc, CMake, Ninja, pybind11, pytest and a CUDA build of
# torch >= 2.10; no network.
#
#   benchmarks/gpu_kit.sh [FOLDER] [--dry-run]        default: benchmarks/results/gpu/NAME-OF-THE-GPU
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu/kit.py" kit "$@"
