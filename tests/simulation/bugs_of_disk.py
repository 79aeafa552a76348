"""Bugs to plant: what is written, when, and what is told of it before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from distlock_server import codec, plan, state, store
from distlock_server.engines.base import Meta
from distlock_server.group import Counters, Group, Slot
from distlock_server.held_index import HeldIndex, Put
from distlock_server.queues import Queue
from distlock_server.store import Store
from distlock_server.table import Table


def tokens_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter of tokens is not stored."""
    whole = plan.counters_meta

    def without(counters: Counters) -> Meta:
        return Meta(tuple(put for put in whole(counters).puts if put[0] != codec.TOKEN_KEY))

    monkeypatch.setattr(plan, "counters_meta", without)
    monkeypatch.setattr(store, "counters_meta", without)


def reply_before_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group is answered before it is written."""
    take, write = Queue.take, Table._write
    taken: list[Any] = []

    def take_batch(self: Queue, max_keys: int) -> list[Any]:
        taken[:] = take(self, max_keys)
        return list(taken)

    def reply_and_write(self: Table, *args: Any) -> set[bytes]:
        self._notify.answered(list(taken))
        return write(self, *args)

    monkeypatch.setattr(Queue, "take", take_batch)
    monkeypatch.setattr(Table, "_write", reply_and_write)


def batch_written_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's changes are written in two pieces."""

    def write(self: Table, write: plan.Write) -> set[bytes]:
        if write.is_needed:
            swaps = [part for swap in write.swaps for part in swap.parts()]
            half = len(swaps) // 2
            self._store.engine.commit(swaps[:half], write.meta)
            self._store.engine.commit(swaps[half:], Meta())
        return set()

    monkeypatch.setattr(Table, "_write", write)


def revision_not_bumped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion does not count as a change."""
    real = Group.apply

    def apply(self: Group, key: bytes, command: state.Command) -> Any:
        revision = self._next.revision
        answer = real(self, key, command)
        if isinstance(command, state.Complete):
            self._next.revision = revision
        return answer

    monkeypatch.setattr(Group, "apply", apply)
    monkeypatch.setattr(Group, "complete_held", lambda *_: None)


def renewal_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is renewed at once while it is being written, and the write takes that back."""
    real = Table.try_renew

    def try_renew(self: Table, key: bytes, command: state.Renew) -> Any:
        with self._mutex:
            writing, self._store.writing = self._store.writing, {}
        try:
            return real(self, key, command)
        finally:
            self._store.writing = writing

    monkeypatch.setattr(Table, "try_renew", try_renew)


def unwritten_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list shows grants that are still on their way to the disk."""
    real = Store._list_held

    def list_held(self: Store, start: bytes, end: bytes, limit: int) -> Any:
        held = self.held
        self.held = {**held, **{k: s for k, s in self.writing.items() if _is_held(s)}}
        try:
            return real(self, start, end, limit)
        finally:
            self.held = held

    monkeypatch.setattr(Store, "_list_held", list_held)


def span_goes_with_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index entry of keys that were granted together is deleted when one of them is settled."""
    real = HeldIndex.leave

    def leave(self: Any, tokens: Sequence[int], puts: list[Put]) -> bool | None:
        for first in self._n_left:
            self._n_left[first] = min(self._n_left[first], len(tokens))
        return real(self, tokens, puts)

    monkeypatch.setattr(HeldIndex, "leave", leave)


def _is_held(slot: Slot) -> bool:
    return isinstance(slot.record, state.Held)


BUGS = (
    tokens_forgotten,
    reply_before_sync,
    batch_written_in_part,
    revision_not_bumped,
    renewal_overwritten,
    unwritten_listed,
    span_goes_with_its_first,
)
"""All of them."""
