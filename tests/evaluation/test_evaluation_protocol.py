"""The verification protocol against direct computations on generated faces, and its command."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from commands import strict
from drawn import TwoFaces, background, portrait
from PIL import Image
from torch import Tensor, nn

from xcos_ext import backbones
from xcos_ext import evaluation as ev
from xcos_ext.cli.app import xcos
from xcos_ext.evaluation.datasets import CSVPairs, PairList, open_pairs
from xcos_ext.io.errors import PictureError
from xcos_ext.model import XCosAttention, XCosHead, XCosModel, plug, save_model
from xcos_ext.ops import xcos_score

pytestmark = pytest.mark.usefixtures("one_thread")

PEOPLE, FOLDS = 12, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures each of people who are random 7x7 mosaics, and pairs of them as CSV, in three folds."""
    root = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for person in range(PEOPLE):
        mosaic = rng.integers(40, 216, (7, 7, 3))
        folder = root / f"p{person:02d}"
        folder.mkdir()
        for number in (1, 2):
            noisy = np.clip(mosaic + rng.integers(-40, 41, mosaic.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize((112, 112), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    rows = ["a,b,genuine,fold"]
    size = PEOPLE // FOLDS
    for person in range(PEOPLE):
        fold = person // size
        other = fold * size + (person + 1) % size
        rows += [
            f"p{person:02d}/1.png,p{person:02d}/2.png,1,{fold}",
            f"p{person:02d}/2.png,p{other:02d}/1.png,0,{fold}",
        ]
    (root / "pairs.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def pairs(root: Path) -> CSVPairs:
    found = open_pairs(root / "pairs.csv", root)
    assert isinstance(found, CSVPairs) and found.people is not None
    return found


def network(seed: int = 0) -> backbones.Recogniser:
    """Cells see their own 16x16 pixels; the embedding is linear over them."""
    torch.manual_seed(seed)
    body = nn.Conv2d(3, 3, 16, 16)
    output = nn.Sequential(nn.Flatten(), nn.Linear(147, 40))
    net = backbones.SplitRecogniser(body, output, grid_shape=(3, 7, 7), embedding_size=40)
    return net.eval()


def learned(symmetric: bool = False) -> XCosModel:
    torch.manual_seed(1)
    head = XCosHead(3, 8, attention=XCosAttention(8, 4, symmetric=symmetric))
    return XCosModel(network(), head).eval()


@torch.no_grad()
def features(model: XCosModel, pairs: CSVPairs, flip: bool = False) -> tuple[Tensor, Tensor]:
    """F of the first and of the second pictures, one by one."""
    images = torch.cat([model.preprocessing(pairs.read(key)) for key in pairs.keys])
    found = model.features(images)
    if flip:
        found = (found + model.features(images.flip(3)).flip(3)) / 2
    return found[pairs.first], found[pairs.second]


@torch.no_grad()
def cosines(net: backbones.Recogniser, pairs: CSVPairs) -> np.ndarray:
    images = torch.cat([net.preprocessing(pairs.read(key)) for key in pairs.keys])
    embedded = net(images)
    return torch.cosine_similarity(embedded[pairs.first], embedded[pairs.second]).double().numpy()


def test_scores_are_the_direct_computation(pairs: CSVPairs) -> None:
    model = learned()
    seen: list[range] = []

    def track(blocks: Any) -> Any:
        for block in blocks:
            seen.append(block)
            yield block

    scores = ev.evaluate(model, pairs, replicates=0, batch_size=3, track=track).variants["own"].scores
    assert sum(map(len, seen)) == len(pairs)
    with torch.no_grad():
        np.testing.assert_allclose(scores, model.score(*features(model, pairs)), atol=1e-6)


@pytest.mark.thorough
def test_pictures_are_read_once_and_features_are_dropped(pairs: CSVPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds what is open, not the list."""
    monkeypatch.setattr("xcos_ext.evaluation.scoring._PAIRS_AT_ONCE", 2)
    read: list[str] = []
    alive: list[int] = []

    class Marked(Tensor):
        pass

    def extract(pictures: list[np.ndarray]) -> dict[str, Tensor]:
        gc.collect()
        alive.append(sum(type(o) is Marked and o.dim() == 1 for o in gc.get_objects()))
        return {"f": torch.rand(len(pictures), 5).as_subclass(Marked)}

    def reader(key: str) -> np.ndarray:
        read.append(key)
        return pairs.read(key)

    scored = ev.score_pairs(pairs, extract, {"sum": ("f", lambda a, b: (a + b).sum(1))}, read=reader, batch_size=2)
    assert sorted(read) == list(pairs.keys) and np.isfinite(scored.values["sum"]).all()
    assert len(pairs.keys) == 24 and 0 < max(alive) <= 10


@pytest.mark.parametrize("flip", [False, True])
def test_variants_are_the_direct_computation(pairs: CSVPairs, flip: bool) -> None:
    model, teacher = learned(), network(5)
    names = ("own", "uniform", "norm", "corr", "symmetric")
    result = ev.evaluate(model, pairs, attentions=names, teacher=teacher, flip=flip, replicates=0, batch_size=5)
    assert list(result.variants) == [*names, "teacher"] and result.resampling is None and not result.failures
    a, b = features(model, pairs, flip)
    with torch.no_grad():
        own, swapped = model.score(a, b, return_maps=True), model.score(b, a)
        expected = {
            "own": own.score,
            "uniform": xcos_score(a, b),
            "norm": xcos_score(a, b, "norm"),
            "symmetric": (own.score + swapped) / 2,
        }
    for name, scores in expected.items():
        np.testing.assert_allclose(result.variants[name].scores, scores, atol=1e-6)
        report = ev.verification(result.variants[name].scores, pairs.genuine, pairs.folds)
        assert result.variants[name].report == report
    if flip:
        assert not np.allclose(result.variants["own"].scores, model.score(*features(model, pairs)).detach())
        return
    target = cosines(teacher, pairs)
    np.testing.assert_allclose(result.variants["teacher"].scores, target, atol=1e-6)
    assert result.variants["own"].correlation == pytest.approx(np.corrcoef(own.score, target)[0, 1], abs=1e-5)
    assert result.variants["teacher"].correlation == pytest.approx(1)
    similarity = own.similarity.flatten(1).double().numpy()
    maps = []
    for fold in range(FOLDS):
        train = pairs.folds != fold
        r = np.array([np.corrcoef(similarity[train, c], target[train])[0, 1] for c in range(49)]).clip(0)
        maps.append(r / r.sum())
        test = ~train
        np.testing.assert_allclose(result.variants["corr"].scores[test], similarity[test] @ maps[-1], atol=1e-6)
    assert result.corr_target == "teacher" and result.variants["corr"].attention is not None
    np.testing.assert_allclose(result.variants["corr"].attention.ravel(), np.mean(maps, 0), atol=1e-6)


def test_symmetric_is_own_where_the_head_is(pairs: CSVPairs) -> None:
    result = ev.evaluate(learned(symmetric=True), pairs, attentions=("own", "symmetric"), replicates=0)
    np.testing.assert_allclose(result.variants["symmetric"].scores, result.variants["own"].scores, atol=1e-6)


def parts_of(root: Path, folder: Path, *parts: tuple[int, ...]) -> list[CSVPairs]:
    """The list's folds, some at a time."""
    header, *rows = (root / "pairs.csv").read_text().splitlines()
    lists = []
    for part in parts:
        file = folder / f"{'-'.join(map(str, part))}.csv"
        file.write_text("\n".join([header, *(row for row in rows if int(row.rsplit(",", 1)[1]) in part)]) + "\n")
        found = open_pairs(file, root)
        assert isinstance(found, CSVPairs)
        lists.append(found)
    return lists


def test_parts_scored_by_one_model_are_the_whole(pairs: CSVPairs, root: Path, tmp_path: Path) -> None:
    model, teacher, names = learned(), network(5), ("own", "norm", "corr")
    whole = ev.evaluate(model, pairs, attentions=names, teacher=teacher, replicates=20)
    lists = parts_of(root, tmp_path, (0, 1), (2,))
    loaded = iter([(model, lists[0]), (model, lists[1])])  # one at a time
    parts = ev.evaluate(loaded, attentions=names, teacher=teacher, replicates=20)
    np.testing.assert_array_equal(parts.genuine, whole.genuine)
    assert parts.resampling is not None and parts.resampling.units == PEOPLE
    for name, variant in whole.variants.items():
        found = parts.variants[name]  # other batches of pictures, so other roundings
        np.testing.assert_allclose(found.scores, variant.scores, atol=1e-6)
        assert found.report.accuracy is not None and variant.report.accuracy is not None
        assert found.report.accuracy.folds == variant.report.accuracy.folds
        assert found.report.auc == variant.report.auc and list(found.intervals) == list(variant.intervals)
        assert found.correlation == pytest.approx(variant.correlation, abs=1e-6)


def test_every_part_is_scored_by_its_own_model(root: Path, tmp_path: Path) -> None:
    models, lists = (learned(), learned(symmetric=True)), parts_of(root, tmp_path, (2, 0), (1,))
    with torch.no_grad():
        next(models[1].head.parameters()).mul_(-2)
    result = ev.evaluate(zip(models, lists, strict=True), replicates=0)
    own = [model.score(*features(model, part)).detach() for model, part in zip(models, lists, strict=True)]
    np.testing.assert_allclose(result.variants["own"].scores, torch.cat(own), atol=1e-6)
    with pytest.raises(ValueError, match="parts: expected every fold in one part, got fold 2 in several"):
        ev.evaluate([(models[0], part) for part in (lists[0], *parts_of(root, tmp_path, (1, 2)))])
    with pytest.raises(ValueError, match="parts: expected at least one model with its pairs, got none"):
        ev.evaluate([])


def test_flip_is_in_width() -> None:
    """A mirrored copy of every picture changes nothing after augmentation; an upside-down one does."""
    rng = np.random.default_rng(3)
    faces = rng.integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    model = learned()
    extract = ev.scoring.extractor(model, None, True)
    plain, mirrored, upside = (
        extract(list(f))["features"] for f in (faces, faces[:, :, ::-1].copy(), faces[:, ::-1].copy())
    )
    torch.testing.assert_close(mirrored.flip(3), plain)
    assert not torch.allclose(upside.flip(2), plain.flip(2))


def test_corr_weights_leave_the_tested_fold_out(root: Path, tmp_path: Path) -> None:
    """Changing a fold's labels and pairs leaves what scores it as it was."""
    text = (root / "pairs.csv").read_text()
    rows = text.splitlines()
    (tmp_path / "other.csv").write_text("\n".join([*rows[:-2], *rows[-1:], rows[-2]]) + "\n")
    model, teacher = learned(), network(5)

    def corr(path: Path) -> np.ndarray:
        pairs = open_pairs(path, root)
        return ev.evaluate(model, pairs, attentions=("corr",), teacher=teacher, replicates=0).variants["corr"].scores

    one, two = corr(root / "pairs.csv"), corr(tmp_path / "other.csv")
    np.testing.assert_allclose(np.sort(one[-8:]), np.sort(two[-8:]), atol=1e-12)


def test_corr_attention() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=500)
    s = np.stack((target + rng.normal(size=500), -target, rng.normal(size=500) * 0 + 3, target), 1)
    weights = ev.corr_attention(s, target)
    assert weights.sum() == pytest.approx(1) and weights[1] == weights[2] == 0
    assert weights[0] / weights[3] == pytest.approx(1 / np.sqrt(2), abs=0.05)
    with pytest.raises(ValueError, match="no cell's similarity correlates"):
        ev.corr_attention(-target[:, None], target)
    for similarity, cosine in ((s[:0], target[:0]), (s.reshape(500, 2, 2), target), (s[:3], target)):
        with pytest.raises(ValueError, match=r"^similarity, target: expected \[N, cells\] and \[N\] of at"):
            ev.corr_attention(similarity, cosine)


def test_no_pairs() -> None:
    nobody = PairList([], [])
    model = plug(network(), centre=False)
    with pytest.raises(PictureError, match=r"^no genuine or no impostor pair can be scored: 0 of 0 pairs are genuine$"):
        ev.evaluate(model, nobody)
    for given, name in ((None, "NoneType"), ([("a", "b")], "list")):
        with pytest.raises(TypeError, match=f"^pairs: expected a PairList, got {name}$"):
            ev.evaluate(model, given)  # type: ignore[arg-type]
    scored = ev.score_pairs(nobody, lambda _: {}, {"cosine": ("mean", torch.cosine_similarity)})
    assert scored.values["cosine"].shape == scored.failed.shape == (0,) and not scored.failures
    features = torch.zeros(0, 4, 7, 7)
    with pytest.raises(ValueError, match=r"^people: 0 impostor pairs cannot tell a false match rate of 0\.001"):
        ev.calibrate(XCosModel(torch.nn.Identity(), XCosHead(4, 4, attention="norm")).eval(), features, [])


def test_corr_needs_a_target_and_folds(pairs: CSVPairs, root: Path, tmp_path: Path) -> None:
    closed = plug(network(), centre=False)
    result = ev.evaluate(closed, pairs, attentions=("corr",), replicates=0)
    assert result.corr_target == "embedding" and result.variants["corr"].correlation is None
    no_embedding = XCosModel(nn.AvgPool2d(16), XCosHead(3, 8)).eval()
    with pytest.raises(ValueError, match=r"corr: the model has no embedding of its own.*give a teacher"):
        ev.evaluate(no_embedding, pairs, attentions=("corr",))
    with pytest.raises(ValueError, match=r"attentions: expected some of own, .*, got best"):
        ev.evaluate(closed, pairs, attentions=("own", "best"))
    (tmp_path / "one.csv").write_text("a,b,genuine\np00/1.png,p00/2.png,1\np00/1.png,p01/1.png,0\n")
    single = open_pairs(tmp_path / "one.csv", root)
    with pytest.raises(ValueError, match=r"corr: .*a single one"):
        ev.evaluate(closed, single, attentions=("corr",))
    assert ev.evaluate(closed, single, replicates=0).variants["own"].report.accuracy is None


def test_pictures_that_fail_count_as_rejected(root: Path, tmp_path: Path) -> None:
    rows = (root / "pairs.csv").read_text().splitlines()
    folder = tmp_path / "faces"
    for file in root.glob("*/*.png"):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / file.parent.name / file.name).write_bytes(file.read_bytes())
    (folder / "p00" / "1.png").write_bytes(b"broken")
    Image.new("RGB", (50, 60)).save(folder / "p05" / "2.png")
    (folder / "pairs.csv").write_text("\n".join(rows))
    pairs = open_pairs(folder / "pairs.csv", folder)
    model = learned()
    result = ev.evaluate(model, pairs, attentions=("own", "corr"), teacher=network(5), replicates=20)
    assert set(result.failures) == {"p00/1.png", "p05/2.png"}
    assert "not a picture" in result.failures["p00/1.png"]
    assert "expected an aligned crop of 112 x 112 pixels, got 50 x 60" in result.failures["p05/2.png"]
    failing = set(result.failures)
    named = zip(pairs.first, pairs.second, strict=True)
    bad = np.array([bool({pairs.keys[a], pairs.keys[b]} & failing) for a, b in named])
    np.testing.assert_array_equal(result.failed, bad)
    assert bad.sum() == 4
    for variant in result.variants.values():
        assert variant.scores[bad].max() < variant.scores[~bad].min()
        assert variant.report.pairs == len(pairs)
    # No threshold accepts the genuine ones.
    assert max(p.tar for p in result.variants["own"].report.operating_points) <= 10 / 12
    for file in folder.glob("*/*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(PictureError, match=r"no genuine or no impostor pair can be scored: .*not a picture"):
        ev.evaluate(model, pairs)


def test_scores_that_are_not_numbers_are_an_error(pairs: CSVPairs) -> None:
    model = learned()
    with torch.no_grad():
        model.head.conv1x1[0].weight.fill_(1e30)
    with pytest.raises(ValueError, match="own: 24 scores are NaN or infinite"):
        ev.evaluate(model, pairs)


def test_roc_figure(pairs: CSVPairs) -> None:
    rng = np.random.default_rng(0)
    genuine = rng.random(4000) < 0.5
    curves = {f"c{i}": ev.error_curves(rng.normal(size=4000) + i * genuine, genuine) for i in (1, 3)}
    figure = ev.roc_figure(curves, int((~genuine).sum()), title="a $title$")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and axes.get_xlim()[0] == pytest.approx(1 / (~genuine).sum())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["c1", "c3"]
    for line, curve in zip(axes.get_lines(), curves.values(), strict=True):
        x, y = line.get_data()
        assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()
        at = np.searchsorted(x, 0.1, "right") - 1  # what the step shows at FMR 0.1
        assert y[at] == pytest.approx((1 - curve.fnmr)[curve.fmr <= 0.1].max())


# --- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with thresholds and a recogniser, both untrained."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = backbones.create("mobilefacenet")
    torch.save(net.state_dict(), folder / "teacher.pt")
    model = plug(net, centre=False, threshold=0.9)
    model.fmr_thresholds = {0.1: 0.95}
    save_model(model, folder / "model.safetensors")
    return {"model": folder / "model.safetensors", "teacher": folder / "teacher.pt"}


def run(*arguments: str | Path) -> Result:
    runner = CliRunner(env={"XCOS_MODEL": None, "XCOS_DEBUG": None})
    return runner.invoke(xcos, ["evaluate", *map(str, arguments)])


@pytest.mark.thorough
def test_command(root: Path, files: dict[str, Path], tmp_path: Path) -> None:
    common = ("verification", "--pairs", root / "pairs.csv", "--root", root, "--aligned", "--model", files["model"])
    more = ("--attention", "own", "--attention", "corr", "--teacher", files["teacher"], "--bootstrap", "20")
    result = run(*common, *more, "--flip", "--plot", tmp_path / "roc.png")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for words in (
        "own",
        "corr",
        "teacher",
        "correlation",
        "bootstrap over 12 people, 20 replicates",
        "mirror picture",
    ):
        assert words in result.stdout
    assert re.search(r"threshold for decisions, 0\.9000: accuracy \d", result.stdout)
    assert re.search(r"threshold calibrated for FMR 0\.1, 0\.9500", result.stdout)
    assert "failed to enrol" not in result.stdout
    assert "-: 12 impostor pairs cannot tell so low a rate" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["roc.png"]
    data = strict(run(*common, *more, "--json").stdout)
    assert data["pairs"] == {
        "file": str(root / "pairs.csv"),
        "format": "csv",
        "count": 24,
        "genuine": 12,
        "pictures": 24,
        "people": 12,
        "folds": 3,
        "only_folds": None,
        "folds_are_the_lists_own": True,
    }
    assert list(data["variants"]) == ["own", "corr", "teacher"] and data["corr_target"] == "teacher"
    own = data["variants"]["own"]
    assert set(own["intervals"]) == {"accuracy", "auc", "eer", "tar@0.1", "tar@0.01", "tar@0.001"}
    assert own["intervals"]["auc"][0] <= own["auc"] <= own["intervals"]["auc"][1]
    assert np.shape(data["variants"]["corr"]["attention"]) == (7, 7)
    assert data["bootstrap"] == {"unit": "people", "units": 12, "replicates": 20, "confidence": 0.95}
    assert data["enrolment"]["aligned"] is True and data["enrolment"]["failed_pictures"] == []
    assert data["at_the_models_thresholds"]["calibrated"][0]["calibrated_fmr"] == 0.1


@pytest.mark.thorough
def test_command_detects_and_says_what_failed(files: dict[str, Path], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name, picture in {
        "a/1": portrait(), "a/2": portrait(degrees=5), "b/1": portrait(tint=0.8), "b/2": portrait(tint=0.8, degrees=-5),
        "c/1": background(200, 200), "c/2": portrait(),
    }.items():  # fmt: skip
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(photos / f"{name}.png")
    (tmp_path / "p.csv").write_text(
        "a,b,genuine\na/1.png,a/2.png,1\nb/1.png,b/2.png,1\na/1.png,b/1.png,0\na/2.png,b/2.png,0\n"
        "c/1.png,c/2.png,1\nc/1.png,a/1.png,0\n"
    )
    common = ("verification", "--pairs", tmp_path / "p.csv", "--root", photos, "--model", files["model"])
    result = run(*common, "--bootstrap", "0")
    assert result.exit_code == 0, result.output
    assert "failed to enrol: 1 of 6 pictures, so 1 genuine and 1 impostor pairs count as rejected" in result.stdout
    assert "(made, so people may be in several)" in result.stdout
    assert result.stderr.startswith("xcos: c/1.png: no face found in 200 x 200 pixels")
    data = strict(run(*common, "--bootstrap", "0", "--json").stdout)
    assert data["enrolment"]["failed_pictures"][0]["picture"] == "c/1.png"
    assert data["enrolment"]["failed_pairs"] == [
        {"a": "c/1.png", "b": "c/2.png", "genuine": True},
        {"a": "c/1.png", "b": "a/1.png", "genuine": False},
    ]
    assert data["enrolment"]["detector"] == "small" and data["bootstrap"] is None
    # Photographs given as crops: nothing is left to measure.
    trouble = run(*common, "--aligned", "--bootstrap", "0")
    assert trouble.exit_code == 2 and "expected an aligned crop of 112 x 112" in trouble.stderr


def test_command_says_which_pictures_show_several_faces(
    root: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xcos_ext.faces.create_detector", lambda spec: TwoFaces())
    common = ("--pairs", root / "pairs.csv", "--root", root, "--model", files["model"])
    result = run("verification", *common, "--bootstrap", "0", "--json")
    assert len(strict(result.stdout)["enrolment"]["several_faces"]) == 24
    assert "p00/1.png: 2 faces found, took the most prominent\n" in result.stderr
    assert "and 19 more pictures with several faces (--json lists them)" in result.stderr


def test_command_on_some_folds(files: dict[str, Path], root: Path) -> None:
    """The numbers of the CSV file, as `evaluate faithfulness` takes them."""
    common = ("verification", "--pairs", root / "pairs.csv", "--root", root, "--aligned", "--model", files["model"])
    known = sorted({int(line.rsplit(",", 1)[1]) for line in (root / "pairs.csv").read_text().split()[1:]})
    chosen = ("--folds", f"{known[0]},{known[2]}", "--bootstrap", "0")
    data = strict(run(*common, *chosen, "--json").stdout)
    assert data["pairs"]["count"] == 16 and data["pairs"]["folds"] == 2
    assert data["pairs"]["only_folds"] == [known[0], known[2]]
    assert f"only folds {known[0]}, {known[2]}" in " ".join(run(*common, *chosen).stdout.split())
    wrong = run(*common, "--folds", "99")
    assert wrong.exit_code == 2 and f"--folds: expected some of {', '.join(map(str, known))}, got 99" in wrong.stderr


def test_command_on_a_bin_file(files: dict[str, Path], root: Path, tmp_path: Path) -> None:
    import pickle

    names = [(f"p{i:02d}/1", f"p{i:02d}/2", f"p{i:02d}/2", f"p{(i + 1) % 12:02d}/1") for i in range(12)]
    pictures = [(root / f"{name}.png").read_bytes() for four in names for name in four]
    (tmp_path / "x.bin").write_bytes(pickle.dumps((pictures, [True, False] * 12)))
    result = run(
        "verification", "--pairs", tmp_path / "x.bin", "--model", files["model"], "--json", "--bootstrap", "20"
    )
    assert result.exit_code == 0, result.output
    data = strict(result.stdout)
    assert data["pairs"]["format"] == "bin" and data["pairs"]["people"] is None and data["pairs"]["folds"] == 10
    assert data["bootstrap"]["unit"] == "pairs" and data["enrolment"]["aligned"] is True


def test_command_trouble(root: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trouble(words: str, *arguments: str | Path) -> None:
        result = run("verification", *arguments)
        assert result.exit_code == 2 and result.stdout == ""
        assert len(result.stderr.splitlines()) == 1 and words in result.stderr, result.stderr

    pairs, model = ("--pairs", root / "pairs.csv"), ("--model", files["model"])
    trouble("Missing option '--pairs'", *model)
    trouble("no such file or folder", "--pairs", tmp_path / "none", *model)
    trouble("expected the folder or zip archive", *pairs, *model)
    trouble("no such folder or archive", *pairs, *model, "--root", tmp_path / "none")
    trouble("pictures are not in", *pairs, *model, "--root", tmp_path)
    trouble("roc.gif: expected a file ending in .png", *pairs, *model, "--root", root, "--plot", tmp_path / "roc.gif")
    trouble("none.pt: no such file", *pairs, "--root", root, "--model", tmp_path / "none.pt")
    trouble("none.pt: no such file", *pairs, *model, "--root", root, "--teacher", tmp_path / "none.pt")
    trouble(
        "'--bootstrap': expected 0 or at least 20, got 3",
        *pairs,
        *model,
        "--root",
        root,
        "--aligned",
        "--bootstrap",
        "3",
    )
    trouble("'best'", *pairs, *model, "--attention", "best")
    # Nothing is scored for what a list of so few pairs cannot give.
    monkeypatch.setattr("xcos_ext.evaluation.protocol.score_pairs", None)
    (tmp_path / "few.csv").write_text("".join((root / "pairs.csv").read_text().splitlines(keepends=True)[:4]))
    few = ("--pairs", tmp_path / "few.csv", "--root", root, "--aligned", *model)
    trouble("--bootstrap: expected 0, or more pairs: 3 pairs are too few to be resampled", *few)
    trouble("--plot: expected a list with at least two impostor pairs", *few, "--plot", tmp_path / "roc.png")
    (tmp_path / "few.csv").unlink()
    assert run("--help").exit_code == run().exit_code == run("verification", "--help").exit_code == 0
    assert list(tmp_path.iterdir()) == []
