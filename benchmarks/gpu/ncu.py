"""Five kernels under Nsight Compute, one launch each: how near to the machine's limits, and what the warps wait for.

python benchmarks/gpu/ncu.py             runs ncu on this file and writes a JSON line a kernel
python benchmarks/gpu/ncu.py --launch    what it profiles
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stages import SKIPPED, emit, seconds_left

KERNELS = "regex:staged_forward|staged_backward|matrix_tensor|head_forward|topk_update"
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "LaunchStats", "SchedulerStats")


def find_ncu() -> str | None:
    """Its path."""
    return shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")


def launch() -> int:
    """Each kernel once inside the profiled part, at sizes whose replays are short."""
    import torch
    from bench_xcos_head import head_and_attention
    from bench_xcos_topk import generated_faces, trained_attention

    import xcos_ext

    device = "cuda"
    torch.manual_seed(0)
    a, b = (torch.randn(65_536, 32, 7, 7, device=device, dtype=torch.float16) for _ in range(2))
    w = torch.rand(65_536, 7, 7, device=device)
    grad = torch.randn(65_536, device=device)
    attention = trained_attention(device).requires_grad_(False)
    probes, gallery = generated_faces(256, 65_536, device)
    p, g = attention.templates(probes, "probe", torch.float16), attention.templates(gallery, "gallery", torch.float16)
    head, _ = head_and_attention(device, False)
    backward = torch.ops.xcos_ext.xcos_score_backward

    def once() -> None:
        xcos_ext.xcos_score(a, b, w)
        with xcos_ext.ops._library.below_autograd():
            backward(grad, None, None, a, b, w, 2, 1.0, 1e-6, True, True, True)
        xcos_ext.xcos_topk(p, g[:32_768], 10)  # one block of scores: matrix_tensor, then topk_update
        head.score(a[:4096].float(), b[:4096].float())

    with torch.no_grad():
        once()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        once()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def parse(text: str) -> dict[str, dict[str, str]]:
    """Metrics by kernel from ``ncu --csv --page details``."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    found: dict[str, dict[str, str]] = {}
    if start is None:
        return found
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name = f"{row.get('ID', '')} {row.get('Kernel Name', '')}".strip()
        metric = row.get("Metric Name") or ""
        if metric:
            found.setdefault(name, {})[metric] = f"{row.get('Metric Value', '')} {row.get('Metric Unit', '')}".strip()
    return found


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", action="store_true")
    options = parser.parse_args()
    if options.launch:
        return launch()
    program = find_ncu()
    if program is None:
        emit(case="ncu", status="skipped", message="ncu not found (looked at PATH and /usr/local/cuda/bin)")
        return SKIPPED
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", KERNELS,
               "--launch-count", "6", "--csv", "--page", "details"]  # fmt: skip
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, __file__, "--launch"]
    import time

    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds_left(begin, 50) - 2)
        text, code = done.stdout, done.returncode
        complaint = done.stderr.strip()[-1500:]
    except subprocess.TimeoutExpired as late:
        text = (late.stdout or b"").decode(errors="replace") if isinstance(late.stdout, bytes) else (late.stdout or "")
        code, complaint = 1, "stopped at its cap"
    kernels = parse(text)
    for name, metrics in kernels.items():
        emit(case=name, status="ok", metrics=metrics)
        print(name, {key: metrics[key] for key in list(metrics)[:8]})
    if not kernels:
        emit(case="ncu", status="failed", message=complaint or text[-1500:] or f"exit status {code}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
