#!/usr/bin/env bash
# The second command for a machine with an NVIDIA GPU, at most 200 s: variants of the learned kernel beside each other,
# the best under Nsight Compute, and the model in its runtimes (benchmarks/gpu/kit.py). Variants are those that
# benchmarks/gpu/prepare.sh built beforehand.
#
#   benchmarks/gpu_tune.sh [FOLDER] [--dry-run]       default: benchmarks/results/gpu/NAME-OF-THE-GPU
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu/kit.py" tune "$@"
