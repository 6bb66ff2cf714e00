"""The tables of what studies found, as Markdown, from the files in benchmarks/results: see benchmarks/render.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from tables import PENDING, Data, commit, duration, load, markdown, spread

# Matching cells with their neighbourhoods: alignment_tolerance.py


def alignment_rules(contents: Data) -> list[str]:
    """A table for each model: rows are sets of pairs, columns rules of matching.

    Bold: the interval of the gain in accuracy over radius 0 lies above 0; italic: below.
    """

    def cell(row: Data) -> str:
        low, high = row["accuracy_gain"]
        text = f"{100 * row['accuracy']:.2f} ({row['auc']:.4f})"
        return f"**{text}**" if low > 0 else f"*{text}*" if high < 0 else text

    lines = []
    for label, conditions in contents["results"].items():
        rules = [row["rule"] for row in next(iter(conditions.values()))["rules"]]
        rows = ([f"{name} ({c['pairs']:,})", *map(cell, c["rules"])] for name, c in conditions.items())
        lines += [f"{label}: accuracy % (AUC)", "", *markdown(["pairs", *rules], rows), ""]
    return lines[:-1]


def alignment(name: str) -> list[str]:
    """The tables of ``results/alignment/NAME.json``."""
    contents = load(f"alignment/{name}.json")
    if contents is None:
        return [PENDING]
    return [f"LFW folds {contents['folds']}; {commit(contents['machine'])}.", "", *alignment_rules(contents)]


# Ways to run a model: inference_choice.py


def inference_case(case: Data) -> list[str]:
    """One model and batch size, with a line that says what was chosen."""
    chosen = case["chosen"]

    def cells(name: str, row: Data) -> list[str]:
        shown = f"**{name}**" if name in chosen.values() else name
        if "seconds" not in row:
            return [shown, row["problem"], *[""] * 4]
        return [
            shown,
            spread(row.get("times_eager")),
            spread(row.get("times_onnxruntime")),
            duration(row["seconds"]["median"] / case["pairs"]),
            f"{row['error']:.0e}" if row["error"] else "0",
            duration(row["build_seconds"]),
        ]

    count = f"{case['pairs']} pair{'' if case['pairs'] == 1 else 's'} a call"
    columns = ("way", "times faster than eager", "than onnxruntime fp32", "time per pair", "score error", "built in")
    return [
        f"{case['model']}, {count} (chosen: {chosen['fp32']}; with bf16 allowed: {chosen['all']}):",
        "",
        *markdown(columns, (cells(name, row) for name, row in case["ways"].items())),
    ]


def inference(kind: str) -> list[str]:
    """``ways``: every model, batch size and way, times as ratios."""
    data = load("models/inference.json")
    if data is None or kind != "ways":
        return [PENDING]
    machine = data["cases"][0]["machine"]
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    at = f"commit `{machine['commit'][:10]}`{'' if machine['clean'] else ' with changes'}, {machine['date'][:10]}"
    lines = [
        f"{machine['processor']}, {threads}; torch {machine['torch']}; {at}. Median (quartiles) of the rounds, ways in "
        "turns."
    ]
    for case in data["cases"]:
        lines += ["", *inference_case(case)]
    return lines


# Exported graphs: onnx_parity.py


def onnx(kind: str) -> list[str]:
    """``parity``: largest differences from torch by batch; ``verdicts``: over all pairs of the folds."""
    data = load("models/onnx.json")
    if data is None:
        return [PENDING]
    machine = data["machine"]
    heading = (
        f"onnxruntime {data['onnxruntime']} against torch {machine['torch']} in fp32, faces of LFW folds "
        f"{' and '.join(map(str, data['folds']))}; {machine['processor']}, {commit(machine)}."
    )
    rows = [row for row in data["rows"] if (row["batch"] == "all") == (kind == "verdicts")]
    if kind == "parity":
        columns = ["model", "inside", "graph", "batch", "score", "S", "W"]
        names = ("score", "similarity", "attention")
        cells = [
            [row["model"], row["dtype"], row["graph"], str(row["batch"]), *(f"{row[name]:.1e}" for name in names)]
            for row in rows
        ]
    else:
        columns = [
            "model", "inside", "pairs", "largest difference of scores, median", "verdicts that change", "size"
        ]  # fmt: skip
        cells = [
            [row["model"], row["dtype"], f"{row['pairs']:,}", f"{row['score']:.1e}, {row['median']:.1e}",
             str(row["changed"]), f"{row['bytes'] / 1e6:.1f} MB"]
            for row in rows
        ]  # fmt: skip
    return [heading, "", *markdown(columns, cells)]


# Models on LFW: cross-validations, and pair_time.py

_RECOGNISERS = {
    "mobilefacenet_arcface": "MobileFaceNet, PReLU",
    "mobilefacenet_apache2": "MobileFaceNet, ReLU6",
}
#: Row of a cross-validation -> what W is.
_ATTENTIONS = {
    "trained": "learned",
    "trained, norm": "norm",
    "trained, corr": "corr",
    "trained, uniform": "uniform",
}
#: What README shows of the trainings; the pages show all.
_SHORT = ("head from the closed form", "head and body from the closed form", "head from random weights")

_ModelRow = tuple[str, str, Data, Data | None]


def _trained(kind: str, times: dict[str, Data]) -> Iterator[_ModelRow]:
    """What was made of the recognisers."""
    for stem, name in _RECOGNISERS.items():
        trainings = load(f"training/crossval_{stem}.json")
        if not trainings:
            continue
        seconds = times.get(stem, {})
        start = trainings[_SHORT[0]]["scores"]
        yield f"{name}: plain cosine", "", start["cosine"], seconds.get("cosine")
        yield "xCos, closed form, nothing trained", "norm", start["start"], seconds.get("closed form")
        shown = [label for label in _SHORT if label in trainings] if kind == "short" else list(trainings)
        for label in shown:
            for row, attention in _ATTENTIONS.items() if kind == "all" else [("trained", "learned")]:
                figures = trainings[label]["scores"].get(row)  # without a plain cosine there is no corr
                if figures is not None:
                    yield f"xCos, {label}", attention, figures, seconds.get(label) if row == "trained" else None


def models(kind: str) -> list[str]:
    """``short``: a row a model, for README; ``all``: every attention, every training."""

    def interval(values: Data, key: str, value: float, scale: float, digits: int) -> str:
        low, high = (scale * end for end in values["intervals"][key])
        return f"{scale * value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    def cells(name: str, attention: str, values: Data, time: Data | None) -> Iterator[str]:
        yield from (name, attention)
        yield interval(values, "accuracy", values["accuracy"]["mean"], 100, 2)
        yield interval(values, "auc", values["auc"], 1, 5)
        yield f"{100 * values['eer']:.2f}"
        tar = {point["requested"]: point["tar"] for point in values["operating_points"]}
        yield f"{100 * tar[1e-2]:.2f}, {100 * tar[1e-3]:.2f}"
        if time is None:
            yield ""
        else:
            low, middle, high = time["times_cosine"]
            yield f"{1e3 * time['seconds'][1]:.1f} ms, {middle:.2f} ({low:.2f} – {high:.2f})"

    times = {stem: values["scores"] for stem, values in (load("models/pair_time.json") or {}).items()}
    found = _trained(kind, times)
    columns = ("score", "W", "accuracy %", "AUC", "EER %", "TAR % at FMR 1e-2, 1e-3")
    return markdown([*columns, "time per pair, times the plain cosine's"], (cells(*row) for row in found))


# People never trained on, LFW and CFP: measure_default.py

#: What is asked for (floor, aim), as a text.
_ASKED = {
    "LFW": "98.3, 99.2",
    "CFP FF": "98.5, 99.3",
    "CFP FP": "86, 92",
    "moved by up to 8 px": "97.5, 99",
    "xcos-similarity": "0.90, 0.95",
    "xcos": "0.86, 0.92",
    "same person": "0.64, 0.58",
    "largest share": "12 %, 8 %",
    "LFW to CFP": "0.25 to 1 %, 0.4 to 0.6 %",
}
_LISTS = {"LFW": "LFW", "CFP FF": "CFP, frontal with frontal", "CFP FP": "CFP, frontal with profile"}


def _estimate(found: Data) -> str:
    low, high = found["interval"]
    return f"{found['value']:.2f} [{low:.2f}, {high:.2f}]"


def _share(found: float) -> str:
    return f"{100 * found:.2g} %"


def _accuracy(found: Data, score: str = "own") -> str:
    low, high = (100 * end for end in found[score]["intervals"]["accuracy"])
    return f"{100 * found[score]['accuracy']['mean']:.2f} [{low:.2f}, {high:.2f}]"


def measured(name: str) -> list[str]:
    """Models side by side, as ``measure_default.py`` measured them in one run."""
    data: Data = load(f"models/{name}.json")
    rows: list[list[str]] = []

    def row(label: str, asked: str, shown: Callable[[Any], str], *keys: str) -> None:
        cells = [label, _ASKED.get(asked, "")]
        for found in data.values():
            for key in keys:
                found = found[key]
            cells.append(shown(found))
        rows.append(cells)

    for key, label in _LISTS.items():
        row(f"{label}, accuracy %", key, _accuracy, key)
    for key in next(iter(data.values()))["altered"]:
        row(f"LFW, {key}, accuracy %", key, _accuracy, "altered", key)
    row("region swap, S", "xcos-similarity", _estimate, "swaps", "xcos-similarity", "absolute")
    row("region swap, contribution", "xcos", _estimate, "swaps", "xcos", "absolute")
    same = "the same person's region, S, centred (0.5 is right)"
    row(same, "same person", _estimate, "swaps", "xcos-similarity", "same_person_centred")
    row("largest share of attention, mean", "largest share", _share, "largest_share", "LFW")
    claimed = "false match rate where 0.5 % is claimed"
    row(f"{claimed}: CFP by LFW's threshold", "LFW to CFP", _share, "claims", "LFW to CFP", "fmr")
    row(f"{claimed}: LFW by CFP's threshold", "CFP to LFW", _share, "claims", "CFP to LFW", "fmr")
    right = "LFW, pairs right at the higher of the thresholds for 0.5 % on LFW and on CFP"
    row(right, "right", lambda found: f"{100 * found:.2f} %", "right_at_worse_threshold", "LFW")
    return markdown(["people never trained on", "floor, aim", *data], rows)


# Recognisers plugged in, LFW and CFP: plugged.py


def plugged(kind: str) -> list[str]:
    """Accuracies frontal and across poses: ``short``, with the shipped model; ``all``, with and without matching."""
    shipped = (load("models/slim.json") or {}).get("slim")
    rows = []
    if shipped is not None and kind == "short":
        rows.append(["**xCos model that comes with the package**", *(_accuracy(shipped[key]) for key in _LISTS)])
    for stem, network in (_RECOGNISERS | {"sface": "SFace"}).items():
        data = load(f"models/plugged_{stem}.json")
        if data is None:
            continue
        lists = [data["lists"][name]["variants"] for name in ("LFW", "CFP-FF", "CFP-FP")]
        scores = [score for score in lists[0] if kind == "all" or ", " not in score]  # behind a comma: the matching
        rows += [[f"{network}: {score}", *(_accuracy(part, score) for part in lists)] for score in scores]
    return markdown(["score", "LFW, accuracy %", "CFP, frontal with frontal", "CFP, frontal with profile"], rows)


# Explainers: faithfulness.py, shipped_models.py

#: Results file -> what is explained: the shipped model, then those that are not shipped any more.
EXPLAINED = {
    "slim": "xcos-slim, the shipped model",
    "compact": "xcos-compact, shipped before",
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


def _value(estimate: Data | None, digits: int = 2) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    text = f"{estimate['value']:.{digits}f}"
    if estimate.get("interval"):
        low, high = estimate["interval"]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def _seconds(timing: Data | None) -> str:
    if timing is None:
        return ""
    value = timing["median"]
    return f"{value:.2g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _heading(data: Data) -> list[str]:
    machine = data["machine"]
    return [
        f"{EXPLAINED[data['name']]}; LFW, people of folds {', '.join(map(str, data['folds']))}, not trained on; "
        f"{machine['processor']}, {machine['threads']} thread; {commit(machine)}.",
        "",
    ]


def region_swaps(data: Data) -> dict[str, tuple[int, dict[tuple[str, str, str], Data], Data]]:
    """Explainer -> pairs, (direction, paste, region) -> row, timing: of the part with the most pairs."""
    found: Data = {}
    for part in data["parts"]:
        swaps = part["region_swap"]
        for name in part["explainers"] if swaps else ():
            if name not in found:
                rows = {(r["direction"], r["paste"], r["region"]): r for r in swaps["rows"] if r["explainer"] == name}
                found[name] = part["count"], rows, part["seconds_a_pair"].get(name)
    return {name: found[name] for name in LABELS if name in found}


def _orders(data: Data) -> Data:
    """Explainer -> pairs, (protocol, kind, mode) -> area, kind of pairs -> area of flips, timing."""
    found: Data = {}
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


def _swap(data: Data) -> list[str]:
    """Mean AUC over the regions for every explainer, both directions, all readings."""
    readings = ("absolute", "difference", "centred")
    columns = [
        "map",
        *(
            f"{what}: absolute" if reading == "absolute" else reading
            for what in (
                "impostor's region in a genuine pair",
                "genuine region in an impostor pair",
                "same person's region",
            )
            for reading in readings
        ),
        "S above it, absolute, same pairs",
        "pairs",
        "time per pair",
    ]
    asked = ((DIRECTIONS[0], "swap"), (DIRECTIONS[1], "swap"), (DIRECTIONS[0], "same-person"))
    rows = []
    for explainer, (count, by, timing) in region_swaps(data).items():
        cells = [_value(by.get((*key, "mean"), {}).get(reading)) for key in asked for reading in readings]
        behind = _value(by[DIRECTIONS[0], "swap", "mean"].get("behind"))
        rows.append([LABELS[explainer], *cells, behind, str(count), _seconds(timing)])
    return [*_heading(data), *markdown(columns, rows)]


def _regions(data: Data) -> list[str]:
    """Absolute AUC of every region, an impostor's in a genuine pair."""
    found = region_swaps(data)
    first = next(iter(found.values()))[1]
    names = [region for direction, paste, region in first if (direction, paste) == (DIRECTIONS[0], "swap")]
    rows = (
        [LABELS[name], *(f"{by[DIRECTIONS[0], 'swap', region]['absolute']['value']:.2f}" for region in names)]
        for name, (_, by, _) in found.items()
    )
    return [*_heading(data), *markdown(["map", *names], rows)]


def _deletion(data: Data) -> list[str]:
    """Areas of deletion and insertion, and of patch replacement."""
    columns = (
        "map", "verification, similar map: deletion ↓", "insertion ↑", "dissimilar map: deletion", "insertion",
        "identification: deletion ↓", "insertion ↑", "verdicts turned by its cells: genuine ↑", "impostor ↑", "pairs",
        "time per pair",
    )  # fmt: skip
    modes = ("deletion", "insertion")
    keys = [("deletion", kind, mode) for kind in ("similar", "dissimilar") for mode in modes]
    keys += [("identification", "similar", mode) for mode in modes]
    rows = []
    for explainer, (count, by, flips, timing) in _orders(data).items():
        cells = [_value(by.get(key), 1) for key in keys]
        cells += [_value(flips.get(kind), 1) for kind in ("genuine", "impostor")]
        rows.append([LABELS[explainer], *cells, str(2 * count), _seconds(timing)])
    return [*_heading(data), *markdown(columns, rows)]


def _locality() -> list[str]:
    """Accuracy and locality, model beside model."""
    verified = load("faithfulness/verification.json")
    rows = []
    for name, label in EXPLAINED.items():
        data = load(f"faithfulness/{name}.json")
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
        rows.append([label, accuracy, area, _value(row["own"], 3), _value(row["neighbourhood"], 3)])
    return markdown(["model", "accuracy %", "AUC", "change in the cell itself", "in the 3x3 cells around"], rows)


def _short() -> list[str]:
    """One line a map of the shipped model, and xCos's own of the others."""
    columns = (
        "model", "map", "region swap: absolute", "difference", "centred", "same person's region, centred",
        "deletion ↓", "insertion ↑", "time per pair",
    )  # fmt: skip
    rows = []
    for name, label in EXPLAINED.items():
        data = load(f"faithfulness/{name}.json")
        if data is None:
            continue
        orders = _orders(data)
        for explainer, (_, by, _) in region_swaps(data).items():
            if name != "slim" and not explainer.startswith("xcos"):
                continue
            mean = by[DIRECTIONS[0], "swap", "mean"]
            control = by[DIRECTIONS[0], "same-person", "mean"]["centred"]
            figures = (mean["absolute"], mean["difference"], mean["centred"], control)
            cells = [f"{figure['value']:.2f}" for figure in figures]
            _, areas, _, timing = orders[explainer]
            cells += [f"{areas['deletion', 'similar', mode]['value']:.1f}" for mode in ("deletion", "insertion")]
            rows.append([label.split(",")[0], LABELS[explainer], *cells, _seconds(timing)])
    return markdown(columns, rows)


def faithfulness(kind: str) -> list[str]:
    """``short``, ``locality``, or ``swap_MODEL``, ``regions_MODEL``, ``deletion_MODEL``."""
    what, _, name = kind.partition("_")
    if not name:
        return {"short": _short, "locality": _locality}[what]()
    data = load(f"faithfulness/{name}.json")
    if data is None:
        return [PENDING]
    return {"swap": _swap, "regions": _regions, "deletion": _deletion}[what](data | {"name": name})


# Galleries: gallery_scale.py, recipes/identify_lfw.py


def _milliseconds(row: Data) -> str:
    scale, unit = (1e3, "ms") if row["median"] < 1 else (1.0, "s")
    middle, low, high = (f"{row[name] * scale:.3g}" for name in ("median", "low", "high"))
    return f"{middle} {unit} ({low} – {high})"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _probes(count: int | str) -> str:
    return f"{count} probe" + "s" * (str(count) != "1")


def _scale(short: bool) -> list[str]:
    """Figures of a large gallery of generated faces."""
    data = load("gallery/scale.json")
    if data is None:
        return [PENDING]
    phases, machine = data["phases"], data["machine"]
    rows = list(_rows(data))
    if "faiss" in phases and not short:
        index = phases["faiss"]
        built, peak = index["build_seconds"], index["peak_bytes"] / 1e9
        rows.append(("building a faiss index (IVF, 8 bits), in memory", f"{built:.0f} s, peak memory {peak:.1f} GB"))
    lines = [
        f"{_count(data['faces'])} generated faces, fp16, published head; {machine['processor']}, {machine['threads']} "
        f"threads; {commit(machine)}. Median and quartiles.",
        "",
        *markdown(("what", "measured"), rows),
    ]
    if short:
        return lines
    stages = (("generated", "two_stages"), ("generated", "faiss"), ("LFW, 10,562 pictures", "two_stages_lfw"))
    found = [
        (name, str(r["probes"]), r["coarse"], _count(r["rerank"]), f"{r['recall_at_10']:.4f}", spread(r["speedup"]))
        for name, phase in stages
        for r in phases.get(phase, {}).get("rows", [])
    ]
    columns = ("gallery", "probes", "coarse", "R", "recall@10", "times the exact search's speed")
    heading = "Two stages: recall@10 against the exact search on 64 probes, and the speed beside it:"
    return [*lines, "", heading, "", *markdown(columns, found)]


def _rows(data: Data) -> Iterator[tuple[str, str]]:
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
    speed = f"{_count(rate['median'])} faces/s ({_count(rate['low'])} – {_count(rate['high'])})"
    yield "enrolling templates", f"{speed}, in {enrol['commits']} commits"
    yield "first search, 16 probes: packs the tiles", f"{first['search_seconds']:.1f} s"
    yield "first search of a later process, 16 probes: checks them", f"{later['search_seconds']:.2f} s"
    for row in sizes["rows"]:
        if row["faces"] == data["faces"]:
            yield f"later searches, {_probes(row['probes'])}", _milliseconds(row["seconds"])
    for row in phases["against_memory"]["rows"]:
        yield (
            f"speed beside the kernel in memory, {_count(row['faces'])} faces, {_probes(row['probes'])}",
            spread(row["speed_of_memory"]),
        )
    cold = phases.get("cold_disk", {})
    if "share_of_reading" in cold:
        search, read = (cold[f"{name}_bytes_per_second"]["median"] / 1e9 for name in ("search", "read"))
        share = spread(cold["share_of_reading"])
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
        "own": ("xCos model that comes with the package", "norm"),
        "uniform": ("", "uniform"),
        "cosine of the flattened grid feature": ("its features: plain cosine", ""),
    },
}


def _percent(figure: Data, *, complement: bool = False) -> str:
    values = [figure["value"], *figure["interval"]]
    if complement:
        values = [1 - values[0], 1 - values[2], 1 - values[1]]
    middle, low, high = (f"{100 * v:.2f}" for v in values)
    return f"{middle} [{low}, {high}]"


def _identification() -> list[str]:
    """Closed- and open-set identification on LFW."""
    data = load("identification/lfw.json")
    if data is None:
        return [PENDING]
    cells = []
    for system, rows in _SCORES.items():
        found = data["systems"][system]
        counts = "; ".join(
            f"{p['counts']['enrolled_people']:,}, {p['counts']['mated_probes']:,}, {p['counts']['non_mated_probes']:,}"
            for p in found["parts"]
        )
        for name, (label, attention) in rows.items():
            figures = found["mean"][name]
            rates = [_percent(figures[rank]) for rank in ("rank@1", "rank@5")]
            fnir = _percent(figures["tpir@0.01"], complement=True)
            cells.append([label, attention, *rates, fnir, counts if label else ""])
    columns = ("score", "W", "rank-1 %", "rank-5 %", "FNIR % at FPIR 1 %")
    return markdown([*columns, "persons enrolled, mated and non-mated probes"], cells)


def gallery(kind: str) -> list[str]:
    """``short`` and ``scale``: a large gallery; ``identification``: rates on LFW."""
    return _identification() if kind == "identification" else _scale(short=kind == "short")


# Face detectors: detectors.py

_DETECTORS = {
    "small": "**small (default)**",
    "yunet.onnx": "YuNet",
}


def detectors(kind: str) -> list[str]:
    """``found``, ``turned`` or ``crops`` of ``results/faces/detectors.json``."""
    contents = load("faces/detectors.json")
    if contents is None:
        return [PENDING]
    rows = [(label, contents["rows"][name]) for name, label in _DETECTORS.items() if name in contents["rows"]]
    if kind == "found":
        columns = ("detector", "photographs", "not found", "error, % of the eyes' distance", "% of the face's size")

        def cells(label: str, name: str, row: Data) -> list[str]:
            eyes, size = (f"{row[f'error_{of}']:.1f} ({row[f'error_{of}_90']:.1f})" for of in ("eyes", "size"))
            return [label, name, f"{row['missed']} of {row['pictures']}", eyes, size]

        sets = ("CFP frontal", "CFP profile", "CFP profile, bordered", "LFW")
        return markdown(columns, (cells(label, name, row[name]) for label, row in rows for name in sets if name in row))
    if kind == "turned":
        turned = ("turned by 90", "turned by 180", "turned by 270")
        return markdown(
            ("detector", *(f"{name}°: not found" for name in turned), "pictures of nothing refused", "640 pixels"),
            (
                [label, *(f"{row[t]['missed']} of {row[t]['pictures']}" for t in turned),
                 f"{row['textures']['refused']:,} of {row['textures']['pictures']:,}",
                 f"{spread(row['640 pixels'], '{:.0f}'.format)} ms"]
                for label, row in rows
            ),
        )  # fmt: skip
    shown = ((name, f"{row['faces']:,} of {row['pictures']:,}") for name, row in contents["crops"].items())
    return markdown(("crops", "look like a face"), shown)
