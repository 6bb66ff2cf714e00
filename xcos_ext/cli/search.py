"""``xcos search``: probes against a gallery."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import click

from xcos_ext.io.errors import GalleryError
from xcos_ext.io.optional import gallery_package
from xcos_ext.io.text import counted, display_name

from . import options
from .console import bar, echo, note, note_faces, note_some, print_json
from .inputs import check_model_path, described, load, open_gallery


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
    device: str,
    k: int,
    by_person: bool,
    quiet: bool,
    as_json: bool,
    **how: Any,
) -> int:
    """Who in GALLERY looks like the faces of PROBES? Exact: every enrolled face is scored."""
    if how["explain"] and not as_json:
        raise GalleryError("--explain: expected --json with it, got none")
    gallery_package("lance")
    path = check_model_path(model)
    from xcos_ext.faces import detector_maker
    from xcos_ext.gallery.enroll import find_probes

    pictures, left_out = find_probes(probes)  # what is not there is said before torch loads a network
    maker = detector_maker("aligned" if aligned else detector)
    loaded = load(path, device)
    with open_gallery(gallery, loaded) as opened, bar("searching", "faces", quiet=quiet) as tick:
        found = opened.find(
            pictures,
            k,
            detector=maker or "aligned",
            by="person" if by_person else "face",
            recall_probes=4 if how["rerank"] is not None else 0,
            reading=partial(tick, title="reading"),
            progress=tick,
            **how,
        )
    left_out |= found.left_out
    lines = [why if why.startswith(f"{name}: ") else f"{name}: {why}" for name, why in left_out.items()]
    note_some([f"left out {line}" for line in lines], "files left out")
    noted = note_faces(found.several, how["policy"])
    hits, limit = found.hits, found.threshold
    if as_json:
        data = {name: getattr(hits, name) for name in ("version", "exact", "recall", "recall_probes")}
        data |= {"gallery": display_name(gallery), "faces": found.faces, "threshold": limit, "seconds": found.seconds}
        data |= {"left_out": left_out, **noted, "model": described(loaded, path)}
        rows = [{"probe": title, "hits": _candidates(hits, row, limit)} for row, title in enumerate(found.probes)]
        print_json(data | {"probes": rows})
        return 0
    for line in str(found).splitlines():
        echo(line)
    if not quiet:
        manner = "every face scored"
        if not hits.exact:
            manner = f"approximate: {how['rerank']} candidates re-ranked"
            if hits.recall is not None:
                manner += f", recall {hits.recall:.3f} measured on {hits.recall_probes} of the probes"
        shown = "no threshold known for this model and attention" if limit is None else f"threshold {limit:.4f}"
        if limit is not None and how["threshold"] is None and how["fpir"] is None:
            shown += ", the model's for one pair: among many faces strangers pass it (--fpir)"
        note(f"{counted(found.faces, 'face')} in {found.seconds:.2f} s ({manner}); {shown}")
    return 0


def _candidates(hits: Any, row: int, threshold: float | None) -> list[dict[str, Any]]:
    candidates = [
        asdict(hit) | {"over_threshold": None if threshold is None else hit.score >= threshold} for hit in hits[row]
    ]
    for rank, candidate in enumerate(candidates):
        for name, maps in ({} if hits.maps is None else vars(hits.maps)).items():
            candidate[name] = None if maps is None else maps[row, rank].tolist()
    return candidates
