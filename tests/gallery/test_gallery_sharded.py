"""Galleries searched by several processes: the results of one, and errors instead of hangs when a process is lost."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import REPOSITORY

import xcos_ext
from xcos_ext.gallery import Gallery, ShardedGallery
from xcos_ext.gallery.layout import Layout
from xcos_ext.gallery.snapshot import Snapshot
from xcos_ext.gallery.stream import even_parts, stream
from xcos_ext.gallery.tiles import TileCache
from xcos_ext.io.errors import GalleryError, LostRankError, XCosError

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("one_thread")]

TILE = 128  # rows of a tile: small galleries have some
TIMEOUT = 4.0
LATE = 1.0  # seconds that a busy machine may add to a time limit

FACES, PROBES = 900, 6
PERSONS = [None if i % 11 == 0 else f"p{i % 80}" for i in range(FACES)]
WEIGHTS = torch.rand(7, 7, generator=torch.Generator().manual_seed(3))

SEARCHES: dict[str, dict[str, Any]] = {
    "faces": {},
    "all faces": {"k": 1000},
    "uniform": {"attention": "uniform"},
    "norm": {"attention": "norm", "min_score": 0.01},
    "weights": {"attention": WEIGHTS},
    "best of a person": {"by": "person"},
    "mean of a person": {"by": "person", "person_fusion": "mean"},
    "person of several probes": {"by": "person", "groups": list("abcabc"), "fusion": "mean"},
    "best of a group": {"groups": list("abbacb"), "explain": True, "threshold": 0.1},
    "mean of a group": {"groups": list("abbacb"), "fusion": "mean"},
    "two stages": {"rerank": 40, "recall_probes": 3},
    "two stages of groups": {"rerank": 30, "coarse": "norm", "groups": list("abbacb")},
    "some": {"where": "person = 'p3' OR json_get_int(metadata, 'n') > 700"},
    "none": {"where": "person = 'nobody'"},
    "few": {"where": "json_get_int(metadata, 'n') = 5", "explain": True, "threshold": 0.0},
    "without some": {"exclude": ["f4", "f850", "f100", "nobody"]},
    "without an array of some": {"exclude": np.array(["f4", "nobody"])},
    "without arrays of some": {"exclude": np.array([["f4"], ["f5"], ["f6"], ["f850"], ["f7"], ["f8"]])},
    "without some of none": {"where": "person = 'none'", "exclude": ["f4"]},
    "without others": {"exclude": [["f4"], ["f5", "f6"], [], ["f850"], ["f7"], ["f8"]], "metadata": False},
    "explained": {"k": 3, "explain": True, "threshold": 0.2},
}


def head() -> torch.nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return xcos_ext.XCosHead(in_channels=64).eval()


def probes() -> torch.Tensor:
    """Features F [6, 32, 7, 7]."""
    return torch.randn(PROBES, 32, 7, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "tile_rows", TILE)
        yield


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four fragments, the last of copies of the first's faces (ties), some deleted; no tiles."""
    path = tmp_path_factory.mktemp("galleries") / "g"
    faces = torch.randn(FACES, 32, 7, 7, generator=torch.Generator().manual_seed(2))
    faces[800:] = faces[:100]
    with Gallery.create(path, head()) as gallery:
        for start, stop in ((0, 150), (150, 600), (600, 800), (800, 900)):
            gallery.add(
                [f"f{i}" for i in range(start, stop)],
                faces[start:stop],
                persons=PERSONS[start:stop],
                metadata=[{"n": i} for i in range(start, stop)],
            )
        gallery.remove([f"f{i}" for i in (0, 1, 9, 149, *range(200, 300, 3), 805, 899)])
    return path


@pytest.fixture
def gallery_path(enrolled: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(enrolled, tmp_path / "g"))


# ------------------------------------------------------------------ processes


def _rank(rank: int, world: int, port: int, launcher: bool, scenario: Any, path: Path, options: Any, pipe: Any) -> None:
    torch.set_num_threads(1)
    Layout.tile_rows = TILE  # type: ignore[method-assign,assignment]
    try:
        if launcher:
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as torchrun does, whose agent keeps the store
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        else:
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        pipe.send_bytes(pickle.dumps(scenario(path, **options)))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps(f"{type(error).__name__}: {error}"))
        raise
    gc.collect()
    dist.destroy_process_group()  # waits for collectives that run, as the interpreter's end does


class Processes:
    """Processes that run a scenario (a function of the gallery's path); rank 0 keeps their store, or this process."""

    def __init__(self, world: int, scenario: Callable[..., Any], path: Path, launcher: bool = True, **options: Any):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "xcos_ext.gallery"])
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port
        if not launcher:
            del self.store
        self.pipes, self.processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            arguments = (rank, world, port, launcher, scenario, path, options, theirs)
            self.processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            self.pipes.append(mine)
            self.processes[-1].start()
            theirs.close()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def result(self, rank: int, seconds: float = 30.0) -> Any:
        """What a rank's scenario returned."""
        assert self.pipes[rank].poll(seconds), f"rank {rank} hangs"
        return pickle.loads(self.pipes[rank].recv_bytes())

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def ends(self, rank: int, seconds: float) -> None:
        self.processes[rank].join(seconds)
        assert self.processes[rank].exitcode == 0, f"rank {rank}: {self.processes[rank].exitcode}"


@dataclasses.dataclass
class Outcome:
    """How a call ended."""

    error: str
    message: str
    ranks: tuple[int, ...]
    seconds: float


def outcome(call: Callable[[], Any]) -> Outcome:
    begin = time.monotonic()
    try:
        call()
        error: BaseException | None = None
    except Exception as raised:
        error = raised
    return Outcome(type(error).__name__, str(error), getattr(error, "ranks", ()), time.monotonic() - begin)


# ------------------------------------------------------------------ the same results


def assert_same(got: Any, wanted: Any, what: str, tolerance: float = 0.0) -> None:
    for field in dataclasses.fields(wanted):
        a, b = getattr(got, field.name), getattr(wanted, field.name)
        if field.name == "maps" and b is not None:
            for one in ("similarity", "attention", "contribution"):
                torch.testing.assert_close(getattr(a, one), getattr(b, one), rtol=0, atol=0, equal_nan=True)
        elif isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")
        else:
            assert a == b, (what, field.name)


def search_everything(path: Path, cache: Any) -> tuple[dict[str, Any], int]:
    """All searches, twice each, and the number of fragments that this process packed."""
    packed = []
    write = TileCache.write
    TileCache.write = lambda *a: packed.append(a[2].key) or write(*a)  # type: ignore[method-assign]
    with ShardedGallery.open(path, head(), timeout=20, cache=cache) as gallery:
        found = {name: gallery.search(probes(), **{"k": 7, **options}) for name, options in SEARCHES.items()}
        for name, options in SEARCHES.items():
            assert_same(gallery.search(probes(), **{"k": 7, **options}), found[name], name)
    return found, len(packed)


@pytest.mark.parametrize(("world", "cache"), [(1, True), (2, False), (2, True), (4, True)])
def test_all_searches_equal_one_process(gallery_path: Path, world: int, cache: bool) -> None:
    with Processes(world, search_everything, gallery_path, cache=cache) as team:
        results = [team.result(rank, 60) for rank in range(world)]
        for rank in range(world):
            team.ends(rank, 10)
    tiles = sorted(path.name for path in (gallery_path / "tiles").glob("*")) if cache else []
    assert len(tiles) == (4 if cache else 0), "a file for each fragment, nothing unfinished"
    if cache:
        assert sum(packed for _, packed in results) == 4, "each fragment is packed by one process"
    with Gallery.open(gallery_path, head()) as gallery:
        for name, options in SEARCHES.items():
            wanted = gallery.search(probes(), **{"k": 7, **options})
            # A person's mean is summed in another order.
            tolerance = 1e-6 if name == "mean of a person" else 0.0
            for found, _ in results:
                assert_same(found[name], wanted, f"{name} on {world}", tolerance)


def test_without_a_process_group_it_is_one_process(gallery_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardedGallery.open(gallery_path, head()) as gallery, Gallery.open(gallery_path, head()) as alone:
        assert (gallery.rank, gallery.world, len(gallery), gallery.version) == (0, 1, len(alone), alone.version)
        for options in SEARCHES.values():
            assert_same(gallery.search(probes(), **options), alone.search(probes(), **options), "alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GalleryError, match=r"group: expected a process group, got none; call torch.distributed.init"):
        ShardedGallery.open(gallery_path)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(XCosError, match=r"^WORLD_SIZE: expected a whole number from 1 on, got 'two'$"):
        ShardedGallery.open(gallery_path)


def test_the_search_takes_what_one_gallery_takes() -> None:
    assert inspect.signature(ShardedGallery.search) == inspect.signature(Gallery.search)


def test_a_closed_gallery_says_so(gallery_path: Path) -> None:
    gallery = ShardedGallery.open(gallery_path, head())
    gallery.close()
    gallery.close()
    with pytest.raises(GalleryError, match="it is closed"):
        gallery.search(probes())
    with pytest.raises(GalleryError, match=r"timeout: expected a finite number of seconds above 0, got 0.0"):
        ShardedGallery.open(gallery_path, timeout=0)


def move_on(path: Path) -> list[Any]:
    """Versions that this rank sees when others are committed in between."""
    faces = torch.randn(4, 32, 7, 7, generator=torch.Generator().manual_seed(5))
    move = ShardedGallery._move_to

    def move_and_commit(gallery: ShardedGallery, version: int | None) -> None:
        move(gallery, version)
        if gallery.rank == 0:
            with Gallery.open(path, head()) as writer:
                writer.add([f"new{writer.version}"], faces[:1])

    ShardedGallery._move_to = move_and_commit  # type: ignore[method-assign]
    with ShardedGallery.open(path, head(), timeout=20) as gallery:
        seen = [gallery.version]
        seen.append(gallery.refresh().version)
        hits = gallery.search(faces[:1], 1)
        return [*seen, len(gallery), hits.version, hits.ids]


def test_all_ranks_see_the_version_of_the_first(gallery_path: Path) -> None:
    with Gallery.open(gallery_path) as gallery:
        version, faces = gallery.version, len(gallery)
    with Processes(2, move_on, gallery_path) as team:
        for rank in range(2):
            # Committed after the first rank had opened: version + 1, and + 2, which nobody sees.
            assert team.result(rank) == [version, version + 1, faces + 1, version + 1, [[f"new{version}"]]]


# ------------------------------------------------------------------ parts


def snapshot_of(*rows: int, tile: int = 1000) -> Any:
    firsts = np.cumsum([0, *rows])
    fragments = [SimpleNamespace(first=int(f), rows=r) for f, r in zip(firsts[:-1], rows, strict=True)]
    return SimpleNamespace(places=sum(rows), fragments=fragments, layout=SimpleNamespace(tile_rows=tile))


def test_parts_begin_with_tiles_where_there_are_enough() -> None:
    assert even_parts(snapshot_of(0), 3) == [0, 0, 0, 0]
    assert even_parts(snapshot_of(), 2) == [0, 0, 0]
    assert even_parts(snapshot_of(2), 4) == [0, 0, 1, 1, 2]
    assert even_parts(snapshot_of(3100), 2) == [0, 1550, 3100]  # a tile's beginning is too far away
    assert even_parts(snapshot_of(50_300, 49_900), 4) == [0, 25_000, 50_000, 75_300, 100_200]
    for world in (1, 2, 3, 7, 64):
        at = even_parts(snapshot_of(123_456, 5, 0, 77_777, 300_000), world)
        sizes = np.diff(at)
        assert at[0] == 0 and at[-1] == 501_238 and (sizes > 0).all()
        assert abs(sizes * world / 501_238 - 1).max() <= 0.11


def test_a_part_of_a_fragment_is_read_alone(gallery_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    read = Snapshot.fragment_batches
    monkeypatch.setattr(Snapshot, "fragment_batches", lambda *a, **k: asked.append(a[2:]) or read(*a, **k))
    with Gallery.open(gallery_path) as gallery:
        snapshot, tiles = gallery.snapshot, TileCache(gallery_path / "tiles", gallery.layout)
        whole = torch.cat([t.templates.features for t in stream(snapshot, tiles, torch.device("cpu"))])
        tiles = TileCache(None, gallery.layout)
        for begin, end in ((200, 601), (100, 140), (599, 600), (0, 900)):
            asked.clear()
            parts = list(stream(snapshot, tiles, torch.device("cpu"), begin=begin, end=end))
            assert torch.equal(torch.cat([t.templates.features for t in parts]), whole[begin:end])
            assert parts[0].first == begin
        assert asked == [(0, 150), (0, 450), (0, 200), (0, 100)]
        list(stream(snapshot, tiles, torch.device("cpu"), begin=160, end=170))
        assert asked[-1] == (10, 20)


# ------------------------------------------------------------------ errors that all learn of


def disagree(path: Path) -> list[Outcome]:
    """Wrong calls, one after the other; in between everything works."""
    rank, model = dist.get_rank(), head()
    gallery = ShardedGallery.open(path, model, timeout=TIMEOUT, cache=False)
    found = []

    def attempt(call: Callable[[], Any]) -> None:
        found.append(outcome(call))
        assert len(gallery.search(probes()).ids) == PROBES

    attempt(lambda: gallery.search(probes() + (rank == 1), 5))
    attempt(lambda: gallery.search(probes(), 5 + (rank == 2)))
    attempt(lambda: gallery.search(probes(), where=f"person = 'p{rank}'"))
    attempt(lambda: gallery.search(probes(), 0))
    found.append(outcome(lambda: gallery.search(probes()) if rank else gallery.refresh()))
    found.append(outcome(lambda: gallery.search(probes())))  # the first has moved, perhaps
    gallery.refresh()

    def fail(done: int, total: int) -> None:
        if rank == 1:
            raise ValueError("out of order")

    attempt(lambda: gallery.search(probes(), progress=fail))

    def slow(done: int, total: int) -> None:
        if rank == 2 and done < 150:  # the first of its tiles
            time.sleep(TIMEOUT / 2)

    attempt(lambda: gallery.search(probes(), progress=slow))
    if rank == 2:
        gallery.close()
        return found
    for _ in range(2):
        found.append(outcome(lambda: gallery.search(probes())))
    gallery.close()
    return found


def test_errors_are_everybodys_and_the_slow_are_waited_for(gallery_path: Path) -> None:
    with Processes(3, disagree, gallery_path) as team:
        first, second, third = (team.result(rank) for rank in range(3))
        for rank in range(3):
            team.ends(rank, 10)
    for each in (first, second, third):
        faces, k, where, wrong, call, stale, _, slow = each[:8]
        assert faces.error == k.error == where.error == call.error == "GalleryError"
        assert "probes: expected the same on all ranks, got 6 faces " in faces.message
        assert faces.message.endswith(" on rank 1")
        assert "k: expected the same on all ranks, got 5 on rank 0, 6 on rank 2" in k.message
        assert "where: expected the same on all ranks, got \"person = 'p0'\" on rank 0" in where.message
        assert "call: expected the same on all ranks, got search on rank 1, refresh on rank 0" in call.message
        assert "version: expected one that all ranks agreed on; refresh() failed" in stale.message
        assert (wrong.error, wrong.message) == ("RuntimeError", "gallery.search: k: expected 1 to 2048, got 0")
        assert (slow.error, slow.message) == ("NoneType", "None") and slow.seconds > TIMEOUT / 2
    assert (second[6].error, second[6].message) == ("ValueError", "out of order")
    for each in (first, third):
        assert each[6].message == "sharded gallery: rank 1 failed: ValueError: out of order"
        assert each[6].seconds < TIMEOUT
    for each in (first, second):
        assert [late.message for late in each[8:]] == ["sharded gallery: rank 2 has closed the gallery"] * 2


def read_damaged(path: Path, cache: Any) -> Outcome:
    with ShardedGallery.open(path, head(), timeout=TIMEOUT, cache=cache) as gallery:
        return outcome(lambda: gallery.search(probes(), metadata=False))


@pytest.mark.parametrize("cache", [False, True])
def test_damaged_rows_of_one_part_are_an_error_on_all(gallery_path: Path, cache: bool) -> None:
    with Gallery.open(gallery_path, cache=False) as gallery:
        needle = gallery.templates_at([len(gallery) - 3]).features.numpy().tobytes()[:512]
        file = gallery_path / "templates.lance" / "data" / gallery.snapshot.fragments[3].paths[0]
    contents = bytearray(file.read_bytes())
    contents[contents.index(needle)] ^= 1
    file.write_bytes(contents)
    with Processes(3, read_damaged, gallery_path, cache=cache) as team:
        results = [team.result(rank) for rank in range(3)]
    assert [each.error for each in results] == ["GalleryError", "GalleryError", "GalleryDamagedError"]
    for each in results[:2]:
        assert each.message == f"sharded gallery: rank 2 failed: GalleryDamagedError: {results[2].message}"
    assert "are not what was written" in results[2].message


def break_exchange(path: Path) -> list[Outcome]:
    """One rank cannot take part in an exchange that the others wait in."""
    rank = dist.get_rank()
    gallery = ShardedGallery.open(path, head(), timeout=TIMEOUT)

    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    if rank == 1:
        dist.all_gather_object = fail
    found = [outcome(lambda: gallery.search(probes())) for _ in range(2)]
    gallery.close()
    return found


def test_an_exchange_that_fails_on_one_rank(gallery_path: Path) -> None:
    with Processes(3, break_exchange, gallery_path) as team:
        for rank in range(3):
            for each in team.result(rank):
                assert (each.error, each.seconds < 2 * TIMEOUT) == ("GalleryError", True)
                assert each.message == (
                    "sharded gallery: rank 1 cannot exchange results with the others (OutOfMemoryError: no room)"
                )


def missing_on_one(path: Path) -> Outcome:
    elsewhere = path.with_name("nowhere") if dist.get_rank() == 1 else path
    return outcome(lambda: ShardedGallery.open(elsewhere, head(), timeout=TIMEOUT))


def test_a_gallery_that_one_rank_cannot_open(gallery_path: Path) -> None:
    with Processes(2, missing_on_one, gallery_path) as team:
        first, second = team.result(0), team.result(1)
        team.ends(0, 10)
    assert first.message == f"sharded gallery: rank 1 failed: GalleryError: {second.message}"
    assert second.message.endswith("nowhere: there is no such gallery")


def search_in_a_group(path: Path) -> Any:
    """Two galleries at once, on a group of the last two processes."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    with (
        ShardedGallery.open(path, head(), group=group, timeout=20) as gallery,
        ShardedGallery.open(path, head(), group=group, timeout=20) as other,
    ):
        hits = gallery.search(probes(), 3)
        assert_same(other.search(probes(), 3), hits, "the other")
        return gallery.rank, gallery.world, hits


def test_a_group_of_some_processes(gallery_path: Path) -> None:
    with Processes(3, search_in_a_group, gallery_path) as team, Gallery.open(gallery_path, head()) as gallery:
        wanted = gallery.search(probes(), 3)
        for rank in (1, 2):
            number, world, hits = team.result(rank)
            assert (number, world) == (rank - 1, 2)
            assert_same(hits, wanted, "some processes")


# ------------------------------------------------------------------ lost ranks


def only_first(path: Path) -> Outcome | None:
    return None if dist.get_rank() else outcome(lambda: ShardedGallery.open(path, head(), timeout=TIMEOUT))


def test_a_rank_that_never_opens(gallery_path: Path) -> None:
    with Processes(2, only_first, gallery_path) as team:
        alone = team.result(0)
    assert (alone.error, alone.ranks) == ("LostRankError", (1,)) and alone.seconds < TIMEOUT + LATE


def lose(path: Path, victim: int, number: int, moment: str) -> list[Outcome]:
    """A search after, in or before which a rank is killed or stopped; then a search by whoever is left."""
    rank = dist.get_rank()
    gallery = ShardedGallery.open(path, head(), timeout=TIMEOUT)
    gallery.search(probes())

    struck = []

    def strike(*ignored: Any) -> None:
        if not struck:
            struck.append(True)
            os.kill(os.getpid(), number)

    progress, exchange = None, dist.all_gather_object
    if rank == victim:
        if moment == "between":
            time.sleep(0.5)  # until the others, too, have returned
            strike()
        elif moment == "scoring":
            progress = strike
        elif moment == "exchange":
            dist.all_gather_object = lambda *arguments: strike() or exchange(*arguments)
    found = [outcome(lambda: gallery.search(probes(), progress=progress)) for _ in range(2)]
    gallery.close()
    return found


@pytest.mark.parametrize("moment", ["between", "scoring", "exchange"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_is_named_in_time(gallery_path: Path, number: int, moment: str) -> None:
    with Processes(3, lose, gallery_path, victim=1, number=number, moment=moment) as team:
        for rank in (0, 2):
            first, second = team.result(rank)
            assert (first.error, first.ranks) == ("LostRankError", (1,)), first.message
            assert "rank 1 is lost: " in first.message
            assert first.seconds < TIMEOUT + LATE
            assert (second.error, second.ranks) == ("LostRankError", (1,)) and second.seconds < 0.5
        for rank in (0, 2):
            team.ends(rank, 2 * TIMEOUT + 5)  # and what was being exchanged does not keep it from ending
        if number == signal.SIGSTOP and moment != "exchange":
            team.signal(1, signal.SIGCONT)
            back = team.result(1)[0]
            assert (back.error, back.ranks) == ("LostRankError", (1,))
            assert "the others gave rank 1, this one, up" in back.message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_lost_keeper_of_the_store_is_named(gallery_path: Path, number: int) -> None:
    with Processes(3, lose, gallery_path, launcher=False, victim=0, number=number, moment="between") as team:
        for rank in (1, 2):
            first, _ = team.result(rank)
            assert (first.error, first.ranks) == ("LostRankError", (0,)), first.message
            assert "rank 0 is lost: the process group's store, which it keeps, " in first.message
            assert first.seconds < TIMEOUT + LATE


def suspended(path: Path) -> Outcome:
    gallery = ShardedGallery.open(path, head(), timeout=TIMEOUT)
    gallery.search(probes())
    path.with_name(f"ready{dist.get_rank()}").touch()
    time.sleep(1.0)  # stopped meanwhile
    return outcome(lambda: [gallery.search(probes()) for _ in range(3)])


def test_ranks_that_are_suspended_together_are_not_lost(gallery_path: Path) -> None:
    with Processes(2, suspended, gallery_path) as team:
        ready = [gallery_path.with_name(f"ready{rank}") for rank in range(2)]
        while not all(path.exists() for path in ready):
            time.sleep(0.01)
        time.sleep(0.3)
        for rank in range(2):
            team.signal(rank, signal.SIGSTOP)
        time.sleep(1.6 * TIMEOUT)
        team.signal(0, signal.SIGCONT)
        time.sleep(0.2)
        team.signal(1, signal.SIGCONT)
        for rank in range(2):
            assert team.result(rank).error == "NoneType"


def test_lost_ranks_travel_with_the_error() -> None:
    error = pickle.loads(pickle.dumps(LostRankError("gone", [2, 3])))
    assert (str(error), error.ranks) == ("gone", (2, 3)) and isinstance(error, GalleryError)


# ------------------------------------------------------------------ torchrun


def test_the_example_under_torchrun(tmp_path: Path) -> None:
    from xcos_ext.io.shipped import default_weights

    model = xcos_ext.load_model(str(default_weights()))
    faces = torch.randn(50, 32, 7, 7)
    with Gallery.create(tmp_path / "g", model) as gallery:
        gallery.add([f"f{i}" for i in range(50)], faces, persons=[f"p{i // 2}" for i in range(50)])
        hits = gallery.search(faces[:3], 2)
    np.save(tmp_path / "probes.npy", faces[:3].numpy())
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    example = str(REPOSITORY / "examples" / "search_sharded.py")
    done = subprocess.run(
        [*launcher, example, str(tmp_path / "g"), str(tmp_path / "probes.npy"), "-k", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "probes.npy[0]" and len(lines) == 9
    wanted = [f"   {hit.score:7.4f}  {hit.id}  {hit.person}" for row in hits for hit in row]
    assert [line for line in lines if line.startswith(" ")] == wanted
