"""Explainers against slow, plain references; what they point at; what they leave alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.backbones import SplitRecogniser
from xcos_ext.card import Preprocessing
from xcos_ext.deploy import for_inference
from xcos_ext.explain.explainers import (
    FGGB,
    XSSAB,
    CellMap,
    CorrRISE,
    EmbeddingCosine,
    GradCAM,
    Occlusion,
    PairModel,
    Saliency,
    XCosPairs,
    as_pair_model,
    available,
    create,
)
from xcos_ext.explain.explainers.masking import average_ranks, cell_squares, patch_masks
from xcos_ext.explain.fills import filled
from xcos_ext.io.optional import MissingPackageError
from xcos_ext.model import XCosAttention, XCosHead, XCosModel, load_model

stats = pytest.importorskip("scipy.stats")
pytest.importorskip("captum")
pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, GRID, DIM = 28, (7, 7), 6
NORMALISATION = Preprocessing(size=(SIDE, SIDE), mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25))
THRESHOLD = 0.2

# Options that make the costly ones small.
SMALL: dict[str, dict[str, Any]] = {"corrrise": {"masks": 30, "size": 9}}
POST_HOC = ("corrrise", "fggb", "xssab", "occlusion", "gradcam")
GRADIENTS = ("fggb", "xssab", "gradcam")
OWN = ("xcos", "xcos-similarity", "xcos-attention")


def small(name: str, **options: Any) -> Any:
    return create(name, **SMALL.get(name, {}), **options)


def recogniser(dtype: torch.dtype = torch.float64) -> SplitRecogniser:
    """A random network of 28x28 pictures: a 5x7x7 map whose cells see beyond their pixels, six numbers."""
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 5, 3, padding=1))
    output = nn.Sequential(nn.Flatten(), nn.Linear(5 * 49, DIM), nn.BatchNorm1d(DIM))
    net = SplitRecogniser(body, output, grid_shape=(5, *GRID), embedding_size=DIM, preprocessing=NORMALISATION)
    for norm in (body[1], output[2]):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
    return net.to(dtype).eval()


def embedding(dtype: torch.dtype = torch.float64, threshold: float | None = THRESHOLD) -> EmbeddingCosine:
    return EmbeddingCosine(recogniser(dtype), threshold=threshold)


def xcos(dtype: torch.dtype = torch.float64, threshold: float | None = THRESHOLD, **attention: Any) -> XCosPairs:
    net = recogniser(dtype)
    head = XCosHead(5, 4, attention=XCosAttention(4, 3, **(attention or {"symmetric": True})))
    for norm in (module for module in head.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
    return XCosPairs(XCosModel(net, head.to(dtype), threshold=threshold, name="toy").eval())


MODELS: dict[str, Callable[..., PairModel]] = {"embedding": embedding, "xcos": xcos}


def pictures(count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Pairs of noise, half alike."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    b[::2] = 0.7 * a[::2] + 0.5 * b[::2]
    return a.to(dtype), b.to(dtype)


def plain_score(model: PairModel, a: Tensor, b: Tensor) -> float:
    """Of one pair, not through the interface."""
    with torch.no_grad():
        if isinstance(model, EmbeddingCosine):
            return float(F.cosine_similarity(model.recogniser(a[None]), model.recogniser(b[None])))
        assert isinstance(model, XCosPairs)
        return float(model.model(a[None], b[None]).score)


def black() -> Tensor:
    return torch.from_numpy(-np.array(NORMALISATION.mean) / np.array(NORMALISATION.std)).view(3, 1, 1)


def close(got: Saliency, similar: Any, dissimilar: Any, tolerance: float = 2e-6) -> None:
    for name, made, expected in zip(got._fields, got, (similar, dissimilar), strict=True):
        reference = np.asarray(expected)
        assert made.dtype == torch.float32 and made.shape == reference.shape, name
        np.testing.assert_allclose(
            made.numpy(), reference, rtol=0, atol=tolerance * np.abs(reference).max(), err_msg=name
        )


# -- against references ---------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("kind", MODELS)
def test_corrrise_is_its_reference(kind: str) -> None:
    model, (a, b) = MODELS[kind](), pictures(2)
    explainer = CorrRISE(40, 2, 9, seed=5, batch_size=7)
    keep = explainer.keep((SIDE, SIDE))
    expected = np.zeros((2, SIDE, SIDE))
    for n in range(2):
        scores = [plain_score(model, torch.where(mask, a[n], black()), b[n]) for mask in keep]
        ranks = stats.rankdata(scores)
        for y in range(SIDE):
            for x in range(SIDE):
                shown = keep[:, y, x].numpy().astype(float)
                if 0 < shown.sum() < len(keep):
                    expected[n, y, x] = stats.pearsonr(shown, ranks).statistic
    close(explainer(model, a, b), np.maximum(expected, 0), np.maximum(-expected, 0))
    explainer.clip = False
    close(explainer(model, a, b), expected, -expected)


def test_corrrise_masks() -> None:
    masks = CorrRISE(masks=200).keep((112, 112))
    hidden = (~masks).flatten(1).sum(1)
    assert masks.shape == (200, 112, 112) and hidden.max() <= 2700 and hidden.min() >= 900
    assert (hidden == 2700).any()  # three that do not overlap
    # Every hidden pixel belongs to a hidden 30x30 square that is fully inside.
    squares = F.max_pool2d((masks[:20, None]).float(), 30, 1).eq(0)
    grown = F.max_pool2d(F.pad(squares.float(), (29,) * 4), 30, 1).squeeze(1).bool()
    assert torch.equal(grown, ~masks[:20])
    one = patch_masks(500, 1, 10, (12, 14), torch.Generator().manual_seed(0))
    assert ((~one).flatten(1).sum(1) == 100).all()
    assert not one[:, 0, 0].all() and not one[:, -1, -1].all()  # first and last places are drawn
    assert torch.equal(CorrRISE(9, seed=4).keep((40, 40)), CorrRISE(9, seed=4).keep((40, 40)))
    assert not torch.equal(CorrRISE(9, seed=4).keep((40, 40)), CorrRISE(9, seed=5).keep((40, 40)))


def test_ranks() -> None:
    values = torch.tensor([[3.0, 1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, -1.0]])
    np.testing.assert_array_equal(average_ranks(values).numpy(), stats.rankdata(values.numpy(), axis=1))


def fggb_reference(units: list[Tensor], image: Tensor, shares: list[float], gradients: str) -> np.ndarray:
    """S [H, W] of one picture: one backward pass per unit."""
    total = np.zeros(image.shape[1:])
    for unit, share in zip(units, shares, strict=True):
        gradient = torch.autograd.grad(unit, image, retain_graph=True)[0].numpy()
        normalised = gradient / np.sqrt((gradient**2).sum())
        if gradients == "magnitude":
            normalised = np.abs(normalised)
        total += (share - THRESHOLD / len(units)) * normalised.mean(0)
    return total


@pytest.mark.parametrize("gradients", ["signed", "magnitude"])
@pytest.mark.parametrize("kind", ["embedding", "cells", "channels"])
def test_fggb_is_its_reference(kind: str, gradients: Any) -> None:
    a, b = pictures(2)
    model: PairModel = embedding() if kind == "embedding" else xcos()
    expected = []
    for n in range(2):
        image = a[n].clone().requires_grad_()
        if isinstance(model, EmbeddingCosine):
            one, two = model.recogniser(image[None])[0], model.recogniser(b[n : n + 1])[0].detach()
            units = list(one)
            shares = (one * two / (one.norm() * two.norm())).tolist()
        else:
            assert isinstance(model, XCosPairs)
            one, two = model.model.features(image[None]), model.model.features(b[n : n + 1]).detach()
            weights = model.model(a[n : n + 1], b[n : n + 1]).attention[0].detach()
            units, shares = [], []
            for i in range(7):
                for j in range(7):
                    p, q = one[0, :, i, j], two[0, :, i, j]
                    if kind == "cells":
                        units.append(p @ q / (p.norm() * q.norm()))
                        shares.append((weights[i, j] * units[-1]).item())
                    else:
                        units += list(p)
                        shares += (weights[i, j] * p * q / (p.norm() * q.norm())).tolist()
        expected.append(fggb_reference(units, image, shares, gradients))
    signed = np.stack(expected)
    for vectorised, batch in ((False, None), (True, 11), (None, 1)):
        options = {"units": kind if kind != "embedding" else None, "gradients": gradients, "batch_size": batch}
        explainer = FGGB(vectorised=vectorised, **options)
        close(explainer(model, a, b), np.maximum(signed, 0), np.maximum(-signed, 0))
    close(FGGB(clip=False, **options)(model, a, b), signed, -signed)


@pytest.mark.parametrize("kind", MODELS)
def test_xssab_is_its_reference(kind: str) -> None:
    model, (a, b) = MODELS[kind](), pictures(2)
    support, oppose = [], []
    for n in range(2):
        image = a[n].clone().requires_grad_()
        if isinstance(model, EmbeddingCosine):
            one = model.recogniser(image[None])[0]
            one = one / one.norm()
            two = model.recogniser(b[n : n + 1])[0].detach()
            two = two / two.norm()
        else:
            assert isinstance(model, XCosPairs)
            weights = model.model(a[n : n + 1], b[n : n + 1]).attention[0].detach()
            p, q = model.model.features(image[None])[0], model.model.features(b[n : n + 1])[0].detach()
            one, two = (weights * p / p.norm(dim=0)).flatten(), (q / q.norm(dim=0)).flatten()
        bound = THRESHOLD / one.numel()
        for maps, inside in ((support, lambda x: x >= bound), (oppose, lambda x: x < bound)):  # noqa: B023
            layer = torch.tensor([y if inside(x * y) else 0.0 for x, y in zip(one.tolist(), two.tolist(), strict=True)])
            gradient = torch.autograd.grad(one @ layer.double(), image, retain_graph=True)[0]
            maps.append(gradient.abs().numpy().mean(0))
    close(XSSAB()(model, a, b), np.stack(support), np.stack(oppose))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("grid", "fill"), [(None, "black"), ((3, 5), "mean"), ((28, 1), "blur"), ((1, 1), "black")])
def test_occlusion_is_its_reference(kind: str, grid: tuple[int, int] | None, fill: Any) -> None:
    model, (a, b) = MODELS[kind](), pictures(2)
    rows, columns = grid or GRID
    expected = np.zeros((2, rows, columns))
    for n in range(2):
        shown = {
            "black": black().expand_as(a[n]),
            "mean": a[n].mean((1, 2), keepdim=True).expand_as(a[n]),
            "blur": filled("blur", a[n : n + 1], NORMALISATION)[0],
        }[fill]
        for i in range(rows):
            for j in range(columns):
                changed = a[n].clone()
                for y in range(SIDE):
                    for x in range(SIDE):
                        if y * rows // SIDE == i and x * columns // SIDE == j:
                            changed[:, y, x] = shown[:, y, x]
                expected[n, i, j] = plain_score(model, a[n], b[n]) - plain_score(model, changed, b[n])
    close(Occlusion(grid, fill=fill, batch_size=9)(model, a, b), expected, -expected)


@pytest.mark.parametrize("kind", MODELS)
def test_gradcam_is_its_reference(kind: str) -> None:
    model, (a, b) = MODELS[kind](), pictures(2)
    maps = []
    for n in range(2):
        if isinstance(model, EmbeddingCosine):
            grid = model.recogniser.grid(a[n : n + 1]).detach().requires_grad_()
            score = F.cosine_similarity(model.recogniser.embed(grid), model.recogniser(b[n : n + 1]).detach()).sum()
        else:
            assert isinstance(model, XCosPairs) and isinstance(model.model.backbone, SplitRecogniser)
            grid = model.model.backbone.grid(a[n : n + 1]).detach().requires_grad_()
            features = model.model.head.features(grid)
            score = model.model.score(features, model.model.features(b[n : n + 1]).detach()).sum()
        (gradient,) = torch.autograd.grad(score, grid)
        made = np.zeros(GRID)
        for channel in range(5):
            made += float(gradient[0, channel].mean()) * grid[0, channel].detach().numpy()
        maps.append(made)
    expected = np.stack(maps)
    close(GradCAM()(model, a, b), np.maximum(expected, 0), np.maximum(-expected, 0))
    close(GradCAM(clip=False, batch_size=1)(model, a, b), expected, -expected)


def test_cell_maps_are_the_scores_own() -> None:
    model, (a, b) = xcos(), pictures(2)
    score, s, w = (x.detach().numpy() for x in model.model(a, b))
    close(create("xcos")(model, a, b), w * (s - THRESHOLD), -w * (s - THRESHOLD))
    close(create("xcos", threshold=-0.5)(model, a, b), w * (s + 0.5), -w * (s + 0.5))
    np.testing.assert_allclose(create("xcos")(model, a, b).similar.sum((1, 2)), score - THRESHOLD, atol=1e-6)
    close(create("xcos-similarity")(model, a, b), s, -s)
    close(create("xcos-attention")(model, a, b), w, w)


# -- what they point at ---------------------------------------------------------------------------------------------


class OneSquare:
    """A pair model that looks only at rows and columns 8 to 15: the cosine of what is there."""

    name, preprocessing, threshold = "one square", Preprocessing(size=(SIDE, SIDE)), 0.5
    square = (..., slice(8, 16), slice(8, 16))

    def features(self, images: Tensor) -> Tensor:
        return images[self.square] + 0.3

    def score(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        return F.cosine_similarity(features_a.flatten(1), features_b.flatten(1))

    def channels(self, features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(features_a.flatten(1), dim=1), F.normalize(features_b.flatten(1), dim=1)


@pytest.mark.parametrize("name", ["corrrise", "fggb", "xssab", "occlusion"])
@pytest.mark.parametrize("genuine", [True, False])
def test_they_point_where_the_model_looks(name: str, genuine: bool) -> None:
    torch.manual_seed(0)
    a, noise = torch.rand(2, 3, SIDE, SIDE), torch.rand(2, 3, SIDE, SIDE)
    b = a if genuine else noise.clone()
    if not genuine:
        b[OneSquare.square] = -a[OneSquare.square] - 0.6  # the opposite: whatever hides it helps
    options = {"masks": 300, "size": 6} if name == "corrrise" else {}
    found = create(name, **options)(OneSquare(), a, b)
    chosen = found.similar if genuine else found.dissimilar
    looked = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    looked[8:16, 8:16] = True
    if name == "occlusion":
        looked = looked.view(7, 4, 7, 4).transpose(1, 2).flatten(2).any(2)
    inside, outside = chosen[:, looked], chosen[:, ~looked]
    assert (inside.mean(1) > 3 * outside.abs().mean(1)).all()
    top = chosen.flatten(1).topk(4 if name == "occlusion" else 12).indices
    assert looked.flatten()[top].float().mean() > 0.9
    if name in ("fggb", "xssab", "occlusion"):
        assert (outside == 0).all()  # nothing there can change the score


def test_gradcam_points_where_the_model_looks() -> None:
    class OneCell(OneSquare):
        def features(self, images: Tensor) -> Tensor:
            return F.avg_pool2d(images, 4).abs() + 0.1

        def score(self, features_a: Tensor, features_b: Tensor) -> Tensor:
            return (features_a * features_b)[:, :, 2, 3].sum(1)

    a, b = torch.zeros(1, 3, SIDE, SIDE), torch.ones(1, 3, SIDE, SIDE)
    a[:, :, 8:12, 12:16] = 1
    found = create("gradcam")(OneCell(), a, b)
    assert found.similar[0].argmax() == 2 * 7 + 3 and not found.dissimilar.any()


# -- what they leave alone, and what does not matter ----------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", POST_HOC)
def test_batches_do_not_matter(name: str, kind: str) -> None:
    model, (a, b) = MODELS[kind](), pictures(3)
    whole = small(name)(model, a, b)
    for made in (small(name, batch_size=2)(model, a, b), small(name, batch_size=1000)(model, a, b)):
        close(made, *whole)
    for n in range(3):
        close(small(name)(model, a[n : n + 1], b[n : n + 1]), *(part[n : n + 1] for part in whole))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", POST_HOC)
def test_the_same_again(name: str, kind: str) -> None:
    model, (a, b) = MODELS[kind](torch.float32), pictures(2, torch.float32)
    explainer = small(name)
    first = explainer(model, a, b)
    for again in (explainer(model, a, b), small(name)(model, a, b)):
        assert torch.equal(first.similar, again.similar) and torch.equal(first.dissimilar, again.dissimilar)


def test_seeds_of_corrrise() -> None:
    model, (a, b) = embedding(), pictures(1)
    one, other = (CorrRISE(30, 2, 9, seed=seed)(model, a, b).similar for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", POST_HOC)
def test_nothing_is_left_behind(name: str, kind: str, frozen: bool) -> None:
    model, (a, b) = MODELS[kind](torch.float32), pictures(2, torch.float32)
    network = model.module.requires_grad_(not frozen)  # type: ignore[attr-defined]
    a.requires_grad_()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    before = a.detach().clone(), b.clone()
    free = small(name)(model, a, b)
    with torch.no_grad():
        quiet = small(name)(model, a, b)
        assert not torch.is_grad_enabled()
    close(quiet, *free)
    assert not any(made.requires_grad for made in (*free, *quiet))
    assert torch.equal(a, before[0]) and torch.equal(b, before[1]) and a.grad is None and not b.requires_grad
    assert all(p.grad is None and p.requires_grad is not frozen for p in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", POST_HOC)
def test_under_inference_mode(name: str, kind: str) -> None:
    expected = small(name)(MODELS[kind](torch.float32), *pictures(2, torch.float32))
    with torch.inference_mode():
        model, (a, b) = MODELS[kind](torch.float32), pictures(2, torch.float32)  # made there, too
        made = small(name)(model, a, b)
        assert torch.is_inference_mode_enabled()
    close(made, *expected, tolerance=2e-5)
    if name in GRADIENTS:
        assert not any(part.is_inference() for part in made)
        close(small(name)(model, a, b), *expected, tolerance=2e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in POST_HOC for kind in MODELS] + [(name, "xcos") for name in OWN]
)
def test_constant_pictures(name: str, kind: str, value: float) -> None:
    a = torch.full((2, 3, SIDE, SIDE), value)
    a[1] = black()
    for made in small(name)(MODELS[kind](torch.float32), a, a.clone()):
        assert torch.isfinite(made).all() and made.dtype == torch.float32 and made.shape[0] == 2


class Blind(OneSquare):
    """Features that do not depend on the picture: no gradient, no change."""

    def features(self, images: Tensor) -> Tensor:
        return images.new_ones(images.shape[0], 3, 2, 2)


class Dark(OneSquare):
    """Features that do, with a gradient of zero."""

    def features(self, images: Tensor) -> Tensor:
        return (0 * images)[self.square]


@pytest.mark.parametrize("model", [Blind(), Dark()], ids=["blind", "dark"])
@pytest.mark.parametrize("name", [name for name in POST_HOC if name != "gradcam"])  # which starts from the features
def test_a_model_that_sees_nothing(name: str, model: PairModel) -> None:
    for made in small(name)(model, *pictures(2, torch.float32)):
        assert not made.any()  # and no NaN


@pytest.mark.parametrize("attention", [{"symmetric": False}, {"residual": True}, {"normalize": "min-shift"}])
@pytest.mark.parametrize("name", ["fggb", "gradcam", "xssab"])
def test_every_attention(name: str, attention: dict[str, Any]) -> None:
    model, (a, b) = xcos(**attention), pictures(2)
    made = small(name)(model, a, b)
    assert made.similar.any() and all(torch.isfinite(part).all() for part in made)
    if name == "fggb":
        close(FGGB("channels", vectorised=True, batch_size=64)(model, a, b), *FGGB("channels")(model, a, b))


@pytest.mark.parametrize("name", ["corrrise", "occlusion"])
def test_bfloat16_models(name: str) -> None:
    model, (a, b) = xcos(torch.float32), pictures(2, torch.float32)
    fast = XCosPairs(for_inference(model.model, torch.bfloat16))
    exact, made = small(name)(model, a, b), small(name)(fast, a, b)
    assert made.similar.dtype == torch.float32
    for x, y in zip(exact, made, strict=True):
        assert np.corrcoef(x.flatten(), y.flatten())[0, 1] > 0.9
    for gradient in GRADIENTS:
        assert torch.isfinite(small(gradient)(fast, a, b).similar).all()


# -- cells and fills ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "size"), [((7, 7), (112, 112)), ((3, 5), (16, 11)), ((1, 1), (4, 4)), ((4, 4), (4, 4))]
)
def test_cell_squares_are_a_partition(grid: tuple[int, int], size: tuple[int, int]) -> None:
    squares = cell_squares(grid, size)
    assert squares.shape == (grid[0] * grid[1], *size) and (squares.sum(0) == 1).all()
    areas = squares.flatten(1).sum(1)
    assert areas.min() >= (size[0] // grid[0]) * (size[1] // grid[1])
    assert areas.max() <= -(-size[0] // grid[0]) * -(-size[1] // grid[1])
    if grid == (7, 7):
        assert squares[7 * 2 + 3, 32:48, 48:64].all() and (areas == 256).all()


def test_black_is_black() -> None:
    black_picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    images = pictures(1, torch.float32)[0]
    torch.testing.assert_close(
        filled("black", images, NORMALISATION), NORMALISATION(black_picture), rtol=1e-6, atol=1e-6
    )


# -- names and bad input --------------------------------------------------------------------------------------------


def test_names() -> None:
    names = available()
    assert names[:3] == OWN and names[-2:] == ("random", "centre")
    assert set(POST_HOC) <= set(names)
    for name in (*POST_HOC, "xcos", "random"):
        assert create(name).name == name
    with pytest.raises(ValueError, match=r"name: expected one of xcos, .*, got 'lime'"):
        create("lime")


@pytest.mark.parametrize("name", ["fggb", "xssab", "xcos"])
def test_no_threshold(name: str) -> None:
    model, (a, b) = xcos(threshold=None), pictures(1)
    with pytest.raises(
        ValueError, match=r"^model: expected a decision threshold, .* got none; give one with threshold="
    ):
        create(name)(model, a, b)
    close(create(name, threshold=THRESHOLD)(model, a, b), *create(name)(xcos(), a, b))
    with pytest.raises(ValueError, match=r"^threshold: expected a finite number or None, got nan"):
        create(name, threshold=float("nan"))


@pytest.mark.parametrize("name", [*POST_HOC, "xcos"])
def test_bad_images(name: str) -> None:
    explainer, model, (a, b) = small(name), xcos(), pictures(2)
    for wrong, message in (
        ((a[0], b), r"^a: expected \[N, 3, H, W\], N at least 1, got \[3, 28, 28\]"),
        ((a[:0], b[:0]), r"^a: expected \[N, 3, H, W\], N at least 1, got \[0, 3, 28, 28\]"),
        ((a, b[:1]), r"^b: expected the shape of a, \[2, 3, 28, 28\], got \[1, 3, 28, 28\]"),
        ((a, b[:, :1]), r"^b: expected \[N, 3, H, W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            explainer(model, *wrong)
    with pytest.raises(TypeError, match=r"^a: expected normalised floating-point images, got torch.uint8"):
        explainer(model, a.byte(), b)
    with pytest.raises(TypeError, match=r"^b: expected a tensor of normalised images, got ndarray"):
        explainer(model, a, b.numpy())
    model.model.train()
    with pytest.raises(ValueError, match=r"^model: expected evaluation mode, got training mode"):
        explainer(model, a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CorrRISE(masks=1), r"^masks: expected a whole number, at least 2, got 1"),
        (lambda: CorrRISE(patches=0), r"^patches: expected a whole number, at least 1, got 0"),
        (lambda: CorrRISE(size=2.5), r"^size: expected a whole number"),  # type: ignore[arg-type]
        (lambda: CorrRISE(fill="pink"), r"^fill: expected one of black, mean, blur, got 'pink'"),  # type: ignore[arg-type]
        (lambda: CorrRISE(batch_size=0), r"^batch_size: expected a whole number, at least 1, got 0"),
        (lambda: Occlusion((0, 3)), r"^grid: expected a whole number, at least 1, got 0"),
        (lambda: Occlusion((7,)), r"^grid: expected \(rows, columns\), got \(7,\)"),  # type: ignore[arg-type]
        (lambda: FGGB("pixels"), r"^units: expected one of cells, channels or None, got 'pixels'"),  # type: ignore[arg-type]
        (lambda: FGGB(gradients="no"), r"^gradients: expected one of signed, magnitude, got 'no'"),  # type: ignore[arg-type]
        (lambda: XSSAB(batch_size=True), r"^batch_size: expected a whole number"),
        (lambda: CellMap("all"), r"^kind: expected one of contribution, similarity, attention, got 'all'"),  # type: ignore[arg-type]
        (lambda: CellMap("attention", threshold=0.1), r"^threshold: expected None for attention"),
    ],
)
def test_bad_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_models_that_do_not_fit() -> None:
    a, b = pictures(1)
    with pytest.raises(ValueError, match=r"^units: expected 'channels' for a model without cells, got 'cells'"):
        FGGB("cells")(embedding(), a, b)
    with pytest.raises(ValueError, match=r"^size: expected patches of at most 28 pixels, .* got 30"):
        CorrRISE()(embedding(), a, b)
    with pytest.raises(ValueError, match=r"^grid: expected 1 to 28 cells .* got 29"):
        Occlusion((29, 7))(embedding(), a, b)
    with pytest.raises(ValueError, match=r"^model: expected features that are a map \[N, C, h, w\], got \[1, 2352\]"):
        flat = OneSquare()
        flat.features = lambda images: images.flatten(1)  # type: ignore[method-assign]
        GradCAM()(flat, a, b)
    with pytest.raises(ValueError, match=r"^model: expected an xCos model"):
        create("xcos")(embedding(), a, b)


def test_without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(MissingPackageError, match=r"Grad-CAM needs captum, .*pip install 'xcos_ext\[explain\]'"):
        create("gradcam")


# -- real faces -----------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.real_data
def test_real_faces(shared_data: Path) -> None:
    """Swap the eyes of a genuine pair: the pictures' explanations move to them."""
    from xcos_ext.evaluation.datasets import LFW
    from xcos_ext.evaluation.faithfulness.pasting import region_mask

    data = LFW(shared_data / "lfw112.zip", shared_data / "pairs.txt", folds=[0])
    chosen = data.pairs[:2]
    model = as_pair_model(load_model())
    keys = [
        (data.pictures.numbered(p.person_a, p.number_a), data.pictures.numbered(p.person_b, p.number_b)) for p in chosen
    ]
    a, b = (model.preprocessing([data.read(key[side]) for key in keys]) for side in (0, 1))
    mask = region_mask("both eyes", "medium", (7, 7))
    pixels = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    changed = torch.where(pixels, a.flip(0), a)
    for name in ("occlusion", "corrrise"):
        options = {"masks": 60} if name == "corrrise" else {}
        explainer = create(name, **options)
        moved = explainer(model, changed, b).dissimilar - explainer(model, a, b).dissimilar
        where = mask if name == "occlusion" else pixels
        assert torch.isfinite(moved).all()
        assert moved[:, where].mean() > moved[:, ~where].mean()
    for name in ("fggb", "xssab", "gradcam", "xcos"):
        for made in create(name)(model, a, b):
            assert made.shape[0] == 2 and torch.isfinite(made).all() and made.any()
