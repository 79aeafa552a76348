"""The table against a plain model of it, over random histories with restarts.

The real table runs over the memory engine, stepped by hand under a clock that is moved by hand.
Every answer, record, count, list, revision and token must be what the model says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from distlock_server import batch, state
from distlock_server.clock import ManualClock
from distlock_server.codec import Kind
from distlock_server.engines.memory import MemoryEngine, MemoryStore
from distlock_server.pending import Pending, Watch
from distlock_server.state import Done, Held, Record, Result, Storage
from distlock_server.table import Table
from tests.contract.plain_model import PlainModel

SECOND = 10**9
KEYS = [b"a", b"b", "ключ".encode(), b"\x1ens\x1fa", b"\x1ens\x1fb"]
IDS = [bytes([number]) * 16 for number in range(1, 5)]

some_key = st.sampled_from(KEYS)
some_keys = st.lists(some_key, min_size=1, max_size=4, unique=True)
some_id = st.sampled_from(IDS)
some_ttl = st.integers(1, 4).map(lambda seconds: seconds * SECOND)


class Told:
    """Keeps what the table tells."""

    def __init__(self) -> None:
        self.answered_: list[Pending[Any]] = []
        self.changed_: list[Watch] = []

    def answered(self, answered: Sequence[Pending[Any]]) -> None:
        """Keep answers."""
        self.answered_ += answered

    def changed(self, watches: Sequence[Watch]) -> None:
        """Keep watches."""
        self.changed_ += watches

    def died(self, error: BaseException) -> None:
        """Fail."""
        raise AssertionError(f"the committer died: {error}") from error


def view(record: Record) -> Any:
    """Give what a reader may see of a record, as the model does."""
    if record is None:
        return None
    if isinstance(record, Held):
        return ("held", record.token, record.attempts, record.ahead, record.deadline_ns)
    if isinstance(record, Done):
        return ("done", record.token, record.result.payload)
    return ("failed", record.attempts, record.error)


class TableMachine(RuleBasedStateMachine):
    """Asks the table and the model the same."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.store = MemoryStore()
        self.told = Told()
        self.model = PlainModel(now=self.clock.now_ns())
        self.stored = self.model.copy()
        self.waiting: list[tuple[Pending[Any], list[str], list[Any], int]] = []
        self.holders: list[tuple[bytes, bytes, int]] = [(KEYS[0], IDS[0], 1)]
        self.table = Table(MemoryEngine(self.store), self.clock, self.told)

    # -- asking -----------------------------------------------------------------------------------

    def ask(self, keys: list[bytes], run: Callable[..., batch.Items], expected: list[str]) -> None:
        """Queue a request; what the model answered to it is checked at the commit."""
        views = [self.model.view(key) for key in keys]
        pending = self.table.submit(keys, run)
        self.waiting.append((pending, expected, views, self.model.revision))

    @rule(
        keys=some_keys,
        claim_id=some_id,
        ttl=some_ttl,
        grants=st.integers(0, 3),
        attempts=st.integers(0, 3),
        ahead=st.booleans(),
    )
    def claim(
        self, keys: list[bytes], claim_id: bytes, ttl: int, grants: int, attempts: int, ahead: bool
    ) -> None:
        """Claim several keys."""
        expected = self.model.claim(keys, claim_id, ttl, grants, attempts, ahead)
        command = state.Claim(claim_id, ttl, max_attempts=attempts, ahead=ahead)
        self.ask(
            keys, partial(batch.claim, keys=keys, command=command, max_grants=grants), expected
        )
        for key in keys:
            entry = self.model.keys.get(key)
            if entry is not None and entry["is"] == "held":
                self.holders.append((key, entry["id"], entry["token"]))

    def _apply(self, key: bytes, command: batch.Change, expected: str) -> None:
        self.ask([key], partial(batch.apply_each, commands=[(key, command)]), [expected])

    def _holder(self, data: st.DataObject) -> tuple[bytes, bytes, int]:
        return data.draw(st.sampled_from(self.holders[-8:]))

    @rule(data=st.data(), ttl=some_ttl, started=st.booleans())
    def renew(self, data: st.DataObject, ttl: int, started: bool) -> None:
        """Renew by the queue."""
        key, claim_id, token = self._holder(data)
        expected = self.model.renew(key, claim_id, token, ttl, started)
        self._apply(key, state.Renew(claim_id, token, ttl, started), expected)

    @precondition(lambda self: not self.waiting)
    @rule(data=st.data(), ttl=some_ttl, started=st.booleans())
    def renew_at_once(self, data: st.DataObject, ttl: int, started: bool) -> None:
        """Renew without the queue where the table agrees; what it promises so needs no write."""
        key, claim_id, token = self._holder(data)
        command = state.Renew(claim_id, token, ttl, started)
        answer = self.table.try_renew(key, command)
        expected = self.model.renew(key, claim_id, token, ttl, started)
        if answer is None:
            self._apply(key, command, expected)
            return
        outcome, record = answer
        assert outcome.answer.value == expected
        assert view(record) == self.model.view(key)
        assert self.model.revision == self.stored.revision, "this change had to be stored"
        self.stored = self.model.copy()

    @rule(data=st.data(), value=st.binary(max_size=3))
    def complete(self, data: st.DataObject, value: bytes) -> None:
        """Complete, rightly or as a stale holder."""
        key, claim_id, token = self._holder(data)
        expected = self.model.complete(key, claim_id, token, value)
        result = Result(Storage.INLINE, value, len(value))
        self._apply(key, state.Complete(claim_id, token, result), expected)

    @rule(data=st.data(), error=st.sampled_from([None, "", "boom"]))
    def give_up(self, data: st.DataObject, error: str | None) -> None:
        """Fail or release, rightly or as a stale holder."""
        key, claim_id, token = self._holder(data)
        expected = self.model.give_up(key, claim_id, token, error)
        command = (
            state.Release(claim_id, token) if error is None else state.Fail(claim_id, token, error)
        )
        self._apply(key, command, expected)

    @rule(key=some_key, back=st.integers(0, 3))
    def reset(self, key: bytes, back: int) -> None:
        """Reset what is not too new."""
        max_revision = max(0, self.model.revision - back)
        self._apply(key, state.Reset(max_revision), self.model.reset(key, max_revision))

    @rule(data=st.data())
    def invalidate(self, data: st.DataObject) -> None:
        """Invalidate a completion."""
        key, _, token = self._holder(data)
        self._apply(key, state.Invalidate(token), self.model.invalidate(key, token))

    @rule(key=some_key, claim_id=some_id, ttl=st.one_of(st.just(0), some_ttl))
    def seize(self, key: bytes, claim_id: bytes, ttl: int) -> None:
        """Seize a key, for a time or for ever."""
        expected = self.model.seize(key, claim_id, ttl)
        command = state.Seize(claim_id, ttl)

        def run(txn: Any) -> batch.Items:
            _, record, outcome = txn.apply(key, command)
            return batch.Items([batch.Item(outcome.answer, record)], txn.now_ns, txn.revision)

        self.ask([key], run, [expected])

    @rule(keys=some_keys)
    def broken(self, keys: list[bytes]) -> None:
        """A request that raises after it has changed something leaves no trace."""

        def run(txn: Any) -> batch.Items:
            for key in keys:
                txn.apply(key, state.Seize(IDS[0], SECOND))
            raise ZeroDivisionError

        self.ask(keys, run, ["error"])

    # -- committing -------------------------------------------------------------------------------

    @rule()
    def commit(self) -> None:
        """Run all that waits as one group, and compare."""
        while self.table.step_once():
            pass
        for pending, expected, views, revision in self.waiting:
            assert pending in self.told.answered_
            if expected == ["error"]:
                assert isinstance(pending.error, ZeroDivisionError)
                continue
            items, now_ns, seen_revision, _ = pending.result()
            assert [item.answer.value for item in items] == expected
            assert [view(item.record) for item in items] == views
            assert (now_ns, seen_revision) == (self.model.now, revision)
        self.waiting.clear()
        self.told.answered_.clear()
        self.stored = self.model.copy()

    @precondition(lambda self: not self.waiting)
    @rule(half_seconds=st.integers(1, 6))
    def advance(self, half_seconds: int) -> None:
        """Let time pass."""
        self.clock.advance(half_seconds / 2)
        self.model.now = self.clock.now_ns()
        self.stored.now = self.model.now

    @rule(seconds=st.integers(-1000, 1000))
    def jump_wall(self, seconds: int) -> None:
        """Wall time has no say."""
        self.clock.jump_wall(seconds)

    @rule()
    def crash(self) -> None:
        """What was not committed is gone; leases run anew."""
        self.waiting.clear()
        self.model = self.stored.copy()
        self.model.restart(is_clean=False)
        self._open()

    @precondition(lambda self: not self.waiting)
    @rule()
    def restart(self) -> None:
        """A clean end keeps expired leases expired."""
        self.table.close()
        self.model.restart(is_clean=True)
        self._open()

    def _open(self) -> None:
        self.table = Table(MemoryEngine(self.store), self.clock, self.told)
        self.stored = self.model.copy()

    @initialize()
    def start_committed(self) -> None:
        """Start with nothing waiting."""
        self.commit()

    # -- what must always hold --------------------------------------------------------------------

    @invariant()
    def everything_agrees(self) -> None:
        """Lists, counts, single reads and running numbers are the committed model's."""
        model = self.stored
        held = sorted(key for key, entry in model.keys.items() if entry["is"] == "held")
        failed = sorted(key for key, entry in model.keys.items() if entry["is"] == "failed")
        for only, expected in (
            (None, sorted(model.keys)),
            (Kind.HELD, held),
            (Kind.FAILED, failed),
        ):
            listed: list[tuple[bytes, Record]] = []
            start = b""
            while True:
                page = self.table.store.list_page(start, b"", 2, only)
                listed += page.records
                start = page.next_start
                if not start:
                    break
            assert [key for key, _ in listed] == expected
            assert [view(record) for _, record in listed] == [model.view(key) for key in expected]
        assert self.table.revision == model.revision
        assert self.table.generation == model.generation

    @invariant()
    def counts_agree(self) -> None:
        """Kept counters and a scan are the committed model's."""
        for namespace, prefix in ((b"", None), (b"ns", b"\x1ens\x1f")):
            entries = [
                entry
                for key, entry in self.stored.keys.items()
                if key.startswith(b"\x1e") == (prefix is not None)
            ]
            expired = sum(
                entry["is"] == "held" and entry["deadline"] <= self.stored.now for entry in entries
            )
            kinds = [entry["is"] for entry in entries]
            expected = (
                kinds.count("done"),
                kinds.count("held") - expired,
                expired,
                kinds.count("failed"),
            )
            counts, is_complete = self.table.store.count(namespace)
            assert tuple(counts) == expected
            assert is_complete
            if prefix is not None:
                assert tuple(self.table.store.count_range(prefix, b"\x1ens\x20")) == expected


TestTableModel = TableMachine.TestCase
TestTableModel.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
