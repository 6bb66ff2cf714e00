"""``xcos search``: probes against a gallery."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import click

from xcos_ext.io.errors import GalleryError, PictureError

from .console import bar, note, print_json, quiet_opencv
from .verify import FaceOptions, check_model_path, chosen_device, load

__all__ = ["Request", "run"]


@dataclass(frozen=True, kw_only=True)
class Request(FaceOptions):
    """The command line's options."""

    gallery: str
    probes: tuple[str, ...]
    k: int = 5
    threshold: float | None = None
    fpir: float | None = None
    where: str | None = None
    attention: str = "own"
    by_person: bool = False
    fusion: str | None = None
    rerank: int | None = None
    explain: bool = False
    quiet: bool = False
    as_json: bool = False


def run(request: Request) -> int:
    """Embed the probes, search, print.

    Raises:
        XCosError: anything wrong with the probes, the gallery or the model.
    """
    quiet_opencv()
    from xcos_ext.faces import create_detector, display_name
    from xcos_ext.io.optional import need

    if request.threshold is not None and request.fpir is not None:
        raise GalleryError("--threshold, --fpir: expected one of them, got both")
    need("lance", "a gallery", extra="gallery")
    model_path = check_model_path(request.model)
    from xcos_ext.gallery import Gallery, identification_threshold
    from xcos_ext.gallery.enroll import find_pictures, read_faces

    pictures = find_pictures(request.probes)
    if not request.aligned:
        create_detector(request.detector)
    import torch

    from xcos_ext.deploy import for_inference

    device = chosen_device(request.device)
    model = load(model_path).to(device)
    with Gallery.open(request.gallery, model) as gallery:
        threshold = gallery.layout.threshold if request.threshold is None else request.threshold
        if request.fpir is not None:
            threshold = identification_threshold(gallery.layout.fmr_curve, request.fpir, len(gallery))
        fast = for_inference(model)
        names, crops, failures = [], [], {}
        with bar("reading", "pictures", quiet=request.quiet or request.as_json) as tick:
            make = None if request.aligned else lambda: create_detector(request.detector)
            faces = read_faces(pictures, model.preprocessing.size, make, policy=request.policy)
            for done, (picture, crop, _, problem) in enumerate(faces, 1):
                if crop is None:
                    failures[picture.id] = problem or "no face"
                else:
                    names.append(picture.id)
                    crops.append(crop)
                tick(done, len(pictures))
        for why in failures.values():
            note(f"left out {why}")
        if not crops:
            raise PictureError("no probe has a usable face")
        with torch.inference_mode():
            probes = fast.templates(fast.features_of(crops), "probe", gallery.layout.dtype)
        begin = time.perf_counter()
        with bar("searching", "faces", quiet=request.quiet or request.as_json) as tick:
            hits = gallery.search(
                probes,
                request.k,
                attention=request.attention,
                where=request.where,
                groups=None if request.fusion is None else ["probe"] * len(names),
                fusion=request.fusion or "max",  # type: ignore[arg-type]
                by="person" if request.by_person else "face",
                rerank=request.rerank,
                recall_probes=4 if request.rerank is not None else 0,
                explain=request.explain,
                threshold=threshold,
                progress=tick,
            )
        seconds = time.perf_counter() - begin
        searched = len(gallery)
    titles = names if request.fusion is None else [f"{len(names)} pictures of one person ({request.fusion})"]
    if request.as_json:
        print_json(
            {
                "gallery": display_name(request.gallery),
                "faces": searched,
                "version": hits.version,
                "threshold": threshold,
                "exact": hits.exact,
                "recall": hits.recall,
                "recall_probes": hits.recall_probes,
                "seconds": seconds,
                "probes": [_described(title, hits, row, threshold) for row, title in enumerate(titles)],
                "left_out": failures,
                "model": {"name": model.name, "file": display_name(model_path), "fingerprint": model.fingerprint()},
            }
        )
        return 0
    for row, title in enumerate(titles):
        click.echo(title)
        if not hits.ids[row]:
            click.echo("   nobody")
        for rank, hit in enumerate(hits[row], 1):
            verdict = (
                "" if threshold is None else ("  over" if hit.score >= threshold else "  below") + " the threshold"
            )
            who = f"  {hit.person}" if hit.person is not None else ""
            click.echo(f"   {rank}  {hit.score:7.4f}  {display_name(hit.id)}{display_name(who)}{verdict}")
    if not request.quiet:
        how = "every face scored"
        if not hits.exact:
            how = f"approximate: {request.rerank} candidates re-ranked"
            if hits.recall is not None:
                how += f", recall {hits.recall:.3f} measured on {hits.recall_probes} of the probes"
        limit = "no threshold" if threshold is None else f"threshold {threshold:.4f}"
        if threshold is not None and request.threshold is None and request.fpir is None:
            limit += ", the model's for one pair: among many faces strangers pass it (--fpir)"
        note(f"{searched:,} faces in {seconds:.2f} s ({how}); {limit}")
    return 0


def _described(title: str, hits: Any, row: int, threshold: float | None) -> dict[str, Any]:
    candidates = []
    for rank, hit in enumerate(hits[row]):
        one: dict[str, Any] = {
            "score": hit.score,
            "over_threshold": None if threshold is None else hit.score >= threshold,
            "id": hit.id,
            "person": hit.person,
            "position": hit.position,
            "metadata": hit.metadata,
        }
        if hits.maps is not None:
            one["similarity"] = hits.maps.similarity[row, rank].tolist()
            one["attention"] = hits.maps.attention[row, rank].tolist()
            contribution = hits.maps.contribution
            one["contribution"] = None if contribution is None else contribution[row, rank].tolist()
        candidates.append(one)
    return {"probe": title, "hits": candidates}
