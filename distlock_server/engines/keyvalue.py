"""What embedded key-value engines share: compare, gather, write once.

An engine built on this brings four small methods: `_get`, `_write`, `_range` and `_close`. All that
a commit changes goes into one atomic batch, counters included, so that nothing is half written.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, TypeAlias

from distlock_server.engines.base import (
    APPLIED,
    SYSTEM_PREFIX,
    Applied,
    EngineError,
    Meta,
    Swap,
    decode_counter,
    encode_counter,
)
from distlock_server.failpoints import reach

Batch: TypeAlias = Mapping[bytes, bytes | None]
"""Entries to write; None deletes."""


class KeyValueEngine(abc.ABC):
    """An engine over a sorted map with atomic batches.

    Reads, scans and commits may come from several threads at once; commits take turns. Closing
    waits for calls under way, since the libraries below free the database whoever still uses it.
    """

    kind: str
    shared: bool = False

    _errors: ClassVar[tuple[type[Exception], ...]] = ()
    """What the library below raises when it fails."""

    def __init__(self, place: str, commit_lock: threading.Lock | None = None) -> None:
        """Prepare.

        Args:
            place: Where the database is, for messages.
            commit_lock: Held while a commit compares and writes; engines over one store share it.
        """
        self._place = place
        self._commit_lock = commit_lock or threading.Lock()
        self._idle = threading.Condition()
        self._n_calls = 0
        self._is_closed = False
        self._cause: Exception | None = None

    @abc.abstractmethod
    def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Read entries, None where there is none."""

    @abc.abstractmethod
    def _write(self, batch: Batch) -> None:
        """Write entries atomically and durably."""

    @abc.abstractmethod
    def _range(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """List entries with start <= key < end in byte order, at most `limit`."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Close the database; called once."""

    def _now_ns(self) -> int:
        """Give the engine's time; 0 where the server's own clock counts."""
        return 0

    def read(self, keys: Sequence[bytes]) -> tuple[list[bytes | None], int]:
        """Read records, in the order of the keys; see `Engine.read`."""
        with self._call("read from"):
            return self._get(keys), self._now_ns()

    def commit(self, swaps: Sequence[Swap], meta: Meta) -> list[Applied | bytes | None]:
        """Write swaps and meta atomically and durably; see `Engine.commit`."""
        keys = [key for swap in swaps for key in swap.keys]
        expected = [raw for swap in swaps for raw in swap.expected]
        assert len(set(keys)) == len(keys) == len(expected), "one swap for a key in a commit"
        assert max(keys, default=b"") < SYSTEM_PREFIX, "not a user's key"
        with self._call("write to", is_final=True), self._commit_lock:
            reach("commit.begun")
            found = self._get(keys)
            answers: list[Applied | bytes | None] = [APPLIED] * len(keys)
            if found != expected:
                answers = [
                    APPLIED if now == before else now
                    for now, before in zip(found, expected, strict=True)
                ]
                parts = (part for swap in swaps for part in swap.parts())
                swaps = [
                    part for part, answer in zip(parts, answers, strict=True) if answer is APPLIED
                ]
            reach("commit.compared")
            batch = self._gather(swaps, meta)
            reach("commit.gathered")
            if batch:
                self._write(batch)
            reach("commit.ended")
            return answers

    def _gather(self, swaps: Iterable[Swap], meta: Meta) -> dict[bytes, bytes | None]:
        """Make one batch of swaps and meta, the changes of each counter summed up."""
        batch: dict[bytes, bytes | None] = {}
        sums: defaultdict[bytes, int] = defaultdict(int)
        for keys, _, values, marks, adds in swaps:
            batch.update(zip(keys, values, strict=True))
            for prefix, entry in marks:
                batch.update(zip(map(prefix.__add__, keys), itertools.repeat(entry)))
            for key, change in adds:
                sums[key] += len(keys) * change
        batch.update(meta.puts)
        for key, change in meta.adds:
            sums[key] += change
        assert sums.keys().isdisjoint(batch), "a counter is never put"
        changed = [key for key, change in sums.items() if change]
        for key, stored in zip(changed, self._get(changed), strict=True):
            batch[key] = encode_counter(decode_counter(stored) + sums[key])
        return batch

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """List entries in byte order; see `Engine.scan`."""
        if not end or start < SYSTEM_PREFIX < end:
            end = SYSTEM_PREFIX
        if limit < 1 or start >= end:
            return []
        with self._call("read from"):
            return self._range(start, end, limit)

    def close(self) -> None:
        """Close the database once the calls under way are over; closing twice is no error.

        Raises:
            EngineError: The database failed to close; what was committed is safe.
        """
        with self._idle:
            if self._is_closed:
                return
            self._is_closed = True
            while self._n_calls:
                self._idle.wait()
        try:
            self._close()
        except self._errors as error:
            if self._cause is None:
                raise EngineError(self._complaint("close", error)) from error

    @contextlib.contextmanager
    def _call(self, action: str, *, is_final: bool = False) -> Iterator[None]:
        """Guard one use of the database and put its errors into words.

        Args:
            action: What is done, for the message.
            is_final: An error leaves the outcome unknown: nothing is allowed from then on.
        """
        with self._idle:
            if self._is_closed:
                raise EngineError(f"the {self.kind} database in {self._place} is closed")
            if self._cause is not None:
                raise EngineError(
                    f"the {self.kind} database in {self._place} is not used any more since a write "
                    f"failed ({reason(self._cause)}): restart the server"
                ) from self._cause
            self._n_calls += 1
        try:
            yield
        except AssertionError:
            raise  # our own bug, not the library's error
        except self._errors as error:
            if is_final:
                self._cause = error
            raise EngineError(self._complaint(action, error)) from error
        finally:
            with self._idle:
                self._n_calls -= 1
                self._idle.notify_all()

    def _complaint(self, action: str, error: Exception) -> str:
        return f"cannot {action} the {self.kind} database in {self._place}: {reason(error)}"


def reason(error: BaseException) -> str:
    """Give the text of a library's error; plyvel's comes as bytes."""
    text = error.args[0] if error.args else error
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)
