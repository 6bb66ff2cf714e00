"""How long the way from two photographs to a score takes, stage by stage and runtime by runtime (docs/benchmarks.md).

``xcos bench`` on the command line; here::

    from xcos_ext.bench import Settings, Workload, compare, read_report, run

    with Workload(xcos_ext.load_model()) as workload:
        report = run(workload, Settings(stages=("pair",), batches=(1, 16)))
    compare(read_report("old.json"), report)
"""

from .cases import DEVICES, DTYPES, RUNTIMES, STAGES, Key, Settings
from .comparison import Change, Comparison, compare
from .environment import machine
from .estimates import Estimate, Latency
from .measuring import run
from .results import FormatError, Report, Result, Share, Skipped, read_report
from .workload import Workload, default_picture

__all__ = [
    "DEVICES",
    "DTYPES",
    "RUNTIMES",
    "STAGES",
    "Change",
    "Comparison",
    "Estimate",
    "FormatError",
    "Key",
    "Latency",
    "Report",
    "Result",
    "Settings",
    "Share",
    "Skipped",
    "Workload",
    "compare",
    "default_picture",
    "machine",
    "read_report",
    "run",
]
