"""Processes that work in step: they exchange messages, and learn of each other's failures instead of hanging.

Everything goes through a gloo process group of our own, whose time limit ends an exchange that a rank does not join.
Gloo does not say which rank that was, so that those that are left then sign in to the group's store; who does not is
lost.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from xcos_ext.io.errors import GalleryError, LostRankError
from xcos_ext.io.text import first_line

__all__ = ["Ranks"]

_WHO = "sharded gallery"
_POLL = 0.02  # seconds between two looks into the store

# Opened so far on each process group: the same number on every rank, so that their keys meet.
_OPENED: Counter[str] = Counter()


@dataclass(frozen=True)
class _Message:
    """What a rank sends in an exchange: a call, what must be the same on all ranks, and a value; or an error."""

    call: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    value: Any = None
    error: str | None = None


class Ranks:
    """The members of a process group, in step.

    All of them make the same calls in the same order, each from one thread.

    Args:
        group: None: the default one; a process that was started alone, without any, is a group of its own.
        timeout: seconds that ranks may be apart. A quarter of it, ten seconds at most, is for finding out who is lost.

    Attributes:
        rank, world: of this process, and the number of all.

    Raises:
        GalleryError: there is no process group, this process is not a member, or a wrong timeout.
        LostRankError: a rank does not open the gallery within the timeout.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        timeout = float(timeout)
        if not (math.isfinite(timeout) and timeout > 0):
            raise GalleryError(f"{_WHO}: timeout: expected a finite number of seconds above 0, got {timeout}")
        self._sign_in_seconds = min(10.0, timeout / 4)
        self._group: Any = None
        self._store: Any = None
        self._known: BaseException | None = None
        self._broken: GalleryError | None = None
        self.rank, self.world = 0, 1
        if group is None and not (dist.is_available() and dist.is_initialized()):
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise GalleryError(
                    f"{_WHO}: group: expected a process group, got none; call torch.distributed.init_process_group() "
                    "first"
                )
            return
        group = dist.group.WORLD if group is None else group
        if dist.get_rank(group) < 0:
            raise GalleryError(f"{_WHO}: group: expected one that this process is a member of, got another")
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        members = dist.get_process_group_ranks(group)
        # Without torchrun, whose agent keeps the store, the first of all processes does.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        self._keeper = members.index(0) if 0 in members and not agent else None
        number = _OPENED[group.group_name]
        _OPENED[group.group_name] += 1
        self._store = dist.PrefixStore(f"xcos_gallery/{number}", group.get_group_store().clone())
        limit = timedelta(seconds=timeout - self._sign_in_seconds)
        try:
            self._group = dist.new_group(members, limit, "gloo", use_local_synchronization=True)
        except RuntimeError as error:
            raise self._fail(error) from error

    # -------------------------------------------------------------- exchanging

    def exchange(self, call: str, fields: Mapping[str, str] | None = None, value: Any = None) -> list[Any]:
        """Wait until every rank makes this call, and learn what they bring.

        Args:
            call: its name.
            fields: words that must be the same on all ranks, by the name of the argument that they stand for.
            value: for the others; anything that can be pickled.

        Returns:
            The values of all ranks.

        Raises:
            LostRankError: a rank does not join within the timeout.
            GalleryError: a rank failed, has closed the gallery, or made another call.
        """
        messages = self._send(_Message(call, fields or {}, value))
        error = next((f"rank {rank} {each.error}" for rank, each in enumerate(messages) if each.error), None)
        error = error or _difference([each.call for each in messages], "call")
        for name in messages[self.rank].fields:
            error = error or _difference([each.fields.get(name, "") for each in messages], name)
        if error is not None:
            self._known = GalleryError(f"{_WHO}: {error}")
            raise self._known
        return [each.value for each in messages]

    def reduce(self, table: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """The elementwise maximum or sum of all ranks' tensors, which may be overwritten."""
        self.exchange(how, {"table": f"{table.dtype} {list(table.shape)}"})
        if self.world == 1:
            return table
        sent = table.cpu().contiguous()
        operation = {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[how]
        self._collective(lambda: dist.all_reduce(sent, operation, self._group))
        return sent.to(table.device)

    def _send(self, message: _Message) -> list[_Message]:
        if self._broken is not None:
            raise copy.copy(self._broken)
        messages = [message] * self.world
        if self.world > 1:
            self._collective(lambda: dist.all_gather_object(messages, message, self._group))
        return messages

    def _collective(self, run: Callable[[], Any]) -> None:
        try:
            run()
        except BaseException as error:
            broken = self._fail(error)
            if not isinstance(error, Exception):
                raise
            raise broken from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this process fails at in here, the others learn in their next exchange: they raise an error as well."""
        if self._broken is not None:
            raise copy.copy(self._broken)
        try:
            yield
        except BaseException as error:
            if self._broken is None and error is not self._known:
                with contextlib.suppress(GalleryError):
                    self._send(_Message(error=f"failed: {type(error).__name__}: {error}"))
            raise
        finally:
            self._known = None

    # -------------------------------------------------------------- the end

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
        found = self._leave(f"cannot exchange results with the others ({why})" if own else "")
        lost, errors = found or ([] if self._keeper is None else [self._keeper], [])
        if found is None:
            why = f"the process group's store, which {'it' if lost else 'none of them'} keeps, does not answer"
        elif self.rank in lost:
            why = f"the others gave rank {self.rank}, this one, up: it did not answer in time"
        else:
            why = f"no answer within the timeout ({why})"
        who = f"rank {lost[0]} is" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} are"
        if errors:
            self._broken = GalleryError(f"{_WHO}: {'; '.join(errors)}")
        else:
            self._broken = LostRankError(f"{_WHO}: {f'{who} lost: ' if lost else ''}{why}", lost)
        return copy.copy(self._broken)  # without the frames that it will come from

    def _leave(self, error: str, *, wait: bool = True) -> tuple[list[int], list[str]] | None:
        """End the group, which ends the others' exchanges, too, and sign in to the store.

        Args:
            error: of this rank, for the others; empty: there is none.
            wait: for the others, and for what is found about them.

        Returns:
            The ranks that are lost and the others' errors, agreed on by all; None: the store does not answer.
        """
        verdict: list[Any] = []

        def sign_in() -> None:
            store, everyone = self._store, range(self.world)
            store.set(str(self.rank), error)
            end = time.monotonic() + self._sign_in_seconds
            while wait:
                there = [rank for rank in everyone if store.check([str(rank)])]
                if len(there) == self.world or time.monotonic() >= end:
                    errors = [f"rank {rank} {text.decode()}" for rank in there if (text := store.get(str(rank)))]
                    own = json.dumps([sorted(set(everyone) - set(there)), errors])
                    verdict.extend(json.loads(store.compare_set("verdict", "", own)))  # the first one counts
                    return
                time.sleep(_POLL)

        # The store's host may be what is lost, and its calls know no time limit.
        thread = threading.Thread(target=sign_in, name="xcos-gallery-sign-in", daemon=True)
        thread.start()
        if self._group is not None:
            with contextlib.suppress(Exception):
                dist.destroy_process_group(self._group)
            self._group = None
        thread.join(self._sign_in_seconds * 1.2)
        return (verdict[0], verdict[1]) if verdict else None


def _difference(values: Sequence[str], name: str) -> str | None:
    """What is wrong with values that are not the same on all ranks."""
    usual = Counter(values).most_common(1)[0][0]  # of equally common ones the first rank's
    others = [rank for rank, value in enumerate(values) if value != usual]
    if not others:
        return None
    got = ", ".join(f"{values[rank]} on rank {rank}" for rank in [values.index(usual), *others[:3]])
    return f"{name}: expected the same on all ranks, got {got}{' and more' if len(others) > 3 else ''}"
