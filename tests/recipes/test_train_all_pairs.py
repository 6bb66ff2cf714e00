"""recipes/train_all_pairs.py: its training and its command, on generated faces and on real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xcos_ext
from recipes import train_all_pairs as example
from xcos_ext import backbones
from xcos_ext.faces import PersonFolder
from xcos_ext.model import XCosAttention, XCosHead
from xcos_ext.training import losses

LOSSES = ("infonce", "contrastive", "triplet")
PEOPLE = 28


pytestmark = pytest.mark.usefixtures("one_thread")


def generated(people: int = 150, pictures: int = 4, channels: int = 24, seed: int = 3) -> Any:
    """Maps in which a person is a fixed pattern in a few channels, under noise in all of them, much of it shared."""
    random = torch.Generator().manual_seed(seed)
    own = torch.zeros(people, 1, channels, 7, 7)
    own[:, :, : channels // 3] = torch.randn(people, 1, channels // 3, 7, 7, generator=random)
    noise = torch.randn(people, pictures, channels, 7, 7, generator=random)
    noise[:, :, channels // 3 :] *= 2
    grids = (own + noise + 1.0).flatten(0, 1)
    embeddings = torch.nn.functional.normalize(own.expand(-1, pictures, -1, -1, -1).flatten(0, 1).flatten(1))
    return example.Faces(grids.half(), embeddings, torch.arange(people).repeat_interleave(pictures))


def prepared(faces: Any) -> XCosHead:
    torch.manual_seed(11)
    head = XCosHead(faces.grids.shape[1], 8, attention=XCosAttention(8, symmetric=False))
    example.fix_statistics(head, faces.grids, 0)
    return head


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_falls_and_people_never_seen_are_told_apart_better(name: str) -> None:
    faces, others = generated(), generated(people=40, seed=4)
    head = prepared(faces)
    batches = example.Batches(faces.people, 12, 2, 0)
    before, _ = example.evaluate(head, others, 0)
    times = example.Times()
    done = example.train(head, faces, batches, losses.make_loss(name), steps=60, rate=3e-3, times=times)
    after, impostors = example.evaluate(head, others, 0)
    first, last = (np.mean([step.loss for step in part]) for part in (done[:5], done[-10:]))
    assert last < 0.5 * first
    assert after.auc > before.auc + 0.05
    assert after.accuracy.mean > before.accuracy.mean
    assert after.pairs == after.genuine + len(impostors) == 160 * 159 // 2
    assert len(times.step) == len(times.forward) == len(times.backward) == 60
    assert not head.training


def test_training_is_reproducible() -> None:
    faces = generated()
    runs = [
        example.train(
            prepared(faces), faces, example.Batches(faces.people, 6, 2, 1), losses.make_loss("infonce"), steps=3
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_every_parameter_of_the_head_is_trained_and_no_statistic_is() -> None:
    faces = generated()
    head = prepared(faces)
    parameters = {name: p.detach().clone() for name, p in head.named_parameters()}
    statistics = {name: b.clone() for name, b in head.named_buffers()}
    example.train(head, faces, example.Batches(faces.people, 8, 2, 0), losses.make_loss("infonce"), steps=3)
    # Equal shifts of all logits leave their softmax alone, unless the last activation bends between them.
    assert all(not torch.equal(p, parameters[name]) for name, p in head.named_parameters())
    assert all(torch.equal(b, statistics[name]) for name, b in head.named_buffers())


def test_the_teacher_pulls_scores_towards_its_cosine() -> None:
    faces = generated()

    def distance(head: XCosHead) -> float:
        with torch.no_grad():
            scores = losses.all_pairs(head, head.features(faces.grids.float()))
        return float(losses.teacher_loss(scores, faces.embeddings))

    head = prepared(faces)
    before = distance(head)
    batches = example.Batches(faces.people, 12, 2, 0)
    example.train(head, faces, batches, lambda scores, people: 0 * scores.sum(), steps=40, rate=3e-3, teacher=1.0)
    assert distance(head) < 0.5 * before
    with pytest.raises(ValueError, match="teacher: expected a network with an output block"):
        example.train(prepared(faces), faces._replace(embeddings=None), batches, None, steps=1, teacher=1.0)


def test_no_person_is_on_both_sides() -> None:
    chosen = [(f"{person}/1", f"{person}/2") for person in range(40)]
    first, second = example.hold_out(chosen, 0.25)
    assert len(second) == 10 and not set(first) & set(second) and set(first) | set(second) == set(chosen)
    assert example.whose(second).tolist() == [person for person in range(10) for _ in range(2)]
    with pytest.raises(ValueError, match=r"--held-out: expected at least 10 people .* got 4 of 40"):
        example.hold_out(chosen, 0.1)


def test_three_ways_give_one_result_and_the_formula_says_what_pairs_keep() -> None:
    faces = generated(channels=16)
    head = prepared(faces)
    count, cells = 32, 49
    features = head.features(faces.grids[:count].float()).detach().requires_grad_()
    kept, scores = {}, {}
    for name, compute in example.IMPLEMENTATIONS.items():
        scores[name] = compute(head, features).detach()
        kept[name] = example.saved_bytes(lambda compute=compute: compute(head, features))
    for name in example.IMPLEMENTATIONS:
        torch.testing.assert_close(scores[name], scores["xcos_matrix"], rtol=0, atol=2e-6)
    needed = count * count * example.pair_bytes(head, cells)
    assert needed <= kept["eager, embedded once"] <= 1.05 * needed
    assert kept["eager, every pair"] > needed
    # Templates, their making, and a matrix of 4 kB: nothing that grows with the pairs' cells.
    assert kept["xcos_matrix"] < 0.1 * needed


def test_costs_are_measured_in_processes_of_their_own() -> None:
    faces = generated(people=16, pictures=2)
    head = XCosHead(24, attention=XCosAttention(symmetric=False)).eval()
    costs = example.compare(head, faces.grids, "infonce", 2, rounds=1, repeats=2)
    own = costs["xcos_matrix"]
    for cost in costs.values():
        np.testing.assert_allclose(cost.scores, own.scores, atol=2e-6)
        np.testing.assert_allclose(cost.gradient, own.gradient, atol=1e-5 * np.abs(own.gradient).max())
        assert all(seconds > 0 for seconds in cost.seconds)
    needed = 32 * 32 * example.pair_bytes(head, 49)
    assert own.peak < needed < 1.2 * costs["eager, every pair"].peak


# --- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two pictures each of people who are random mosaics, and an untrained network."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for person in range(PEOPLE):
        mosaic = rng.integers(40, 216, (7, 7, 3))
        (root / "crops" / f"P{person}").mkdir(parents=True)
        for number in (1, 2):
            noisy = np.clip(mosaic + rng.integers(-20, 21, mosaic.shape), 0, 255).astype(np.uint8)
            image.fromarray(noisy).resize((112, 112)).save(root / "crops" / f"P{person}" / f"{number}.png")
    torch.manual_seed(0)
    torch.save(backbones.create("mobilefacenet").state_dict(), root / "net.pt")
    return root / "crops", root / "net.pt"


COMMON = ["--people", "4", "--steps", "2", "--held-out", "0.5", "--threads", "1"]


def test_the_command_trains_reports_and_saves(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crops, net = files
    out = tmp_path / "head.safetensors"
    options = ["--loss", "triplet", "--teacher", "1", "--out", str(out)]
    assert example.main([str(crops), "--model", str(net), *COMMON, *options]) == 0
    printed = capsys.readouterr().out
    for expected in ("56 faces of 28 people", "step     1", "head before training", "head after training", "cosine"):
        assert expected in printed
    model = xcos_ext.load_model(out)
    assert model.name == "xcos-triplet" and model.head.kind == "learned"
    pictures = PersonFolder(crops)
    faces = [pictures.read(pictures.of(person)[0]) for person in pictures.people[:2]]
    with torch.no_grad():
        features = model.features(model.preprocessing(faces))
        templates = model.templates(features, role="both")
        scores = xcos_ext.xcos_matrix(templates, templates)
        torch.testing.assert_close(scores[0, 1:], model.score(features[:1], features[1:]), atol=1e-5, rtol=0)


def test_nothing_is_written_unasked(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert example.main([str(files[0]), "--model", str(files[1]), *COMMON]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pictures": "missing.zip"}, "missing.zip: no such folder or archive"),
        ({"model": "missing.pt"}, "missing.pt: no such file"),
        ({"--people": "20"}, "expected at least 20 people with 2 pictures or more to train on, got 14"),
        ({"--pictures-each": "3"}, "expected people with 3 pictures or more, got none among 28"),
        ({"--pictures-each": "1"}, "expected at least 2 people with 2 pictures each, got 4 with 1"),
        ({"--per-person": "1"}, "--per-person: expected room for 2 pictures of a person, got 4000 and 1"),
        ({"--held-out": "0.1"}, "--held-out: expected at least 10 people"),
        ({"--held-out": "1.5"}, "expected a number between 0 and 1, got 1.5"),
        ({"--compare": "1000"}, "--compare: expected 4 to 28 faces, got 1000"),
        ({"--steps": "0"}, "expected 1 or more, got 0"),
        ({"--rate": "nan"}, "expected a finite number above 0, got nan"),
        ({"--out": "missing/head.safetensors"}, "missing is no folder"),
        ({"--loss": "hinge"}, "invalid choice: 'hinge'"),
    ],
)
def test_errors_are_clear_and_come_before_the_work(
    files: tuple[Path, Path],
    changed: dict[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the network was run")

    monkeypatch.setattr(example, "compute", never)
    pictures, net = changed.pop("pictures", str(files[0])), changed.pop("model", str(files[1]))
    options = [part for pair in changed.items() for part in pair]
    with pytest.raises(SystemExit) as stopped:
        example.main([pictures, "--model", net, *COMMON, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.real_data
def test_real_faces(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short run on few people: the loss falls, and people held out are told apart better than before."""
    network = xcos_ext.model.load_recogniser(shared_data / "mobilefacenet_arcface.pt")
    pictures = PersonFolder(shared_data / "lfw112.zip")
    to_train, to_verify = example.hold_out(example.choose(pictures, 240, 4, 2, 0), 0.3)
    faces, others = (example.compute(network, pictures, part) for part in (to_train, to_verify))
    torch.manual_seed(0)
    head = XCosHead(attention=XCosAttention(symmetric=False))
    example.fix_statistics(head, faces.grids, 0)
    before, _ = example.evaluate(head, others, 0)
    done = example.train(head, faces, example.Batches(faces.people, 24, 2, 0), losses.make_loss("infonce"), steps=40)
    after, _ = example.evaluate(head, others, 0)
    assert np.mean([step.loss for step in done[-5:]]) < 0.3 * done[0].loss
    assert after.auc > before.auc + 0.01
    assert after.eer < before.eer
