"""Tables of explainers' faithfulness for README and the pages in docs: see render.py and faithfulness.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results" / "faithfulness"
#: Results file -> what is explained.
MODELS = {
    "compact": "xcos-compact, the default model",
    "faithful": "xcos-faithful, trained on swapped regions too",
    "local": "xcos-local, cells of 44x44 pixels",
    "cosine": "plain cosine of MobileFaceNet",
}
LABELS = {
    "xcos": "**xCos contribution W (S − t)**",
    "xcos-similarity": "**xCos similarity S**",
    "xcos-attention": "xCos attention W",
    "reconstruction": "reconstruction",
    "corrrise": "CorrRISE",
    "fggb": "FGGB",
    "xssab": "xSSAB",
    "occlusion": "occlusion of cells",
    "gradcam": "Grad-CAM",
    "random": "control: random",
    "centre": "control: centre",
}
DIRECTIONS = ("impostor-into-genuine", "genuine-into-impostor")
READINGS = ("absolute", "difference", "centred")


def _load(name: str) -> dict[str, Any] | None:
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _value(estimate: dict[str, Any] | None, digits: int = 2) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    text = f"{estimate['value']:.{digits}f}"
    if estimate.get("interval"):
        low, high = estimate["interval"]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def _seconds(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return ""
    value = timing["median"]
    return f"{value:.2g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _heading(data: dict[str, Any]) -> list[str]:
    machine = data["machine"]
    return [
        f"{MODELS[data['name']]}; LFW, people of folds {', '.join(map(str, data['folds']))}, not trained on; "
        f"{machine['processor']}, {machine['threads']} thread; commit `{machine['commit'][:10]}`, "
        f"{machine['date'][:10]}.",
        "",
    ]


def _swaps(data: dict[str, Any]) -> dict[str, tuple[int, dict[tuple[str, str, str], dict[str, Any]], dict[str, Any]]]:
    """Explainer -> pairs, (direction, paste, region) -> row, timing: of the part with the most pairs."""
    found: dict[str, Any] = {}
    for part in data["parts"]:
        swaps = part["region_swap"]
        for name in part["explainers"] if swaps else ():
            if name not in found:
                rows = {(r["direction"], r["paste"], r["region"]): r for r in swaps["rows"] if r["explainer"] == name}
                found[name] = part["count"], rows, part["seconds_a_pair"].get(name)
    return {name: found[name] for name in LABELS if name in found}


def _orders(data: dict[str, Any]) -> dict[str, Any]:
    """Explainer -> pairs, (protocol, kind, mode) -> area, kind of pairs -> area of flips, timing."""
    found: dict[str, Any] = {}
    for part in (p for p in data["parts"] if p["deletion"]):
        for name in part["explainers"]:
            if name in found:
                continue
            areas = {
                (protocol, r["kind"], r["mode"]): r["curve"]["area"]
                for protocol in ("deletion", "identification")
                for r in part[protocol]["rows"]
                if r["explainer"] == name
            }
            flips = {r["pairs"]: r["flips"]["area"] for r in part["patch"]["rows"] if r["explainer"] == name}
            found[name] = part["count"], areas, flips, part["seconds_a_pair"].get(name)
    return {name: found[name] for name in LABELS if name in found}


def region_swap(data: dict[str, Any]) -> list[str]:
    """Mean AUC over the regions for every explainer, both directions, all readings."""
    lines = [
        *_heading(data),
        "| map | impostor's region in a genuine pair: absolute | difference | centred | genuine region in an "
        "impostor pair: absolute | difference | centred | same person's region: absolute | difference | centred | "
        "S above it, absolute, same pairs | pairs | time per pair |",
        "|" + "---|" * 13,
    ]
    for explainer, (count, rows, timing) in _swaps(data).items():
        cells = [
            _value(rows.get((direction, paste, "mean"), {}).get(reading))
            for direction, paste in ((DIRECTIONS[0], "swap"), (DIRECTIONS[1], "swap"), (DIRECTIONS[0], "same-person"))
            for reading in READINGS
        ]
        cells.append(_value(rows[DIRECTIONS[0], "swap", "mean"].get("behind")))
        lines.append(f"| {LABELS[explainer]} | {' | '.join(cells)} | {count} | {_seconds(timing)} |")
    return lines


def regions(data: dict[str, Any]) -> list[str]:
    """Absolute AUC of every region, an impostor's in a genuine pair."""
    found = _swaps(data)
    first = next(iter(found.values()))[1]
    names = [region for direction, paste, region in first if (direction, paste) == (DIRECTIONS[0], "swap")]
    lines = [*_heading(data), f"| map | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for explainer, (_, rows, _) in found.items():
        cells = [f"{rows[DIRECTIONS[0], 'swap', region]['absolute']['value']:.2f}" for region in names]
        lines.append(f"| {LABELS[explainer]} | {' | '.join(cells)} |")
    return lines


def deletion(data: dict[str, Any]) -> list[str]:
    """Areas of deletion and insertion, and of patch replacement."""
    found = _orders(data)
    lines = [
        *_heading(data),
        "| map | verification, similar map: deletion ↓ | insertion ↑ | dissimilar map: deletion | insertion | "
        "identification: deletion ↓ | insertion ↑ | verdicts turned by its cells: genuine ↑ | impostor ↑ | "
        "pairs | time per pair |",
        "|" + "---|" * 11,
    ]
    for explainer, (count, by, flips, timing) in found.items():
        keys = [("deletion", kind, mode) for kind in ("similar", "dissimilar") for mode in ("deletion", "insertion")]
        keys += [("identification", "similar", mode) for mode in ("deletion", "insertion")]
        cells = [_value(by.get(key), 1) for key in keys]
        cells += [_value(flips.get(kind), 1) for kind in ("genuine", "impostor")]
        lines.append(f"| {LABELS[explainer]} | {' | '.join(cells)} | {2 * count} | {_seconds(timing)} |")
    return lines


def locality() -> list[str]:
    """Accuracy and locality, model beside model."""
    verified = _load("verification")
    lines = [
        "| model | accuracy % | AUC | change in the cell itself | in the 3x3 cells around |",
        "|---|---|---|---|---|",
    ]
    for name, label in MODELS.items():
        data = _load(name)
        part = next((p for p in data["parts"] if p["locality"]), None) if data else None
        if part is None:
            continue
        row = part["locality"]["rows"][0]
        accuracy = area = ""
        if verified is not None and name in verified["models"]:
            found = verified["models"][name]
            values = (found["accuracy"]["mean"], *found["intervals"]["accuracy"])
            accuracy = "{:.2f} [{:.2f}, {:.2f}]".format(*(100 * value for value in values))
            area = "{:.4f} [{:.4f}, {:.4f}]".format(found["auc"], *found["intervals"]["auc"])
        lines.append(f"| {label} | {accuracy} | {area} | {_value(row['own'], 3)} | {_value(row['neighbourhood'], 3)} |")
    return lines


def short() -> list[str]:
    """For README: one line a map of the default model, and xCos's own of the others."""
    lines = [
        "| model | map | region swap: absolute | difference | centred | same person's region, centred | deletion ↓ | "
        "insertion ↑ | time per pair |",
        "|" + "---|" * 9,
    ]
    for name, label in MODELS.items():
        data = _load(name)
        if data is None:
            continue
        orders = _orders(data)
        for explainer, (_, rows, _) in _swaps(data).items():
            if name != "compact" and not explainer.startswith("xcos"):
                continue
            mean = rows[DIRECTIONS[0], "swap", "mean"]
            cells = [f"{mean[reading]['value']:.2f}" for reading in READINGS]
            cells.append(f"{rows[DIRECTIONS[0], 'same-person', 'mean']['centred']['value']:.2f}")
            _, areas, _, timing = orders[explainer]
            cells += [f"{areas['deletion', 'similar', mode]['value']:.1f}" for mode in ("deletion", "insertion")]
            cells.append(_seconds(timing))
            lines.append(f"| {label.split(',')[0]} | {LABELS[explainer]} | {' | '.join(cells)} |")
    return lines


def table(kind: str) -> str:
    """The table ``short``, ``locality``, or ``swap_MODEL``, ``regions_MODEL``, ``deletion_MODEL``."""
    what, _, name = kind.partition("_")
    made = {"short": short, "locality": locality}
    per_model = {"swap": region_swap, "regions": regions, "deletion": deletion}
    if what in made:
        return "\n".join(made[what]()) + "\n"
    data = _load(name)
    return "Pending: not measured yet.\n" if data is None else "\n".join(per_model[what](data | {"name": name})) + "\n"
