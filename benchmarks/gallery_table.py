"""Tables of galleries for README and the pages in docs: see render.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


def _load(path: str) -> dict[str, Any] | None:
    file = FOLDER / path
    return json.loads(file.read_text()) if file.exists() else None


def _seconds(row: dict[str, float]) -> str:
    values = [row["median"], row["low"], row["high"]]
    scale, unit = (1e3, "ms") if values[0] < 1 else (1.0, "s")
    middle, low, high = (f"{v * scale:.3g}" for v in values)
    return f"{middle} {unit} ({low} – {high})"


def _ratio(row: dict[str, float]) -> str:
    return f"{row['median']:.2f} ({row['low']:.2f} – {row['high']:.2f})"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _probes(count: int | str) -> str:
    return f"{count} probe" + "s" * (str(count) != "1")


def scale(short: bool) -> list[str]:
    """Figures of a large gallery of generated faces."""
    data = _load("gallery/scale.json")
    if data is None:
        return ["Pending: not measured yet."]
    phases, machine = data["phases"], data["machine"]
    lines = [
        f"{_count(data['faces'])} generated faces, fp16, published head; {machine['processor']}, {machine['threads']} "
        f"threads; commit `{machine['commit'][:10]}`, {machine['date'][:10]}. Median and quartiles.",
        "",
        "| what | measured |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _rows(data)),
    ]
    if short:
        return lines
    if "faiss" in phases:
        index = phases["faiss"]
        built, peak = index["build_seconds"], index["peak_bytes"] / 1e9
        lines.append(f"| building a faiss index (IVF, 8 bits), in memory | {built:.0f} s, peak memory {peak:.1f} GB |")
    lines += [
        "",
        "Two stages: recall@10 against the exact search on 64 probes, and the speed beside it:",
        "",
        "| gallery | probes | coarse | R | recall@10 | times the exact search's speed |",
        "|---|---|---|---|---|---|",
    ]
    stages = (("generated", "two_stages"), ("generated", "faiss"), ("LFW, 10,562 pictures", "two_stages_lfw"))
    for name, phase in stages:
        for r in phases.get(phase, {}).get("rows", []):
            cells = (name, r["probes"], r["coarse"], _count(r["rerank"]), f"{r['recall_at_10']:.4f}")
            lines.append("| " + " | ".join(map(str, cells)) + f" | {_ratio(r['speedup'])} |")
    return lines


def _rows(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, measured)."""
    phases = data["phases"]
    enrol, first, later, sizes = (phases[name] for name in ("enrol", "first_search", "later_process", "sizes"))
    each, rate = enrol["bytes_per_face"], enrol["faces_per_second"]
    tiles = first["tiles_bytes"] / data["faces"]
    yield (
        "size on disk",
        f"{_count(each)} bytes a face, {enrol['times_template_bytes']:.3f} times 4,704; "
        f"packed tiles {_count(tiles)} more",
    )
    spread = f"{_count(rate['median'])} faces/s ({_count(rate['low'])} – {_count(rate['high'])})"
    yield "enrolling templates", f"{spread}, in {enrol['commits']} commits"
    yield "first search, 16 probes: packs the tiles", f"{first['search_seconds']:.1f} s"
    yield "first search of a later process, 16 probes: checks them", f"{later['search_seconds']:.2f} s"
    for row in sizes["rows"]:
        if row["faces"] == data["faces"]:
            yield f"later searches, {_probes(row['probes'])}", _seconds(row["seconds"])
    for row in phases["against_memory"]["rows"]:
        yield (
            f"speed beside the kernel in memory, {_count(row['faces'])} faces, {_probes(row['probes'])}",
            _ratio(row["speed_of_memory"]),
        )
    cold = phases.get("cold_disk", {})
    if "share_of_reading" in cold:
        search, read = (cold[f"{name}_bytes_per_second"]["median"] / 1e9 for name in ("search", "read"))
        share = _ratio(cold["share_of_reading"])
        yield (
            "cold search, 16 probes",
            f"{search:.2f} GB/s; plainly reading the same files {read:.2f} GB/s; ratio {share}",
        )
    # These hold the peer's templates and faiss' index in memory.
    apart = ("against_memory", "faiss")
    peak = max(p.get("peak_bytes", 0) for name, p in phases.items() if name not in apart)
    yield "peak memory of any phase, maps included", f"{peak / 1e9:.2f} GB"
    for width, fit in sizes["fits"].items():
        yield (
            f"cost against N from 10⁴ on, {_probes(width)}",
            f"{1e3 * fit['seconds_per_million']:.0f} ms a million, straight line R² {fit['r_squared']:.4f}",
        )
    if "ranks" in phases:
        yield "two ranks beside one, a thread each, 16 probes", f"{phases['ranks']['speedup']:.2f} times the speed"
    gone = phases.get("remove_and_compact")
    if gone is not None:
        yield (
            f"removing {_count(gone['removed'])} faces, then compacting",
            f"{gone['remove_seconds']:.2f} s, {gone['compact_seconds']:.1f} s",
        )


_SCORES = {
    "recogniser": {
        "plain cosine": ("MobileFaceNet: plain cosine", ""),
        "closed form, norm": ("xCos, closed form, nothing trained", "norm"),
        "closed form, uniform": ("", "uniform"),
        "head, learned": ("xCos, head from the closed form", "learned"),
        "head, norm": ("", "norm"),
        "head, uniform": ("", "uniform"),
    },
    "shipped": {
        "learned": ("**xCos model that comes with the package**", "learned"),
        "norm": ("", "norm"),
        "uniform": ("", "uniform"),
        "cosine of the flattened grid feature": ("its features: plain cosine", ""),
    },
}


def _percent(figure: dict[str, Any], *, complement: bool = False) -> str:
    values = [figure["value"], *figure["interval"]]
    if complement:
        values = [1 - values[0], 1 - values[2], 1 - values[1]]
    middle, low, high = (f"{100 * v:.2f}" for v in values)
    return f"{middle} [{low}, {high}]"


def identification() -> list[str]:
    """Closed- and open-set identification on LFW."""
    data = _load("identification/lfw.json")
    if data is None:
        return ["Pending: not measured yet."]
    lines = [
        "| score | W | rank-1 % | rank-5 % | FNIR % at FPIR 1 % | persons enrolled, mated and non-mated probes |",
        "|---|---|---|---|---|---|",
    ]
    for system, rows in _SCORES.items():
        found = data["systems"][system]
        counts = "; ".join(
            f"{p['counts']['enrolled_people']:,}, {p['counts']['mated_probes']:,}, {p['counts']['non_mated_probes']:,}"
            for p in found["parts"]
        )
        for name, (label, attention) in rows.items():
            figures = found["mean"][name]
            cells = (
                _percent(figures["rank@1"]),
                _percent(figures["rank@5"]),
                _percent(figures["tpir@0.01"], complement=True),
            )
            lines.append(f"| {label} | {attention} | {' | '.join(cells)} | {counts if label else ''} |")
    return lines


def table(kind: str) -> str:
    """The table of a results marker."""
    lines = identification() if kind == "identification" else scale(short=kind == "short")
    return "\n".join(lines) + "\n"
