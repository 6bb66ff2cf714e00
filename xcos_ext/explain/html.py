"""A decision as one HTML page that needs nothing else: no network, no other file, no server.

Everything that comes from outside (names, metadata) is escaped where it enters the page, and a policy in the page
forbids what slips through: only the style and the program with the stated hashes run, only data URIs are shown, nothing
is fetched or sent.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from xcos_ext.io.optional import need
from xcos_ext.io.text import percent, printable, signed

from .colours import RDBU, YLGN, Scale, ink
from .explanation import short_name
from .regions import PARTS

if TYPE_CHECKING:
    from .explanation import Explanation, Face

__all__ = ["Page", "data_block", "explanation_page", "notebook_frame", "picture_uri", "text"]

_UNIT = 100  # of an SVG: a cell's side


def text(value: str) -> str:
    """Any string as HTML, in an element or an attribute in double quotes; invisible characters are shown as escapes."""
    return escape(printable(value), quote=True)


def data_block(data: Any, name: str) -> str:
    """JSON in a ``<script>`` that no browser runs; what could end the element is written as escapes.

    Raises:
        ValueError: a value that is not finite.
    """
    written = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" class="{name}">{written}</script>\n'


def picture_uri(rgb: np.ndarray, kind: str = "PNG", **how: Any) -> str:
    """A picture, uint8 RGB [height, width, 3], as a data URI.

    Raises:
        MissingPackageError: Pillow is not installed.
    """
    image = need("PIL.Image", "encoding pictures for a page")
    stream = io.BytesIO()
    image.fromarray(rgb).save(stream, kind, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


@cache
def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


class Page:
    """The frame of a page: head with policy and style, then content, then the program.

    Args:
        kind: ``"page"`` or ``"report"``: which style and program.
        title: of the page, any string.
    """

    def __init__(self, kind: str, title: str) -> None:
        style = f"{_part('base.css')}\n{_part(f'{kind}.css')}"
        program = _part(f"{kind}.js")
        policy = (
            f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(program)}'; "
            "base-uri 'none'; form-action 'none'"
        )
        frame = Template(_part("frame.html")).substitute(
            title=text(title), policy=policy, style=style, program=program, content="\0"
        )
        self.head, _, self.foot = frame.partition("\0")


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode('utf-8')).digest()).decode('ascii')}"


# --- pieces


def _cells(values: np.ndarray, scale: Scale, form: Any) -> str:
    size = min(30.0, 30.0 * 7 / max(values.shape))
    side = f'width="{_UNIT}" height="{_UNIT}"'
    drawn = []
    for (row, column), value in np.ndenumerate(values):
        colour = scale(float(value))
        x, y = column * _UNIT, row * _UNIT
        drawn.append(
            f'<g class="cell" data-at="{row},{column}"><rect x="{x}" y="{y}" {side} fill="{colour}"/>'
            f'<text x="{x + _UNIT / 2:g}" y="{y + _UNIT / 2:g}" fill="{ink(colour)}" font-size="{size:.3g}">'
            f"{form(value)}</text></g>"
        )
    return "".join(drawn)


def _svg(cells: tuple[int, ...], name: str, label: str, content: str) -> str:
    rows, columns = cells
    return (
        f'<svg class="grid {name}" viewBox="0 0 {columns * _UNIT} {rows * _UNIT}" role="application" tabindex="0" '
        f'aria-roledescription="grid of cells" aria-label="{label} Arrow keys move from cell to cell." '
        f'aria-describedby="readout">{content}</svg>'
    )


def _legend(scale: Scale, low: str, high: str, marks: Mapping[str, float]) -> str:
    """A bar of the colours with its ends and marks written under it."""
    steps = 48
    width = 300.0
    bars = "".join(
        f'<rect x="{i * width / steps:.2f}" y="0" width="{width / steps + 0.5:.2f}" height="12" '
        f'fill="{scale(scale.low + (i + 0.5) / steps * (scale.high - scale.low))}"/>'
        for i in range(steps)
    )
    places = {word: (value - scale.low) / (scale.high - scale.low) * width for word, value in marks.items()}
    ticks = "".join(
        f'<path d="M{x:.1f} -2V15" class="tick"/><text x="{x:.1f}" y="27" text-anchor="middle">{word}</text>'
        for word, x in places.items()
    )
    return (
        f'<svg class="legend" viewBox="-2 -3 304 34" aria-hidden="true">{bars}{ticks}'
        f'<text x="0" y="27">{low}</text><text x="{width:g}" y="27" text-anchor="end">{high}</text></svg>'
    )


def _map(name: str, title: str, hint: str, values: np.ndarray, scale: Scale, form: Any, legend: str) -> str:
    drawing = _svg(values.shape, name, f"{title}.", _cells(values, scale, form))
    return (
        f'<figure class="panel"><figcaption><b>{title}</b> <span>{hint}</span></figcaption>{drawing}{legend}</figure>'
    )


def _face(face: Face, letter: str, cells: tuple[int, ...]) -> str:
    rows, columns = cells
    width, height = columns * _UNIT, rows * _UNIT
    if face.rgb is None:
        content = f'<rect width="{width}" height="{height}" class="nothing"/>'
    else:
        content = (
            f'<image href="{picture_uri(face.rgb)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        )
    side = f'width="{_UNIT}" height="{_UNIT}"'
    overlay = "".join(
        f'<rect class="cell" data-at="{row},{column}" x="{column * _UNIT}" y="{row * _UNIT}" {side}/>'
        for row in range(rows)
        for column in range(columns)
    )
    drawing = _svg(cells, "face", f"Face {letter}, {text(short_name(face.name))}.", content + overlay)
    name = "" if face.name == letter else f' <bdi title="{text(face.name)}">{text(short_name(face.name))}</bdi>'
    return f'<figure class="panel"><figcaption><b>{letter}</b>{name}</figcaption>{drawing}</figure>'


def _budget(explanation: Explanation) -> str:
    """From the threshold, part by part, to the score."""
    start = explanation.threshold if explanation.threshold is not None else 0.0
    rows: list[tuple[str, float, float, str, str]] = []
    if explanation.threshold is not None:
        rows.append(("threshold", 0.0, start, "given", f"{start:.3f}".replace("-", "\u2212")))
    at = start
    for region in explanation.regions:
        kind = "for" if region.contribution >= 0 else "against"
        rows.append((region.name, at, at + region.contribution, kind, signed(region.contribution)))
        at += region.contribution
    rows.append(("score", 0.0, explanation.score, "given", f"{explanation.score:.3f}".replace("-", "\u2212")))
    ends = [end for _, low, high, *_ in rows for end in (low, high)]
    low, high = min(ends), max(ends)
    room = max(high - low, 1e-6)
    step, left, width = 27, 92, 150

    def place(value: float) -> float:
        return left + (value - low) / room * width

    drawn = [f'<path class="rule" d="M{place(start):.1f} 2V{len(rows) * step - 4}"/>']
    for i, (label, begin, end, kind, value) in enumerate(rows):
        y = i * step
        x, size = place(min(begin, end)), abs(place(end) - place(begin))
        part = f' data-part="{PARTS.index(label)}"' if label in PARTS else ""
        drawn.append(
            f'<g class="step"{part}><rect class="row" x="0" y="{y}" width="300" height="{step}"/>'
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{label}</text>'
            f'<rect class="{kind}" x="{x:.1f}" y="{y + 6}" width="{max(size, 0.8):.1f}" height="15" rx="1.5"/>'
            f'<text class="value" x="298" y="{y + 17}" text-anchor="end">{value}</text></g>'
        )
    title = "From threshold to score" if explanation.threshold is not None else "From zero to score"
    return (
        f'<figure class="panel budget"><figcaption><b>{title}</b></figcaption>'
        f'<svg viewBox="0 0 300 {len(rows) * step}" role="img" aria-label="{title}: numbers in the table of parts.">'
        f"{''.join(drawn)}</svg></figure>"
    )


def _parts_table(explanation: Explanation) -> str:
    decided = explanation.threshold is not None
    most = max((abs(region.contribution) for region in explanation.regions), default=0.0) or 1.0
    rows = []
    for region in explanation.regions:
        size = abs(region.contribution) / most * 48
        kind = "for" if region.contribution >= 0 else "against"
        x = 50 if kind == "for" else 50 - size
        bar = (
            f'<svg class="bar" viewBox="0 0 100 10" aria-hidden="true"><rect class="{kind}" x="{x:.1f}" y="1" '
            f'width="{max(size, 0.5):.1f}" height="8"/><path class="zero" d="M50 0V10"/></svg>'
        )
        rows.append(
            f'<tr data-part="{PARTS.index(region.name)}" tabindex="0"><th scope="row">{region.name}</th>'
            f"<td>{len(region.cells)}</td><td>{region.similarity:.2f}</td><td>{percent(region.share)}</td>"
            f'<td class="wide">{bar}{signed(region.contribution)}</td><td class="word">{region.word}</td></tr>'.replace(
                ">-", ">\u2212"
            )
        )
    total = explanation.margin if decided else explanation.score
    sum_of = "score \u2212 t" if decided else "score"
    meaning = "contribution, \u03a3 W\u00b7(S \u2212 t)" if decided else "\u03a3 W\u00b7S"
    columns = ("part", "cells", "mean S", "attention", meaning)
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    foot = (
        f'<tr><th scope="row">all</th><td>{explanation.similarity.size}</td>'
        f"<td>{signed(float(explanation.similarity.mean()), 2).lstrip('+')}</td><td>100 %</td>"
        f'<td class="wide">{signed(total or 0.0)}</td><td class="word">{sum_of}</td></tr>'
    )
    return (
        f'<div class="scroll"><table class="parts"><thead><tr>{head}<th scope="col" class="word">in words</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody><tfoot>{foot}</tfoot></table></div>"
    )


def _all_cells(explanation: Explanation, parts: np.ndarray) -> str:
    third = explanation.contribution if explanation.contribution is not None else explanation.weighted
    rows = "".join(
        f"<tr><td>{row + 1}</td><td>{column + 1}</td><td>{PARTS[parts[row, column]]}</td>"
        f"<td>{signed(s, 4).lstrip('+')}</td><td>{explanation.attention[row, column]:.5f}</td>"
        f"<td>{signed(third[row, column], 5)}</td></tr>"
        for (row, column), s in np.ndenumerate(explanation.similarity)
    )
    meaning = "W\u00b7(S \u2212 t)" if explanation.threshold is not None else "W\u00b7S"
    head = "".join(f'<th scope="col">{column}</th>' for column in ("row", "column", "part", "S", "W", meaning))
    return (
        f"<details><summary>All {explanation.similarity.size} cells as numbers</summary>"
        f'<div class="scroll"><table class="cells"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</details>"
    )


def _facts(explanation: Explanation) -> str:
    from xcos_ext import __version__

    model = explanation.model
    facts: list[tuple[str, str]] = [("model", f"<bdi>{text(model.name)}</bdi>")]
    if model.file is not None:
        facts.append(("file", f"<bdi>{text(model.file)}</bdi>"))
    facts += [
        ("fingerprint", f"<code>{text(model.fingerprint)}</code>"),
        ("attention", text(model.attention_in_words)),
    ]
    for letter, face in (("A", explanation.a), ("B", explanation.b)):
        facts.append((f"picture {letter}", f"<bdi>{text(face.name)}</bdi>"))
        for key, value in face.details.items():
            if key == "picture":
                continue
            facts.append((f"{letter}: {text(str(key).replace('_', ' '))}", f"<bdi>{text(_plain(value))}</bdi>"))
        if face.landmarks is not None:
            points = ", ".join(f"({x:.0f}, {y:.0f})" for x, y in face.landmarks)
            facts.append((f"{letter}: points in the crop", points))
    facts.append(("made with", f"xcos_ext {text(__version__)}"))
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts) + "</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(f"({_plain(v)})" if isinstance(v, list | tuple) else _plain(v) for v in value)
    return str(value)


def how_to_read(decided: bool) -> str:
    """What maps can say and what they cannot, as HTML."""
    parts = (
        "<b>Contribution</b> is W\u00b7(S \u2212 threshold). It adds up, over all cells, to score \u2212 threshold: "
        "blue cells carried the score up, red cells pulled it down."
        if decided
        else "<b>W\u00b7S</b> adds up, over all cells, to the score. Without a threshold no cell speaks for or against "
        "anything."
    )
    return f"""<ul>
<li><b>Similarity S</b> is the cosine of the two faces' features in a cell: 1 is equal, 0 unrelated.
<b>Attention W</b> is how much the cell counts; all cells together make 100 %. {parts}</li>
<li>The maps are the arithmetic of this score, not a picture drawn afterwards. They say what <em>this model</em> went
by. They do not say that the model is right, nor why a person would see a likeness.</li>
<li>A cell's features come from a network that sees more of the face than the cell: a change elsewhere can move them.
Read a cell as a place in the network's grid, not as the pixels under it.</li>
<li>The names of the parts come from five points of the face (eyes, nose, corners of the mouth) and a fixed rule; left
and right are the picture's. <i>Sides</i> are the outer columns: ears, hair, background.</li>
<li>False match rates were measured on the people and photographs of the model's calibration. Age, pose, light, masks,
twins and groups of people that were rare there change them. A score is evidence to be weighed by a person, never an
identification.</li>
</ul>"""


# --- the page


def explanation_page(explanation: Explanation, *, title: str | None = None) -> str:
    """A decision as one HTML page; see :meth:`Explanation.to_html <xcos_ext.explain.Explanation.to_html>`."""
    names = (short_name(explanation.a.name), short_name(explanation.b.name))
    page = Page("page", title or f"{names[0]} and {names[1]}: {explanation.verdict}")
    return f"{page.head}{_content(explanation, title)}{page.foot}"


def _content(explanation: Explanation, title: str | None) -> str:
    s, w = explanation.similarity, 100 * explanation.attention
    threshold, decided = explanation.threshold, explanation.threshold is not None
    middle = threshold if threshold is not None else 0.0
    span = max(1 - middle, 0.05)
    third = explanation.weighted if explanation.contribution is None else explanation.contribution
    most = max(float(np.abs(third).max()), 1e-9)
    parts = explanation.parts_of((s.shape[0], s.shape[1]))
    similarity = Scale(RDBU, middle - span, middle + span)
    attention = Scale(YLGN, min(0.0, float(w.min())), max(float(w.max()), 1e-7))
    contribution = Scale(RDBU, -100 * most, 100 * most)
    mark = {f"threshold {middle:.2f}".replace("-", "\u2212"): middle} if decided else {"0": 0.0}
    maps = (
        _map(
            "s",
            "Similarity S",
            "where the faces agree",
            s,
            similarity,
            lambda v: signed(v, 2).lstrip("+"),
            _legend(similarity, f"{middle - span:.2f}".replace("-", "\u2212"), f"{middle + span:.2f}", mark),
        ),
        _map(
            "w",
            "Attention W, %",
            "where the model looks",
            w,
            attention,
            lambda v: f"{v:.1f}",
            _legend(attention, f"{attention.low:.0f} %", f"{attention.high:.1f} %", {}),
        ),
        _map(
            "c",
            "Contribution \u00d7 100" if decided else "W\u00b7S \u00d7 100",
            "what it did",
            100 * third,
            contribution,
            lambda v: signed(v, 1),
            _legend(contribution, f"\u2212{100 * most:.1f}: against", f"for: +{100 * most:.1f}", {})
            if decided
            else _legend(contribution, f"\u2212{100 * most:.1f}", f"+{100 * most:.1f}", {"0": 0.0}),
        ),
    )
    kind = {True: "same", False: "different", None: "none"}[explanation.same]
    sign = {True: "\u2265", False: "<", None: ""}[explanation.same]
    numbers = f"<span>score <b>{explanation.score:.4f}</b></span>".replace("-", "\u2212")
    if threshold is not None and explanation.margin is not None:
        numbers += (
            f' <span class="sign">{sign}</span> <span>threshold <b>{threshold:.4f}</b></span>'
            f' <span class="margin">margin <b>{signed(explanation.margin, 4)}</b></span>'
        ).replace("<b>-", "<b>\u2212")
    remarks = "".join(f"<li>{text(remark)}</li>" for remark in explanation.remarks)
    heading = f'<p class="title">{text(title)}</p>' if title else ""
    choices = "".join(
        f'<label><input type="radio" name="overlay" value="{value}"{"" if value else " checked"}>'
        f"<span>{word}</span></label>"
        for value, word in (
            ("", "nothing"),
            ("s", "similarity"),
            ("w", "attention"),
            ("c", "contribution" if decided else "W\u00b7S"),
        )
    )
    data = {
        "s": s.tolist(),
        "w": explanation.attention.tolist(),
        "c": third.tolist(),
        "parts": parts.tolist(),
        "names": list(PARTS),
        "decided": decided,
        "margin": explanation.margin,
    }
    return f"""<main>
<header class="{kind}">{heading}
<h1>{explanation.verdict.capitalize()}</h1>
<p class="numbers">{numbers}</p>
<p class="summary">{text(explanation.summary.partition(". ")[2])}</p>
<p class="certainty">{text(explanation.certainty)}</p>
{f'<ul class="remarks">{remarks}</ul>' if remarks else ""}</header>
<section aria-label="The two faces and the maps">
<fieldset class="choice"><legend>Lay over the faces</legend>{choices}</fieldset>
<div class="panels">
{_face(explanation.a, "A", s.shape)}
{_face(explanation.b, "B", s.shape)}
{_budget(explanation)}
{"".join(maps)}
<p id="readout" role="status" aria-live="polite">Point at a cell, tap it, or move with the arrow keys; a click keeps
it, Escape lets go.</p>
</div>
</section>
<section><h2>Parts of the face</h2>
{_parts_table(explanation)}
</section>
<section class="notes"><h2>What these maps can say, and what they cannot</h2>
{how_to_read(decided)}
</section>
<section><h2>What was compared</h2>
{_facts(explanation)}
{_all_cells(explanation, parts)}
</section>
</main>
{data_block(data, "data")}"""


def notebook_frame(explanation: Explanation, *, height: int = 920) -> str:
    """The page in a frame of its own for a notebook: its style and names stay inside, and its program cannot reach out.

    Args:
        explanation: what to show.
        height: of the frame in pixels.
    """
    inside = escape(explanation_page(explanation), quote=True)
    return (
        f'<iframe srcdoc="{inside}" sandbox="allow-scripts" width="100%" height="{height}" loading="lazy" '
        f'title="{text(repr(explanation))}" frameborder="0"></iframe>'
    )
