"""``xcos search``: probes against a gallery."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from xcos_ext.io.errors import GalleryError, PictureError
from xcos_ext.io.optional import gallery_package
from xcos_ext.io.text import counted, display_name

from . import options
from .console import bar, echo, note, note_faces, note_some, print_json
from .inputs import check_model_path, described, detector_maker, load, open_gallery


@options.command("search")
@options.gallery
@click.argument("probes", nargs=-1, required=True, type=click.Path(), metavar="PROBES...")
@options.faces
@options.number("-k", default=5, most=2048, help="Candidates for each probe.")
@options.threshold
@click.option(
    "--fpir",
    type=options.finite,
    metavar="RATE",
    help="The threshold at which a stranger finds anybody at most at this rate, for a gallery of this size.",
)
@click.option("--where", metavar="SQL", help="Only faces that a condition selects: \"person = 'Ann'\".")
@options.choice("--attention", values=["own", "uniform", "norm"], default="own", help="How the cells are weighed.")
@click.option("--by-person", is_flag=True, help="Candidates are persons, by the best of their faces.")
@options.choice("--fuse", "fusion", values=["max", "mean"], help="All PROBES are one person: one score of all.")
@options.number(
    "--rerank",
    most=2048,
    metavar="R",
    help="Approximate: re-rank the R best by norm attention; the recall is measured on some of the probes.",
)
@click.option("--explain", is_flag=True, help="With --json: the maps of every candidate.")
@options.quiet
@options.as_json
def run(
    gallery: str,
    probes: tuple[str, ...],
    model: str | None,
    detector: str,
    aligned: bool,
    policy: str,
    strict: bool,
    device: str,
    threshold: float | None,
    fpir: float | None,
    by_person: bool,
    fusion: Any,
    quiet: bool,
    as_json: bool,
    **how: Any,
) -> int:
    """Who in GALLERY looks like the faces of PROBES? Exact: every enrolled face is scored."""
    if threshold is not None and fpir is not None:
        raise GalleryError("--threshold, --fpir: expected one of them, got both")
    if how["explain"] and not as_json:
        raise GalleryError("--explain: expected --json with it, got none")
    gallery_package("lance")
    path = check_model_path(model)
    from xcos_ext.gallery import identification_threshold
    from xcos_ext.gallery.enroll import find_probes, read_faces

    pictures, failures = find_probes(probes)
    make_detector = detector_maker(detector, aligned)
    import torch

    from xcos_ext.deploy import for_inference

    loaded = load(path, device)
    with open_gallery(gallery, loaded) as opened:
        layout = opened.layout
        own = layout.weighs(how["attention"])
        limit = layout.threshold if threshold is None and own else threshold
        if fpir is not None:
            if layout.fmr_curve is not None and not own:
                raise GalleryError(
                    f"--fpir: expected the attention that the model is calibrated with, got --attention "
                    f"{how['attention']}; give --threshold"
                )
            # The best of several pictures is a draw from each; a mean strays less than one picture does.
            each = len(pictures) if fusion == "max" else 1
            limit = identification_threshold(layout.fmr_curve, fpir, len(opened) * each)
        fast = for_inference(loaded)
        crops: list[Any] = []
        names: list[str] = []
        faces_on: dict[str, int] = {}
        note_some([f"left out {name}: {why}" for name, why in failures.items()], "files left out")
        with bar("reading", "pictures") as tick:
            faces = read_faces(pictures, loaded.preprocessing.size, make_detector, policy=policy, strict=strict)
            for done, (picture, crop, faces_here, problem) in enumerate(faces, 1):
                if crop is None:
                    failures[picture.id] = problem or "no face"
                    note(f"left out {problem}")
                else:
                    crops.append(crop)
                    names.append(picture.id)
                    faces_on[picture.id] = faces_here
                tick(done, len(pictures))
        if not crops:
            raise PictureError("no probe has a usable face")
        with torch.inference_mode():
            templates = fast.templates(fast.features_of(crops), "probe", opened.layout.dtype)
        begin = time.perf_counter()
        with bar("searching", "faces") as tick:
            hits = opened.search(
                templates,
                groups=None if fusion is None else ["probe"] * len(names),
                fusion=fusion or "max",
                by="person" if by_person else "face",
                recall_probes=4 if how["rerank"] is not None else 0,
                threshold=limit,
                progress=tick,
                **how,
            )
        seconds = time.perf_counter() - begin
        searched = len(opened)
    noted = note_faces(faces_on, policy)
    titles = names if fusion is None else [f"{counted(len(names), 'picture')} of one person ({fusion})"]
    if as_json:
        data = {name: getattr(hits, name) for name in ("version", "exact", "recall", "recall_probes")}
        data |= {"gallery": display_name(gallery), "faces": searched, "threshold": limit, "seconds": seconds}
        data |= {"left_out": failures, **noted, "model": described(loaded, path)}
        found = [{"probe": title, "hits": _candidates(hits, row, limit)} for row, title in enumerate(titles)]
        print_json(data | {"probes": found})
        return 0
    for row, title in enumerate(titles):
        echo(title)
        if not hits.ids[row]:
            echo("   nobody")
        for rank, hit in enumerate(hits[row], 1):
            verdict = "" if limit is None else f"  {'over' if hit.score >= limit else 'below'} the threshold"
            who = "" if hit.person is None else f"  {display_name(hit.person)}"
            echo(f"   {rank}  {hit.score:7.4f}  {display_name(hit.id)}{who}{verdict}")
    if not quiet:
        manner = "every face scored"
        if not hits.exact:
            manner = f"approximate: {how['rerank']} candidates re-ranked"
            if hits.recall is not None:
                manner += f", recall {hits.recall:.3f} measured on {hits.recall_probes} of the probes"
        shown = "no threshold known for this model and attention" if limit is None else f"threshold {limit:.4f}"
        if limit is not None and threshold is None and fpir is None:
            shown += ", the model's for one pair: among many faces strangers pass it (--fpir)"
        note(f"{counted(searched, 'face')} in {seconds:.2f} s ({manner}); {shown}")
    return 0


def _candidates(hits: Any, row: int, threshold: float | None) -> list[dict[str, Any]]:
    candidates = [
        asdict(hit) | {"over_threshold": None if threshold is None else hit.score >= threshold} for hit in hits[row]
    ]
    for rank, candidate in enumerate(candidates):
        for name, maps in ({} if hits.maps is None else vars(hits.maps)).items():
            candidate[name] = None if maps is None else maps[row, rank].tolist()
    return candidates
