"""Bugs to plant: leases that are measured, counted or kept wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from distlock_server import codec, codec_batch, group, state
from distlock_server.engines.base import Meta
from distlock_server.state import Answer, Outcome, Record, Stamp
from distlock_server.store import Store
from distlock_server.table import Table
from run_once import answers
from run_once.answers import ClaimAnswer
from run_once.lease import Lease
from run_once.retrying import Caller


def wall_clock_for_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server measures leases by the wall clock."""
    real = Table.__init__

    def init(self: Table, engine: Any, clock: Any, notify: Any) -> None:
        class Wall:
            now_ns = wall_ns = staticmethod(clock.wall_ns)

        real(self, engine, Wall(), notify)

    monkeypatch.setattr(Table, "__init__", init)


def old_deadlines_after_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are stored, and hold by the clock of the next boot."""
    real = codec_batch.encode_all

    def encode_all(records: Sequence[Record], *, stores_deadline: bool) -> Sequence[bytes | None]:
        return real(records, stores_deadline=True)

    monkeypatch.setattr(codec_batch, "encode_all", encode_all)


def no_time_after_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash leases do not run anew, they have expired."""
    real = codec._decode_held

    def decode(reader: Any, head: Any, opened: Any) -> state.Held:
        return real(reader, head, opened)._replace(deadline_ns=opened.now_ns)

    monkeypatch.setattr(codec, "_decode_held", decode)


def expiry_a_millisecond_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of a deadline with the time is off by the smallest step of time."""

    def is_expired(self: state.Held, now_ns: int) -> bool:
        return self.deadline_ns <= now_ns + 1_000_000

    monkeypatch.setattr(state.Held, "is_expired", is_expired)


def expired_never_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that ran out is not noticed before its ttl has passed once more."""

    def is_expired(self: state.Held, now_ns: int) -> bool:
        return self.deadline_ns + self.ttl_ns < now_ns

    monkeypatch.setattr(state.Held, "is_expired", is_expired)


def renewal_does_not_extend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renewal is answered RENEWED, and the deadline stays."""

    def renew(record: Record, command: state.Renew, stamp: Stamp) -> Any:
        is_held = state._is_held_by(record, command)
        return record, Outcome(Answer.RENEWED if is_held else Answer.LOST)

    monkeypatch.setitem(state._STEPS, state.Renew, renew)


def longer_ttl_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renewal for a longer time is promised before it is on disk."""
    real = state.is_stored_change

    def is_stored_change(before: Record, after: Record) -> bool:
        if isinstance(before, state.Held) and isinstance(after, state.Held):
            after = after._replace(ttl_ns=before.ttl_ns, revision=before.revision)
        return real(before, after)

    monkeypatch.setattr(group, "is_stored_change", is_stored_change)
    monkeypatch.setattr("distlock_server.table.is_stored_change", is_stored_change)


def all_stored_as_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that shuts down stores all leases as expired, those that run as well."""
    monkeypatch.setattr(
        Store,
        "store_expired",
        lambda self: self.engine.commit(
            [codec.expired_swap(key, slot.record, slot.raw) for key, slot in self.held.items()],
            Meta(),
        ),
    )


def count_from_last_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that was sent again is believed for a whole ttl from its last send."""
    real = answers.read_claim

    def read(request: Any, reply: Any, sent_ns: int) -> ClaimAnswer:
        for place in range(len(reply.remaining_ns)):
            reply.remaining_ns[place] = request.ttl_ns
        return real(request, reply, sent_ns)

    monkeypatch.setattr("run_once.client.read_claim", read)


def count_from_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are counted from the reply, not from when the request was sent."""
    call = Caller.call

    def late(self: Caller, *args: Any, **more: Any) -> tuple[Any, int]:
        return call(self, *args, **more)[0], self._clock.now_ns()

    monkeypatch.setattr(Caller, "call", late)


def renewal_counted_from_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renewal is believed from when its answer is read."""
    real = Lease.take_renewal

    def take(self: Lease, expires_ns: int) -> None:
        real(self, self._clock.now_ns() + int(self.ttl_s * 0.95e9))

    monkeypatch.setattr(Lease, "take_renewal", take)


def no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client leaves no margin for clocks of different speeds."""
    monkeypatch.setattr(answers, "margin_ns", lambda ttl_ns: 0)


def believed_while_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is believed on although its release was sent: what the simulation found first."""
    monkeypatch.setattr(Lease, "held", property(lambda self: self.is_open and self.remaining_s > 0))


BUGS = (
    wall_clock_for_expiry,
    old_deadlines_after_restart,
    no_time_after_restart,
    expiry_a_millisecond_early,
    expired_never_granted,
    renewal_does_not_extend,
    longer_ttl_not_stored,
    all_stored_as_expired,
    count_from_last_send,
    count_from_reply,
    renewal_counted_from_reply,
    no_margin,
    believed_while_released,
)
"""All of them."""
