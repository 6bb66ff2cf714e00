"""Reading pictures: everything that a file can be gives an upright RGB array or one PictureError naming the file."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcos_ext.evaluation.datasets import InsightfaceBin, open_pairs
from xcos_ext.explain.pairs_file import pictures_below
from xcos_ext.faces import PersonFolder, PictureTree, decode_picture, display_name, read_face, read_picture
from xcos_ext.gallery.enroll import find_pictures, find_probes
from xcos_ext.io.errors import PictureError
from xcos_ext.training.data import read_pictures


def colours(height: int = 24, width: int = 40) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 6, y * 10, (x + y) * 3], 2).astype(np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **how: object) -> Path:
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(path, **how)
    return path


def refused(path: Path | str | bytes, *words: str, **how: int) -> str:
    """The message of the error, which starts with the file's name, is one line and has the words."""
    with pytest.raises(PictureError) as caught:
        read_picture(path, **how)
    message = str(caught.value)
    assert message.startswith(display_name(path) + ": ")
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < seconds


# --- what is read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm", "gif"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    expected = colours(8, 8)
    how = {"lossless": True} if suffix == "webp" else {}
    got = read_picture(save(tmp_path / f"a.{suffix}", expected, **how))
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert np.abs(got.astype(int) - expected).max() <= (0 if suffix != "gif" else 40)


def test_suffix_does_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", colours())
    wrong = path.rename(tmp_path / "a.jpg")
    assert (read_picture(wrong) == colours()).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    upright = colours()
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", np.ascontiguousarray(undo(upright)), exif=exif)
    assert (read_picture(path) == upright).all()
    assert (decode_picture(path.read_bytes(), "a") == upright).all()
    assert (PictureTree(tmp_path).read("a.png") == upright).all()


@pytest.mark.parametrize("zipped", [False, True])
def test_folders_and_archives_have_the_same_limits(tmp_path: Path, zipped: bool) -> None:
    (tmp_path / "p").mkdir()
    save(tmp_path / "p" / "a.png", colours())
    (tmp_path / "p" / "empty.png").touch()
    if zipped:
        with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
            for name in ("a.png", "empty.png"):
                archive.write(tmp_path / "p" / name, name)
    tree = PictureTree(tmp_path / ("p.zip" if zipped else "p"))
    with pytest.raises(PictureError, match=r"a\.png: too large: 40 x 24 pixels, at most 100"):
        tree.read("a.png", max_pixels=100)
    with pytest.raises(PictureError, match=r"empty\.png: expected a picture, got an empty file"):
        tree.read("empty.png")


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", colours(), exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff garbage")
    assert read_picture(path).shape == (24, 40, 3)


def test_grey_and_one_bit(tmp_path: Path) -> None:
    grey = colours()[:, :, 0]
    assert (read_picture(save(tmp_path / "a.png", grey)) == grey[:, :, None]).all()
    bits = read_picture(save(tmp_path / "b.png", grey, "1"))
    assert set(np.unique(bits)) == {0, 255}


def test_palette(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([9, 8, 7, 200, 30, 40])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").tolist() == [[[9, 8, 7], [200, 30, 40]]]


def test_transparency_shows_neutral_grey(tmp_path: Path) -> None:
    array = np.zeros((4, 4, 4), np.uint8)
    array[..., 0] = 255
    array[:2, :, 3] = 255
    array[2, :, 3] = 128
    got = read_picture(save(tmp_path / "a.png", array))
    assert (got[:2] == (255, 0, 0)).all()
    assert (np.abs(got[2].astype(int) - (192, 64, 64)) <= 1).all()
    assert (got[3] == 128).all()


def test_grey_with_alpha_and_transparent_colours(tmp_path: Path) -> None:
    got = read_picture(save(tmp_path / "a.png", np.array([[[10, 255], [10, 0]]], np.uint8)))
    assert got.tolist() == [[[10] * 3, [128] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "b.gif", transparency=0)
    assert read_picture(tmp_path / "b.gif").tolist() == [[[128] * 3, [200, 100, 50]]]
    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)).save(tmp_path / "c.png", transparency=(1, 2, 3))
    assert read_picture(tmp_path / "c.png").tolist() == [[[128] * 3, [4, 5, 6]]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_by_its_full_range(tmp_path: Path, suffix: str) -> None:
    deep = np.array([[0, 257, 128 * 257, 65535], [100, 200, 30000, 65000]], np.uint16)
    got = read_picture(save(tmp_path / f"a.{suffix}", deep))
    assert got.shape == (2, 4, 3)
    assert (got[..., 0] == np.rint(deep / 257)).all()
    assert (got[..., 0] == got[..., 2]).all()


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    samples = np.array([[[0, 32896, 65535]]], ">u2")
    (tmp_path / "a.png").write_bytes(png(1, 1, b"\0" + samples.tobytes(), depth=16, kind=2))
    assert read_picture(tmp_path / "a.png").tolist() == [[[0, 128, 255]]]


def tiff(bits: int, data: bytes, *, white_is_0: bool = False, signed: bool = False) -> bytes:
    """Two pixels side by side, of kinds that Pillow does not write."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, 0 if white_is_0 else 1), (273, 122), (277, 1)]
    tags += [(279, len(data)), (339, 2 if signed else 1)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def test_deep_grey_is_scaled_by_its_type_or_refused(tmp_path: Path) -> None:
    """Whatever the values are: black pictures of 32 bits were often pictures of 0..255."""
    for data, expected in (
        (tiff(16, struct.pack("<HH", 1000, 60000)), [4, 233]),
        (tiff(16, struct.pack("<HH", 1000, 60000), white_is_0=True), [251, 22]),
        (tiff(12, bytes([0x3E, 0x8F, 0xA0])), [62, 249]),  # 1000 and 4000 of 4095
        (b"P5 2 1 4095\n" + struct.pack(">HH", 1000, 4095), [62, 255]),
    ):
        assert decode_picture(data, "a")[0, :, 0].tolist() == expected
    signed = tiff(16, struct.pack("<hh", -5, 30000), signed=True)
    with pytest.raises(PictureError, match=r"^a: expected unsigned samples .*, got signed or 32-bit samples"):
        decode_picture(signed, "a")
    for index, most in enumerate((255, 65535, 70000)):
        refused(save(tmp_path / f"{index}.tiff", np.array([[0, most]], np.int32)), "32-bit samples", "what is white")
    for index, samples in enumerate(([0, 0.5, 1], [0, 40, 255], [0, np.nan, 1])):
        refused(save(tmp_path / f"f{index}.tiff", np.array([samples], np.float32)), "floating-point samples")


def test_cmyk(tmp_path: Path) -> None:
    array = np.full((16, 16, 3), (200, 60, 30), np.uint8)
    got = read_picture(save(tmp_path / "a.jpg", array, "CMYK", quality=95))
    assert np.abs(got.astype(int) - array).max() <= 12


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    how = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **how)
    assert (read_picture(tmp_path / f"a.{suffix}") == (250, 0, 0)).all()


def test_one_pixel(tmp_path: Path) -> None:
    assert read_picture(save(tmp_path / "a.png", np.array([[[1, 2, 3]]], np.uint8))).tolist() == [[[1, 2, 3]]]


def test_link_to_a_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", colours())
    (tmp_path / "link").symlink_to(path)
    assert read_picture(tmp_path / "link").shape == (24, 40, 3)


def test_names_of_all_kinds(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", colours())
    raw = os.fsencode(tmp_path) + b"/\xff\xfe name.png"
    os.rename(path, raw)
    assert read_picture(raw).shape == (24, 40, 3)
    assert read_picture(os.fsdecode(raw)).shape == (24, 40, 3)
    message = refused(os.fsencode(tmp_path) + b"/\xff\nmissing.png", "no such file")
    message.encode("utf-8")
    assert "\\xff" in message
    assert "\\n" in message
    refused("a\0b.png", "cannot be opened")
    contents = save(tmp_path / "b.png", colours()).read_bytes()
    for value, words in (
        (contents, rf"{len(contents)} bytes of contents, which decode_picture\(data, name\) takes$"),
        (colours(), "ndarray$"),
        (io.BytesIO(contents), "BytesIO$"),
        (3, "int$"),
    ):
        with pytest.raises(TypeError, match=f"^path: expected the path of a picture file, got {words}"):
            read_face(value, None)


# --- one decoder for every way in


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """ann/: files that a decoder of their own reads differently."""
    folder = tmp_path / "p" / "ann"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "phone.jpg", colours(), exif=exif)
    deep = np.linspace(30_000, 34_000, 24 * 40).astype(np.uint16).reshape(24, 40)  # bright, and flat: clipped to white
    save(folder / "deep.png", deep)
    palette = Image.fromarray(colours()).quantize(8)
    palette.save(folder / "palette.gif", transparency=0)
    palette.save(folder / "palette.png", transparency=0)
    save(folder / "ink.jpg", colours(), "CMYK")
    save(folder / "ink.tiff", colours(), "CMYK")
    save(folder / "torn.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (folder / "torn.jpg").write_bytes((folder / "torn.jpg").read_bytes()[:2000])
    (folder / "vast.png").write_bytes(png(11_000, 10_000, b""))
    (folder / "empty.png").touch()
    (folder / "other.jpg").write_bytes(b"hello")
    (folder / "phone.dat").write_bytes((folder / "phone.jpg").read_bytes())
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"ann/{file.name}")
    return tmp_path / "p"


def one_training_picture(root: Path, name: str) -> np.ndarray:
    """Through the door of training, which reads all that there are, and lists those that it cannot use."""
    height, width = (40, 24) if name == "phone.jpg" else (24, 40)
    found = read_pictures(root, (height, width))
    if f"ann/{name}" in found.oddities["left out, cannot be decoded"]:
        raise PictureError(name)
    return found.images[found.keys.index(f"ann/{name}")].permute(1, 2, 0).numpy()


DOORS: dict[str, Callable[[Path, str], np.ndarray]] = {
    "tree": lambda root, name: PictureTree(root).read(f"ann/{name}"),
    "report": lambda root, name: pictures_below(root)(f"ann/{name}"),
    "enroll": lambda root, name: next(p for p in find_pictures([root])[0] if p.id == f"ann/{name}").read(),
    "search": lambda root, name: next(p for p in find_probes([root])[0] if p.id.endswith(f"ann/{name}")).read(),
    "plug": lambda root, name: PersonFolder(root).read(f"ann/{name}"),
    "train": one_training_picture,
}


def through_a_list(root: Path, name: str) -> np.ndarray:
    path = root.with_name("list.csv")
    path.write_text(f"a,b,genuine\nann/{name},ann/{name},1\n")
    return open_pairs(path, root).read(f"ann/{name}")


def through_a_bin(root: Path, name: str) -> np.ndarray:
    content = (root.with_name("p") / "ann" / name).read_bytes()
    path = root.with_name("set.bin")
    path.write_bytes(pickle.dumps(([content, content], [True])))
    return InsightfaceBin(path).read("000000")


DOORS |= {"evaluate": through_a_list, "bin": through_a_bin}
READ = ("phone.jpg", "deep.png", "palette.gif", "palette.png", "ink.jpg", "ink.tiff")
REFUSED = ("torn.jpg", "vast.png", "other.jpg", "empty.png")


@pytest.mark.parametrize("door", DOORS)
def test_every_door_has_the_one_decoder(awkward: Path, door: str) -> None:
    """The same array, or the same refusal, as of the file alone: from folders and archives, through every command."""
    for name in (*READ, *REFUSED):
        if (door, name) == ("bin", "empty.png"):
            continue  # an empty picture is refused with its file
        try:
            expected: np.ndarray | str = read_picture(awkward / "ann" / name)
        except PictureError as error:
            expected = str(error).removeprefix(str(awkward / "ann" / name))
        for root in (awkward, awkward.with_name("p.zip")):
            if isinstance(expected, str):
                with pytest.raises(PictureError) as caught:
                    DOORS[door](root, name)
                assert door == "train" or str(caught.value).endswith(expected), (root, name)
            else:
                got = DOORS[door](root, name)
                assert got.shape == expected.shape and (got == expected).all(), (root, name)


def test_a_file_alone_is_read_by_read_picture(awkward: Path) -> None:
    path = awkward / "ann" / "phone.jpg"
    expected = read_picture(path)
    assert expected.shape == (40, 24, 3)
    for found in (find_pictures([path])[0], find_probes([path])[0]):
        assert (found[0].read() == expected).all()
    assert (read_face(path, None, size=(40, 24)).rgb == expected).all()


@pytest.mark.parametrize("archive", [False, True])
def test_a_list_names_files_whatever_their_suffix(awkward: Path, archive: bool) -> None:
    root = awkward.with_name("p.zip") if archive else awkward
    expected = read_picture(awkward / "ann" / "phone.jpg")
    for read in (DOORS["report"], DOORS["evaluate"]):
        assert (read(root, "phone.dat") == expected).all()
    assert (pictures_below(root)("phone.jpg") == expected).all()  # below the only folder
    assert (pictures_below(root)("ann\\phone.jpg") == expected).all()


# --- what is refused


def png(width: int, height: int, pixels: bytes, depth: int = 8, kind: int = 0) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def test_decompression_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    # 40,000 x 40,000 zeros compress to 200 KB; only a few of them are needed, as nothing is to be decoded.
    path = tmp_path / "bomb.png"
    path.write_bytes(png(40_000, 40_000, bytes(1000)))
    with within(2):
        refused(path, "too large", "1,600,000,000 pixels", "at most 100,000,000")


def test_archives_that_unpack_to_more_than_any_picture_fill_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xcos_ext.faces.pictures.MAX_PIXELS", 1000)
    path, long = tmp_path / "p.zip", 30 << 20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(8001))
        archive.writestr("lying.png", bytes(long))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", long), struct.pack("<I", 8000)))
    tree = PictureTree(path)
    with pytest.raises(PictureError, match=r"a\.png: too large: 8,001 bytes, at most 8,000 are accepted"):
        tree.contents("a.png", max_pixels=1)
    tracemalloc.start()
    with pytest.raises(PictureError, match="cannot be read from the archive"):
        tree.contents("lying.png", max_pixels=1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 << 20


def test_size_limit_can_be_set(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", colours())
    refused(path, "40 x 24 pixels", "at most 959", max_pixels=959)
    assert read_picture(path, max_pixels=960).shape == (24, 40, 3)
    with pytest.raises(ValueError, match="max_pixels: expected a positive number"):
        read_picture(path, max_pixels=0)
    big = tmp_path / "big.png"
    big.write_bytes(png(11_000, 10_000, b""))
    refused(big, "11,000 x 10,000")


def test_pillow_s_own_limits_raise_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(9_900, 9_900, b""))
    refused(path, "damaged or truncated PNG")  # within our limit, beyond Pillow's warning
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff", "bmp"])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.9])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    rng = np.random.default_rng(0)
    path = save(tmp_path / f"a.{suffix}", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path)


def test_damaged_bytes_never_escape(tmp_path: Path) -> None:
    """Whatever the damage, the result is an array or a PictureError."""
    rng = np.random.default_rng(1)
    for suffix in ("jpg", "png", "gif", "tiff", "webp", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(colours()).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
        for _ in range(25):
            data = bytearray(buffer.getvalue())
            for position in rng.integers(0, len(data), 6):
                data[position] = rng.integers(0, 256)
            (tmp_path / f"d.{suffix}").write_bytes(data)
            with contextlib.suppress(PictureError):
                assert read_picture(tmp_path / f"d.{suffix}").dtype == np.uint8


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"hello", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"\xff\xd8\xff\xe0", ""),
        (bytes(100), "not a picture"),
    ],
)
def test_not_a_picture(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    refused(tmp_path / "a.jpg", words)


def test_missing_directory_and_dangling_link(tmp_path: Path) -> None:
    refused(tmp_path / "none.jpg", "no such file")
    refused(tmp_path, "a directory")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused(tmp_path / "link", "link points to no file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "cannot be opened")


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
def test_pipes_sockets_and_devices_do_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "random").symlink_to("/dev/random")
    with within(2):
        refused(tmp_path / "pipe", "a named pipe")
        refused(tmp_path / "zero", "a device")
        refused(tmp_path / "random", "a device")
        refused("/dev/null", "a device")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # socket names are short
        server.bind("s")
        refused("s", "a socket")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", colours())
    path.chmod(0)
    refused(path, "no permission")


def test_no_file_stays_open(tmp_path: Path) -> None:
    save(tmp_path / "a.png", colours())
    (tmp_path / "b.png").write_bytes(b"not a picture")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        read_picture(tmp_path / "a.png")
        for bad in ("b.png", ""):
            with contextlib.suppress(PictureError):
                read_picture(tmp_path / bad)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    data = io.BytesIO()
    Image.new("RGB", (400, 400)).save(data, "PNG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: decode_picture(data.getvalue(), str(i)), range(200)))
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="still heard"):
        warnings.warn("still heard", stacklevel=1)
