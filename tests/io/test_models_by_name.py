"""Models by name: a registry, and a downloader before a server that fails in every way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import run, strict, trouble

from xcos_ext.io import models
from xcos_ext.io.errors import ModelError
from xcos_ext.io.models import REGISTRY, Entry, cache_folder, entry_named, fetch, local_file, place_of

CONTENTS = bytes(range(256)) * 400
HASH = hashlib.sha256(CONTENTS).hexdigest()


class _Server(ThreadingHTTPServer):
    """Serves :data:`CONTENTS` under every path; the path says what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []  # path and range of each request
        super().__init__(("127.0.0.1", 0), _Handler)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        how = self.path.split("/")[1]
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if how == "moved":
            self.send_response(302)
            self.send_header("Location", "/good/file")
            self.end_headers()
            return
        if how in ("404", "503"):
            self.send_error(int(how))
            return
        contents = CONTENTS[::-1] if how == "other" else b"<html>sign in</html>" if how == "page" else CONTENTS
        if how == "deaf" or first > len(contents):
            first = 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(contents) - 1}/{len(contents)}")
        self.send_header("Content-Length", str(len(contents) - first))
        self.end_headers()
        body = contents[first:]
        times = sum(path == self.path for path, _ in self.server.asked)
        if how == "breaks" or (how in ("once", "deaf") and times == 1):
            body = body[: len(body) // 2]  # and the connection closes
        if how == "slow":
            time.sleep(3)
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XCOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XCOS_OFFLINE", raising=False)
    return tmp_path / "cache"


def _entry(*urls: str, **other: object) -> Entry:
    made = Entry("toy", "recogniser", "a toy", "toy.pt", HASH, len(CONTENTS), licence="MIT", urls=urls)
    return dataclasses.replace(made, **other)  # type: ignore[arg-type]


def _only_the_file(entry: Entry) -> None:
    assert entry.path().read_bytes() == CONTENTS
    assert {path.name for path in entry.path().parent.iterdir()} <= {"toy.pt", "toy.pt.lock"}


@pytest.mark.parametrize("how", ["good", "moved", "once", "deaf"])
def test_a_file_comes_whole(server: _Server, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Redirected; broken off once and resumed, also by a server that begins again."""
    entry = _entry(server.url(f"{how}/file"))
    assert fetch(entry) == entry.path()
    _only_the_file(entry)
    assert "toy: MIT; fetching 102 kB from 127.0.0.1" in capsys.readouterr().err
    before = len(server.asked)
    assert fetch(entry) == entry.path() and len(server.asked) == before  # it is here now
    assert capsys.readouterr().err == ""
    if how == "once":
        assert [wanted for _, wanted in server.asked] == [None, f"bytes={len(CONTENTS) // 2}-"]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("404", "the server said 404"),
        ("503", "the server said 503"),
        ("page", f"expected a file of SHA-256 {HASH}, got "),
        ("other", f"expected a file of SHA-256 {HASH}, got {hashlib.sha256(CONTENTS[::-1]).hexdigest()}"),
    ],
)
def test_what_fails_is_said_and_leaves_nothing(server: _Server, how: str, why: str) -> None:
    entry = _entry(server.url(f"{how}/file"))
    with pytest.raises(ModelError, match=r"^toy: cannot be fetched: 127.0.0.1: ") as error:
        fetch(entry)
    assert why in str(error.value) and str(entry.path()) in str(error.value)
    assert not entry.path().exists() and [path.name for path in entry.path().parent.iterdir()] == ["toy.pt.lock"]


def test_another_address_takes_over_where_one_breaks_off(server: _Server) -> None:
    entry = _entry(server.url("breaks/file"), server.url("404/file"), server.url("good/file"))
    fetch(entry)
    _only_the_file(entry)
    path, wanted = server.asked[-1]
    assert path == "/good/file" and wanted is not None and int(wanted[6:-1]) > len(CONTENTS) // 2


def test_an_interrupted_download_goes_on_in_the_next_call(server: _Server) -> None:
    entry = _entry(server.url("breaks/file"))
    with pytest.raises(ModelError, match=r"the connection broke off"):
        fetch(entry)
    part = entry.path().with_name("toy.pt.part")
    there = part.stat().st_size
    assert 0 < there < len(CONTENTS)
    entry = _entry(server.url("good/file"))
    fetch(entry)
    assert server.asked[-1] == ("/good/file", f"bytes={there}-")
    _only_the_file(entry)


def test_a_part_of_another_file_does_not_spoil_it(server: _Server) -> None:
    entry = _entry(server.url("good/file"))
    entry.path().parent.mkdir(parents=True)
    entry.path().with_name("toy.pt.part").write_bytes(b"nonsense")
    fetch(entry)
    _only_the_file(entry)


def test_a_damaged_file_is_fetched_again(server: _Server) -> None:
    entry = _entry(server.url("good/file"))
    fetch(entry)
    entry.path().write_bytes(CONTENTS[:-1])
    fetch(entry)
    _only_the_file(entry)


def test_a_silent_server_is_given_up(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_TIMEOUT", 0.3)
    with pytest.raises(ModelError, match=r"127.0.0.1: no answer"):
        fetch(_entry(server.url("slow/file")))


def test_no_network_is_no_traceback() -> None:
    with pytest.raises(ModelError, match=r"nowhere.invalid: no such host; is there a network"):
        fetch(_entry("https://nowhere.invalid/file"))
    with pytest.raises(ModelError, match=r"127.0.0.1: no connection"):
        fetch(_entry("http://127.0.0.1:9/file"))


def test_offline(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = _entry(server.url("good/file"))
    monkeypatch.setenv("XCOS_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"^toy: expected its file at .*toy.pt, for XCOS_OFFLINE is set; got none$"):
        fetch(entry)
    assert not server.asked
    monkeypatch.delenv("XCOS_OFFLINE")
    fetch(entry)
    monkeypatch.setenv("XCOS_OFFLINE", "1")
    assert fetch(entry) == entry.path()


def test_two_threads_fetch_it_once(server: _Server) -> None:
    entry = _entry(server.url("good/file"))
    threads = [threading.Thread(target=fetch, args=(entry,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.asked) == 1
    _only_the_file(entry)


def test_a_folder_that_cannot_be_written(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XCOS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelError, match=r"toy: .* cannot be written: Not a directory"):
        fetch(_entry(server.url("good/file")))


def test_terms_have_to_be_accepted(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = _entry(server.url("good/file"), commercial=False, licence="for research only")
    monkeypatch.setitem(REGISTRY, "toy", entry)
    with pytest.raises(ModelError, match=r"for research only, does not allow every use.*models fetch toy --accept-lic"):
        local_file("toy", "recogniser")
    trouble(run("models", "fetch", "toy"), "for research only")
    assert run("models", "fetch", "toy", "--accept-license").stdout.strip() == str(entry.path())
    assert local_file("toy", "recogniser") == entry.path()


def test_addresses(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    path = local_file(f"{server.url('good/net.pt')}#sha256={HASH}", "model")
    assert path.name == "net.pt" and path.read_bytes() == CONTENTS
    monkeypatch.setenv("HF_ENDPOINT", server.url("good/"))
    path = local_file("hf://owner/repo/deep/net.pt", "model")
    assert path.read_bytes() == CONTENTS and server.asked[-1][0] == "/good/owner/repo/resolve/main/deep/net.pt"
    local_file("hf://owner/repo@v2/net.pt", "model")
    assert server.asked[-1][0] == "/good/owner/repo/resolve/v2/net.pt"
    with pytest.raises(ModelError, match=r"expected a file of SHA-256 0{64}, got " + HASH):
        local_file(f"hf://owner/repo/net.pt#sha256={'0' * 64}", "model")
    for address, why in (
        ("https://a.b/net.pt", "ends in #sha256="),
        ("https://a.b/net.pt#sha256=12", "64 hexadecimal digits"),
        ("https://a.b/net.pt#md5=12", "64 hexadecimal digits"),
        ("hf://owner/repo", "hf://owner/repo/file"),
        (f"https://a.b/#sha256={HASH}", "the address of a file"),
    ):
        with pytest.raises(ModelError, match=why):
            place_of(address, "model")


def test_names_files_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sface").write_text("mine")
    assert place_of("sface", "recogniser") == (Path("sface"), None)  # a file of that name comes first
    assert place_of("folder/sface", "recogniser")[1] is None
    with pytest.raises(ModelError, match=r"^yunett: .*did you mean yunet\? Known are small, yunet$"):
        entry_named("yunett", "detector")
    with pytest.raises(TypeError, match=r"^path: expected the path of a file, a name or an address, got int$"):
        place_of(3, "model")  # type: ignore[arg-type]
    monkeypatch.delenv("XCOS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/xcos_ext")


def test_every_entry_says_what_it_is() -> None:
    for name, entry in REGISTRY.items():
        assert entry.name == name and entry.about and entry.licence
        if entry.urls:
            assert len(entry.sha256) == 64 and entry.size > 0
            assert all(url.startswith("https://") for url in entry.urls)
            assert any(len(part) == 40 for part in entry.urls[0].split("/"))  # a fixed commit
        else:
            assert entry.here()


@pytest.mark.real_data
def test_the_files_at_hand_are_those_of_the_registry(shared_data: Path) -> None:
    for name, file in (("sface", "sface_2021dec_int8bq.onnx"), ("mobilefacenet", "mobilefacenet_apache2.pt")):
        contents = (shared_data / file).read_bytes()
        assert (len(contents), hashlib.sha256(contents).hexdigest()) == (REGISTRY[name].size, REGISTRY[name].sha256)


def test_commands(cache: Path) -> None:
    listed = strict(run("models", "list", "--json").stdout)
    assert [entry["name"] for entry in listed] == list(REGISTRY)
    assert {entry["name"] for entry in listed if entry["here"]} == {"slim", "small"}
    text = run("models", "list").stdout
    assert "Apache-2.0" in text and "10.7 MB" in text and "*  slim" in text
    assert run("models", "path", "sface").stdout.startswith(f"{cache}/fb143eea")
    trouble(run("models", "path", "sfase"), "did you mean sface?")
    trouble(run("models", "fetch", "sfase"), "did you mean sface?")
    trouble(run("verify", "a.jpg", "b.jpg", "--model", "sfase"), "did you mean sface?")
    trouble(run("models", "fetch", "sface", env={"XCOS_OFFLINE": "1"}), "XCOS_OFFLINE is set")
    assert json.loads(run("models", "list", "--json").stdout) == listed
