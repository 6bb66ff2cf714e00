"""Reading pictures that come from anywhere: every file gives an upright 8-bit RGB array or one clear error."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import posixpath
import re
import stat
import threading
import warnings
from typing import IO, Any, BinaryIO

import numpy as np

from xcos_ext.io.arrays import picture_hint, refuse_masked
from xcos_ext.io.errors import PictureError
from xcos_ext.io.optional import need
from xcos_ext.io.text import display_name, first_line

__all__ = [
    "MAX_PIXELS",
    "decode_picture",
    "decode_with_mode",
    "is_system_file",
    "named_as_picture",
    "open_regular",
    "picture_of",
    "read_contents",
    "read_picture",
    "read_whole",
    "why_unreadable",
]

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

#: Pictures of more pixels are refused from their header, before anything is decoded (RGB takes 3 bytes a pixel).
MAX_PIXELS = 100_000_000

# Of a file: more than a picture of so many pixels can need, four channels of 16 bits.
_BYTES_A_PIXEL = 8

# Formats that hold photographs. Left out on purpose: those that Pillow hands to other programs (EPS) or that
# are containers of something else.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "MPO", "PPM", "JPEG2000", "AVIF", "TGA", "DIB", "PCX", "SGI")

#: Those of them that people meet, for messages.
READABLE = "JPEG, PNG, WebP, TIFF, BMP or GIF"

# What shows through transparent pixels: mid-grey, so that neither dark nor light hair melts into it.
_BACKGROUND = (128, 128, 128)


@functools.cache
def _suffixes() -> frozenset[str]:
    """The suffixes of the formats above that this Pillow can open."""
    image_module = need("PIL.Image", "reading pictures")
    known = image_module.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in _FORMATS and name in image_module.OPEN)


def named_as_picture(name: str) -> bool:
    """Whether a file's suffix is that of a format which :func:`read_picture` reads here.

    A file that is named reads whatever its suffix; this is for folders, in which other things lie too.

    >>> [named_as_picture(name) for name in ("a/1.JPG", "a/1.tiff", "a/1.heic", "a/1")]
    [True, True, False, False]
    """
    return posixpath.splitext(name)[1].lower() in _suffixes()


def is_system_file(name: str) -> bool:
    """Whether a name is hidden, or that of a file or folder which systems leave behind: never anybody's picture.

    >>> [is_system_file(name) for name in ("a/._1.jpg", "a/Thumbs.db", "__MACOSX", "a/1.jpg")]
    [True, True, True, False]
    """
    last = posixpath.basename(name)
    return last.startswith(".") or last.lower() in {"__macosx", "desktop.ini", "ehthumbs.db", "icon\r", "thumbs.db"}


def read_picture(path: StrPath, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> np.ndarray:
    """Read a picture file.

    EXIF rotation is applied; grey, palette and CMYK pictures become RGB; transparency is composited on
    mid-grey; 16-bit grey is scaled from its full range 0..65535; of an animation the first frame is taken. Grey samples
    of 32 bits, signed or floating-point ones are refused: what of them is white would be a guess.
    Only regular files are opened (symbolic links are followed), so a pipe or a device cannot block or flood
    the caller.

    Args:
        path: the file; names that are not UTF-8 are fine.
        max_pixels: larger pictures are refused from the header alone.
        name: what to call it in messages; None: its path.

    Returns:
        uint8 RGB [height, width, 3], contiguous and writable.

    Raises:
        PictureError: missing, not a regular file, not readable, empty, not a picture, damaged, truncated, or
            too large. The message starts with the name.
        ValueError: ``max_pixels`` is not positive.
        TypeError: no path, but a picture or its contents.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".ppm") as file:
    ...     _ = file.write(b"P6 2 1 255 abcdef")
    ...     file.flush()
    ...     read_picture(file.name).tolist()
    [[[97, 98, 99], [100, 101, 102]]]
    """
    name = _named(path) if name is None else name
    with open_regular(path, name) as file:
        return _decode(file, name, max_pixels)[0]


def picture_of(given: Any, name: str = "picture", *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of a picture in any form that people have one in.

    Args:
        given: a path, a Pillow picture, or uint8 RGB [H, W, 3] (OpenCV's are BGR: ``bgr[:, :, ::-1]``).
        name: of the picture, for messages; that of a path is the path.
        max_pixels: as of :func:`read_picture`.

    Returns:
        uint8 RGB [height, width, 3].

    Raises:
        PictureError, ValueError: as :func:`read_picture`; an array of another shape or type.
        TypeError: none of these.

    >>> picture_of(np.zeros((2, 3, 3), np.uint8)).shape
    (2, 3, 3)
    """
    if isinstance(given, np.ndarray):
        refuse_masked(**{name: given})
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3 or not given.size:
            raise ValueError(
                f"{name}: expected uint8 RGB [H, W, 3], got {given.dtype} {list(given.shape)}{picture_hint(given)}"
            )
        return given
    if isinstance(given, (str, bytes, os.PathLike)):
        return read_picture(given, max_pixels=max_pixels)
    if type(given).__module__.partition(".")[0] == "PIL" and hasattr(given, "getexif"):
        if given.width * given.height > max_pixels:
            raise _too_large(name, f"{given.width:,} x {given.height:,}", max_pixels)
        try:
            return _to_rgb(given, name)
        except (OSError, ValueError, SyntaxError) as error:
            if isinstance(error, PictureError):
                raise
            raise PictureError(f"{name}: damaged or truncated picture ({why_unreadable(error)})") from error
    raise TypeError(f"{name}: expected a path, a Pillow picture or a uint8 array [H, W, 3], got {type(given).__name__}")


def read_contents(path: StrPath, *, name: str | None = None) -> bytes:
    """The undecoded content of a picture file; name and PictureError as of :func:`read_picture`."""
    name = _named(path) if name is None else name
    with open_regular(path, name) as file:
        try:
            return read_whole(file, name, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise PictureError(f"{name}: cannot be read ({error.strerror or error})") from error


def _named(path: StrPath) -> str:
    """What to call a picture by its path; TypeError for anything else, above all for a picture itself."""
    contents = isinstance(path, (bytes, bytearray)) and b"\0" in path  # which no path has, and every picture
    if contents or not isinstance(path, (str, bytes, os.PathLike)):
        got = f"{len(path)} bytes of contents" if contents else type(path).__name__  # type: ignore[arg-type]
        hint = ", which decode_picture(data, name) takes" if contents else ""
        raise TypeError(f"path: expected the path of a picture file, got {got}{hint}")
    return display_name(path)


def read_whole(file: IO[bytes], name: str, size: int, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """All of a picture file; PictureError if that is more than any accepted picture takes, before it fills the memory.

    Args:
        file: opened for reading; it may unpack what it reads.
        name: of the picture, for messages.
        size: of the file as its folder or archive states it.
        max_pixels: that will be accepted.
    """
    most = _BYTES_A_PIXEL * max(max_pixels, MAX_PIXELS)
    if size > most:
        raise PictureError(f"{name}: too large: {size:,} bytes, at most {most:,} are accepted")
    content = bytearray()
    # A piece at a time: zipfile unpacks all of what it has read, and leaves out what is over the stated size then.
    while piece := file.read(1 << 12):
        content += piece
    return bytes(content)


def decode_picture(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the content of a picture file, e.g. out of an archive, as :func:`read_picture` does.

    Args:
        data: the content.
        name: of the picture, for messages.
        max_pixels: larger pictures are refused from the header alone.

    Returns:
        uint8 RGB [height, width, 3], contiguous and writable.

    Raises:
        PictureError, ValueError: as :func:`read_picture`.

    >>> decode_picture(b"P5 2 1 255 az", "grey.pgm").tolist()
    [[[97, 97, 97], [122, 122, 122]]]
    """
    return decode_with_mode(data, name, max_pixels=max_pixels)[0]


def decode_with_mode(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, str]:
    """As :func:`decode_picture`, and the mode that the file has in Pillow's words ("L" is grey, "CMYK" is CMYK).

    >>> decode_with_mode(b"P5 2 1 255 az", "grey.pgm")[1]
    'L'
    """
    return _decode(io.BytesIO(data), name, max_pixels)


def open_regular(path: StrPath, name: str) -> BinaryIO:
    """Open a regular file for reading; PictureError, starting with the name, for anything else."""
    try:
        mode = os.stat(path).st_mode  # asked before, because merely opening some devices has effects
        if stat.S_ISREG(mode):
            # And again of what was opened, without waiting: a pipe may have taken the file's place.
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
    except FileNotFoundError as error:
        dangling = os.path.islink(path)
        raise PictureError(f"{name}: {'the link points to no file' if dangling else 'no such file'}") from error
    except PermissionError as error:
        raise PictureError(f"{name}: no permission to read it") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PictureError(f"{name}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = kinds.get(stat.S_IFMT(mode), "a special file")
    raise PictureError(f"{name}: expected a picture file, got {kind}")


def why_unreadable(error: BaseException) -> str:
    """Another library's message on one line, without the addresses of its objects."""
    return re.sub(r"<(?:\w+\.)*(\w+) object at 0x[0-9a-fA-F]+>", r"\1", first_line(error))


class _Hush:
    """Warnings are ignored while any thread is inside. Filters are the whole process's: were each thread to put back
    what it found, one that found another's would leave it there for ever."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_HUSH = _Hush()


def _too_large(name: str, pixels: str, max_pixels: int) -> PictureError:
    return PictureError(
        f"{name}: too large: {pixels} pixels, at most {max_pixels:,} are accepted; scale the picture down, or raise "
        "the limit (max_pixels) if you trust the file"
    )


def _decode(file: BinaryIO, name: str, max_pixels: int) -> tuple[np.ndarray, str]:
    if max_pixels < 1:
        raise ValueError(f"max_pixels: expected a positive number of pixels, got {max_pixels}")
    image_module = need("PIL.Image", "reading pictures")
    image_module.init()
    formats = [f for f in _FORMATS if f in image_module.OPEN]
    damage, size = "damaged picture: its header cannot be read", "its"
    try:
        with _HUSH:  # our own limit decides; Pillow's warnings about size and odd metadata would only confuse stderr
            if not file.read(1):
                raise PictureError(f"{name}: expected a picture, got an empty file")
            file.seek(0)
            with image_module.open(file, formats=formats) as picture:
                size = f"{picture.width:,} x {picture.height:,}"
                if picture.width * picture.height > max_pixels:
                    raise _too_large(name, size, max_pixels)
                damage = f"damaged or truncated {picture.format} picture"
                return _to_rgb(picture, name), picture.mode
    except PictureError:
        raise
    except MemoryError as error:
        raise PictureError(f"{name}: not enough memory for {size} pixels") from error
    except image_module.DecompressionBombError as error:
        # Pillow's own, harder limit is met while the header is read, and only its message has the size.
        found = re.search(r"(\d+) pixels", str(error))
        limit = min(max_pixels, 2 * (image_module.MAX_IMAGE_PIXELS or max_pixels))
        raise _too_large(name, f"{int(found[1]):,}" if found else "too many", limit) from error
    except image_module.UnidentifiedImageError as error:
        raise PictureError(f"{name}: not a picture, or of an unknown kind; expected {READABLE}") from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise PictureError(f"{name}: {damage} ({why_unreadable(error)})") from error


def _to_rgb(picture: Any, name: str) -> np.ndarray:
    image_module = need("PIL.Image", "reading pictures")
    ends = _ends(picture, name)
    picture.load()
    # Damaged EXIF is no reason to refuse a picture that decodes.
    with contextlib.suppress(Exception):
        picture = need("PIL.ImageOps", "reading pictures").exif_transpose(picture)
    if ends is not None:
        black, white = ends
        grey = np.rint((np.asarray(picture, np.float64) - black) * (255 / (white - black))).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(grey[:, :, None], (*grey.shape, 3)))
    if picture.mode in ("La", "RGBa"):  # colours already multiplied by alpha
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        background = image_module.new("RGBA", picture.size, (*_BACKGROUND, 255))
        picture = image_module.alpha_composite(background, picture)
    return np.array(picture.convert("RGB"), dtype=np.uint8)


def _ends(picture: Any, name: str) -> tuple[int, int] | None:
    """Black and white of grey samples of more than 8 bits, by the file's type and never by its content; None: of 8."""
    if not picture.mode.startswith("I") and picture.mode != "F":
        return None
    if not picture.mode.startswith("I;16") and (picture.mode, picture.format) != ("I", "PPM"):  # which Pillow scales
        kind = "floating-point samples" if picture.mode == "F" else "signed or 32-bit samples"
        raise PictureError(
            f"{name}: expected unsigned samples of 8 or 16 bits, got {kind}, of which nobody knows what is white; save "
            "the picture with 8 or 16 bits"
        )
    tags = getattr(picture, "tag_v2", {})  # TIFF's: also 12 bits, and white as 0, which Pillow leaves as they are
    most = (1 << tags.get(258, (16,))[0]) - 1
    return (most, 0) if tags.get(262) == 0 else (0, most)
