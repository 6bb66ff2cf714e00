"""What figures belong to: processor, GPU, versions, commit; and how the machine did while they were taken."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import xcos_ext
from xcos_ext.io.text import counted

__all__ = ["ColdCache", "Watch", "busy_warning", "conditions", "machine"]

_ROOT = Path(__file__).resolve().parents[2]
_CPU = Path("/sys/devices/system/cpu")
_GPU_FACTS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
_GPU_STATE = "clocks.sm,clocks.mem,temperature.gpu,power.draw,pstate"

#: Share of the cores that others may use before figures are called disturbed.
_OTHERS = 0.15


def _command(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpuinfo(key: str) -> list[str]:
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def _nvidia_smi(query: str) -> dict[str, str]:
    gpu = f"--id={torch.cuda.current_device()}"
    answer = _command("nvidia-smi", gpu, f"--query-gpu={query}", "--format=csv,noheader").splitlines()
    return dict(zip(query.split(","), answer[0].split(", ") if answer else (), strict=False))


def machine(repository: Path = _ROOT) -> dict[str, Any]:
    """What the figures belong to: processor, GPU with driver and clocks, versions, commit.

    >>> sorted(machine())[:4]
    ['build', 'clean', 'commit', 'cores']

    Args:
        repository: whose commit it is, where it is a git checkout; by default the one that this package lies in.

    Returns:
        JSON-ready values. Outside a checkout ``commit`` is what XCOS_COMMIT says; ``gpu`` is there if torch sees one.
    """
    git = ("git", "-C", str(repository))
    top = _command(*git, "rev-parse", "--show-toplevel")
    ours = bool(top) and Path(top).resolve() == repository.resolve()  # and does not merely lie in somebody else's
    info: dict[str, Any] = {
        "processor": next(iter(_cpuinfo("model name")), "") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": xcos_ext.build_info(),
        "commit": (_command(*git, "rev-parse", "HEAD") if ours else "") or os.environ.get("XCOS_COMMIT", ""),
        "clean": ours and _command(*git, "status", "--porcelain", "--untracked-files=no") == "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        info["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "nvidia_smi": _nvidia_smi(_GPU_FACTS),
        }
    return info


def conditions(*, cuda: bool = False) -> dict[str, Any]:
    """What changes from minute to minute: load, clocks, governor. What cannot be read is None or missing.

    Args:
        cuda: ask nvidia-smi too.

    Returns:
        ``load`` (1-minute average), ``mhz`` (lowest and highest of the cores now), ``governor``, and
        ``gpu`` (clocks, temperature, power as nvidia-smi writes them).
    """
    governors = {_read(path) for path in _CPU.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""}
    khz = map(_read, _CPU.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    load = _read(Path("/proc/loadavg")).split()
    mhz = [int(text) / 1e3 for text in khz if text.isdigit()]
    if not mhz:
        mhz = [float(text) for text in _cpuinfo("cpu MHz") if text.replace(".", "", 1).isdigit()]
    return {
        "load": float(load[0]) if load else None,
        "mhz": [min(mhz), max(mhz)] if mhz else None,
        "governor": ", ".join(sorted(governors)) or None,
        **({"gpu": _nvidia_smi(_GPU_STATE)} if cuda else {}),
    }


def busy_warning(state: dict[str, Any]) -> str | None:
    """A sentence about a machine that was at work before the first measurement, or None."""
    load, cores = state["load"], os.cpu_count() or 1
    if load is None or load < 0.5 * cores:
        return None
    return f"the machine is busy: load {load:.2f} on {counted(cores, 'core')} before anything was measured"


def _cache_bytes() -> int:
    """Size of the processor's last-level cache; 32 MiB where it cannot be read."""
    sizes = []
    for path in (_CPU / "cpu0" / "cache").glob("index*/size"):
        text = _read(path)
        if text[:-1].isdigit() and text[-1:] in "KMG":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=32 << 20)


def _available_memory() -> int:
    """Bytes that can be allocated without swapping; 1 GiB where it cannot be read."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 30


class ColdCache:
    """Empties caches by going over a buffer that is larger than they are.

    On a CPU, torch's own threads read and write 1.25 times the last-level cache, so that every core's private caches
    are emptied too; on a GPU, twice its L2 is overwritten on the current stream.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Attributes:
        bytes: of the buffer.
        whole: whether it is as large as it should be; a quarter of the free memory is the limit.
    """

    def __init__(self, device: str) -> None:
        if device == "cuda":
            wanted = 2 * int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
            limit = int(torch.cuda.mem_get_info()[0]) // 4
        else:
            wanted, limit = _cache_bytes() * 5 // 4, _available_memory() // 4
        self.bytes = min(wanted, limit) // 8 * 8
        self.whole = wanted <= limit
        self._buffer = torch.zeros(self.bytes // 8, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        self._buffer.add_(1)


class Watch:
    """How much of the machine others used since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float | None, float, int]:
        """Seconds of the clock, of all cores, and of this process; how often it was made to wait for others."""
        times, busy = os.times(), None
        fields = _read(Path("/proc/stat")).partition("\n")[0].split()
        if len(fields) > 8 and fields[0] == "cpu":
            # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = [int(field) for field in fields[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        return time.perf_counter(), busy, times.user + times.system, switches

    def read(self) -> dict[str, Any]:
        """``seconds``; ``others``: cores that other processes, or other guests of the host, kept busy on average (None
        where it cannot be told); ``preempted``: how often this process was made to wait for others."""
        (begin, before, own, switches), (end, after, own_after, more) = self._start, self._now()
        seconds, others = max(end - begin, 1e-9), None
        if before is not None and after is not None:
            others = round(max(0.0, (after - before) - (own_after - own)) / seconds, 3)
        return {"seconds": seconds, "others": others, "preempted": more - switches}

    @staticmethod
    def warning(reading: dict[str, Any]) -> str | None:
        """A sentence about a disturbed measurement, or None. Short ones are not judged: the kernel counts coarsely."""
        cores = os.cpu_count() or 1
        others = reading["others"]
        if others is None or reading["seconds"] < 0.5 or others < _OTHERS * cores:
            return None
        return f"others used {others:.1f} of {counted(cores, 'core')} meanwhile"
