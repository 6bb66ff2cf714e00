"""Processes that work in step: they meet, exchange tensors, and learn of each other's failures instead of hanging.

A collective operation waits for every process, and knows nothing of one that is gone but a time limit, which a process
that is merely slow runs into as well. So no process enters a collective before all have said, in the process group's
store, that they are there; and in every process a thread counts a key of its own up in the store as long as the process
lives, whatever it is busy with. Whoever waits reads these counters: one that stands still belongs to a lost process.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xcos_ext.io.errors import GalleryError, LostRankError
from xcos_ext.io.text import first_line

__all__ = ["Ranks"]

_WHO = "sharded gallery"
_POLL = 0.05  # seconds between two looks while the store is asked
_SHORTEST, _LONGEST = 0.0005, 0.02  # seconds between two questions whether all have arrived
_NEWS = "news"

# Opened so far on each process group: the same number on every rank, so that their keys meet.
_OPENED: Counter[str] = Counter()


class _Still:
    """For how long a value has not changed, counting only the time in which it was looked at.

    Args:
        gap: most seconds that count between two looks: a process that was stopped itself has seen nothing meanwhile.
    """

    def __init__(self, gap: float) -> None:
        self._gap = gap
        self._value: Any = None
        self._age = 0.0
        self._looked = time.monotonic()

    def seconds(self, value: Any) -> float:
        now = time.monotonic()
        self._age = 0.0 if value != self._value else self._age + min(now - self._looked, self._gap)
        self._value, self._looked = value, now
        return self._age


class _Job:
    """A question to the store and, once ``done`` is set, its answer or error."""

    def __init__(self, call: Callable[[dist.Store], Any]) -> None:
        self.call = call
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None


class _Watch:
    """The thread that talks to the store: it beats for its rank, looks at the others' beats, and asks what it is told.

    It only makes calls that the store answers at once, so one that does not come back means that its host is gone.

    Attributes:
        interval: seconds between beats.
        limit: seconds without a beat, as seen from here, after which a rank is lost.
        lost: ranks that are.
        counts: of the others' beats.
        news: what a rank that failed last left for the others.
        beats: of this thread.
        error: of the store; it ends the thread.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float) -> None:
        self._store, self._rank = store, rank
        self.interval = min(1.0, timeout / 10)
        # A beat is seen an interval late, and so is its absence.
        self.limit = timeout - 2 * self.interval
        self._still = {other: _Still(2 * self.interval) for other in range(world) if other != rank}
        self.lost: tuple[int, ...] = ()
        self.counts = dict.fromkeys(self._still, 0)
        self.news: dict[str, Any] = {}
        self.beats = 0
        self.error: Exception | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="xcos-gallery-heartbeat", daemon=True)
        self._thread.start()

    def ask(self, call: Callable[[dist.Store], Any]) -> _Job:
        job = _Job(call)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join(1.0)  # longer only where the store does not answer

    def _work(self) -> None:
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                try:
                    self._beat()
                except Exception as error:
                    self.error = error
                    return
                due = time.monotonic() + self.interval
            try:
                job = self._jobs.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                continue
            if job is None:
                return
            try:
                job.result = job.call(self._store)
            except Exception as error:
                job.error = error
            job.done.set()

    def _beat(self) -> None:
        # Adding makes a key that is not there; reading it would wait for it.
        self._store.add(f"beat/{self._rank}", 1)
        if self._store.check([_NEWS]):
            self.news = json.loads(self._store.get(_NEWS))
        self.counts = {rank: self._store.add(f"beat/{rank}", 0) for rank in self._still}
        still = {rank: self._still[rank].seconds(count) for rank, count in self.counts.items()}
        self.lost = tuple(rank for rank, seconds in still.items() if seconds > self.limit)
        self.beats += 1


class _Said(NamedTuple):
    """What a rank says at a step: a call with what must be the same on all ranks, and a note; or an error.

    After a final one nothing can be done together any more.
    """

    call: str
    fields: Mapping[str, str]
    note: Any
    error: str | None = None
    final: bool = False


class Ranks:
    """The members of a process group, in step.

    All of them make the same calls in the same order, each from one thread.

    Args:
        group: None: the default one; a process that was started alone, without any, is a group of its own.
        timeout: seconds without a sign of life after which a rank is lost.

    Attributes:
        rank, world: of this process, and the number of all.

    Raises:
        GalleryError: there is no process group, this process is not a member, or a wrong timeout.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        timeout = float(timeout)
        if not (math.isfinite(timeout) and timeout > 0):
            raise GalleryError(f"{_WHO}: timeout: expected a finite number of seconds above 0, got {timeout}")
        self._timeout = timeout
        self._group: Any = None
        self._backends: dict[str, str] = {}
        self._host: int | None = None
        self.rank, self.world = 0, 1
        if group is None and not (dist.is_available() and dist.is_initialized()):
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise GalleryError(
                    f"{_WHO}: group: expected a process group, got none; call torch.distributed.init_process_group() "
                    "first"
                )
            store: dist.Store = dist.HashStore()
        else:
            store = self._join(dist.group.WORLD if group is None else group)
        self._step = self._heard = 0
        self._own: list[int] = []
        self._known: BaseException | None = None
        self._broken: GalleryError | None = None
        self._watch = _Watch(store, self.rank, self.world, timeout)
        self._silence = _Still(_POLL * 4)
        self._stop = weakref.finalize(self, self._watch.stop)

    def _join(self, group: Any) -> dist.Store:
        """Be a member of a group; returns the part of its store that is ours."""
        if dist.get_rank(group) < 0:
            raise GalleryError(f"{_WHO}: group: expected one that this process is a member of, got another")
        self._group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
            self._host = _member(group, 0)
        number = _OPENED[group.group_name]
        _OPENED[group.group_name] += 1
        store: Any = dist.distributed_c10d._get_process_group_store(group)
        # A connection of its own: the original one is locked while another thread waits for a key.
        return dist.PrefixStore(f"xcos_gallery/{number}", store.clone())

    # -------------------------------------------------------------- the store

    def _ask(self, call: Callable[[dist.Store], Any]) -> Any:
        """An answer of the store, or an error where there is none."""
        job = self._watch.ask(call)
        while not job.done.wait(_POLL):
            self._hear_store()
        if job.error is not None:
            raise self._store_gone(job.error)
        return job.result

    def _hear_store(self) -> None:
        if self._watch.error is not None:
            raise self._store_gone(self._watch.error)
        if self._silence.seconds(self._watch.beats) > self._watch.limit:
            raise self._store_gone(None)

    def _store_gone(self, error: Exception | None) -> GalleryError:
        # Its host may have ended because of what it left word of.
        news = self._watch.news
        if lost := news.get("lost"):
            return self._break(LostRankError(f"{_WHO}: {_ranks(lost)} lost, as another rank reports", lost))
        if news.get("step", -1) >= self._step and news["rank"] == self._host:
            return self._break(GalleryError(f"{_WHO}: rank {self._host} {news['said'][0]}"))
        why = "does not answer" if error is None else f"is gone ({first_line(error, 300)})"
        if self._host is None:
            return self._break(
                LostRankError(f"{_WHO}: the process group's store, which none of its ranks keeps, {why}")
            )
        lost = [self._host]
        return self._break(
            LostRankError(f"{_WHO}: {_ranks(lost)} lost: the process group's store, which it keeps, {why}", lost)
        )

    def _break(self, error: GalleryError) -> GalleryError:
        """Keep an error after which nothing can be done together."""
        self._broken = copy.copy(error)  # without the frames that it comes from
        self._known = error
        return error

    def _lose(self, lost: Sequence[int], how: str) -> GalleryError:
        if self.rank not in lost:
            self._leave_word({"lost": list(lost)})
            if self.rank == self._host:
                # The store may end with this process: the others' watches read it once an interval.
                time.sleep(2 * self._watch.interval)
        return self._break(LostRankError(f"{_WHO}: {_ranks(lost)} lost: {how}", lost))

    def _leave_word(self, word: Mapping[str, Any]) -> None:
        """Tell the others' watches, whatever their ranks are doing."""
        self._ask(lambda store: store.set(_NEWS, json.dumps(word)))

    # -------------------------------------------------------------- meeting

    def arrive(self, call: str, fields: Mapping[str, str] | None = None, note: Any = None) -> list[Any]:
        """Wait until every rank makes this call.

        Args:
            call: its name.
            fields: words that must be the same on all ranks, by the name of the argument that they stand for.
            note: for the others; anything that JSON can hold.

        Returns:
            The notes of all ranks.

        Raises:
            LostRankError: a rank does not live any more.
            GalleryError: a rank failed, has closed the gallery, or made another call.
        """
        if self._broken is not None:
            raise copy.copy(self._broken)
        heard = self._meet(_Said(call, fields or {}, note))
        self._check_same(heard)
        return [said.note for said in heard]

    def _say(self, said: _Said) -> None:
        self._step += 1
        self._own.append(self._step)
        # All have arrived at the last step that was heard, so they have read those before it.
        old, self._own = _split(self._own, self._heard)
        words, step = json.dumps(said), self._step

        def call(store: dist.Store) -> None:
            store.set(f"{step}/{self.rank}", words)
            for one in old:
                store.delete_key(f"{one}/{self.rank}")

        self._ask(call)

    def _read(self, ranks: Sequence[int]) -> list[_Said] | None:
        """What these ranks say at this step; None: one of them says nothing yet."""
        keys = [f"{self._step}/{rank}" for rank in ranks]
        words = self._ask(lambda store: store.multi_get(keys) if store.check(keys) else None)
        return None if words is None else [_Said(*json.loads(word)) for word in words]

    def _meet(self, said: _Said) -> list[_Said]:
        self._say(said)
        began = time.monotonic()
        everyone = range(self.world)
        while (heard := self._read(everyone)) is None:
            self._look()
            # Waiting may take five percent longer than it must, not more.
            time.sleep(min(_LONGEST, max(_SHORTEST, (time.monotonic() - began) / 20)))
        self._heard = self._step
        for rank, each in enumerate(heard):
            self._hear(rank, each)
        return heard

    def _hear(self, rank: int, said: _Said) -> None:
        if said.error is not None:
            error = GalleryError(f"{_WHO}: rank {rank} {said.error}")
            self._known = error
            raise self._break(error) if said.final else error

    def _look(self, *, exchanging: bool = False) -> None:
        """Raise what has happened to the others while they are waited for, at a step or in the exchange after it."""
        self._hear_store()
        news = self._watch.news
        if lost := news.get("lost"):
            if self.rank in lost:
                raise self._lose(lost, f"the others gave rank {self.rank}, this one, up: it did not answer")
            raise self._lose(lost, "as another rank reports")
        if news.get("step") == self._step + exchanging and news["rank"] != self.rank:
            said = _Said("", {}, None, *news["said"])
            # Who failed otherwise has been through the exchange, and will be heard at the next step.
            if said.final or not exchanging:
                self._hear(news["rank"], said)
        lost = self._watch.lost
        for rank in lost:
            # Who has failed or closed may end.
            if not exchanging and (last := self._read([rank])) is not None:
                self._hear(rank, last[0])
        if lost:
            raise self._lose(lost, f"no sign of life for {self._timeout:g} s")

    def _check_same(self, heard: Sequence[_Said]) -> None:
        for name, values in (
            ("call", [said.call for said in heard]),
            *((name, [said.fields.get(name, "") for said in heard]) for name in heard[self.rank].fields),
        ):
            usual = Counter(values).most_common(1)[0][0]  # of equally common ones the first rank's
            others = [rank for rank, value in enumerate(values) if value != usual]
            if others:
                shown = [values.index(usual), *others[:3]]
                got = ", ".join(f"{values[rank]} on rank {rank}" for rank in shown)
                more = " and more" if len(others) > 3 else ""
                error = GalleryError(f"{_WHO}: {name}: expected the same on all ranks, got {got}{more}")
                self._known = error
                raise error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this process fails at in here, the others learn: they raise an error as well."""
        if self._broken is not None:
            raise copy.copy(self._broken)
        try:
            yield
        except BaseException as error:
            if self._broken is None and error is not self._known:
                with contextlib.suppress(GalleryError):
                    self._tell(f"failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._known = None

    def _tell(self, error: str, final: bool = False) -> None:
        self._say(_Said("", {}, None, error, final))
        self._leave_word({"step": self._step, "rank": self.rank, "said": [error, final]})
        end = time.monotonic() + 2 * self._watch.interval
        # As in _lose(). Nobody waits for word where all have failed, as at a wrong argument.
        while self.rank == self._host and time.monotonic() < end:
            heard = self._read(range(self.world))
            if heard is not None and all(said.error for said in heard):
                break
            time.sleep(_LONGEST)

    # -------------------------------------------------------------- exchanging

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, by rank; of one shape and dtype."""
        if self.world == 1:
            return [tensor]
        sent = tensor.to(self._wire(tensor.device)).contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.world)]
        options = self._bounded(dist.distributed_c10d.AllgatherOptions(), sent)
        self._exchange("gather", sent, lambda: self._group.allgather([parts], [sent], options))
        return [part.to(tensor.device) for part in parts]

    def reduce(self, tensor: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """The elementwise maximum or sum of all ranks' tensors, which may be overwritten."""
        if self.world == 1:
            return tensor
        sent = tensor.to(self._wire(tensor.device)).contiguous()
        options = self._bounded(dist.distributed_c10d.AllreduceOptions(), sent)
        options.reduceOp = {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[how]
        self._exchange(how, sent, lambda: self._group.allreduce([sent], options))
        return sent.to(tensor.device)

    def _wire(self, device: torch.device) -> torch.device:
        """Where the group's collectives take a tensor from: NCCL from the GPU, gloo from the CPU."""
        backend = self._backends.get(device.type)
        if backend == "nccl" or (backend is not None and device.type == "cpu"):
            return device
        if "cpu" in self._backends:
            return torch.device("cpu")
        raise GalleryError(f"{_WHO}: probes: expected on a GPU, for the process group uses NCCL, got on {device}")

    def _bounded(self, options: Any, tensor: Tensor) -> Any:
        """A collective that gives up some time after its caller has: the process could not end before it.

        Not so NCCL's, whose time limit ends the process.
        """
        if self._backends.get(tensor.device.type) == "gloo":
            options.timeout = timedelta(seconds=2 * self._timeout)
        return options

    def _exchange(self, call: str, sent: Tensor, start: Callable[[], Any]) -> None:
        """Meet and run a collective. Who fails in it leaves the others behind in theirs, so that is final."""
        try:
            self.arrive(call, {"tensor": f"{sent.dtype} {list(sent.shape)}"})
            if sent.numel():
                work = start()
                while not work.is_completed():
                    self._look(exchanging=True)
                    time.sleep(_SHORTEST)
                work.wait()
        except GalleryError:
            raise  # the others know
        except BaseException as error:
            if isinstance(error, RuntimeError):
                self._look_for_the_lost()
            text = f"cannot exchange results with the others ({type(error).__name__}: {first_line(error, 300)})"
            self._tell(text, final=True)
            broken = self._break(GalleryError(f"{_WHO}: rank {self.rank} {text}"))
            if not isinstance(error, Exception):
                raise
            raise broken from error

    def _look_for_the_lost(self) -> None:
        """Raise that a rank is lost, whose connections close before its beats are missed; return if all live."""
        before, end = self._watch.counts, time.monotonic() + self._timeout
        # The first beat that is seen may be one from before.
        while time.monotonic() < end and any(n < before[rank] + 2 for rank, n in self._watch.counts.items()):
            self._look(exchanging=True)
            time.sleep(_LONGEST)

    # -------------------------------------------------------------- the end

    def close(self, *, wait: bool = True) -> None:
        """Leave; the others' later calls fail.

        Args:
            wait: where this process keeps the store, until the others have left, too (they still read), or for the
                timeout.
        """
        if not self._stop.alive:
            return
        if self._broken is None:
            self._broken = GalleryError(f"{_WHO}: it is closed")
            with contextlib.suppress(GalleryError):
                self._say(_Said("", {}, None, "has closed the gallery", True))
                end = time.monotonic() + self._timeout
                while wait and self.rank == self._host and not self._watch.lost and time.monotonic() < end:
                    if self._read(range(self.world)) is not None:
                        break
                    time.sleep(_LONGEST)
        self._stop()


def _member(group: Any, global_rank: int) -> int | None:
    """A process's rank in a group; None: it is not a member."""
    try:
        return dist.get_group_rank(group, global_rank)
    except (ValueError, KeyError):
        return None


def _split(steps: Sequence[int], at: int) -> tuple[list[int], list[int]]:
    """Steps before one, and the rest."""
    return [step for step in steps if step < at], [step for step in steps if step >= at]


def _ranks(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
