"""The headers below every kernel, tested on the host: 16-bit floats, exhaustively, against NumPy and torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).resolve().parents[2]

PROGRAM = r"""
#include <cstdio>
#include <vector>
#include "core/half.h"
using namespace xcos;
int main() {
  // Every 16-bit pattern to float, then floats from stdin to both 16-bit types.
  std::vector<float> wide(65536);
  for (int i = 0; i < 65536; ++i) wide[i] = f16_to_float(static_cast<uint16_t>(i));
  fwrite(wide.data(), 4, wide.size(), stdout);
  for (int i = 0; i < 65536; ++i) wide[i] = bf16_to_float(static_cast<uint16_t>(i));
  fwrite(wide.data(), 4, wide.size(), stdout);
  std::vector<float> in(1 << 20);
  in.resize(fread(in.data(), 4, in.size(), stdin));
  std::vector<uint16_t> narrow(in.size());
  for (size_t i = 0; i < in.size(); ++i) narrow[i] = float_to_f16(in[i]);
  fwrite(narrow.data(), 2, narrow.size(), stdout);
  for (size_t i = 0; i < in.size(); ++i) narrow[i] = float_to_bf16(in[i]);
  fwrite(narrow.data(), 2, narrow.size(), stdout);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_half_conversions(tmp_path):
    (tmp_path / "half.cpp").write_text(PROGRAM)
    sanitizers = ["-fsanitize=undefined,address", "-fno-sanitize-recover=all"]
    command = ["g++", "-std=c++17", "-O1", *sanitizers, f"-I{REPOSITORY / 'csrc'}", "half.cpp", "-o", "half"]
    subprocess.run(command, cwd=tmp_path, check=True)

    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    ties = (np.arange(65536, dtype=np.uint32) << 13 | 0x1000).view(np.float32)  # halfway between two fp16 values
    small = np.ldexp(rng.standard_normal(100_000), rng.integers(-30, 18, 100_000)).astype(np.float32)
    values = np.concatenate(
        [values, ties, small, np.float32([0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520])]
    )
    out = subprocess.run([tmp_path / "half"], input=values.tobytes(), capture_output=True, check=True).stdout

    wide = np.frombuffer(out[: 2 * 65536 * 4], np.float32).reshape(2, 65536)
    narrow = np.frombuffer(out[2 * 65536 * 4 :], np.uint16).reshape(2, len(values))
    patterns = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(wide[0], patterns.view(np.float16).astype(np.float32))
    bf16 = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)
    np.testing.assert_array_equal(wide[1], bf16.float().numpy())

    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(narrow[0].view(np.float16), values.astype(np.float16))
    np.testing.assert_array_equal(
        torch.from_numpy(narrow[1].view(np.int16).copy()).view(torch.bfloat16).float().numpy(),
        torch.from_numpy(values).bfloat16().float().numpy(),
    )
