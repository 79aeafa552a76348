"""Bugs to plant: what loops must not do with keys held ahead, and with what is settled later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server import batch
from distlock_server.done_blocks import DoneBlocks
from distlock_server.state import Done
from run_once.answers import SettleAnswer
from run_once.asker import Asker
from run_once.key_pass import KeyPass
from run_once.lease import Lease
from run_once.live import LiveItem
from run_once.settler import Ended, Settler
from run_once.todo import Chunk, Todo


def lost_ahead_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether the lease of a key that was held ahead still stands."""

    def is_usable(self: Any, lease: Lease, now_ns: int) -> bool:
        lease.started = True
        return True

    monkeypatch.setattr(KeyPass, "_is_usable", is_usable)


def overdue_stays_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is overdue is given back, and handed out all the same."""
    real = KeyPass._take_overdue

    def take_overdue(self: Any) -> list[Lease]:
        ready = list(self._ready)
        overdue = real(self)
        if overdue:
            self._ready.extend(ready)
        return overdue

    monkeypatch.setattr(KeyPass, "_take_overdue", take_overdue)


def overdue_never_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held ahead behind a very long body stays held."""
    monkeypatch.setattr(KeyPass, "_take_overdue", lambda self: [])


class _Unheard:
    """An item that does not care what it is answered."""

    @staticmethod
    def take_answers(ended: Sequence[Any], answers: Sequence[SettleAnswer]) -> None:
        """Hear nothing."""

    @staticmethod
    def take_error(ended: Sequence[Any], error: Exception) -> None:
        """Hear nothing."""


def completed_when_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item is completed in the background as soon as it is handed out."""
    real = KeyPass._begin

    def begin(self: Any, item: Any, lease: Lease) -> Any:
        live = real(self, item, lease)
        if live is not None and live.is_kept and not self._options.is_explicit:
            Settler.put(self.session.settler, lease, _Unheard())
        return live

    monkeypatch.setattr(KeyPass, "_begin", begin)


def done_when_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `timeout=0` keys are done when they are claimed ahead, not when they are handed out."""
    real = KeyPass._claim

    def claim(self: Any, max_grants: int) -> None:
        real(self, max_grants)
        leases = [lease for _, lease in self._ready if lease.is_open]
        if self._options.is_for_good and leases:
            self.session.complete_all(leases)

    monkeypatch.setattr(KeyPass, "_claim", claim)


def fixed_time_not_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `timeout=T` an item is handed out with whatever is left of T."""

    def freshen(self: Any, lease: Lease) -> None:
        self.session.keeper.drop(lease)
        lease.is_kept = False

    monkeypatch.setattr(KeyPass, "_freshen", freshen)


def unsent_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions that could not be sent are dropped in silence."""

    def send(self: Any, part: list[tuple[Lease, Ended]]) -> None:
        try:
            answers = self._complete([lease for lease, _ in part])
        except Exception:  # noqa: BLE001 - just that is the bug
            return
        for (_, ended), answer in zip(part, answers, strict=True):
            ended.take_answers([ended], [answer])

    monkeypatch.setattr(Settler, "_send", send)


def unsent_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves a loop hears nothing of completions that could not be sent."""
    real = KeyPass.on_settled

    def on_settled(self: Any, items: Sequence[LiveItem[Any]]) -> None:
        real(self, items)
        self.n_unsent = 0

    monkeypatch.setattr(KeyPass, "on_settled", on_settled)


def sent_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended last is completed first."""
    real = Settler.step

    def step(self: Any) -> bool:
        self._queue.reverse()
        while len(self._queue) > 1:
            last = self._queue.pop()
            real(self)
            self._queue.append(last)
        return real(self)

    monkeypatch.setattr(Settler, "step", step)


def loss_counted_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item whose completion was refused counts as completed."""
    real = LiveItem.take_answers

    def take_answers(ended: Sequence[Any], answers: Sequence[SettleAnswer]) -> None:
        real(ended, [SettleAnswer(pb.KEY_STATE_COMPLETED)] * len(answers))

    monkeypatch.setattr(LiveItem, "take_answers", staticmethod(take_answers))


def flush_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a loop does not wait for what is being settled."""
    monkeypatch.setattr(Settler, "flush", lambda self, timeout_s=None: 0)


def close_forgets_what_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is left gives back its item, and not what it held ahead."""
    real = KeyPass.close

    def close(self: Any) -> list[Lease]:
        real(self)
        return []

    monkeypatch.setattr(KeyPass, "close", close)


def overtaken_claim_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a claim gets after its loop was left stays held."""
    real = KeyPass._claim

    def claim(self: Any, max_grants: int) -> None:
        session = self.session

        class Keeping:
            """The session, but for giving back."""

            def __getattr__(self, name: str) -> Any:
                return getattr(session, name)

            def release(self, leases: Sequence[Lease]) -> None:
                """Give nothing back."""

        self.session = Keeping()
        try:
            real(self, max_grants)
        finally:
            self.session = session

    monkeypatch.setattr(KeyPass, "_claim", claim)


def held_ahead_not_come_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that another holds only ahead is left to it for good."""
    real = Asker.set_aside

    def set_aside(self: Any, key: bytes, item: Any, state: int) -> None:
        real(self, key, item, state)
        if not self._options.waits:
            self._pending.pop(key, None)

    monkeypatch.setattr(Asker, "set_aside", set_aside)


def passed_over_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that others were seen to ask for are never looked at."""
    real = Todo.follow

    def follow(self: Any, blocks: Any, told: Any) -> None:
        real(self, blocks, told)
        self.passed.clear()

    monkeypatch.setattr(Todo, "follow", follow)


def passed_over_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that others were seen to ask for are taken for done."""
    real = Asker._take_passed
    monkeypatch.setattr(Asker, "_take_passed", lambda self, chunk, _: real(self, chunk, b""))


def told_keys_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server told is forgotten when it tells more before that was asked for."""
    real = Todo.follow

    def follow(self: Any, blocks: list[Chunk[Any]], told: Any) -> None:
        for chunk in blocks:
            n_dropped = chunk.place - chunk._at
            chunk._at += n_dropped
            self._n_keys -= n_dropped
        real(self, blocks, told)

    monkeypatch.setattr(Todo, "follow", follow)


def blocks_outlive_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that was found done is taken for done whatever was undone since."""

    def known(self: Any, digests: Sequence[bytes], generation: int) -> bytes:
        return bytes(digest in self._found for digest in digests)

    monkeypatch.setattr(DoneBlocks, "known", known)


def blocks_of_done_or_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block counts as done when one of its keys is."""
    real = batch.lookup

    def lookup(txn: Any, keys: Sequence[bytes], *, wants_records: bool = True) -> batch.Items:
        found = real(txn, keys, wants_records=wants_records)
        if any(isinstance(item.record, Done) for item in found.items):
            txn.note_done(keys)
        return found

    monkeypatch.setattr(batch, "lookup", lookup)


BUGS = (
    lost_ahead_handed_out,
    overdue_stays_ready,
    overdue_never_looked_at,
    completed_when_handed_out,
    done_when_claimed,
    fixed_time_not_fresh,
    unsent_forgotten,
    unsent_not_told,
    sent_out_of_order,
    loss_counted_as_done,
    flush_does_not_wait,
    close_forgets_what_is_ready,
    overtaken_claim_kept,
    held_ahead_not_come_back_to,
    passed_over_for_good,
    passed_over_is_done,
    told_keys_dropped,
    blocks_outlive_resets,
    blocks_of_done_or_held,
)
