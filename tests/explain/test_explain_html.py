"""The page of a decision: whole in one file, safe with any name, and alive in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, open_browser, require
from explained import crop, toy

from xcos_ext.explain import Explanation, explain
from xcos_ext.explain.page import _templates
from xcos_ext.explain.plotting import RDBU, YLGN, Scale, ink
from xcos_ext.explain.regions import PARTS
from xcos_ext.faces import ARCFACE_TEMPLATE

HOSTILE = (
    '"><script>alert(1)</script>.jpg',
    "</script><script>alert(2)</script>.png",
    "</title><img src=x onerror=alert(3)>",
    "gpj.\u202eexe\u2066\x00\x1b[31m\n\u2028.jpg",
    "${policy} $content {{7*7}} \\u003cscript\\u003e",
    "' onmouseover='alert(4)' style='color:red",
    "javascript:alert(5)//\ud800<!--",
)


def explanation(**how: Any) -> Explanation:
    return explain(toy(how.pop("kind", "learned"), **how.pop("model", {})), crop(1), crop(2), **how)


def hostile(name: str) -> Explanation:
    """That name wherever a name can be."""
    return explain(
        toy(name=name),
        crop(1),
        crop(2),
        names=(name, f"folder/{name}"),
        file=name,
        details=({name: name, "box": [name, 1.0]}, {"landmarks": [[0.0, 1.0]]}),
        landmarks_a=ARCFACE_TEMPLATE,
    )


class Elements(HTMLParser):
    """Every element with its attributes, and what is written in scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._open = tag
            self.raw.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.raw[-1] = (self._open, self.raw[-1][1] + data)


def skeleton(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Elements and names of attributes: what no name may change."""
    return [(tag, tuple(sorted(attributes))) for tag, attributes in Elements(page).elements]


# --- the file


def test_one_file_and_nothing_else() -> None:
    page = explanation(names=("a.jpg", "b.jpg")).to_html()
    assert page.startswith("<!doctype html>")
    found = Elements(page)
    assert {tag for tag, _ in found.elements}.isdisjoint({"link", "iframe", "object", "embed", "base", "form", "a"})
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert name not in ("src", "style", "action") and not name.startswith("on"), (tag, name)
            if name == "href":
                assert tag == "image" and (value or "").startswith("data:image/png;base64,")
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    assert "@import" not in page and "url(" not in page
    assert len(page.encode()) < 400_000


def test_policy_names_what_may_run() -> None:
    found = Elements(explanation().to_html())
    (policy,) = [a["content"] for t, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    style = "".join(data for tag, data in found.raw if tag == "style")
    programs = [data for tag, data in found.raw if tag == "script"]
    for kind, content in (("style", style), ("script", programs[-1])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    kinds = [a.get("type") for t, a in found.elements if t == "script"]
    assert kinds == ["application/json", None]
    # Program and style do not depend on what is explained, so the policy is one for all pages.
    (other,) = [a["content"] for _, a in Elements(hostile(HOSTILE[0]).to_html()).elements if "http-equiv" in a]
    assert other == policy


def test_pictures_are_the_faces() -> None:
    import io

    from PIL import Image

    page = explanation().to_html()
    found = [a["href"] for t, a in Elements(page).elements if t == "image"]
    for href, face in zip(found, (crop(1), crop(2)), strict=True):
        assert href is not None
        data = base64.b64decode(href.partition(",")[2])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), face)


def test_numbers_on_the_page() -> None:
    e = explanation()
    page = e.to_html()
    data = json.loads(next(content for tag, content in Elements(page).raw if tag == "script"))
    np.testing.assert_array_equal(data["s"], e.similarity)
    np.testing.assert_array_equal(data["w"], e.attention)
    np.testing.assert_array_equal(data["c"], e.contribution)
    assert f"<b>{e.score:.4f}</b>".replace("-", "\u2212") in page
    for region in e.regions:
        assert f'<th scope="row">{region.name}</th>' in page
    assert html.escape(e.certainty) in page
    assert page.count('class="cell"') == 5 * 49


def test_without_a_threshold_or_faces() -> None:
    page = explanation(model={"threshold": None, "curve": None}).to_html()
    assert "<h1>No verdict</h1>" in page and "not calibrated" in page
    assert "contribution, \u03a3" not in page
    e = explanation()
    import dataclasses

    bare = dataclasses.replace(e, a=dataclasses.replace(e.a, rgb=None), b=dataclasses.replace(e.b, rgb=None))
    assert "<image" not in bare.to_html()


@pytest.mark.parametrize("kind", ["uniform", "norm"])
def test_attention_that_was_not_learned(kind: Any) -> None:
    assert f"The attention is {kind}, not learned" in explanation(kind=kind).to_html()


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_text(name: str) -> None:
    page, tame = hostile(name).to_html(), hostile("tame").to_html()
    assert skeleton(page) == skeleton(tame)
    page.encode("utf-8")  # no half surrogates
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]", page)
    titled = hostile("tame").to_html(title=name)
    assert "<script>alert" not in titled and "<img" not in titled


@pytest.mark.parametrize("name", HOSTILE)
def test_data_blocks_end_where_they_should(name: str) -> None:
    name = name.encode("utf-8", "replace").decode()
    block = _templates().from_string("{{ data|tojson }}")
    inside = block.render(data={name: [name]})
    assert "<" not in inside and "&" not in inside
    assert json.loads(inside)[name] == [name]
    with pytest.raises(ValueError):
        block.render(data=[float("nan")])


def test_text() -> None:
    page = _templates().from_string("<p title='{{ name }}'>{{ name }}</p>").render(name="a<b>&\"'\u202e")
    assert page == "<p title='{0}'>{0}</p>".format("a&lt;b&gt;&amp;&#34;&#39;\\u202e")


def test_notebook_frame() -> None:
    e = hostile(HOSTILE[0])
    frame = e._repr_html_()
    ((tag, attributes),) = Elements(frame).elements
    assert tag == "iframe"
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == e.to_html()


def test_colours_are_the_figures() -> None:
    import matplotlib

    for name, stops in (("RdBu", RDBU), ("YlGn", YLGN)):
        scale = Scale(stops, -2.0, 3.0)
        for value in np.linspace(-3, 4, 71):
            expected = matplotlib.colormaps[name](float((value + 2) / 5), bytes=True)[:3]
            got = [int(scale(float(value))[i : i + 2], 16) for i in (1, 3, 5)]
            assert np.abs(np.array(got) - np.array(expected, int)).max() <= 3
    assert ink("#053061") == "#ffffff" and ink("#f7f7f7") == "#1a1a1a"


def test_parts_of_pages_come_with_the_package() -> None:
    folder = resources.files("xcos_ext.explain")
    for name in (
        *("base.html", "page.html", "report.html", "notes.html"),
        *("base.css", "page.css", "page.js", "report.css", "report.js"),
    ):
        assert folder.joinpath(name).is_file()
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if pyproject.is_file():
        for suffix in ("html", "css", "js"):
            assert f'"explain/*.{suffix}"' in pyproject.read_text()


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require()
    with open_browser() as opened:
        yield opened


def show(browser: Browser, e: Explanation, folder: Path, **how: Any) -> None:
    (folder / "page.html").write_text(e.to_html(), encoding="utf-8")
    browser.open(folder / "page.html", **how)


def lit(browser: Browser) -> list[list[list[int]]]:
    """The framed cells (row, column) of every grid."""
    return browser.run(
        "[...document.querySelectorAll('svg.grid')].map((g) => [...g.querySelectorAll('.frame.light')]"
        ".map((f) => [f.getAttribute('y') / 100, f.getAttribute('x') / 100]))"
    )


def readout(browser: Browser) -> str:
    return browser.run("document.getElementById('readout').textContent")


def said(e: Explanation, row: int, column: int) -> str:
    assert e.contribution is not None
    part = PARTS[e.parts[row, column]]
    c = e.contribution[row, column]
    s, c_text = f"{e.similarity[row, column]:.3f}".replace("-", "\u2212"), f"{c:+.4f}".replace("-", "\u2212")
    attention = f"{100 * e.attention[row, column]:.1f} %"
    side = "for" if c > 0 else "against"
    return (
        f"Row {row + 1}, column {column + 1}, {part}: similarity S {s}, attention W {attention}, "
        f"contribution {c_text}, {side} the same person."
    )


def test_hovering_lights_up_both_faces_and_all_maps(browser: Browser, tmp_path: Path) -> None:
    e = explanation(names=("a.jpg", "b.jpg"))
    show(browser, e, tmp_path)
    assert lit(browser) == [[]] * 5
    for which, grid in enumerate(("face", "face", "s", "w", "c")):
        row, column = 1 + which, 5 - which
        number = 49 * which + 7 * row + column if grid == "face" else 7 * row + column
        browser.hover(f"svg.{grid} .cell", number)
        assert lit(browser) == [[[row, column]]] * 5
        assert readout(browser) == said(e, row, column)
        part = e.parts[row, column]
        assert browser.run(f"document.querySelector('tr[data-part=\"{part}\"]').classList.contains('lit')")
    browser.hover("h2")
    assert lit(browser) == [[]] * 5
    assert browser.complaints() == []


def test_keyboard_and_clicks(browser: Browser, tmp_path: Path) -> None:
    e = explanation()
    show(browser, e, tmp_path)
    browser.run("document.querySelector('svg.s').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        browser.press(key)
    assert lit(browser) == [[[2, 0]]] * 5
    browser.press("End")
    assert readout(browser) == said(e, 2, 6)
    browser.press("Home")
    assert lit(browser)[0] == [[2, 0]]
    browser.press("Escape")
    assert lit(browser) == [[]] * 5
    browser.click("svg.w .cell", 24)
    browser.hover("svg.s .cell", 0)
    assert lit(browser) == [[[3, 3]]] * 5  # kept
    browser.click("svg.w .cell", 24)
    browser.hover("svg.s .cell", 0)
    assert lit(browser) == [[[0, 0]]] * 5  # let go
    # Every grid can be reached with Tab, and so can the rows of the table.
    assert browser.run("document.querySelectorAll('svg.grid[tabindex=\"0\"][aria-label]').length") == 5
    assert browser.run("document.querySelectorAll('.parts tbody tr[tabindex=\"0\"]').length") == len(e.regions)
    assert browser.complaints() == []


def test_parts_and_overlay(browser: Browser, tmp_path: Path) -> None:
    e = explanation()
    show(browser, e, tmp_path)
    nose = next(r for r in e.regions if r.name == "nose")
    browser.hover(f'tr[data-part="{PARTS.index("nose")}"]')
    assert [sorted(cells) for cells in lit(browser)] == [[list(cell) for cell in nose.cells]] * 5
    assert readout(browser).startswith(f"nose, {len(nose.cells)} cells: mean S ")
    first = "getComputedStyle(document.querySelector('svg.face .cell')).fill"
    clear = browser.run(first)
    for value in ("s", "w", "c"):
        browser.click(f'input[value="{value}"]')
        colour = browser.run(f"document.querySelector('svg.{value} .cell rect').getAttribute('fill')")
        rgb = ", ".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
        assert browser.run(first) == f"rgb({rgb})"
    browser.click('input[name="overlay"]')
    assert browser.run(first) == clear
    assert browser.complaints() == []


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_foreign_runs(browser: Browser, tmp_path: Path, name: str) -> None:
    show(browser, hostile(name), tmp_path)
    browser.hover("svg.face .cell", 3)
    assert browser.complaints() == []
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.querySelectorAll('img, [onerror], [onmouseover], [style]:not(.cell)').length") == 0


def test_the_policy_stops_what_slips_through(browser: Browser, tmp_path: Path) -> None:
    page = (
        explanation().to_html().replace("<main>", '<main><script>alert(1)</script><img src="x.png" onerror="alert(2)">')
    )
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "page.html")
    complaints = browser.complaints()
    assert complaints and not [c for c in complaints if c.startswith("dialog")]
    assert all("Content Security Policy" in c for c in complaints if c.startswith("log"))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_every_width_and_scheme(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    e = explanation(names=("a_very_long_name_without_any_place_to_break_it_" * 4 + ".jpg", "b.jpg"))
    show(browser, e, tmp_path, width=width, dark=dark, phone=width < 500)
    assert browser.run("document.documentElement.scrollWidth") <= width
    ground, front = browser.run(
        "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    assert contrast(ground, front) > 10
    soft = browser.run("getComputedStyle(document.querySelector('.certainty')).color")
    assert contrast(ground, soft) > 4.5
    assert contrast(ground, browser.run("getComputedStyle(document.querySelector('h1')).color")) > 4.5
    assert (brightness(ground) < 0.5) is dark


def brightness(colour: str) -> float:
    """Relative luminance of a computed colour (WCAG 2)."""
    values = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    light, dark = sorted((brightness(one), brightness(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_numbers_can_be_read_on_their_colours(browser: Browser, tmp_path: Path) -> None:
    show(browser, explanation(), tmp_path)
    pairs = browser.run(
        "[...document.querySelectorAll('svg.grid g.cell')].map((c) => [getComputedStyle(c.querySelector('rect')).fill,"
        "getComputedStyle(c.querySelector('text')).fill])"
    )
    assert min(contrast(*pair) for pair in pairs) > 3


def test_in_a_notebook(browser: Browser, tmp_path: Path) -> None:
    """Two in one document: they work, and leave it alone."""
    frames = explanation()._repr_html_() + hostile(HOSTILE[0])._repr_html_()
    outer = f"<!doctype html><h1 id='readout'>Mine</h1>{frames}"
    (tmp_path / "notebook.html").write_text(outer, encoding="utf-8")
    browser.open(tmp_path / "notebook.html", height=2200)
    style = (
        "JSON.stringify([getComputedStyle(document.body).margin, getComputedStyle(document.querySelector('h1')).color])"
    )
    assert json.loads(browser.run(style)) == ["8px", "rgb(0, 0, 0)"]
    assert browser.run("document.querySelectorAll('iframe').length") == 2
    assert browser.run("document.getElementById('readout').textContent") == "Mine"
    for which in (0, 1):
        with browser.inside_frame(which):
            browser.run("document.querySelectorAll('tr[data-part]')[3].click()")
            assert readout(browser).startswith("nose, 3 cells: mean S ")
            assert "srcdoc" in browser.run("document.URL")
    assert browser.complaints() == []
