"""The table of models on LFW, from the results files of the cross-validations and of the time per pair.

``render.py`` puts it where a page has the marker ``<!-- results: models short -->`` (what README shows), ``models all``
(every attention, every training) or ``models compact`` (the shipped model's card).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
RECOGNISERS = {
    "mobilefacenet_arcface": "MobileFaceNet, PReLU",
    "mobilefacenet_apache2": "MobileFaceNet, ReLU6",
}
COMPACT_TEACHER = "mobilefacenet_apache2"
#: Row of a cross-validation -> what W is.
ATTENTIONS = {
    "trained": "learned",
    "trained, norm": "norm",
    "trained, corr": "corr",
    "trained, uniform": "uniform",
}
#: What README shows of the trainings; the pages show all.
SHORT = ("head from the closed form", "head and body from the closed form", "head from random weights")

Row = tuple[str, str, dict[str, Any], dict[str, Any] | None]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _times() -> dict[str, Any]:
    """Recogniser -> label -> time per pair."""
    found = _read(RESULTS / "models" / "pair_time.json")
    return {stem: values["scores"] for stem, values in found.items()}


def _trained(kind: str) -> Iterator[Row]:
    """What was made of the recognisers."""
    for stem, name in RECOGNISERS.items():
        trainings = _read(RESULTS / "training" / f"crossval_{stem}.json")
        if not trainings:
            continue
        seconds = _times().get(stem, {})
        start = trainings[SHORT[0]]["scores"]
        yield f"{name}: plain cosine", "", start["cosine"], seconds.get("cosine")
        yield "xCos, closed form, nothing trained", "norm", start["start"], seconds.get("closed form")
        shown = [label for label in SHORT if label in trainings] if kind == "short" else list(trainings)
        for label in shown:
            for row, attention in ATTENTIONS.items() if kind == "all" else [("trained", "learned")]:
                figures = trainings[label]["scores"].get(row)  # without a plain cosine there is no corr
                if figures is not None:
                    yield f"xCos, {label}", attention, figures, seconds.get(label) if row == "trained" else None


def _compact(kind: str) -> Iterator[Row]:
    """The shipped model, cross-validated."""
    variants = _read(RESULTS / "models" / "default_model.json").get("variants", {})
    seconds = _times().get(COMPACT_TEACHER, {})
    for row, attention in {"own": "learned", "norm": "norm", "corr": "corr", "uniform": "uniform"}.items():
        if row in variants and (kind != "short" or row == "own"):
            time = seconds.get("compact") if row == "own" else None
            yield "**xCos model that comes with the package**", attention, variants[row], time
    if kind == "compact" and "teacher" in variants:
        yield "its teacher: plain cosine", "", variants["teacher"], seconds.get("cosine")


def _rows(kind: str) -> Iterator[Row]:
    """Name, W, figures, time."""
    if kind != "compact":
        yield from _trained(kind)
    yield from _compact(kind)


def _interval(values: dict[str, Any], key: str, value: float, scale: float, digits: int) -> str:
    low, high = (scale * end for end in values["intervals"][key])
    return f"{scale * value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _tar(values: dict[str, Any], rate: float) -> str:
    (point,) = (point for point in values["operating_points"] if point["requested"] == rate)
    return f"{100 * point['tar']:.2f}"


def table(kind: str) -> str:
    """The table as Markdown.

    Args:
        kind: ``"short"``: one row a model; ``"all"``: every attention too; ``"compact"``: the shipped model only.
    """
    lines = [
        "| score | W | accuracy % | AUC | EER % | TAR % at FMR 1e-2, 1e-3 | time per pair, times the plain cosine's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, attention, values, time in _rows(kind):
        took = ""
        if time is not None:
            low, middle, high = time["times_cosine"]
            took = f"{1e3 * time['seconds'][1]:.1f} ms, {middle:.2f} ({low:.2f} – {high:.2f})"
        lines.append(
            f"| {name} | {attention} | {_interval(values, 'accuracy', values['accuracy']['mean'], 100, 2)} | "
            f"{_interval(values, 'auc', values['auc'], 1, 5)} | {100 * values['eer']:.2f} | "
            f"{_tar(values, 1e-2)}, {_tar(values, 1e-3)} | {took} |"
        )
    return "\n".join(lines) + "\n"
