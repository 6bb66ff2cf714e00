"""Identification on LFW: who is enrolled and searched, that nobody tested was trained on, and what is written down."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from recipes import identify_lfw as example
from xcos_ext.evaluation import ranked_persons
from xcos_ext.ops import xcos_matrix
from xcos_ext.training.data import Pictures, people_of_folds, people_of_share

pytest.importorskip("PIL.Image")
pytest.importorskip("lance")

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures_of(sizes: dict[str, int]) -> Pictures:
    names = tuple(sizes)
    people = [number for number, count in enumerate(sizes.values()) for _ in range(count)]
    keys = [f"{name}/{name}_{i + 1:04d}.jpg" for name, count in sizes.items() for i in range(count)]
    return Pictures(torch.zeros(len(keys), 3, 4, 4, dtype=torch.uint8), torch.tensor(people), names, tuple(keys))


def test_who_is_enrolled_and_who_is_searched() -> None:
    pictures = pictures_of({"a": 1, "b": 2, "c": 3, "d": 4, "e": 9, "other": 5, "z": 1})
    part = example.make_part("some", pictures, set("abcdez"), 7)
    keys = np.array(pictures.keys)
    enrolled = [f"{name}/{name}_000{i}.jpg" for name, i in ("b1", "c1", "c2", "d1", "d2", "d3", "e1", "e2", "e3")]
    assert keys[part.gallery.numpy()].tolist() == enrolled
    searched = ["a1", "b2", "c3", "d4", "e4", "e5", "e6", "e7", "e8", "e9", "z1"]
    assert keys[part.probes.numpy()].tolist() == [f"{name}/{name}_000{i}.jpg" for name, i in searched]
    assert part.of(part.probes) == list("abcdeeeeeez")
    assert part.counts == {
        "people": 6,
        "enrolled_people": 4,
        "enrolled_pictures": 9,
        "mated_probes": 9,
        "most_mated_probes_of_a_person": 6,
        "non_mated_probes": 2,
    }


def test_halves_share_nobody(tmp_path: Path) -> None:
    lines = ["4\t2"]
    for fold in range(4):
        lines += [f"P{fold}a\t1\t2", f"P{fold}b\t1\t2", f"P{fold}a\t1\tP{fold}c\t1", f"P{fold}b\t1\tP{fold}c\t1"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    paired = [f"P{fold}{letter}" for fold in range(4) for letter in "abc"]
    names = [*paired, *(f"Q{i}" for i in range(40))]
    found = example.halves(str(tmp_path / "pairs.txt"), names)
    (name, first), (other, second) = found.items()
    assert name.startswith("folds 1 to 2 and") and other.startswith("folds 3 to 4 and")
    assert not first & second and first | second == set(names)
    assert {name for name in first if name[0] == "P"} == people_of_folds(tmp_path / "pairs.txt", (1, 2))
    assert {name for name in first if name[0] == "Q"} == people_of_share(names[12:], 0.5)


@pytest.mark.thorough
@pytest.mark.real_data
def test_the_quick_form_on_real_faces(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[set[str], set[str]]] = []

    class Watched(example.HeadTask):
        def __init__(self, sources: Any, *arguments: Any, **named: Any) -> None:
            super().__init__(sources, *arguments, **named)
            names, people = sources.pictures.names, sources.pictures.people
            sides = ({names[int(i)] for i in people[chosen]} for chosen in (self.trained, self.held_out))
            trained.append(tuple(sides))  # type: ignore[arg-type]

    searched: list[set[str]] = []
    search = example.search

    @torch.no_grad()
    def watched(part: Any, pictures: Pictures, model: Any, features: Any, attentions: Any) -> Any:
        """The same candidates as from the scores of all pairs in memory."""
        found = search(part, pictures, model, features, attentions)
        probes = model.templates(features(part.probes), "probe", torch.float16)
        gallery = model.templates(features(part.gallery), "gallery", torch.float16)
        for attention in attentions:
            scores = xcos_matrix(probes, gallery, attention)
            persons, values = ranked_persons(scores, part.of(part.gallery), example.CANDIDATES)
            np.testing.assert_allclose(found[attention].scores, values, atol=1e-5)
            pairs = zip(found[attention].persons, persons, strict=True)
            same = [a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]
            assert np.mean(same) > 0.999  # rounding may swap neighbours
        searched.append(set(part.of(part.probes)) | set(part.of(part.gallery)))
        return found

    monkeypatch.setattr(example, "HeadTask", Watched)
    monkeypatch.setattr(example, "search", watched)
    out = tmp_path / "made" / "lfw.json"
    settings = {
        "data.pictures": shared_data / "lfw112.zip",
        "data.pairs": shared_data / "pairs.txt",
        "data.cache": tmp_path / "cache",
        "model.recogniser": shared_data / "mobilefacenet_arcface.pt",
        "train.workers": 0,
    }
    changes = itertools.chain.from_iterable(("--set", f"{name}={value}") for name, value in settings.items())
    config = str(REPOSITORY / "recipes" / "head_closed_form.toml")
    arguments = [config, *changes, "--teacher", str(shared_data / "mobilefacenet_apache2.pt"), "--quick"]
    assert example.main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out

    # Nobody who was searched or enrolled was trained on.
    shipped, *others = searched
    unseen = people_of_folds(shared_data / "pairs.txt", example.SHIPPED_UNSEEN)
    assert shipped and shipped <= unseen
    assert len(trained) == 2 and len(others) == 4  # head and closed form
    for (used, held_out), tested in zip(trained, others[::2], strict=True):
        assert used and tested == held_out and not used & tested
    assert trained[0] == trained[1][::-1]

    result = json.loads(out.read_text())
    assert result["schema"] == 1 and result["quick"] is True
    assert result["machine"]["commit"] and result["machine"]["threads"] == 1
    assert result["protocol"]["text"].startswith("Protocol. Of everybody with two pictures")
    assert str(shared_data) not in out.read_text()  # where files lay is nobody's business
    assert set(result["systems"]) == {"shipped", "recogniser"}
    for system in result["systems"].values():
        for part in system["parts"]:
            counts = part["counts"]
            for row in part["rows"].values():
                assert (row["mated"], row["non_mated"]) == (counts["mated_probes"], counts["non_mated_probes"])
                assert row["enrolled"] == counts["enrolled_people"] and len(row["cmc"]) == example.CANDIDATES
                for point in row["operating_points"]:
                    assert point["fpir"] <= point["requested"] and point["fnir"] == pytest.approx(1 - point["tpir"])
        for name, figures in system["mean"].items():
            rates = [part["rows"][name]["rates"]["1"] for part in system["parts"]]
            assert figures["rank@1"]["value"] == pytest.approx(np.mean(rates))
            assert f"| {name} | {100 * figures['rank@1']['value']:.2f} [" in printed
    own = result["systems"]["shipped"]["mean"]["own"]["rank@1"]["value"]
    uniform = result["systems"]["shipped"]["mean"]["uniform"]["rank@1"]["value"]
    difference = result["systems"]["shipped"]["differences"]["own - uniform"]["rank@1"]["value"]
    assert difference == pytest.approx(own - uniform) and own > 0.8
    closed = result["systems"]["recogniser"]["mean"]
    assert closed["closed form, norm"]["rank@1"]["value"] > 0.95 < closed["plain cosine"]["rank@1"]["value"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.stepz=1"], "train.stepz: no such setting"),
        (["data.pairs=none"], "expected an experiment with task = 'head' and data.pairs"),
        (["task=model"], "expected an experiment with task = 'head' and data.pairs"),
        (["data.pictures=nowhere.zip"], "nowhere.zip: no such folder or archive"),
    ],
)
def test_mistakes_are_named(changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument for change in changes for argument in ("--set", change)]
    with pytest.raises(SystemExit):
        example.main([str(REPOSITORY / "recipes" / "head_closed_form.toml"), *arguments])
    assert message in capsys.readouterr().err
