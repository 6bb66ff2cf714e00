"""Pictures for training: odd ones, splits by people, pairs and batches, cached maps, alterations."""

from __future__ import annotations

import dataclasses
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from xcos_ext import backbones
from xcos_ext.io.errors import PictureError, XCosError
from xcos_ext.training.augment import AugmentConfig, augmented
from xcos_ext.training.data import (
    Pictures,
    cached_maps,
    normalised,
    people_of_folds,
    people_of_share,
    read_pictures,
)
from xcos_ext.training.sampling import IdentityBatches, PairBatches, hardest_impostors

image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")


def picture(seed: int, size: tuple[int, int] = (112, 112), mode: str = "RGB") -> object:
    rng = np.random.default_rng(seed)
    rgb = image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    return rgb.convert(mode)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with every kind of trouble."""
    root = tmp_path / "crops"
    for name in "ABCD":
        (root / name).mkdir(parents=True)
    picture(0).save(root / "A" / "1.png")
    picture(1).save(root / "A" / "2.png")
    picture(2, mode="L").save(root / "A" / "grey.png")
    picture(3, mode="CMYK").save(root / "B" / "cmyk.jpg")
    picture(4, (224, 224)).save(root / "B" / "large.png")
    picture(5, (20, 20)).save(root / "B" / "tiny.png")
    (root / "B" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (root / "B" / "empty.png").touch()
    whole = (root / "A" / "1.png").read_bytes()
    (root / "B" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(root / "A" / "1.png", root / "C" / "copy.png")
    picture(6).save(root / "C" / "1.png")
    (root / "D" / "only_broken.png").write_bytes(b"x")
    return root


class TestReading:
    def test_odd_pictures_are_named_and_never_stop_a_training(self, odd: Path) -> None:
        found = read_pictures(odd)
        assert found.keys == ("A/1.png", "A/2.png", "A/grey.png", "B/cmyk.jpg", "B/large.png", "C/1.png")
        assert found.names == ("A", "B", "C") and found.people.tolist() == [0, 0, 0, 1, 1, 2]
        assert found.images.shape == (6, 3, 112, 112) and found.images.dtype == torch.uint8
        assert found.oddities == {
            "left out, cannot be decoded": ["B/broken.jpg", "B/empty.png", "B/truncated.png", "D/only_broken.png"],
            "left out, smaller than half the wanted size": ["B/tiny.png"],
            "left out, the same file as another picture": ["C/copy.png (as A/1.png)"],
            "resized": ["B/large.png (224x224)"],
            "grey, made RGB": ["A/grey.png"],
            "CMYK, made RGB": ["B/cmyk.jpg"],
            "people with one picture, used in impostor pairs only": ["C"],
        }
        assert "1 CMYK, made RGB: B/cmyk.jpg" in found.report()
        np.testing.assert_array_equal(found.images[0].permute(1, 2, 0).numpy(), np.asarray(picture(0)))
        grey = found.images[2]
        assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])

    def test_archives_are_as_folders(self, odd: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in odd.rglob("*.*"):
                archive.write(file, f"deep/{file.relative_to(odd)}")
        zipped, plain = read_pictures(tmp_path / "x.zip"), read_pictures(odd)
        assert zipped.keys == plain.keys and zipped.fingerprint == plain.fingerprint
        assert torch.equal(zipped.images, plain.images)

    def test_turned_and_deep_pictures_and_what_is_none(self, tmp_path: Path) -> None:
        """As the file alone is read: a phone's rotation, 16 bits; what is not taken is told."""
        (tmp_path / "A").mkdir()
        exif = image.Exif()
        exif[0x0112] = 3
        picture(0).save(tmp_path / "A" / "turned.png", exif=exif)
        image.fromarray(np.full((112, 112), 257 * 77, np.uint16)).save(tmp_path / "A" / "deep.png")
        for name in ("A/film.mp4", "A/1.heic", "loose.png"):
            (tmp_path / name).touch()
        found = read_pictures(tmp_path)
        assert found.keys == ("A/deep.png", "A/turned.png")
        assert (found.images[0] == 77).all()
        np.testing.assert_array_equal(found.images[1].permute(1, 2, 0).numpy(), np.asarray(picture(0))[::-1, ::-1])
        told = "left out, not a picture by its suffix; expected JPEG, PNG, WebP, TIFF, BMP or GIF"
        assert found.oddities == {
            told: ["A/1.heic", "A/film.mp4"],
            "left out, a picture in no person's folder": ["loose.png"],
            "grey, made RGB": ["A/deep.png"],
        }

    def test_chosen_people_and_fingerprints(self, odd: Path) -> None:
        some = read_pictures(odd, chosen=lambda name: name == "A")
        assert some.names == ("A",)
        before = read_pictures(odd).fingerprint
        picture(9).save(odd / "A" / "2.png")
        assert len({some.fingerprint, before, read_pictures(odd).fingerprint}) == 3

    def test_nothing_usable(self, tmp_path: Path) -> None:
        (tmp_path / "A").mkdir()
        (tmp_path / "A" / "1.png").write_bytes(b"x")
        with pytest.raises(PictureError, match="expected usable pictures, got none among 1"):
            read_pictures(tmp_path)
        with pytest.raises(PictureError, match="no such folder"):
            read_pictures(tmp_path / "nowhere")


class TestSplits:
    def test_a_share_depends_on_names_alone(self) -> None:
        names = [f"person {i}" for i in range(2000)]
        chosen = people_of_share(names, 0.3)
        assert 500 < len(chosen) < 700
        assert people_of_share(names[::-1][:1000], 0.3) == chosen & set(names[1000:])
        assert people_of_share(names, 0.0) == set()

    def test_folds(self, tmp_path: Path) -> None:
        pairs = tmp_path / "pairs.txt"
        pairs.write_text("2\t1\nA\t1\t2\nB\t1\tC\t1\nD\t1\t2\nE\t1\tF\t1\n")
        assert people_of_folds(pairs, [1]) == {"A", "B", "C"}
        assert people_of_folds(pairs, [1, 2]) == set("ABCDEF")
        with pytest.raises(XCosError, match=r"data.folds: expected some of \[1, 2\], got \[3\]"):
            people_of_folds(pairs, [3])
        with pytest.raises(XCosError, match=r"data.pairs: .*x.txt: no such file"):
            people_of_folds(tmp_path / "x.txt", [1])


PEOPLE = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestPairs:
    @pytest.mark.parametrize("count", [1, 2, 7, 200])
    def test_half_are_genuine(self, count: int) -> None:
        indices = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 10])
        first, second = PairBatches(PEOPLE, indices).draw(generator(), count)
        assert len(first) == len(second) == count
        assert torch.equal(PEOPLE[first] == PEOPLE[second], torch.arange(count) % 2 == 0)
        assert (first != second).all()
        assert set(first.tolist()) | set(second.tolist()) <= set(indices.tolist())

    def test_all_people_and_all_pictures_come(self) -> None:
        first, second = PairBatches(PEOPLE, torch.arange(12)).draw(generator(), 2000)
        impostors = first[1::2]
        assert set(impostors.tolist()) == set(range(12))
        share = torch.bincount(PEOPLE[impostors], minlength=6) / len(impostors)
        assert (share > 0.1).all()  # people alike, however many pictures they have
        assert {(4, 5), (5, 4), (0, 2), (9, 6)} <= set(zip(first.tolist(), second.tolist(), strict=True))

    def test_the_same_generator_gives_the_same_pairs(self) -> None:
        batches = PairBatches(PEOPLE, torch.arange(12))
        one, other = batches.draw(generator(3), 20), batches.draw(generator(3), 20)
        assert torch.equal(torch.stack(one), torch.stack(other))

    def test_hard_impostors(self) -> None:
        torch.manual_seed(0)
        embeddings = torch.nn.functional.normalize(torch.randn(12, 5))
        indices = torch.tensor([0, 1, 4, 5, 6, 10, 11])
        hardest = hardest_impostors(embeddings, PEOPLE, indices, 2)
        for row, own in zip(hardest.tolist(), indices.tolist(), strict=True):
            others = [i for i in indices.tolist() if PEOPLE[i] != PEOPLE[own]]
            assert row == sorted(others, key=lambda i: -float(embeddings[own] @ embeddings[i]))[:2]
        first, second = PairBatches(PEOPLE, indices, hardest, 1.0).draw(generator(), 200)
        known = {(a, b) for a, row in zip(indices.tolist(), hardest.tolist(), strict=True) for b in row}
        assert set(zip(first[1::2].tolist(), second[1::2].tolist(), strict=True)) == known
        assert torch.equal(PEOPLE[first] == PEOPLE[second], torch.arange(200) % 2 == 0)

    def test_too_few(self) -> None:
        with pytest.raises(XCosError, match="at least two people, one of them with two pictures, got 2 people, 0"):
            PairBatches(PEOPLE, torch.tensor([3, 10]))
        with pytest.raises(XCosError, match="at least two people"):
            hardest_impostors(torch.eye(12), PEOPLE, torch.tensor([0, 1]), 3)


class TestIdentityBatches:
    def test_others_are_single_faces_of_other_people(self) -> None:
        batches = IdentityBatches(PEOPLE, torch.arange(12), 3, 2, others=3)
        assert len(batches) == 9
        for seed in range(20):
            chosen = batches.draw(generator(seed))
            own = PEOPLE[chosen]
            assert len(set(chosen.tolist())) == 9 and len(set(own.tolist())) == 6
            assert (own[:6].view(3, 2)[:, 0] == own[:6].view(3, 2)[:, 1]).all()
            assert set(own[6:].tolist()) == {1, 4, 5}
        with pytest.raises(XCosError, match="expected 4 people with fewer pictures, got 3"):
            IdentityBatches(PEOPLE, torch.arange(12), 3, 2, others=4)


def generated(count: int = 10) -> Pictures:
    torch.manual_seed(2)
    images = torch.randint(0, 256, (count, 3, 112, 112), dtype=torch.uint8)
    people = torch.arange(count) // 2
    return Pictures(images, people, tuple("ABCDE"), tuple(map(str, range(count))), {}, "0123456789abcdef")


@pytest.fixture(scope="module")
def recogniser() -> backbones.Recogniser:
    torch.manual_seed(0)
    return backbones.create("mobilefacenet").eval().requires_grad_(False)


class TestCache:
    def test_maps_are_computed_once_and_are_the_networks(
        self, recogniser: backbones.Recogniser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pictures = generated()
        done: list[int] = []
        monkeypatch.setattr("xcos_ext.training.data._BATCH", 4)
        maps = cached_maps(recogniser, pictures, tmp_path / "c", flipped=True, progress=lambda n, _: done.append(n))
        assert done[-1] == 20 and maps.grids.shape == (2, 10, 512, 7, 7) and maps.grids.dtype == torch.float16
        assert maps.embeddings is not None and maps.embeddings.shape == (2, 10, 128)

        def expected(images: Tensor) -> tuple[Tensor, Tensor]:
            grid = recogniser.grid(recogniser.preprocessing(images.permute(0, 2, 3, 1).numpy()))
            return grid, torch.nn.functional.normalize(recogniser.embed(grid))

        for view, images in enumerate((pictures.images, pictures.images.flip(3))):
            grid, embeddings = expected(images)
            torch.testing.assert_close(maps.grids[view].float(), grid, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(maps.embeddings[view], embeddings, rtol=1e-4, atol=1e-5)
        monkeypatch.setattr(recogniser, "grid", None)
        monkeypatch.setattr("xcos_ext.training.data.FileLock", None)  # which a folder that is read-only refuses
        again = cached_maps(recogniser, pictures, tmp_path / "c", flipped=True)
        assert torch.equal(again.grids, maps.grids)

    def test_of_other_weights_or_pictures_they_are_computed_anew(
        self, recogniser: backbones.Recogniser, tmp_path: Path
    ) -> None:
        cached_maps(recogniser, generated(), tmp_path)
        other = generated()
        other.fingerprint = "f" * 16
        cached_maps(recogniser, other, tmp_path)
        assert len(list(tmp_path.glob("*.maps.npy"))) == 2

    def test_an_interrupted_computation_leaves_nothing(self, recogniser: backbones.Recogniser, tmp_path: Path) -> None:
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cached_maps(recogniser, generated(), tmp_path, progress=stop)
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]

    def test_bad_input(self, recogniser: backbones.Recogniser, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(XCosError, match="maps cannot be written"):
            cached_maps(recogniser, generated(), tmp_path / "file" / "x")
        recogniser.train()
        with pytest.raises(ValueError, match="recogniser: expected evaluation mode, got training mode"):
            cached_maps(recogniser, generated(), tmp_path)
        recogniser.eval()

    def test_normalised_is_the_networks_preprocessing(self) -> None:
        network = backbones.create("mobilefacenet_relu", output=False)
        images = generated().images
        expected = network.preprocessing(images.permute(0, 2, 3, 1).numpy())
        torch.testing.assert_close(normalised(network, images), expected)


# --- alterations


def smooth_faces(count: int, size: int = 112) -> Tensor:
    """Smooth coloured pictures, uint8 [count, 3, size, size]."""
    low = torch.rand(count, 3, 6, 6, generator=generator(1))
    smooth = torch.nn.functional.interpolate(low, size=(size, size), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).to(torch.uint8)


def test_augmented_is_reproducible_and_each_picture_has_its_own() -> None:
    same = smooth_faces(1).expand(16, -1, -1, -1)
    first, again = (augmented(same, AugmentConfig(), generator(5)) for _ in range(2))
    assert first.dtype == torch.uint8 and first.shape == same.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, augmented(same, AugmentConfig(), generator(6)))
    assert all(not torch.equal(first[0], other) for other in first[1:])


def test_augmented_without_alterations_is_the_identity() -> None:
    nothing = AugmentConfig(**{field.name: 0 for field in dataclasses.fields(AugmentConfig)})
    images = smooth_faces(4)
    assert torch.equal(augmented(images, nothing, generator()), images)


@pytest.mark.parametrize(
    ("alteration", "changed"),
    [({"flip": 1.0}, lambda x: x.flip(3)), ({"grey": 1.0}, lambda x: x.float().mean(1, keepdim=True).expand_as(x))],
)
def test_augmented_flips_and_greys(alteration: dict[str, float], changed: object) -> None:
    nothing = {field.name: 0 for field in dataclasses.fields(AugmentConfig)}
    images = smooth_faces(3)
    made = augmented(images, AugmentConfig(**(nothing | alteration)), generator())
    torch.testing.assert_close(made.float(), changed(images).float(), atol=1.0, rtol=0)  # type: ignore[operator]


def test_augmented_takes_small_and_empty_batches_and_names_bad_ones() -> None:
    assert augmented(smooth_faces(2, 16), AugmentConfig(blur=1.0, patch=1.0), generator()).shape == (2, 3, 16, 16)
    assert augmented(smooth_faces(1)[:0], AugmentConfig(), generator()).shape == (0, 3, 112, 112)
    with pytest.raises(TypeError, match=r"images: expected uint8, got torch\.float32"):
        augmented(smooth_faces(1).float(), AugmentConfig(), generator())
    with pytest.raises(ValueError, match=r"images: expected \[N, 3, H, W\], got \[3, 112, 112\]"):
        augmented(smooth_faces(1)[0], AugmentConfig(), generator())
