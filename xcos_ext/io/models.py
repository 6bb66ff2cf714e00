"""Recognisers and detectors by name: where their files are, whose they are, and how they get here.

pooch fetches them: it checks hashes and moves a file into place only when it is whole. Hugging Face's own downloader
would serve one of the three places alone. Resuming and mirrors are added here.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from .errors import ModelError
from .optional import need
from .shipped import DATA, default_weights
from .text import byte_size, display_name, first_line

__all__ = ["REGISTRY", "Entry", "cache_folder", "entry_named", "fetch", "is_address", "local_file", "place_of"]

Kind = Literal["model", "recogniser", "detector"]

_ZOO = "opencv/opencv_zoo", "966be4cb6eefc2a4f586ed0581bf4bbaa2533070"
_TRIES = 3  # of one address, each going on where the one before broke off
_TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Entry:
    """A file that is known by name.

    Attributes:
        name: in one word.
        kind: ``"model"``: an xCos model; ``"recogniser"``: becomes one in closed form; ``"detector"``.
        about: what it is and what for.
        file: its name.
        sha256: of its contents; empty: it comes with the package.
        size: bytes.
        licence: its name.
        commercial: whether the licence allows commercial use; False: it must be accepted before it is fetched.
        urls: where it is, the first one first.

    >>> entry_named("sface", "recogniser").licence
    'Apache-2.0'
    """

    name: str
    kind: Kind
    about: str
    file: str
    sha256: str = ""
    size: int = 0
    licence: str = "Apache-2.0"
    commercial: bool = True
    urls: tuple[str, ...] = ()

    def path(self) -> Path:
        """Where its file is, or would be once it is fetched."""
        return cache_folder() / self.sha256[:16] / self.file if self.sha256 else DATA / self.file

    def here(self) -> bool:
        """Whether its file is on this machine."""
        return self.path().is_file()


def _of_the_zoo(folder: str, file: str) -> tuple[str, ...]:
    repository, commit = _ZOO
    return (
        f"https://media.githubusercontent.com/media/{repository}/{commit}/models/{folder}/{file}",
        f"https://github.com/{repository}/raw/{commit}/models/{folder}/{file}",
        f"https://huggingface.co/opencv/{folder}/resolve/main/{file}",
    )


_SFACE, _YUNET = "face_recognition_sface_2021dec_int8bq.onnx", "face_detection_yunet_2023mar.onnx"
_MOBILE = "foamliu/MobileFaceNet", "a6cc9032a659b615f477833e1a70b5e7931bcccc", "weights/mobilefacenet.pt"

#: Name -> entry.
REGISTRY: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "slim",
            "model",
            "the default: xCos over a slim MobileFaceNet, trained by this project; research and demonstration",
            "xcos_slim.safetensors",
            commercial=False,
        ),
        Entry(
            "sface",
            "recogniser",
            "SFace, the best across poses; 4 to 5 times slower than slim",
            _SFACE,
            "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
            10_667_852,
            urls=_of_the_zoo("face_recognition_sface", _SFACE),
        ),
        Entry(
            "mobilefacenet",
            "recogniser",
            "MobileFaceNet with ReLU6 (foamliu)",
            "mobilefacenet.pt",
            "90a00ba1d8b0b688af3deb731ed53dca582e6106805d1bc3cfdef55f570493f4",
            4_135_271,
            urls=tuple(
                address.format(*_MOBILE)
                for address in ("https://raw.githubusercontent.com/{}/{}/{}", "https://github.com/{}/raw/{}/{}")
            ),
        ),
        Entry(
            "small",
            "detector",
            "the default: box, points, score and pose; research and demonstration",
            "detector.safetensors",
            commercial=False,
        ),
        Entry(
            "yunet",
            "detector",
            "YuNet of OpenCV's zoo",
            _YUNET,
            "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
            232_589,
            licence="MIT",
            urls=_of_the_zoo("face_detection_yunet", _YUNET),
        ),
    )
}


def cache_folder() -> Path:
    """Where fetched files are kept: ``XCOS_CACHE``, or ``xcos_ext`` in the user's cache folder."""
    if own := os.environ.get("XCOS_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "xcos_ext")


def is_address(spec: str | os.PathLike[str]) -> bool:
    """Whether a setting is an address, ``https://`` or ``hf://``, and not a file or a name.

    >>> is_address("hf://owner/repo/file.onnx"), is_address("sface")
    (True, False)
    """
    return isinstance(spec, str) and spec.startswith(("https://", "http://", "hf://"))


def entry_named(name: str, *kinds: Kind) -> Entry:
    """The entry of a name, of one of the kinds if any are given.

    Raises:
        ModelError: there is none; the nearest names are told.

    >>> entry_named("sfase", "model", "recogniser")
    Traceback (most recent call last):
    xcos_ext.io.errors.ModelError: sfase: no such file, and no such name; did you mean sface? Known are slim, sface, \
mobilefacenet
    """
    known = [entry.name for entry in REGISTRY.values() if not kinds or entry.kind in kinds]
    if name in known:
        return REGISTRY[name]
    near = difflib.get_close_matches(name.lower(), known, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ModelError(f"{display_name(name)}: no such file, and no such name{hint} Known are {', '.join(known)}")


def place_of(spec: str | os.PathLike[str] | None, *kinds: Kind) -> tuple[Path, Entry | None]:
    """Where the file lies that a setting means, and its entry unless it is a file of the user's; nothing is fetched.

    Arguments and errors as of :func:`local_file`.
    """
    if spec is None:
        return default_weights(), None
    if not isinstance(spec, (str, os.PathLike)):
        raise TypeError(f"path: expected the path of a file, a name or an address, got {type(spec).__name__}")
    word = os.fspath(spec)
    if is_address(spec):
        entry = _at(word, kinds[0])
    elif os.path.exists(spec) or os.path.basename(word) != word or "." in word:
        return Path(word), None
    else:
        entry = entry_named(word, *kinds)
    return entry.path(), entry


def local_file(spec: str | os.PathLike[str] | None, *kinds: Kind) -> Path:
    """The file that a setting means, fetched if it has to be.

    Args:
        spec: a file; a name of :data:`REGISTRY`; ``hf://owner/repo/file`` (``owner/repo@revision``), on which
            ``#sha256=`` may follow; or an ``https://`` address, on which it must. None: the shipped model.
        kinds: of the names that are meant.

    Raises:
        ModelError: no such name, or it cannot be fetched.
        TypeError: neither text nor a path.

    >>> local_file("slim", "model").name, local_file("other.pt", "model").name
    ('xcos_slim.safetensors', 'other.pt')
    """
    path, entry = place_of(spec, *kinds)
    return path if entry is None else fetch(entry)


def fetch(entry: Entry, *, accept_licence: bool = False) -> Path:
    """The file of an entry, from this machine or from its addresses.

    A download goes on where an earlier one broke off; the file takes its name only when its hash is right. While it
    runs a bar is shown where standard error is a terminal, and the licence is told.

    Raises:
        ModelError: the licence has to be accepted first; there is no network, or it may not be used
            (``XCOS_OFFLINE=1``); what the addresses have is another file.
        MissingPackageError: pooch is not installed.
    """
    path = entry.path()
    if not entry.urls or _is_whole(path, entry):
        return path
    if not (entry.commercial or accept_licence):
        raise ModelError(
            f"{entry.name}: its licence, {entry.licence}, does not allow every use; once you have read it: "
            f"xcos models fetch {entry.name} --accept-license"
        )
    if os.environ.get("XCOS_OFFLINE", "0") not in ("", "0"):
        raise ModelError(f"{entry.name}: expected its file at {path}, for XCOS_OFFLINE is set; got none")
    locks = need("filelock", "fetching models")
    pooch = need("pooch", "fetching models")
    pooch.get_logger().setLevel("ERROR")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.FileLock(f"{path}.lock"):
            if _is_whole(path, entry):  # another process was faster
                return path
            print(f"{entry.name}: {entry.licence}; fetching {_amount(entry)}", file=sys.stderr, flush=True)
            refused = []
            for url in entry.urls:
                why = _from(pooch, url, path, entry)
                if why is None:
                    return path
                refused.append(f"{urlsplit(url).hostname}: {why}")
            part = path.with_name(f"{path.name}.part")
            if part.exists() and not part.stat().st_size:
                part.unlink()
    except OSError as error:
        raise ModelError(f"{entry.name}: {display_name(path)} cannot be written: {error.strerror or error}") from error
    raise ModelError(f"{entry.name}: cannot be fetched: {'; '.join(refused)}. By hand it belongs at {path}")


def _amount(entry: Entry) -> str:
    return f"{byte_size(entry.size)} from {urlsplit(entry.urls[0]).hostname}" if entry.size else entry.urls[0]


def _is_whole(path: Path, entry: Entry) -> bool:
    if not path.is_file():
        return False
    if len(entry.sha256) < 64:  # nobody said what it should be
        return True
    there = path.stat()
    return _sha256(path, there.st_mtime_ns, there.st_size) == entry.sha256


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, changed: int, size: int) -> str:
    """Of a file as it was changed last: a call that names a model should not read all of it again."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _from(pooch: Any, url: str, path: Path, entry: Entry) -> str | None:
    """Fetch from one address; why not, or None."""
    part = path.with_name(f"{path.name}.part")

    def download(url: str, output: str, _: Any) -> None:
        there = part.stat().st_size if part.exists() else 0
        if entry.size and there >= entry.size:
            there = 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={there}-"} if there else {})
        with part.open("ab" if there else "wb") as file, _bar(entry, there) as bar:
            pooch.HTTPDownloader(progressbar=bar, headers=headers, timeout=_TIMEOUT)(url, file, None)
        shutil.copyfile(part, output)

    why = "nothing came"
    for _ in range(_TRIES):
        before = part.stat().st_size if part.exists() else 0
        try:
            pooch.retrieve(
                url,
                f"sha256:{entry.sha256}" if len(entry.sha256) == 64 else None,
                path.name,
                path.parent,
                downloader=download,
            )
        except ValueError as error:  # whole, and another file
            got = re.findall(r"[0-9a-f]{64}", str(error))
            why = f"expected a file of SHA-256 {entry.sha256}, got {got[-1] if got else first_line(error)}"
            part.unlink(missing_ok=True)
            if not before:
                return why
        except OSError as error:  # requests' errors are
            response = getattr(error, "response", None)
            if response is not None:
                why = f"the server said {response.status_code} {response.reason}"
                if response.status_code == 416:  # the part was longer than the file
                    part.unlink(missing_ok=True)
                    continue
                return why
            why = _plainly(error)
            if part.exists() and part.stat().st_size == before:
                return why
        else:
            part.unlink(missing_ok=True)
            return None
    return why


def _plainly(error: OSError) -> str:
    """What a failed connection comes down to."""
    said = str(error)
    if "Name or service" in said or "name resolution" in said or "NameResolution" in said:
        return "no such host; is there a network?"
    if "timed out" in said or type(error).__name__.endswith("Timeout"):
        return f"no answer for {_TIMEOUT:.0f} s"
    if "IncompleteRead" in said or "Connection broken" in said:
        return "the connection broke off"
    if "refused" in said or "unreachable" in said:
        return "no connection"
    return first_line(error)[:120]


@contextlib.contextmanager
def _bar(entry: Entry, there: int) -> Iterator[Any]:
    """What pooch tells its progress; shown where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    progress = need("rich.progress", "a progress bar")
    console = need("rich.console", "a progress bar").Console(stderr=True)
    columns = ("{task.description}", progress.BarColumn(), progress.DownloadColumn(), progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=console) as shown:
        task = shown.add_task(entry.name, total=entry.size or None, completed=there)

        class Told:
            total = 0

            def update(self, amount: int) -> None:
                shown.update(task, advance=amount)

            def reset(self) -> None:
                shown.update(task, completed=there)

            def close(self) -> None:
                pass

        yield Told()


def _at(address: str, kind: Kind) -> Entry:
    """The entry of an address."""
    url, _, fragment = address.partition("#")
    sha256 = fragment.removeprefix("sha256=").lower()
    if fragment and (not fragment.startswith("sha256=") or not re.fullmatch("[0-9a-f]{64}", sha256)):
        raise ModelError(f"{display_name(address)}: expected #sha256= and 64 hexadecimal digits, got #{fragment[:80]}")
    if url.startswith("hf://"):
        owner, _, rest = url.removeprefix("hf://").partition("/")
        repository, _, file = rest.partition("/")
        repository, _, revision = repository.partition("@")
        if not (owner and repository and file):
            raise ModelError(f"{display_name(address)}: expected hf://owner/repo/file")
        base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        url = f"{base}/{owner}/{repository}/resolve/{revision or 'main'}/{file}"
    elif not sha256:
        raise ModelError(f"{display_name(address)}: expected an address that ends in #sha256= and the file's hash")
    file = os.path.basename(urlsplit(url).path)
    if not file:
        raise ModelError(f"{display_name(address)}: expected the address of a file")
    key = sha256 or "url-" + hashlib.sha256(url.encode()).hexdigest()[:12]
    return Entry(address, kind, "", file, key, licence="terms of its own", urls=(url,))
