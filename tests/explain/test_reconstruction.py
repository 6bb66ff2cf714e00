"""Faces drawn from features: shapes, files, sets put out, and the explainer against a slow reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from xcos_ext.backbones import create
from xcos_ext.card import Preprocessing
from xcos_ext.explain.explainers import EmbeddingCosine, XCosPairs
from xcos_ext.explain.explainers import create as create_explainer
from xcos_ext.explain.reconstruction import (
    FeatureDecoder,
    ReconstructionExplainer,
    evidence,
    fingerprint_of,
    load_decoder,
    reconstruct,
    reconstruction_figure,
    save_decoder,
    shipped_decoders,
    without,
)
from xcos_ext.io.errors import ModelError
from xcos_ext.io.weights import read_safetensors, write_safetensors
from xcos_ext.model import XCosHead, XCosModel, load_model

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (6, 5, 4, 4)


def small(shape: tuple[int, ...], fingerprint: str = "toy", widths: tuple[int, ...] = WIDTHS) -> FeatureDecoder:
    """A decoder with random weights, also where a new one has zeros, and a mean that is not zero."""
    decoder = FeatureDecoder(shape, fingerprint=fingerprint, widths=widths, name="small")
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        decoder.mean.copy_(torch.randn(shape))
        decoder.scale.copy_(torch.rand(shape) + 0.5)
    return decoder.eval().requires_grad_(False)


# --- a toy world in which every answer is known: features are pixels, the decoder a matrix

_SIDE, _LENGTH = 4, 6


class Linear(FeatureDecoder):
    """D(f) = 1/2 + M f: what a channel does to the picture is its column."""

    def __init__(self, shape: tuple[int, ...], fingerprint: str = "toy") -> None:
        super().__init__(shape, fingerprint=fingerprint, widths=WIDTHS)
        self.picture_size = (_SIDE, _SIDE)
        size = int(np.prod(shape))
        self.register_buffer("matrix", 0.02 * torch.randn(3 * _SIDE * _SIDE, size))
        self.mean.copy_(0.1 * torch.randn(shape))
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        return 0.5 + (features.flatten(1).float() @ self.matrix.T).view(-1, 3, _SIDE, _SIDE)


class Pixels:
    """Unit vectors of the first numbers of a picture, compared by their cosine."""

    preprocessing = Preprocessing(size=(_SIDE, _SIDE))
    threshold = 0.3
    name = "toy"

    def fingerprint(self) -> str:
        return "toy"

    def features(self, images: Tensor) -> Tensor:
        return F.normalize(images.flatten(1)[:, :_LENGTH], dim=1)

    def score(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        return (features_a * features_b).sum(1)

    def channels(self, features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
        return features_a, features_b


@pytest.fixture
def cells() -> XCosPairs:
    """An xCos model with a grid of 2 x 2 cells of 3 channels, whose features are a crop of the picture."""

    class Crop(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :, :2, :2] + 0.3 * images[:, :, 2:, 2:]

    head = XCosHead(3, 3, attention="norm").eval()
    pixels = Preprocessing(size=(_SIDE, _SIDE))
    return XCosPairs(XCosModel(Crop(), head, preprocessing=pixels, threshold=0.2).eval())


# --- the network


@pytest.mark.parametrize(("shape", "size"), [((32, 7, 7), (112, 112)), ((16,), (112, 112)), ((3, 2, 4), (32, 64))])
def test_a_decoder_draws_pictures_of_16_pixels_a_cell(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    decoder = small(shape)
    drawn = decoder(torch.randn(2, *shape))
    assert drawn.shape == (2, 3, *size)
    assert drawn.dtype == torch.float32
    assert decoder(torch.randn(0, *shape)).shape == (0, 3, *size)


def test_a_new_decoder_shows_about_the_mean_face() -> None:
    decoder = FeatureDecoder((32, 7, 7))
    decoder.mean_face.uniform_()
    change = decoder(torch.randn(4, 32, 7, 7)).detach() - decoder.mean_face
    assert float(change.square().mean().sqrt()) < 0.2


def test_gradients_reach_the_features_and_every_weight() -> None:
    decoder = small((4, 2, 2)).requires_grad_(True)
    features = torch.randn(2, 4, 2, 2, requires_grad=True)
    decoder(features).square().sum().backward()
    assert features.grad is not None and bool((features.grad != 0).any())
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in decoder.parameters())


@pytest.mark.parametrize("shape", [(), (4, 7), (4, 0, 7)])
def test_other_shapes_of_features_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape: expected"):
        FeatureDecoder(shape)
    with pytest.raises(ValueError, match="widths: expected 4"):
        FeatureDecoder((4, 7, 7), widths=(8, 8))


# --- files


@pytest.mark.parametrize("shape", [(4, 2, 3), (5,)])
def test_files_keep_everything(tmp_path: Path, shape: tuple[int, ...]) -> None:
    decoder = small(shape, fingerprint="0123456789abcdef")
    path = tmp_path / "d.safetensors"
    save_decoder(decoder, path, dtype=torch.float32)
    loaded = load_decoder(path)
    assert (loaded.shape, loaded.widths, loaded.fingerprint, loaded.name) == (
        shape,
        WIDTHS,
        "0123456789abcdef",
        "small",
    )
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    features = torch.randn(3, *shape)
    torch.testing.assert_close(loaded(features), decoder(features))
    save_decoder(decoder, path)
    half = load_decoder(path)
    assert torch.equal(half.mean, decoder.mean)  # what replaces entries is the mean as it was measured
    torch.testing.assert_close(half(features), decoder(features), atol=5e-3, rtol=5e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path, bad = tmp_path / "d.safetensors", tmp_path / "bad.safetensors"
    save_decoder(small((4, 2, 3)), path)
    with pytest.raises(ModelError, match="no such file"):
        load_decoder(tmp_path / "none.safetensors")
    for length in (0, 5, 100, path.stat().st_size - 1):
        bad.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ModelError, match=r"bad\.safetensors: "):
            load_decoder(bad)
    tensors, metadata = read_safetensors(path)
    for changed in (
        metadata | {"format": "xcos-model"},
        metadata | {"config": "{"},
        metadata | {"config": json.dumps({"shape": [4, 2, 3], "widths": [1], "name": "x"})},
        metadata | {"config": json.dumps({"shape": [4, 2, 2], "widths": WIDTHS, "name": "x"})},
        {name: value for name, value in metadata.items() if name != "fingerprint"},
    ):
        write_safetensors(bad, tensors, changed)
        with pytest.raises(ModelError, match="decoder's file"):
            load_decoder(bad)
    for wrong in (
        {name: tensor for name, tensor in tensors.items() if name != "mean"},
        tensors | {"scale": torch.zeros(4, 2, 3)},
        tensors | {"mean_face": torch.full_like(tensors["mean_face"], torch.nan)},
    ):
        write_safetensors(bad, wrong, metadata)
        with pytest.raises(ModelError, match="damaged decoder's file"):
            load_decoder(bad)


def test_what_fp16_cannot_hold_is_not_written(tmp_path: Path) -> None:
    decoder = small((4, 2, 3))
    decoder.leave.bias.fill_(1e6)
    with pytest.raises(ModelError, match=r"leave\.bias"):
        save_decoder(decoder, tmp_path / "d.safetensors")
    assert not list(tmp_path.iterdir())


# --- sets


def test_sets_are_replaced_by_the_mean_exactly() -> None:
    decoder, features = small((3, 2, 4)), torch.randn(2, 3, 2, 4)
    mean = decoder.mean.expand_as(features)

    def check(got: Tensor, removed: Tensor) -> None:
        assert torch.equal(got[removed], mean[removed]) and torch.equal(got[~removed], features[~removed])

    none = torch.zeros(2, 3, 2, 4, dtype=torch.bool)
    check(without(decoder, features), none)
    check(without(decoder, features, channels=[]), none)
    channel = none.clone()
    channel[:, [0, 2]] = True
    check(without(decoder, features, channels=[2, 0]), channel)
    check(without(decoder, features, channels=torch.tensor([True, False, True])), channel)
    own = none.clone()
    own[0, 1], own[1, 2] = True, True
    check(without(decoder, features, channels=torch.tensor([[False, True, False], [False, False, True]])), own)
    cell = none.clone()
    cell[:, :, 1, 3] = True
    check(without(decoder, features, cells=cell[0, 0]), cell)
    check(without(decoder, features, cells=cell[:, 0]), cell)
    entry = torch.rand(2, 3, 2, 4) < 0.3
    check(without(decoder, features, entries=entry), entry)
    check(without(decoder, features, entries=entry[0]), entry[:1].expand_as(entry))
    check(without(decoder, features, channels=[0, 2], cells=cell[0, 0], entries=entry), channel | cell | entry)
    assert without(decoder, features) is not features


def test_sets_of_an_embedding() -> None:
    decoder, features = small((5,)), torch.randn(2, 5)
    got = without(decoder, features, channels=[1, 4])
    assert torch.equal(got[:, [1, 4]], decoder.mean[[1, 4]].expand(2, 2)) and torch.equal(got[:, :1], features[:, :1])
    with pytest.raises(ValueError, match="cells: expected a decoder of grid features"):
        without(decoder, features, cells=torch.ones(7, 7, dtype=torch.bool))


def test_a_reconstruction_is_the_decoders_picture_clamped() -> None:
    decoder, features = small((3, 2, 4)), 3 * torch.randn(2, 3, 2, 4)
    assert torch.equal(reconstruct(decoder, features), decoder(features).clamp(0, 1))
    everything = reconstruct(decoder, features, channels=[0, 1, 2])
    torch.testing.assert_close(everything, decoder(decoder.mean.expand(2, -1, -1, -1)).clamp(0, 1))
    assert reconstruct(decoder, features[:0]).shape == (0, 3, 32, 64)


@pytest.mark.parametrize(
    ("sets", "error", "message"),
    [
        ({"channels": [3]}, ValueError, "channels: expected numbers from 0 to 2"),
        ({"channels": [-1]}, ValueError, "channels: expected numbers"),
        ({"channels": torch.tensor([0.5])}, ValueError, "channels: expected numbers"),
        ({"channels": torch.ones(4, dtype=torch.bool)}, ValueError, r"channels: expected bool \[3\]"),
        ({"cells": torch.ones(2, 4)}, TypeError, "cells: expected a bool mask"),
        ({"cells": torch.ones(4, 2, dtype=torch.bool)}, ValueError, r"cells: expected bool \[2, 4\]"),
        ({"entries": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"entries: expected bool \[3, 2, 4\]"),
        ({"cells": torch.ones(3, 2, 4, dtype=torch.bool)}, ValueError, "sets: expected one for all faces or 2, got 3"),
    ],
)
def test_wrong_sets_get_one_clear_error(sets: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        reconstruct(small((3, 2, 4)), torch.randn(2, 3, 2, 4), **sets)  # type: ignore[arg-type]


def test_wrong_features_get_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"features: expected \[N, 3, 2, 4\], got \[2, 3, 4, 2\]"):
        reconstruct(small((3, 2, 4)), torch.randn(2, 3, 4, 2))
    with pytest.raises(TypeError, match="features: expected floating-point"):
        reconstruct(small((3, 2, 4)), torch.zeros(2, 3, 2, 4, dtype=torch.int64))


# --- the explainer


def test_with_a_linear_decoder_the_maps_are_known_in_closed_form() -> None:
    model, decoder = Pixels(), Linear((_LENGTH,))
    a, b = torch.randn(3, 3, _SIDE, _SIDE), torch.randn(3, 3, _SIDE, _SIDE)
    fa, fb = model.features(a), model.features(b)
    excess = fa * fb - model.threshold / _LENGTH
    shift = (fa - decoder.mean).abs()  # |D(a) - D(a without k)| = |column k| |a_k - mean_k|
    columns = decoder.matrix.abs().view(3, _SIDE, _SIDE, _LENGTH).mean(0)
    got = ReconstructionExplainer(decoder, groups=None, blur=0)(model, a, b)
    for found, part in ((got.similar, excess.clamp_min(0)), (got.dissimilar, (-excess).clamp_min(0))):
        torch.testing.assert_close(found, torch.einsum("hwk,nk->nhw", columns, shift * part))
    assert got.similar.shape == (3, _SIDE, _SIDE) and got.similar.dtype == torch.float32


def _slow(
    decoder: FeatureDecoder, model: XCosPairs | Pixels, a: Tensor, b: Tensor, units: str, groups: int
) -> list[Tensor]:
    """The maps pair by pair and unit by unit, from the definition."""
    fa, fb = model.features(a), model.features(b)
    made: list[Tensor] = []
    for n in range(len(a)):
        u, v = (part[0] for part in model.channels(fa[n : n + 1], fb[n : n + 1]))
        parts = [float(x) * float(y) for x, y in zip(u, v, strict=True)]
        if isinstance(model, XCosPairs):
            w = model.model.score(fa[n : n + 1], fb[n : n + 1], return_maps=True).attention[0].flatten().tolist()
            shares = [x / fa.shape[1] for _ in range(fa.shape[1]) for x in w]
        else:
            shares = [1 / len(parts)] * len(parts)
        threshold = model.threshold
        assert threshold is not None
        excess = np.array(parts) - threshold * np.array(shares)
        whole = decoder(fa[n : n + 1]).clamp(0, 1)
        maps = [torch.zeros(_SIDE, _SIDE), torch.zeros(_SIDE, _SIDE)]
        members: list[tuple[int, float, list[int]]] = []
        if units == "cells":
            count = excess.size // fa.shape[1]
            for cell in range(count):
                own = list(range(cell, excess.size, count))
                total = float(excess[own].sum())
                members.append((int(total < 0), abs(total), own))
        else:
            for side, sign in enumerate((1, -1)):
                chosen = sorted((k for k in range(excess.size) if sign * excess[k] > 0), key=lambda k: -abs(excess[k]))
                parts_made = min(groups, len(chosen))
                for g in range(parts_made):
                    own = [k for rank, k in enumerate(chosen) if rank * parts_made // len(chosen) == g]
                    members.append((side, float(np.abs(excess[own]).mean()), own))
        for side, weight, own in members:
            feature = fa[n].clone().flatten()
            feature[own] = decoder.mean.flatten()[own]
            drawn = decoder(feature.view(1, *decoder.shape)).clamp(0, 1)
            maps[side] += weight * (whole - drawn)[0].abs().mean(0)
        made += maps
    return made


@pytest.mark.parametrize("units", ["cells", "channels"])
@pytest.mark.parametrize("groups", [1, 3, 8])
def test_cells_and_channels_of_a_grid_equal_a_slow_reference(cells: XCosPairs, units: str, groups: int) -> None:
    decoder = Linear((3, 2, 2), fingerprint_of(cells))
    a, b = torch.randn(4, 3, _SIDE, _SIDE), torch.randn(4, 3, _SIDE, _SIDE)
    explainer = ReconstructionExplainer(decoder, units=units, groups=groups, blur=0, batch_size=3)  # type: ignore[arg-type]
    got = explainer(cells, a, b)
    wanted = torch.stack(_slow(decoder, cells, a, b, units, groups)).view(4, 2, _SIDE, _SIDE)
    torch.testing.assert_close(torch.stack(got, 1), wanted)
    assert float(wanted[:, 0].max()) > 0 and float(wanted[:, 1].max()) > 0


def test_groups_of_an_embedding_equal_a_slow_reference() -> None:
    model, decoder = Pixels(), Linear((_LENGTH,))
    a, b = torch.randn(4, 3, _SIDE, _SIDE), torch.randn(4, 3, _SIDE, _SIDE)
    for groups in (1, 2, 5):
        got = ReconstructionExplainer(decoder, groups=groups, blur=0)(model, a, b)
        wanted = torch.stack(_slow(decoder, model, a, b, "channels", groups)).view(4, 2, _SIDE, _SIDE)
        torch.testing.assert_close(torch.stack(got, 1), wanted)


def test_the_evidence_adds_up_to_the_decision(cells: XCosPairs) -> None:
    for model in (cells, Pixels()):
        a, b = torch.randn(5, 3, _SIDE, _SIDE), torch.randn(5, 3, _SIDE, _SIDE)
        fa, fb = model.features(a), model.features(b)
        for threshold in (None, -0.4, 0.7):
            t = model.threshold if threshold is None else threshold
            assert t is not None
            told = evidence(model, fa, fb, threshold)
            torch.testing.assert_close(told.excess.sum(1), model.score(fa, fb) - t)
            assert not bool((told.similar & told.dissimilar).any())


def test_sets_of_cells_are_the_cells_of_the_decision_budget(cells: XCosPairs) -> None:
    decoder = Linear((3, 2, 2), fingerprint_of(cells))
    a, b = torch.randn(4, 3, _SIDE, _SIDE), torch.randn(4, 3, _SIDE, _SIDE)
    fa, fb = cells.features(a), cells.features(b)
    maps = cells.model.score(fa, fb, return_maps=True)
    similar, dissimilar = ReconstructionExplainer(decoder).sets(cells, fa, fb)
    wanted = (maps.attention * (maps.similarity - 0.2) > 0).unsqueeze(1).expand(-1, 3, -1, -1)
    assert torch.equal(similar, wanted) and torch.equal(dissimilar, ~wanted)


def test_the_threshold_moves_entries_from_one_set_to_the_other() -> None:
    model, decoder = Pixels(), Linear((_LENGTH,))
    a, b = torch.randn(2, 3, _SIDE, _SIDE), torch.randn(2, 3, _SIDE, _SIDE)
    low = ReconstructionExplainer(decoder, threshold=-50.0)(model, a, b)
    high = ReconstructionExplainer(decoder, threshold=50.0)(model, a, b)
    assert float(low.dissimilar.max()) == 0 < float(low.similar.min())
    assert float(high.similar.max()) == 0 < float(high.dissimilar.min())


def test_blur_keeps_what_is_even_and_spreads_what_is_not() -> None:
    model, decoder = Pixels(), Linear((_LENGTH,))
    a, b = torch.randn(2, 3, _SIDE, _SIDE), torch.randn(2, 3, _SIDE, _SIDE)
    sharp = ReconstructionExplainer(decoder, blur=0)(model, a, b).similar
    soft = ReconstructionExplainer(decoder, blur=2)(model, a, b).similar
    assert float(soft.flatten(1).std()) < float(sharp.flatten(1).std())


def test_it_works_without_gradients_and_leaves_no_inference_tensors(cells: XCosPairs) -> None:
    explainer = ReconstructionExplainer(Linear((3, 2, 2), fingerprint_of(cells)))
    a, b = torch.randn(2, 3, _SIDE, _SIDE), torch.randn(2, 3, _SIDE, _SIDE)
    plain = explainer(cells, a, b)
    with torch.no_grad():
        again = explainer(cells, a, b)
    assert torch.equal(plain.similar, again.similar)
    assert not plain.similar.is_inference() and not plain.similar.requires_grad


def test_a_decoder_of_another_model_is_refused(cells: XCosPairs, tmp_path: Path) -> None:
    images = torch.randn(1, 3, _SIDE, _SIDE)
    with pytest.raises(
        ValueError, match=r"model: expected the one whose features the decoder .*\(other\), got toy \(toy\)"
    ):
        ReconstructionExplainer(Linear((_LENGTH,), "other"))(Pixels(), images, images)
    with pytest.raises(ValueError, match="model: expected one that a shipped decoder belongs to"):
        ReconstructionExplainer()(cells, images, images)
    path = tmp_path / "d.safetensors"
    save_decoder(small((3, 7, 7), "other"), path)
    with pytest.raises(ValueError, match="decoder 'small' was trained on"):
        ReconstructionExplainer(path)(cells, images, images)


def test_bad_options_and_arguments_get_one_clear_error(cells: XCosPairs) -> None:
    decoder, images = Linear((_LENGTH,)), torch.randn(1, 3, _SIDE, _SIDE)
    for options, message in (
        ({"units": "pixels"}, "units: expected"),
        ({"units": "cells"}, "units: expected 'channels' for a decoder of embeddings"),
        ({"groups": 0}, "groups: expected"),
        ({"blur": -1.0}, "blur: expected"),
        ({"blur": float("nan")}, "blur: expected"),
        ({"threshold": float("inf")}, "threshold: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            ReconstructionExplainer(decoder, **options)  # type: ignore[arg-type]
    model = Pixels()
    model.threshold = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="model: expected a decision threshold"):
        ReconstructionExplainer(decoder)(model, images, images)
    with pytest.raises(ValueError, match="b: expected the shape of a"):
        ReconstructionExplainer(decoder)(Pixels(), images, torch.cat((images, images)))


def test_fingerprints_tell_models_apart() -> None:
    one, other = (EmbeddingCosine(create("mobilefacenet", embedding_size=4).eval()) for _ in "ab")
    before = fingerprint_of(one)
    assert before != fingerprint_of(other) and before == fingerprint_of(one)
    one.recogniser.preprocessing = Preprocessing(mean=(0.4, 0.4, 0.4))
    assert fingerprint_of(one) != before


# --- the decoder that the package ships


@pytest.fixture(scope="module")
def shipped() -> XCosPairs:
    return XCosPairs(load_model())


@pytest.fixture(scope="module")
def crops() -> list[np.ndarray]:
    from xcos_ext.faces import create_detector, read_face

    folder = REPOSITORY / "examples" / "photographs"
    detector = create_detector()
    return [read_face(folder / name, detector).rgb for name in ("astronaut.jpg", "astronaut-masked.jpg")]


def test_the_shipped_decoder_draws_the_photographs_better_than_the_mean_face(
    shipped: XCosPairs, crops: list[np.ndarray]
) -> None:
    decoder = load_decoder(shipped_decoders()[fingerprint_of(shipped)])
    images = shipped.preprocessing(crops)
    real = (images + 1) / 2
    features = shipped.features(images)
    drawn = reconstruct(decoder, features)
    assert bool(((drawn - real).abs().mean((1, 2, 3)) < (decoder.mean_face - real).abs().mean((1, 2, 3)))[0])
    threshold = shipped.threshold
    assert threshold is not None
    score = shipped.score(features, shipped.features(2 * drawn - 1))
    control = shipped.score(features, shipped.features((2 * decoder.mean_face - 1).expand_as(images)))
    assert bool((score >= threshold).all()) and bool((control < threshold).all())


def test_shipped_decoders_are_small() -> None:
    sizes = [path.stat().st_size for path in shipped_decoders().values()]
    assert sizes and sum(sizes) <= 8_000_000


def test_the_shipped_explainer_and_its_figure(shipped: XCosPairs, crops: list[np.ndarray], tmp_path: Path) -> None:
    from xcos_ext.explain import save_figure

    explainer = create_explainer("reconstruction")
    assert isinstance(explainer, ReconstructionExplainer) and explainer.name == "reconstruction"
    images = shipped.preprocessing(crops)
    made = explainer(shipped, images[:1], images[1:])
    assert made.similar.shape == (1, 112, 112) and bool(torch.isfinite(torch.stack(made)).all())
    # The mask covers nose, mouth and chin; the eyes are bare.
    ratio = (made.dissimilar / (made.similar + made.dissimilar))[0]
    assert float(ratio[70:100, 30:82].mean()) > float(ratio[30:60, 30:82].mean())
    figure = reconstruction_figure(explainer, shipped, *crops, names=("bare", "$masked$ <b>"), note="public domain")
    path = tmp_path / "figure.png"
    save_figure(figure, path)
    assert Image.open(path).size[0] > 800


def test_the_figure_refuses_other_pictures(shipped: XCosPairs) -> None:
    face = np.zeros((96, 96, 3), np.uint8)
    with pytest.raises(ValueError, match="expected an aligned RGB crop"):
        reconstruction_figure(ReconstructionExplainer(), shipped, face, face)
