"""How long the way from two photographs to a score takes, stage by stage and runtime by runtime (docs/bench.md).

``xcos bench`` on the command line; here::

    from xcos_ext.bench import Settings, Subject, compare, read_report, run

    with Subject(xcos_ext.load_model()) as subject:
        report = run(subject, Settings(stages=("pair",), batches=(1, 16)))
    compare(read_report("old.json"), report)
"""

from .cases import DEVICES, DTYPES, RUNTIMES, STAGES, Key, Settings
from .comparison import Change, Comparison, compare
from .machine import machine
from .reading import FormatError, read_report
from .report import Report, Result, Share, Skipped
from .runner import run
from .statistics import Estimate, Latency
from .subject import Subject, default_picture

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
    "Subject",
    "compare",
    "default_picture",
    "machine",
    "read_report",
    "run",
]
