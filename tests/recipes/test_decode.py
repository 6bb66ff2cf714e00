"""Training a decoder: batches, losses, resuming to the bit, starting from another decoder, and what is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recipes.decode import DecodeConfig, DecoderConfig, DecodeTask, Experiment, Judge, load_judged, measure
from recipes.decode import create as create_task
from xcos_ext.backbones import SplitRecogniser, create
from xcos_ext.explain.explainers import EmbeddingCosine, XCosPairs
from xcos_ext.explain.reconstruction import FeatureDecoder, fingerprint_of, load_decoder, save_decoder
from xcos_ext.io.weights import read_safetensors
from xcos_ext.model import XCosHead, XCosModel, save_model
from xcos_ext.training import BatchIndex, ConfigError, TrainConfig, train
from xcos_ext.training.data import Pictures
from xcos_ext.training.tasks import load_experiment
from xcos_ext.training.tasks.config import DataConfig

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).resolve().parents[2]
PEOPLE, EACH = 6, 2
SMALL = DecoderConfig(widths=(8, 8, 4, 4))
SHORT = TrainConfig(
    steps=6, batch=4, optimiser="muon", rate=3e-3, warmup=1, clip=5.0, ema=0.9, workers=0, log_every=1, amp="bf16"
)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    people = torch.arange(PEOPLE).repeat_interleave(EACH)
    keys = tuple(f"p{int(p)}/p{int(p)}_{i % EACH + 1:04d}.jpg" for i, p in enumerate(people))
    low = torch.rand(PEOPLE * EACH, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    images = (nn.functional.interpolate(low, size=(112, 112), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    return Pictures(images, people, tuple(f"p{p}" for p in range(PEOPLE)), keys, {}, "0123")


@pytest.fixture(scope="module")
def model() -> XCosPairs:
    torch.manual_seed(0)
    sizes = (3, 8, 12, 16)
    steps = [nn.Sequential(nn.Conv2d(sizes[i], sizes[i + 1], k, k), nn.ReLU()) for i, k in enumerate((4, 2, 2))]
    body = SplitRecogniser(nn.Sequential(*steps), nn.Flatten(), grid_shape=(16, 7, 7), embedding_size=784)
    return XCosPairs(XCosModel(body, XCosHead(16, 8, attention="norm"), threshold=0.5).eval())


def task(model: XCosPairs, pictures: Pictures, loss: DecodeConfig | None = None, **changes: object) -> DecodeTask:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    return DecodeTask(model, pictures, config, loss or DecodeConfig(), {"p0", "p3"}, name="test")


def test_means_come_from_the_people_trained_on(model: XCosPairs, pictures: Pictures) -> None:
    made = task(model, pictures)
    assert made.held_out.tolist() == [0, 1, 6, 7]
    assert made.trained.tolist() == [2, 3, 4, 5, 8, 9, 10, 11]
    firsts = pictures.images[[2, 4, 8, 10]]
    torch.testing.assert_close(made.module.mean_face, firsts.float().mean(0) / 255)
    features = model.features((firsts.float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(made.module.mean, features.mean(0), atol=1e-5, rtol=1e-4)
    assert bool((made.module.scale > 0).all())
    assert made.module.fingerprint == fingerprint_of(model) == made.describe()["decoder"]["model"]


def test_batches_are_a_function_of_their_place(model: XCosPairs, pictures: Pictures) -> None:
    made = task(model, pictures)
    first, again, next_one = (made.batch(BatchIndex(3, step), 4) for step in (0, 0, 1))
    assert first.dtype == torch.uint8 and first.shape == (4, 3, 112, 112)
    assert torch.equal(first, again) and not torch.equal(first, next_one)


def test_the_judge_takes_maps_at_a_quarter_and_an_eighth(model: XCosPairs) -> None:
    for judged in (model, EmbeddingCosine(create("mobilefacenet_relu", embedding_size=8).eval())):
        features, maps = Judge(judged)(torch.rand(2, 3, 112, 112))
        assert [tuple(m.shape[2:]) for m in maps] == [(28, 28), (14, 14)]
        assert features.dtype == torch.float32
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        Judge(EmbeddingCosine(create("mobilefacenet_relu").train()))


def test_the_loss_is_the_weighted_sum_and_trains_the_decoder_alone(model: XCosPairs, pictures: Pictures) -> None:
    weights = DecodeConfig(pixels=3.0, identity=2.0, perceptual=0.7, judged=0.5)
    made = task(model, pictures, weights)
    with torch.no_grad():
        made.module.leave.weight.mul_(30)
    batch = made.batch(BatchIndex(0, 0), 4)
    total, parts = made.loss(batch)
    total.backward()
    assert all(p.grad is not None for p in made.module.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())

    real = batch.float() / 255
    features = model.features((real - 0.5) / 0.5)
    drawn = made.module(features).detach()
    again = model.features((drawn[:2] - 0.5) / 0.5)
    pixels = (drawn - real).abs().mean()
    identity = 1 - torch.cosine_similarity(again.flatten(1), features[:2].flatten(1)).mean()

    def maps(x: Tensor) -> tuple[Tensor, ...]:
        body = model.model.backbone.body
        quarter = body[0]((x - 0.5) / 0.5)  # type: ignore[index, operator]
        return quarter, body[1](quarter)  # type: ignore[index, operator]

    distances = [
        (a - b).square().mean() / v for a, b, v in zip(maps(drawn[:2]), maps(real[:2]), made.variances, strict=True)
    ]
    wanted = {"pixels": pixels, "identity": identity, "perceptual": torch.stack(distances).mean()}
    for name, value in wanted.items():
        torch.testing.assert_close(parts[name], value, atol=1e-4, rtol=1e-3)
    sum_of = 3.0 * wanted["pixels"] + 2.0 * wanted["identity"] + 0.7 * wanted["perceptual"]
    torch.testing.assert_close(total.detach(), sum_of, atol=1e-3, rtol=1e-3)


@pytest.mark.thorough
def test_a_training_that_was_cut_ends_with_the_same_bits(model: XCosPairs, pictures: Pictures, tmp_path: Path) -> None:
    whole = train(task(model, pictures), SHORT, tmp_path / "whole", show=False)
    assert whole.steps == 6 and {"l1", "psnr", "identity", "score", "verified"} == set(whole.metrics)

    class Cut(Exception):
        pass

    def stop(step: int, _: object) -> None:
        if step == 4:
            raise Cut

    cut = dataclasses.replace(SHORT, checkpoint_every=3)
    with pytest.raises(Cut):
        train(task(model, pictures), cut, tmp_path / "cut", show=False, on_step=stop)
    rest = train(task(model, pictures), cut, tmp_path / "cut", resume=True, show=False)
    assert rest.resumed == 3
    (ours, told), (wanted, wanted_told) = (read_safetensors(result.files[0]) for result in (rest, whole))
    assert told == wanted_told and ours.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.items())
    decoder = load_decoder(whole.files[0])
    assert decoder.fingerprint == fingerprint_of(model) and decoder.name == "test"


@pytest.mark.thorough
def test_training_lowers_the_loss(model: XCosPairs, pictures: Pictures) -> None:
    made = task(model, pictures, DecodeConfig(identity=0.0, perceptual=0.0))
    batch = made.batch(BatchIndex(0, 0), 4)
    made.batch = lambda index, size: batch  # type: ignore[method-assign]
    losses: list[float] = []
    config = dataclasses.replace(SHORT, steps=25, rate=0.02, ema=0.0, clip=1.0)
    train(made, config, show=False, on_step=lambda _, row: losses.append(row["pixels"]))
    assert losses[-1] < 0.9 * losses[0]


def test_a_start_gives_its_weights_and_not_its_means(model: XCosPairs, pictures: Pictures, tmp_path: Path) -> None:
    other = FeatureDecoder((8, 7, 7), fingerprint="another", widths=SMALL.widths)
    other.mean.fill_(7.0)
    file = tmp_path / "other.safetensors"
    save_decoder(other, file, dtype=torch.float32)
    made = task(model, pictures, start=str(file)).module
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), other.parameters(), strict=True))
    assert float(made.mean.abs().max()) < 7.0 and made.fingerprint == fingerprint_of(model)
    with pytest.raises(ConfigError, match=r"decoder\.start: expected a decoder of features \(8, 7, 7\)"):
        task(model, pictures, start=str(file), widths=(4, 4, 4, 4))


def test_what_is_measured(model: XCosPairs, pictures: Pictures) -> None:
    decoder = task(model, pictures).module.eval()
    images = pictures.images[:3]
    figures = measure(decoder, Judge(model), images)
    real, mean = images.float() / 255, decoder.mean_face
    drawn = decoder(model.features((real - 0.5) / 0.5)).clamp(0, 1).detach()
    assert figures["l1"] == pytest.approx(float((drawn - real).abs().mean()), abs=1e-5)
    assert figures["mean face l1"] == pytest.approx(float((mean - real).abs().mean()), abs=1e-5)
    mse = (drawn - real).square().mean((1, 2, 3))
    assert figures["psnr"] == pytest.approx(float((10 * (1 / mse).log10()).mean()), abs=1e-3)
    assert 0 <= figures["verified"] <= 1
    assert measure(decoder, Judge(model), images, threshold=-2.0)["verified"] == 1.0
    assert measure(decoder, Judge(model), images, threshold=2.0)["mean face verified"] == 0.0


@pytest.mark.thorough
def test_an_embedding_is_decoded_too(pictures: Pictures, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(create("mobilefacenet_relu").state_dict(), tmp_path / "r.pt")
    config = dataclasses.replace(SMALL, features="embedding", model=str(tmp_path / "r.pt"))
    judged = load_judged(config)
    made = DecodeTask(judged, pictures, config, DecodeConfig(judged=0.5), {"p0"}, name="e")
    assert made.module.shape == (128,)
    done = train(made, dataclasses.replace(SHORT, steps=2), tmp_path / "out", show=False)
    assert load_decoder(done.files[0]).fingerprint == fingerprint_of(judged)
    assert "verified" not in done.metrics  # it has no threshold


def test_settings_that_cannot_be_used(model: XCosPairs, pictures: Pictures) -> None:
    with pytest.raises(ConfigError, match=r"decoder\.model: expected weights of a recogniser"):
        load_judged(DecoderConfig(features="embedding"))
    with pytest.raises(ConfigError, match="data: expected at least two pictures to train on, got 0"):
        DecodeTask(model, pictures, SMALL, DecodeConfig(), set(pictures.names))


def test_the_experiments_file_is_read_and_run(tmp_path: Path) -> None:
    from PIL import Image

    shipped = load_experiment(REPOSITORY / "recipes" / "decoder.toml")
    assert isinstance(shipped, Experiment) and shipped.data.folds == (7, 8)
    generator = torch.Generator().manual_seed(0)
    for person in "ab":
        (tmp_path / "faces" / person).mkdir(parents=True)
        for number in range(2):
            pixels = torch.randint(256, (112, 112, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "faces" / person / f"{number}.png")
    file = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    save_model(XCosModel(create("slim"), XCosHead(512, 8, attention="norm")).eval(), file)
    changed = dataclasses.replace(
        shipped,
        data=DataConfig(str(tmp_path / "faces")),
        decoder=dataclasses.replace(SMALL, model=str(file)),
    )
    said: list[tuple[str, int, int]] = []
    made = create_task(changed, lambda *values: said.append(values))
    assert len(made.trained) == 4 and said[-1] == ("reading", 4, 4)
    assert made.evaluate(made.module) == {}
