"""The closed-form plug-in: exact identities, every output block, statistics, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xcos_ext import backbones
from xcos_ext.card import Calibration, FMRCurve
from xcos_ext.io.errors import ModelError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.model import (
    DEFAULT_SPREAD,
    Form,
    PlugStatistics,
    cell_matrices,
    find_statistics,
    load_model,
    load_recogniser,
    plug,
    plug_statistics,
)
from xcos_ext.model.cells import separate, spread_matrix

pytestmark = pytest.mark.usefixtures("one_thread")


def randomise(module: nn.Module) -> None:
    """Batch norms away from their neutral values, as after training."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)


class OutputOnly(backbones.Recogniser):
    """An output block of a real architecture behind a trivial body, so that tests need not run the network."""

    def __init__(self, owner: backbones.Recogniser) -> None:
        super().__init__()
        self.architecture = f"output-of-{owner.architecture}"
        self.grid_shape = owner.grid_shape
        self.embedding_size = owner.embedding_size
        self.owner = owner

    def grid(self, images: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(images, 16)  # [N, 3, 7, 7]
        channels = self.grid_shape[0]
        mixing = torch.linspace(-1, 1, channels * 3, dtype=images.dtype).view(channels, 3)
        return torch.einsum("kc,nchw->nkhw", mixing, pooled).relu()

    def embed(self, grid: Tensor) -> Tensor:
        return self.owner.embed(grid)


def convolutional() -> backbones.Recogniser:
    """A block with a bias, a convolution over cells and an average pool: affine, though none of the known ones."""
    body = nn.AvgPool2d(16)
    output = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 7, 1), nn.AvgPool2d(7), nn.Flatten()
    )
    return backbones.SplitRecogniser(body, output, grid_shape=(3, 7, 7), embedding_size=7)


def narrow_irse() -> backbones.Recogniser:
    """IR-SE's output block with fewer channels; the real one is tested where its size matters."""
    output = nn.Sequential(
        nn.BatchNorm2d(16), nn.Dropout(0.6), nn.Flatten(), nn.Linear(16 * 49, 24), nn.BatchNorm1d(24)
    )
    body = nn.Sequential(nn.Conv2d(3, 16, 16, 16), nn.ReLU())
    return backbones.SplitRecogniser(body, output, grid_shape=(16, 7, 7), embedding_size=24)


BLOCKS = {
    "narrow_irse": narrow_irse,
    "ir_se_50": lambda: OutputOnly(irse_block()),
    "mobilefacenet": lambda: OutputOnly(backbones.create("mobilefacenet")),
    "mobilefacenet_relu": lambda: OutputOnly(backbones.create("mobilefacenet_relu", embedding_size=64)),
    "convolutional": convolutional,
}


def irse_block() -> backbones.Recogniser:
    with torch.device("meta"):
        net = backbones.create("ir_se_50")
    assert isinstance(net.output_layer, nn.Sequential)
    net.output_layer = net.output_layer.to_empty(device="cpu")
    for layer in net.output_layer:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    del net.body, net.input_layer
    return net


def network(name: str) -> backbones.Recogniser:
    net = BLOCKS[name]()
    randomise(net)
    return net


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "ir_se_50"])
def test_double_sum_over_cells_is_the_inner_product_of_embeddings(name: str) -> None:
    """sum_ij sum_kl e_ij(A).e_kl(B) + c.(sum e(A) + sum e(B)) + c.c = emb(A).emb(B), in fp64."""
    net = network(name).double()
    matrices, constant = cell_matrices(net)
    a, b = (torch.randn(3, *net.grid_shape, dtype=torch.float64) for _ in "ab")
    cells_a, cells_b = (torch.einsum("dchw,nchw->ndhw", matrices, x) for x in (a, b))
    every_pair = torch.einsum("ndp,ndq->npq", cells_a.flatten(2), cells_b.flatten(2))
    rest = (cells_a.sum((2, 3)) + cells_b.sum((2, 3))) @ constant + constant @ constant
    net.eval()
    expected = (net.embed(a) * net.embed(b)).sum(1)
    torch.testing.assert_close(every_pair.sum((1, 2)) + rest, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "forms"),
    [
        (name, [(True, 0.7)] if name == "ir_se_50" else [(True, 0.0), (False, 0.7), (True, 0.7), (True, 50.0)])
        for name in BLOCKS
    ],
)
def test_features_sum_to_the_embedding(name: str, forms: list[tuple[bool, float]]) -> None:
    """Whatever is shared between cells, their sum is the recogniser's embedding."""
    net = network(name).double()
    faces = torch.randn(5, 3, 112, 112, dtype=torch.float64)
    for centre, spread in forms:
        model = plug(net, [faces] if centre else None, centre=centre, spread=spread)
        with torch.no_grad():
            features = model.features(faces)
            expected = model.embedding(faces)
        assert features.dtype == torch.float64
        tolerance = 1e-9 * float(expected.abs().max())
        torch.testing.assert_close(model.head.embedding(features), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "ir_se_50"])
def test_score_is_the_formula(name: str) -> None:
    net = network(name)
    faces = torch.randn(6, 3, 112, 112)
    model = plug(net, [faces], spread=0.0)
    with torch.no_grad():
        grid = net.grid(faces).double()
        cells = torch.einsum("dchw,nchw->ndhw", cell_matrices(net).matrices, grid)
        cells = cells - cells.mean(0)
        a, b = cells[:3], cells[3:]
        weight = a.norm(dim=1) * b.norm(dim=1)
        expected = (a * b).sum((1, 2, 3)) / weight.sum((1, 2))
        result = model(faces[:3], faces[3:])
    torch.testing.assert_close(result.score.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        result.attention.double(), weight / weight.sum((1, 2), keepdim=True), rtol=1e-3, atol=1e-5
    )


def test_wide_spread_approaches_the_plain_cosine() -> None:
    net = network("mobilefacenet").double()
    faces = torch.randn(8, 3, 112, 112, dtype=torch.float64)
    model = plug(net, centre=False, spread=1e4)
    with torch.no_grad():
        features = model.features(faces)
        score = model.score(features[:4], features[4:])
        total = features.sum((2, 3))
    expected = torch.cosine_similarity(total[:4], total[4:])
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.thorough
def test_depthwise_blocks_are_stored_compactly() -> None:
    assert plug(network("mobilefacenet"), centre=False).head.weight.shape == (128, 512)
    assert plug(network("mobilefacenet_relu"), centre=False).head.weight.shape == (64, 512)
    assert plug(network("ir_se_50"), centre=False).head.weight.shape == (49, 512, 512)
    matrices = torch.einsum("dc,chw->dchw", torch.randn(4, 6).double(), torch.randn(6, 7, 7).double())
    weight, scale = separate(matrices)
    torch.testing.assert_close(torch.einsum("dc,chw->dchw", weight, scale), matrices)
    matrices[0, 0, 0, 0] += 1e-3
    assert separate(matrices) is None


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)])
def test_spread_matrix_keeps_sums(size: tuple[int, int]) -> None:
    matrix = spread_matrix(size, 0.7)
    assert matrix is not None
    torch.testing.assert_close(matrix.sum(0), torch.ones(size[0] * size[1], dtype=torch.float64))
    assert (matrix > 0).all()
    middle = matrix.unflatten(0, size).unflatten(2, size)
    if size == (7, 7):
        expected = torch.exp(torch.tensor(-0.5 * (1 + 4) / 0.49, dtype=torch.float64))
        torch.testing.assert_close(middle[4, 5, 3, 3] / middle[3, 3, 3, 3], expected)
    assert spread_matrix(size, 0) is None


def test_training_mode_and_modes_of_layers_are_restored() -> None:
    net = network("mobilefacenet").train()
    net.owner.bn.eval()
    before = {name: module.training for name, module in net.named_modules()}
    cell_matrices(net)
    assert {name: module.training for name, module in net.named_modules()} == before


@pytest.mark.parametrize(
    "last", [nn.PReLU(), nn.ReLU6(), nn.LayerNorm(6), nn.Hardtanh(-40, 40)], ids=lambda m: type(m).__name__
)
def test_blocks_that_are_not_affine_are_refused(last: nn.Module) -> None:
    output = nn.Sequential(nn.Flatten(), nn.Linear(147, 6), last)
    net = backbones.SplitRecogniser(nn.AvgPool2d(16), output, grid_shape=(3, 7, 7), embedding_size=6)
    with pytest.raises(ModelError, match="not affine over the feature map"):
        plug(net, centre=False)


def test_other_refusals() -> None:
    with pytest.raises(ModelError, match="no output block"):
        plug(backbones.create("mobilefacenet", output=False), centre=False)
    with pytest.raises(TypeError, match="recogniser: expected a Recogniser, got Linear"):
        plug(nn.Linear(2, 2), centre=False)  # type: ignore[arg-type]
    net = network("convolutional")
    with pytest.raises(ModelError, match="no statistics are known for these weights"):
        plug(net)
    with pytest.raises(ValueError, match="give one of them, not both"):
        plug(net, [torch.randn(1, 3, 112, 112)], statistics="x")
    with pytest.raises(TypeError, match="statistics: expected a path or PlugStatistics, got int"):
        plug(net, statistics=123)
    with pytest.raises(ValueError, match="project: expected a positive integer or None, got 0"):
        plug(net, [torch.randn(1, 3, 112, 112)], project=0)
    with pytest.raises(ValueError, match=r"project: expected 1..7, got 32"):
        plug(net, [torch.randn(40, 3, 112, 112)], project=32)
    with pytest.raises(ValueError, match="spread: expected a finite number >= 0"):
        plug(net, centre=False, spread=-1)
    with pytest.raises(ValueError, match="faces: expected at least one picture, got none"):
        plug(net, [])
    with pytest.raises(ValueError, match="3 axes need more than 3 pictures, got 2"):
        plug(net, [torch.randn(2, 3, 112, 112)], project=3)
    with pytest.raises(ValueError, match=r"faces: expected floating-point batches \[N, 3, 112, 112\]"):
        plug(net, [torch.randn(2, 3, 96, 96)])
    with pytest.raises(TypeError, match="faces: expected NumPy arrays or tensors, got str"):
        plug(net, ["face.jpg"])
    with torch.no_grad():
        next(iter(net.output.parameters())).fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        plug(net, centre=False)


def test_faces_may_come_in_any_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xcos_ext.model.statistics._BATCH", 4)
    net = network("convolutional")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (11, 112, 112, 3), dtype=np.uint8)
    means = [
        plug(net, faces).head.mean
        for faces in (
            list(pictures),
            [pictures],
            [pictures[:7], pictures[7], pictures[8:]],
            [net.preprocessing(pictures[:5]), net.preprocessing(pictures[5:])],
            (picture for picture in pictures),
        )
    ]
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spread", [0.0, DEFAULT_SPREAD])
def test_projection_keeps_the_strongest_axes(spread: float) -> None:
    net = network("convolutional").double()
    faces = torch.randn(60, 3, 112, 112, dtype=torch.float64)
    whole = plug(net, [faces], spread=spread).features(faces).flatten(2)
    model = plug(net, [faces], spread=spread, project=2)
    projected = model.features(faces).flatten(2)
    assert projected.shape == (60, 2, 49)
    for cell in (0, 24, 48):
        centred = whole[:, :, cell] - whole[:, :, cell].mean(0)
        singular = torch.linalg.svdvals(centred.detach())
        kept = projected[:, :, cell].square().sum(0).sqrt()
        torch.testing.assert_close(kept, singular[:2], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="these cells were projected"):
        model.head.embedding(projected)


def test_full_projection_changes_nothing() -> None:
    net = network("convolutional")
    faces = torch.randn(60, 3, 112, 112)
    whole, turned = plug(net, [faces]), plug(net, [faces], project=7)
    a, b = faces[:20], faces[20:40]
    torch.testing.assert_close(turned(a, b).score, whole(a, b).score, rtol=1e-4, atol=1e-4)


def test_statistics_file_round_trip(tmp_path: Path) -> None:
    net = network("convolutional")
    faces = torch.randn(40, 3, 112, 112)
    curve = FMRCurve((0.0, 0.1, 0.4), (1.0, 0.1, 0.01), (1.0, 0.12, 0.02), 0.003, 1000, 50)
    calibration = Calibration(0.25, "by hand", {0.1: 0.1, 0.001: 0.3}, 1000, curve)
    form = Form(True, DEFAULT_SPREAD, None)
    statistics = dataclasses.replace(
        plug_statistics(net, [faces], project=3, note="noise"), calibrations={form: calibration}
    )
    path = tmp_path / "net.safetensors"
    statistics.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    loaded = PlugStatistics.load(path)
    assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.basis, statistics.basis)
    assert dataclasses.replace(loaded, mean=None, basis=None) == dataclasses.replace(statistics, mean=None, basis=None)
    assert (loaded.faces, loaded.note, loaded.fingerprint) == (40, "noise", fingerprint_weights(net))
    model = plug(net, statistics=path)
    assert model.threshold == 0.25 and model.fmr_thresholds == {0.1: 0.1, 0.001: 0.3} and model.fmr_curve == curve
    direct = plug(net, [faces])
    torch.testing.assert_close(model(faces, faces.flip(0)).score, direct(faces, faces.flip(0)).score)
    # A threshold holds for the form that it was computed with, and for no other.
    assert plug(net, statistics=path, spread=0.0).threshold is None
    assert plug(net, statistics=path, centre=False).threshold is None
    assert plug(net, statistics=path, project=3).threshold is None
    assert plug(net, statistics=path, threshold=0.5).threshold == 0.5


def test_statistics_of_other_weights_are_refused(tmp_path: Path) -> None:
    net = network("convolutional")
    path = tmp_path / "net.safetensors"
    plug_statistics(net, [torch.randn(9, 3, 112, 112)], project=2).save(path)
    with pytest.raises(ModelError, match=r"project=4 needs that many axes per cell, the statistics have 2"):
        plug(net, statistics=path, project=4)
    with pytest.raises(ModelError, match=r"the axes were computed for spread=0.7, not 0.0"):
        plug(net, statistics=path, project=2, spread=0.0)
    with torch.no_grad():
        next(iter(net.output.parameters()))[0] += 1e-6
    with pytest.raises(ModelError, match=rf"{path}: these statistics belong to weights \w{{16}}, the recogniser"):
        plug(net, statistics=path)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "version", "nan", "shape", "json"])
def test_damaged_statistics(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    net = network("convolutional")
    path = tmp_path / "net.safetensors"
    plug_statistics(net, [torch.randn(9, 3, 112, 112)], project=2).save(path)
    tensors = load_file(path)
    metadata = {"xcos_format": "xcos_ext.plug_statistics", "version": "1", "fingerprint": "0" * 16}
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "foreign":
        save_file(tensors, path)
    elif damage == "version":
        save_file(tensors, path, metadata | {"version": "9"})
    elif damage == "nan":
        save_file(tensors | {"mean": torch.full((7, 7, 7), torch.nan)}, path, metadata)
    elif damage == "shape":
        save_file(tensors | {"basis": torch.zeros(48, 2, 7)}, path, metadata)
    else:
        save_file(tensors, path, metadata | {"calibrations": '[{"threshold": 1}]'})
    with pytest.raises(ModelError, match=str(path)):
        PlugStatistics.load(path)


def test_plugging_under_inference_mode_and_no_grad() -> None:
    faces = torch.randn(4, 3, 112, 112)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            net = network("convolutional")
            model = plug(net, [faces])
            score = model(faces, faces.flip(0)).score
        assert torch.isfinite(score).all()


def test_half_precision_backbone_scores_in_fp32() -> None:
    net = network("convolutional").to(torch.bfloat16)
    model = plug(net, centre=False)
    images = torch.randn(2, 3, 112, 112)
    assert model.head.features(net.grid(images.bfloat16())).dtype == torch.float32


def test_shipped_statistics_are_small_and_readable() -> None:
    folder = Path(backbones.__file__).parent.parent / "data"
    files = sorted(folder.glob("mobilefacenet_*.safetensors"))  # other files there are weights
    assert len(files) == 2
    for file in files:
        assert file.stat().st_size < 64 * 1024
        statistics = PlugStatistics.load(file)
        known = find_statistics(statistics.fingerprint)
        assert known is not None and torch.equal(known.mean, statistics.mean)
        assert statistics.faces >= 300 and statistics.note
        calibration = statistics.calibration(centre=True, spread=DEFAULT_SPREAD, project=None)
        assert calibration is not None
        assert set(calibration.fmr) == {1e-1, 1e-2, 1e-3}
        assert calibration.fmr[1e-1] < calibration.fmr[1e-2] < calibration.fmr[1e-3]
    assert find_statistics("0" * 16) is None


@pytest.mark.real_data
@pytest.mark.parametrize("file", ["mobilefacenet_arcface.pt", "mobilefacenet_apache2.pt"])
def test_known_weights_just_work(shared_data: Path, file: str, recwarn: pytest.WarningsRecorder) -> None:
    model = load_model(shared_data / file)
    assert not recwarn.list
    assert model.threshold is not None and model.head.mean is not None
    recogniser = load_recogniser(shared_data / file)
    assert fingerprint_weights(model.backbone) == fingerprint_weights(recogniser)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        features = model.features(images)
        expected = recogniser(images)
    torch.testing.assert_close(model.head.embedding(features), expected, rtol=0, atol=1e-4)
