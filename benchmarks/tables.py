"""What tables of results share, and those of the operators' speed: Markdown from the files in results, see render.py.

Those of runs on GPUs and of ``xcos bench`` are in gpu_table.py and bench_table.py, those of studies in
recipes/studies/study_tables.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PENDING = "Pending: not measured in a committed results file yet."

Data = dict[str, Any]


def load(path: str) -> Data | None:
    """A results file; None: there is none."""
    file = RESULTS / path
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table, line by line."""
    columns = list(columns)
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def commit(machine: Data) -> str:
    """What the figures were measured with."""
    return f"commit `{machine['commit'][:10]}`, {machine['date'][:10]}"


def duration(seconds: float) -> str:
    """Three digits that count."""
    unit, scale = next((u for u in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= u[1]), ("ns", 1e-9))
    return f"{seconds / scale:.3g} {unit}"


def spread(row: Data | None, text: Any = "{:.2f}".format) -> str:
    """Median and quartiles; nothing where there are none."""
    return "" if row is None else f"{text(row['median'])} ({text(row['low'])} – {text(row['high'])})"


def targets(cells: Iterable[tuple[str, str, str]]) -> list[str]:
    """What was aimed for, what was reached, and whether that is enough; nothing where nothing was aimed for."""
    rows = list(cells)
    return ["", *markdown(("target", "reached", ""), rows)] if rows else []


def _targets(rows: list[Data]) -> Iterator[tuple[str, str, str]]:
    for row in rows:
        for target in row["targets"]:
            reached = target["reached"]
            text = f"{reached:.0f}" if reached >= 100 else f"{reached:.3g}"
            text = duration(reached) if "under 10 us" in target["text"] else text
            name = row["name"].split("/")[-1]
            yield f"{name}: {target['text']}", text, "met" if target["met"] else "missed"


def _pair_cells(row: Data) -> Iterator[str]:
    seconds, speedup = row["seconds"], row["speedup"]
    yield row["name"]
    yield from (spread(seconds.get(name), duration) for name in ("xcos_ext", "eager", "torch.compile"))
    yield from (f"{speedup[name]['median']:.2f}" if name in speedup else "" for name in ("eager", "torch.compile"))
    if "bandwidth_share" in row:
        (peer,) = set(row["bandwidth"]) - {"xcos_ext"}
        share = row["bandwidth_share"]["median"]
        yield f"{row['bandwidth']['xcos_ext'] / 1e9:.3g} GB/s, {share:.2f} of {peer}"
    else:
        yield ""


def _matrix_cells(row: Data) -> Iterator[str]:
    def times(ratio: float) -> str:
        return f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.2f}"

    facts, rates = row["facts"], row["multiply_adds"]
    yield f"{row['name']}: {row['note']}"
    yield spread(row["seconds"]["xcos_ext"], duration)
    yield f"{row['pairs'] / row['seconds']['xcos_ext']['median'] / 1e6:.3g} million"
    yield "; ".join(
        f"{name}{' (scaled)' if name in row['scaled'] else ''} {duration(row['seconds'][name]['median'])}, "
        f"**{times(speed['median'])}**"
        for name, speed in row["speedup"].items()
        if name != "gemm"
    )
    # Halves are held against torch's fp32 product: see bench_xcos_topk.py.
    kind = "fp32 GEMM" if row["name"].endswith("fp16") else "GEMM"
    share = "gemm" in rates and rates["xcos_ext"] / rates["gemm"]
    yield f"{rates['xcos_ext'] / 1e9:.0f} G/s, {share:.2f} of a {kind}" if share else ""
    error = ""
    if "largest error" in facts:
        agreement = f"{100 * facts['top-10 agreement']:.1f} %"
        error = f"{facts['largest error']:.1e} / {facts['mean error']:.1e}; {agreement}"
    yield error
    memory = f"{facts['extra MB']:.0f} MB" if "extra MB" in facts else ""
    yield memory + (f" (eager {facts['extra MB of eager']:.0f} MB)" if "extra MB of eager" in facts else "")


_OPERATORS = {
    "pairs": (
        ("case", "xcos_ext", "eager", "torch.compile", "times eager", "times compile", "bandwidth"),
        _pair_cells,
    ),
    "matrix": (
        (
            "case", "xcos_ext", "pairs/s", "against peers: their time, times faster ours is", "multiply-adds",
            "error against fp64, largest / mean; top-10 agreement", "extra memory",
        ),
        _matrix_cells,
    ),
}  # fmt: skip


def _place(machine: Data) -> str:
    return f"{machine['processor']}, {machine['threads']} threads"


def operators(files: Iterable[str], kind: str) -> list[str]:
    """Tables ``pairs`` or ``matrix`` (all pairs) of some results files."""
    lines: list[str] = []
    columns, cells = _OPERATORS[kind]
    for results in filter(None, map(load, files)):
        machine, matrix = results["machine"], ("xcos_topk/", "xcos_matrix/")
        rows = [row for row in results["cases"] if row["name"].startswith(matrix) == (kind == "matrix")]
        heading = f"{_place(machine)}; torch {machine['torch']}; {commit(machine)}. Median and quartiles"
        lines += [f"{heading}; peers in the same run.", ""]
        lines += [*markdown(columns, map(cells, rows)), *targets(_targets(rows)), ""]
    return lines[:-1] or [PENDING]


# What README shows of the operators' speed: where it was measured, the case, what it is, the peer and its name.
_HEADLINES = (
    ("cpu.json", "xcos_score/forward/fp32", "score of 4,096 pairs", "torch.compile", "torch.compile, leanest form"),
    ("cpu.json", "xcos_score/forward+backward/fp32", "score and gradients", "torch.compile", "torch.compile"),
    (
        "cpu.json", "xcos_topk/learned/bf16", "64 x 100,000 pairs, learned W, top 10, bf16", "cosine fp32",
        "torch's fp32 cosine",
    ),
    ("head/threads2.json", "xcos_head/ordered/256", "learned head, 256 pairs", "eager", "the published head, eager"),
    (
        "gpu/nvidia-h100-80gb-hbm3/roofline.jsonl", "xcos_score/forward/fp32", "score of 262,144 pairs", "copy",
        "copying as many bytes",
    ),
)  # fmt: skip


def speed(kind: str) -> list[str]:
    """``short``: five lines for README."""
    rows = []
    for name, case, what, peer, peer_name in _HEADLINES:
        file = RESULTS / name
        if file.suffix == ".jsonl":  # a GPU's
            found, where = [json.loads(line) for line in file.read_text("utf-8").splitlines()], file.parent.name
            where = where.upper().replace("-", " ")
        else:
            results = json.loads(file.read_text("utf-8"))
            found, where = results["cases"], _place(results["machine"])
        row = next(row for row in found if row.get("name") == case)
        seconds, times = row["seconds"], row["speedup"][peer]["median"]
        ours = spread(seconds["xcos_ext"], duration)
        rows.append((what, where, ours, f"{peer_name}: {duration(seconds[peer]['median'])}", f"{times:.2f}"))
    return markdown(("what", "where", "xcos_ext, median and quartiles", "peer, same run", "times faster"), rows)
