"""Processes that work in step: they exchange messages, and learn of each other's failures instead of hanging.

Everything goes through a gloo process group of our own, whose time limit ends an exchange that a rank does not join.
Gloo does not say which rank that was, so those that are left then sign in to the group's store; who does not is lost.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from xcos_ext.io.environment import whole_number
from xcos_ext.io.errors import GalleryError, LostRankError
from xcos_ext.io.text import first_line

__all__ = ["Ranks"]

_WHO = "sharded gallery"

# Opened so far on each process group: the same number on every rank, so that their keys meet.
_OPENED: Counter[str] = Counter()


class Ranks:
    """The members of a process group, in step: all make the same calls in the same order, each from one thread.

    Args:
        group: None: the default one; a process that was started alone, without any, is a group of its own.
        timeout: seconds that ranks may be apart. A quarter of it, ten seconds at most, is for finding out who is lost.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        timeout = float(timeout)
        if not (math.isfinite(timeout) and timeout > 0):
            raise GalleryError(f"{_WHO}: timeout: expected a finite number of seconds above 0, got {timeout}")
        self._sign_in_seconds = min(10.0, timeout / 4)
        self._group: Any = None
        self._known: BaseException | None = None  # is reported on all ranks already
        self._broken: GalleryError | None = None
        self.rank, self.world = 0, 1
        if group is None and not (dist.is_available() and dist.is_initialized()):
            if whole_number("WORLD_SIZE", 1, least=1) > 1:
                call = "torch.distributed.init_process_group()"
                raise GalleryError(f"{_WHO}: group: expected a process group, got none; call {call} first")
            return
        group = dist.group.WORLD if group is None else group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise GalleryError(f"{_WHO}: group: expected one that this process is a member of, got another")
        members = dist.get_process_group_ranks(group)
        # Without torchrun, whose agent keeps the store, the first of all processes does.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        self._keepers = [members.index(0)] if 0 in members and not agent else []
        name = f"xcos_gallery/{_OPENED[group.group_name]}"
        _OPENED[group.group_name] += 1
        self._store = dist.PrefixStore(name, group.get_group_store().clone())
        with self._collective():
            limit = timedelta(seconds=timeout - self._sign_in_seconds)
            self._group = dist.new_group(members, limit, "gloo", use_local_synchronization=True)

    def exchange(self, call: str, fields: Mapping[str, str] | None = None, value: Any = None) -> list[Any]:
        """Wait until every rank makes this call, with the same ``fields``; returns the values that they bring.

        Raises:
            LostRankError: a rank does not join within the timeout.
            GalleryError: a rank failed, has closed the gallery, made another call, or has other fields.
        """
        sent = self._send({"call": call} | dict(fields or {}), value)
        problems = [f"rank {rank} {error}" for rank, (_, _, error) in enumerate(sent) if error]
        for name in sent[self.rank][0]:
            got = [words.get(name, "") for words, _, _ in sent]
            usual = Counter(got).most_common(1)[0][0]  # of equally common ones the first rank's
            others = [rank for rank, value in enumerate(got) if value != usual]
            if others:
                some = ", ".join(f"{got[rank]} on rank {rank}" for rank in [got.index(usual), *others[:3]])
                more = " and more" if len(others) > 3 else ""
                problems.append(f"{name}: expected the same on all ranks, got {some}{more}")
        if problems:
            self._known = GalleryError(f"{_WHO}: {problems[0]}")
            raise self._known
        return [each for _, each, _ in sent]

    def reduce(self, table: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """The elementwise maximum or sum of all ranks' tensors, which may be overwritten."""
        self.exchange(how, {"table": f"{table.dtype} {list(table.shape)}"})
        if self.world == 1:
            return table
        sent = table.cpu().contiguous()
        with self._collective():
            dist.all_reduce(sent, {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[how], self._group)
        return sent.to(table.device)

    def _send(self, words: dict[str, str], value: Any, error: str = "") -> list[tuple[dict[str, str], Any, str]]:
        messages = [(words, value, error)] * self.world
        with self._collective():
            if self.world > 1:
                dist.all_gather_object(messages, messages[0], self._group)
        return messages

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        if self._broken is not None:
            raise copy.copy(self._broken)  # without the frames that it came from before
        try:
            yield
        except BaseException as error:
            self._broken = self._fail(error)
            if not isinstance(error, Exception):
                raise
            raise copy.copy(self._broken) from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this process fails at in here, the others learn in their next exchange: they raise an error as well."""
        try:
            if self._broken is not None:
                raise copy.copy(self._broken)
            yield
        except BaseException as error:
            if self._broken is None and error is not self._known:
                with contextlib.suppress(GalleryError):
                    self._send({}, None, f"failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._known = None

    def close(self) -> None:
        """Leave; the others' later calls fail."""
        if self._broken is None:
            self._broken = GalleryError(f"{_WHO}: it is closed")
            if self.world > 1:
                self._leave("has closed the gallery", wait=False)

    def _fail(self, error: BaseException) -> GalleryError:
        """Leave after a collective has failed; returns why, the same on all ranks that are left."""
        why = f"{type(error).__name__}: {first_line(error, 300)}"
        own = not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError)
        found = self._leave(f"cannot exchange results with the others ({why})" if own else "", wait=True)
        lost, errors = found or (self._keepers, [])
        if errors:
            return GalleryError(f"{_WHO}: {'; '.join(errors)}")
        if found is None:
            why = f"the process group's store, which {'it' if lost else 'none of them'} keeps, does not answer"
        elif self.rank in lost:
            why = f"the others gave rank {self.rank}, this one, up: it did not answer in time"
        elif lost:
            why = f"no answer within the timeout ({why})"
        else:
            why = (
                f"all ranks are there, but one took longer than the timeout; open the gallery with a longer one ({why})"
            )
        who = f"rank {lost[0]} is" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} are"
        return LostRankError(f"{_WHO}: {f'{who} lost: ' if lost else ''}{why}", lost)

    def _leave(self, error: str, *, wait: bool) -> tuple[list[int], list[str]] | None:
        """End the group, which ends the others' exchanges, too, and sign in to the store, with an error or with "".

        Returns the ranks that are lost and the others' errors, agreed on by all; None: the store does not answer.
        """
        verdict: list[Any] = []

        def sign_in() -> None:
            store, everyone = self._store, [str(rank) for rank in range(self.world)]
            store.set(str(self.rank), error)
            if wait:
                with contextlib.suppress(RuntimeError):  # not all of them came
                    store.wait(everyone, timedelta(seconds=self._sign_in_seconds))
                there = {rank: store.get(rank).decode() for rank in everyone if store.check([rank])}
                lost = [int(rank) for rank in everyone if rank not in there]
                own = json.dumps([lost, [f"rank {rank} {text}" for rank, text in there.items() if text]])
                verdict.extend(json.loads(store.compare_set("verdict", "", own)))  # the first one counts

        # The store's host may be what is lost, and not all of its calls know a time limit.
        thread = threading.Thread(target=sign_in, name="xcos-gallery-sign-in", daemon=True)
        thread.start()
        if self._group is not None:
            with contextlib.suppress(Exception):
                dist.destroy_process_group(self._group)
            self._group = None
        thread.join(self._sign_in_seconds * 1.2)
        return (verdict[0], verdict[1]) if verdict else None
