"""The package as a user first meets it: names, cheap import, build information, typing."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import xcos_ext


def test_every_public_name_resolves():
    for name in xcos_ext.__all__:
        assert getattr(xcos_ext, name) is not None
    assert set(xcos_ext.__all__) <= set(dir(xcos_ext))
    with pytest.raises(AttributeError, match="module 'xcos_ext' has no attribute 'nothing'"):
        xcos_ext.nothing  # noqa: B018


@pytest.mark.process
def test_importing_the_package_does_not_import_torch():
    code = "import sys, xcos_ext; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.process
def test_importing_the_operators_registers_them():
    code = "import xcos_ext.ops, torch; torch.ops.xcos_ext.xcos_score; torch.ops.xcos_ext.grid_cosine"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_versions_agree():
    assert xcos_ext.build_info()["version"] == xcos_ext.__version__
    try:
        installed = metadata.version("xcos_ext")
    except metadata.PackageNotFoundError:
        pytest.skip("run from a source folder without an installation")
    assert installed == xcos_ext.__version__


def test_build_info_is_complete():
    info = xcos_ext.build_info()
    assert {
        "version",
        "compiler",
        "torch",
        "isa",
        "isa_compiled",
        "isa_supported",
        "cuda",
        "cuda_architectures",
    } <= set(info)
    assert info["isa"] in info["isa_supported"] and set(info["isa_supported"]) <= set(info["isa_compiled"])
    assert bool(info["cuda_architectures"]) == info["cuda"]


def test_the_package_is_typed():
    assert resources.files("xcos_ext").joinpath("py.typed").is_file()


def test_operators_have_documented_contracts():
    for name in ("grid_cosine", "grid_match", "xcos_head", "xcos_score"):
        text = getattr(xcos_ext, name).__doc__
        for section in ("Args:", "Returns:", "Raises:", "[N, C, H, W]", "float64"):
            assert section in text


ROOMS = [
    "backbones",
    "bench",
    "card",
    "deploy",
    "devices",
    "evaluation",
    "evaluation.datasets",
    "evaluation.faithfulness",
    "explain",
    "explain.explainers",
    "explain.reconstruction",
    "faces",
    "gallery",
    "model",
    "ops",
    "training",
]
#: What takes seconds, files of others or a GPU to show; the faithfulness package's own docstring shows its protocols.
WITHOUT_EXAMPLE = {
    "LayerRecogniser",
    "OnnxRecogniser",
    "OnnxModel",
    "CompiledModel",
    "PairMaps",
    "TrtRunner",
    "build_engine",
    "export_onnx",
    "CFP",
    "CSVPairs",
    "deletion_identification",
    "deletion_verification",
    "faithfulness",
    "faithfulness_figure",
    "locality",
    "patch_replacement",
    "region_swap",
    "reconstruction_figure",
    "read_report",
    "Study",
    "PairModel",
    "Explainer",
    "Task",
    "CellMatrices",
}


def test_public_names_have_an_example_that_runs():
    """`pytest --doctest-modules xcos_ext` runs them; results, choices and errors speak for themselves."""
    missing = []
    for module in (xcos_ext, *(importlib.import_module(f"xcos_ext.{room}") for room in ROOMS)):
        for name in set(module.__all__) - WITHOUT_EXAMPLE:
            value = getattr(module, name)
            plain = isinstance(value, type) and issubclass(value, (BaseException, tuple, enum.Enum))
            if not callable(value) or dataclasses.is_dataclass(value) or plain:
                continue
            if ">>>" not in (value.__doc__ or ""):
                missing.append(f"{module.__name__}.{name}")
    assert not missing


# ------------------------------------------------------------------ one text where several are wanted


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A gallery with the faces "1", "2" and "12", and whatever else calls need."""
    pytest.importorskip("lance", reason="needs the extra gallery (pylance)")
    from xcos_ext.backbones import SplitRecogniser
    from xcos_ext.evaluation.datasets import PairList
    from xcos_ext.evaluation.faithfulness import Faces
    from xcos_ext.gallery import Gallery

    features = torch.randn(3, 4, 7, 7)
    templates = xcos_ext.Templates.from_features(features)
    model = xcos_ext.XCosModel(torch.nn.Identity(), xcos_ext.XCosHead(4, 4, attention="norm")).eval()
    output = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(147, 8))
    recogniser = SplitRecogniser(torch.nn.AvgPool2d(16), output, grid_shape=(3, 7, 7), embedding_size=8)
    pairs = PairList([("a", "b"), ("c", "d")], [True, False], [0, 1], lambda key: key)
    with Gallery.create(tmp_path_factory.mktemp("several") / "g", templates) as gallery:
        gallery.add(["1", "2", "12"], templates)
        yield SimpleNamespace(
            gallery=gallery,
            templates=templates,
            features=features,
            model=model,
            recogniser=recogniser,
            pairs=pairs,
            faces=Faces(pairs),
        )


def of(module: str, name: str) -> Any:
    """Something of the package."""
    return getattr(importlib.import_module(f"xcos_ext.{module}"), name)


CANDIDATES = [["Ann"], ["Bob"]], [[0.9], [0.8]], ["Ann", "Ann"], {"Ann", "Bob"}
SCORES = [0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0]
#: Message -> a call with one text (or bytes, a path, a number) as the argument that it names.
ONE: dict[str, Callable[[Any], Any]] = {
    "gallery.add: ids": lambda w: w.gallery.add("xyz", w.templates),
    "gallery.add: persons": lambda w: w.gallery.add(list("xyz"), w.templates, persons="Ann"),
    "gallery.add: metadata": lambda w: w.gallery.add(list("xyz"), w.templates, metadata="abc"),
    "gallery.remove: ids": lambda w: w.gallery.remove("12"),
    "gallery.remove: ids: expected a sequence of texts, got bytes": lambda w: w.gallery.remove(b"12"),
    "gallery.get: ids": lambda w: w.gallery.get("12"),
    "gallery.positions: ids": lambda w: w.gallery.positions("12"),
    "gallery.templates_at: positions": lambda w: w.gallery.templates_at("12"),
    "gallery.templates_at: positions: expected a sequence of integers, got int": lambda w: w.gallery.templates_at(1),
    "gallery.search: exclude": lambda w: w.gallery.search(w.templates, exclude="12"),
    "gallery.search: groups": lambda w: w.gallery.search(w.templates, groups="aab"),
    "find_pictures: paths": lambda w: of("gallery.enroll", "find_pictures")("folder"),
    "find_pictures: paths: expected a sequence of paths, got one path": lambda w: of("gallery.enroll", "find_pictures")(
        Path("folder")
    ),
    "faces: expected a sequence of pictures": lambda w: of("card.preprocessing", "ARCFACE").array("face"),
    "pictures": lambda w: w.model.features_of(Path("face.png")),
    "faces": lambda w: of("model", "plug_statistics")(w.recogniser, "photographs"),
    "candidates": lambda w: of("deploy.candidates", "names")(torch.device("cpu"), "eager"),
    "dtypes": lambda w: of("deploy.compiled", "_check_dtypes")(torch.float32),
    "profiles": lambda w: of("deploy.tensorrt", "build_engine")("a.onnx", "a.plan", profiles="123"),
    "label_names": lambda w: of("explain.pairs_report", "write_report")(
        "a.html", w.model, [], None, label_names="camera"
    ),
    "names: expected": lambda w: of("explain", "explain")(
        xcos_ext.load_model(), *[np.zeros((112, 112, 3), np.uint8)] * 2, names="Ann"
    ),
    "shape": lambda w: of("explain.reconstruction", "FeatureDecoder")("123"),
    "widths": lambda w: of("explain.reconstruction", "FeatureDecoder")((4,), widths="4321"),
    "channels": lambda w: of("explain.reconstruction", "without")(
        of("explain.reconstruction", "FeatureDecoder")((3, 2, 2)), torch.ones(1, 3, 2, 2), channels="02"
    ),
    "named": lambda w: of("evaluation.datasets", "PairList")("ab", [True]),
    "genuine": lambda w: of("evaluation.datasets", "PairList")([("a", "b")], "1"),
    "folds": lambda w: of("evaluation.datasets", "PairList")([("a", "b")], [True], "1"),
    "folds: expected a sequence of numbers, got int": lambda w: of("evaluation.datasets", "LFW")("a", "b", folds=1),
    "folds: expected a sequence of numbers, got one text": lambda w: of("evaluation.faithfulness", "Faces")(
        w.pairs, folds="01"
    ),
    "keys": lambda w: w.faces.stacked("ab"),
    "avoid": lambda w: w.faces.another("a", np.random.default_rng(0), avoid="abc"),
    "explainers": lambda w: of("evaluation.faithfulness", "faithfulness")(None, w.faces, "xcos"),
    "protocols": lambda w: of("evaluation.faithfulness", "faithfulness")(None, w.faces, protocols="deletion"),
    "regions": lambda w: of("evaluation.faithfulness", "Settings")(regions="mouth"),
    "sizes": lambda w: of("evaluation.faithfulness", "Settings")(sizes="small"),
    "fills": lambda w: of("evaluation.faithfulness", "Settings")(fills="zero"),
    "attentions": lambda w: of("evaluation", "evaluate")(w.model, w.pairs, attentions="own"),
    "fmrs": lambda w: of("evaluation", "evaluate")(w.model, w.pairs, fmrs=0.1),
    "fmrs: expected a sequence of numbers, got float": lambda w: of("evaluation", "verification")(*SCORES, fmrs=0.1),
    "fmrs: expected a sequence of numbers, got one text": lambda w: of("evaluation", "bootstrap")(
        *SCORES, None, fmrs="0.1"
    ),
    "people": lambda w: of("evaluation.fmr", "calibrate")(w.model, w.features, "Ann"),
    "people: expected a sequence of texts": lambda w: of("evaluation.fmr", "all_pair_scores")(
        w.model, w.features, "Ann"
    ),
    "fmrs: expected a sequence": lambda w: of("evaluation.fmr", "calibrate")(w.model, w.features, ["a"] * 3, fmrs=0.1),
    "thresholds": lambda w: of("evaluation.fmr", "fmr_curve")([0.1, 0.2], thresholds="0.5"),
    "persons": lambda w: of("evaluation", "ranked_persons")([[0.1, 0.2]], "ab", 1),
    "candidates: expected": lambda w: of("evaluation", "identification")("ab", *CANDIDATES[1:]),
    "candidates[0]": lambda w: of("evaluation", "identification")(["Ann", "Bob"], *CANDIDATES[1:]),
    "persons: expected": lambda w: of("evaluation", "identification")(*CANDIDATES[:2], "ab", CANDIDATES[3]),
    "enrolled": lambda w: of("evaluation", "identification")(*CANDIDATES[:3], "Ann"),
    "ranks": lambda w: of("evaluation", "identification")(*CANDIDATES, ranks=1),
    "fpirs": lambda w: of("evaluation", "identification")(*CANDIDATES, fpirs=0.1),
    "thresholds: expected": lambda w: of("evaluation", "identification")(*CANDIDATES, thresholds="0.5"),
    "names": lambda w: of("training.data", "people_of_share")("Ann", 0.5),
    "folds: expected": lambda w: of("training.data", "people_of_folds")("pairs.txt", 1),
    "chosen": lambda w: of("training.data", "Pictures")(None, None, (), (), {}).of_people("Ann"),
    "assignments": lambda w: of("training.settings", "override")({}, "train.steps=20"),
    "held_out": lambda w: of("training.tasks.head", "HeadTask")(
        SimpleNamespace(pictures=None, maps=SimpleNamespace(embeddings=None)),
        SimpleNamespace(loss=None, train=SimpleNamespace(seed=0)),
        "Ann",
    ),
    "stages": lambda w: of("bench.cases", "Settings")(stages="read"),
    "runtimes": lambda w: of("bench.cases", "Settings")(runtimes="onnx"),
    "devices": lambda w: of("bench.cases", "Settings")(devices="cpu"),
    "dtypes: expected": lambda w: of("bench.cases", "Settings")(dtypes="fp32"),
    "batches": lambda w: of("bench.cases", "Settings")(batches=4),
    "suffixes": lambda w: of("io.atomic", "check_output")("a", ".png"),
}


@pytest.mark.parametrize("message", ONE)
def test_one_text_is_not_taken_for_its_letters(world: SimpleNamespace, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^{re.escape(message)}.*"):
        ONE[message](world)
    assert list(world.gallery.ids()) == ["1", "2", "12"]


#: Message -> a call with a set, whose order is another one in every process, where places count.
SETS: dict[str, Callable[[Any], Any]] = {
    "gallery.add: ids": lambda w: w.gallery.add({"x", "y", "z"}, w.templates),
    "gallery.add: persons": lambda w: w.gallery.add(list("xyz"), w.templates, persons={"Ann", "Bob", "Cid"}),
    "gallery.get: ids": lambda w: w.gallery.get({"1", "2"}),
    "gallery.search: groups": lambda w: w.gallery.search(w.templates, groups=frozenset("abc")),
    "people": lambda w: of("evaluation", "all_pair_scores")(w.model, w.features, set("abc")),
    "persons": lambda w: of("evaluation", "ranked_persons")([[0.2, 0.9]], {"Ann", "Bob"}, 1),
    "candidates[1]": lambda w: of("evaluation", "identification")([["Ann"], {"Bob"}], *CANDIDATES[1:]),
    "genuine": lambda w: of("evaluation.datasets", "PairList")([("a", "b"), ("a", "c")], {True, False}),
    "names": lambda w: of("explain", "explain")(w.model, FACE, FACE, names={"a", "b"}),
    "pictures": lambda w: w.model.features_of({1, 2}),
}
FACE = np.zeros((112, 112, 3), np.uint8)


@pytest.mark.parametrize("argument", SETS)
def test_sets_are_not_taken_for_sequences(world: SimpleNamespace, argument: str) -> None:
    with pytest.raises(TypeError, match=rf"^{re.escape(argument)}: expected a sequence of .*set, which has no order$"):
        SETS[argument](world)
    assert list(world.gallery.ids()) == ["1", "2", "12"]
    assert world.gallery.positions({"2"}) == {"2": 1}  # where places do not count


# ------------------------------------------------------------------ paths and processes


def _gallery(path: str, shade: int) -> Any:
    from xcos_ext.gallery import Gallery

    faces = xcos_ext.Templates.from_features(torch.ones(1, 4, 7, 7))
    with Gallery.create(f"{path}.gallery", faces) as made:
        made.add([str(shade)], faces)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Folders ``here`` and ``there`` with everything of the same names, and of other contents."""
    for shade, name in ((10, "here"), (200, "there")):
        folder = tmp_path / name
        (folder / "tree" / "ann").mkdir(parents=True)
        Image.new("RGB", (4, 3), (shade, shade, shade)).save(folder / "tree" / "ann" / "1.png")
        with zipfile.ZipFile(folder / "tree.zip", "w") as archive:
            archive.write(folder / "tree" / "ann" / "1.png", "ann/1.png")
        (folder / "pairs.csv").write_text(f"a,b,genuine,note\nann/1.png,ann/1.png,1,{shade}\n")
        _gallery(str(folder / "one"), shade)
    return tmp_path


def _found(path: str) -> Any:
    return of("gallery.enroll", "find_pictures")([path])[0][0].read


#: What is made of a relative path -> the shade that it gives later.
LATER: dict[str, Callable[[], Callable[[], Any]]] = {
    "gallery": lambda: of("gallery", "Gallery").open("one.gallery"),
    "tree": lambda: of("faces", "PictureTree")("tree"),
    "archive": lambda: of("faces", "PictureTree")("tree.zip"),
    "persons": lambda: of("faces", "PersonFolder")("tree"),
    "pairs": lambda: of("explain.pairs_file", "PairsFile")("pairs.csv"),
    "listed pairs": lambda: of("evaluation.datasets", "CSVPairs")("tree", "pairs.csv"),
    "below a folder": lambda: of("explain.pairs_file", "pictures_below")("tree"),
    "below an archive": lambda: of("explain.pairs_file", "pictures_below")("tree.zip"),
    "enrolled file": lambda: _found("tree/ann/1.png"),
    "enrolled folder": lambda: _found("tree"),
    "enrolled archive": lambda: _found("tree.zip"),
}


def _shade(name: str, made: Any) -> int:
    if name == "gallery":
        return int(next(made.refresh().ids()))
    if name == "pairs":
        return int(next(iter(made)).labels[0])
    read = made.read if hasattr(made, "read") else made
    return int((read() if name.startswith("enrolled") else read("ann/1.png"))[0, 0, 0])


@pytest.mark.parametrize("name", LATER)
def test_objects_stay_where_they_were_made(places: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.chdir does not lead them to others of that name, nor does pickling."""
    if name == "gallery":
        pytest.importorskip("lance", reason="needs the extra gallery (pylance)")
    monkeypatch.chdir(places / "here")
    made = LATER[name]()
    monkeypatch.chdir(places / "there")
    assert _shade(name, made) == _shade(name, pickle.loads(pickle.dumps(made))) == 10
