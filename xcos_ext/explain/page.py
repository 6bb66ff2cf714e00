"""Decisions as HTML pages that need nothing else: no network, no other file, no server.

Jinja escapes everything that comes from outside (names, metadata), and a policy in the page forbids what slips through:
only the style and the program with the stated hashes run, only data URIs are shown, nothing is fetched or sent.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from xcos_ext.io.optional import need
from xcos_ext.io.text import number, percent, printable, short_name, signed

from .plotting import RDBU, YLGN, Scale, ink, shades
from .regions import PARTS

__all__ = ["explanation_page", "notebook_frame", "picture_uri", "render"]


def render(kind: str, **values: Any) -> Iterator[str]:
    """A page, piece by piece.

    Args:
        kind: ``"page"`` or ``"report"``: which template, style and program.
        **values: what the template shows; text is escaped, and invisible characters are shown as escapes.

    Raises:
        MissingPackageError: Jinja is not installed.
        ValueError: data for the program that are not finite.
    """
    page = _templates().get_template(f"{kind}.html")
    style = f"{_file('base.css')}\n{_file(f'{kind}.css')}"
    pieces: Iterator[str] = page.generate(style=style, program=_file(f"{kind}.js"), **values)
    return pieces


@cache
def _templates() -> Any:
    jinja2 = need("jinja2", "a page")
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str and not value.isprintable() else value,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    functions = (number, signed, percent, short_name, ink, shades, picture_uri, sha256)
    made.filters |= {function.__name__: function for function in functions}
    return made


@cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def sha256(content: str) -> str:
    """What a policy names a style or a program by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode('utf-8')).digest()).decode('ascii')}"


def picture_uri(rgb: np.ndarray, kind: str = "PNG", **how: Any) -> str:
    """A picture, uint8 RGB [height, width, 3], as a data URI; needs Pillow."""
    image = need("PIL.Image", "encoding pictures for a page")
    stream = io.BytesIO()
    image.fromarray(rgb).save(stream, kind, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def explanation_page(e: Any, title: str | None = None) -> Iterator[str]:
    """A decision as one HTML page, piece by piece.

    Args:
        e: an :class:`~xcos_ext.explain.Explanation` (its file knows this one).
        title: of the page; None: the names of the pictures and the verdict.
    """
    middle, attention = e.threshold or 0.0, 100 * e.attention
    span = max(1 - middle, 0.05)
    added = e.weighted if e.contribution is None else e.contribution
    most = 100 * max(float(np.abs(added).max()), 1e-9)
    names = " and ".join(short_name(face.name) for face in (e.a, e.b))
    return render(
        "page",
        title=title or f"{names}: {e.verdict}",
        heading=title,
        e=e,
        decided=e.threshold is not None,
        rows=e.similarity.shape[0],
        columns=e.similarity.shape[1],
        similarity=Scale(RDBU, middle - span, middle + span),
        similarity_text=lambda value: number(value, 2),
        attention=Scale(YLGN, min(0.0, float(attention.min())), max(float(attention.max()), 1e-7)),
        attention_text=lambda value: number(value, 1),
        per_cent=attention.tolist(),
        contribution=Scale(RDBU, -most, most),
        contribution_text=lambda value: signed(value, 1),
        hundredfold=(100 * added).tolist(),
        largest=max((abs(region.contribution) for region in e.regions), default=0.0) or 1.0,
        budget=_budget(e),
        names=list(PARTS),
        facts=_facts(e),
        data={
            "s": e.similarity.tolist(),
            "w": e.attention.tolist(),
            "c": added.tolist(),
            "parts": e.parts.tolist(),
            "names": list(PARTS),
            "decided": e.threshold is not None,
            "margin": e.margin,
        },
    )


def _budget(e: Any) -> dict[str, Any]:
    """Bars from the threshold (or from zero), part by part, to the score; in units of the drawing, 300 wide."""
    at = start = e.threshold or 0.0
    bars = [] if e.threshold is None else [("threshold", "given", 0.0, start, number(start))]
    for region in e.regions:
        side = "for" if region.contribution >= 0 else "against"
        bars.append((region.name, side, at, at + region.contribution, signed(region.contribution)))
        at += region.contribution
    bars.append(("score", "given", 0.0, e.score, number(e.score)))
    ends = [end for _, _, *both, _ in bars for end in both]
    low, high = min(ends), max(ends)

    def place(value: float) -> float:
        return 92 + (value - low) / max(high - low, 1e-6) * 150

    return {
        "start": place(start),
        "bars": [
            {
                "label": label,
                "kind": kind,
                "x": place(min(begin, end)),
                "width": max(abs(place(end) - place(begin)), 0.8),
                "value": value,
            }
            for label, kind, begin, end, value in bars
        ],
    }


def _facts(e: Any) -> list[tuple[str, str]]:
    """What was compared: names and values."""
    from xcos_ext import __version__

    facts = [("model", e.model.name), *([] if e.model.file is None else [("file", e.model.file)])]
    facts += [("fingerprint", e.model.fingerprint), ("attention", e.model.attention_in_words)]
    for letter, face in (("A", e.a), ("B", e.b)):
        facts.append((f"picture {letter}", face.name))
        known = {key: value for key, value in face.details.items() if key != "picture"}
        facts += [(f"{letter}: {str(key).replace('_', ' ')}", _plain(value)) for key, value in known.items()]
        if face.landmarks is not None:
            points = ", ".join(f"({x:.0f}, {y:.0f})" for x, y in face.landmarks)
            facts.append((f"{letter}: points in the crop", points))
    return [*facts, ("made with", f"xcos_ext {__version__}")]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(v)}" for key, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(f"({_plain(v)})" if isinstance(v, list | tuple) else _plain(v) for v in value)
    return str(value)


def notebook_frame(e: Any) -> str:
    """The page in a frame of its own for a notebook: its style and names stay inside, its program cannot reach out."""
    frame = need("markupsafe", "a page").Markup(
        '<iframe srcdoc="{}" sandbox="allow-scripts" width="100%" height="920" loading="lazy" title="{}" '
        'frameborder="0"></iframe>'
    )
    return str(frame.format("".join(explanation_page(e)), printable(repr(e))))
