"""What the table needs of a storage engine. Start here to add one.

An engine compares and keeps bytes; it knows no rule. `commit` is one atomic, durable write:
when it returns, everything it reports as applied survives a power cut, together with its
index entries, counters and meta values. When it raises, the outcome is unknown, and the
process must end without another write: what is on disk is found out after a restart.

Keys of the server itself start with byte 0xFE, which no UTF-8 key has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

SYSTEM_PREFIX: Final = b"\xfe"
"""First byte of the server's own keys; user keys are UTF-8 and sort below it."""


class EngineError(Exception):
    """The engine cannot be opened or used; the message says why and what to do."""


class EngineLockedError(EngineError):
    """Another process has the database open."""


class EngineKindError(EngineError):
    """The folder holds a database of another kind."""


class Swap(NamedTuple):
    """Compare-and-swap of the records of keys that change alike, each by itself.

    Attributes:
        keys: The users' keys as stored, each once in a commit.
        expected: The exact bytes that each record must have now; None: it must be absent.
        values: The new bytes of each; None: delete.
        marks: Index entries of each key (what stands before the key in the entry's key, value or
            None to delete), written only if it was as expected.
        adds: Counters (key, difference), added for each key that was as expected.
    """

    keys: Sequence[bytes]
    expected: Sequence[bytes | None]
    values: Sequence[bytes | None]
    marks: tuple[tuple[bytes, bytes | None], ...] = ()
    adds: tuple[tuple[bytes, int], ...] = ()

    @classmethod
    def one(
        cls,
        key: bytes,
        expected: bytes | None,
        value: bytes | None,
        marks: tuple[tuple[bytes, bytes | None], ...] = (),
        adds: tuple[tuple[bytes, int], ...] = (),
    ) -> Swap:
        """Make the swap of one key."""
        return cls((key,), (expected,), (value,), marks, adds)

    def parts(self) -> Iterator[Swap]:
        """Give the swap of each key by itself."""
        for key, expected, value in zip(self.keys, self.expected, self.values, strict=True):
            yield Swap.one(key, expected, value, self.marks, self.adds)


class Meta(NamedTuple):
    """The server's own values, written with every commit whether swaps apply or not.

    Attributes:
        puts: (key, value or None to delete), each key under `SYSTEM_PREFIX`.
        adds: Counters (key, difference).
    """

    puts: tuple[tuple[bytes, bytes | None], ...] = ()
    adds: tuple[tuple[bytes, int], ...] = ()


class Applied:
    """A swap that was written."""


APPLIED: Final = Applied()


def encode_counter(value: int) -> bytes:
    """Encode a counter as engines keep it: 8 bytes, big-endian, signed."""
    return value.to_bytes(8, "big", signed=True)


def decode_counter(stored: bytes | None) -> int:
    """Decode a counter; a missing one is 0."""
    return 0 if stored is None else int.from_bytes(stored, "big", signed=True)


class Engine(Protocol):
    """A durable map from bytes to bytes with atomic compare-and-swap batches."""

    kind: str
    """Name shown to people: memory, leveldb, rocksdb."""

    shared: bool
    """Do several servers use it? Then time is the engine's, and deadlines live in records."""

    def read(self, keys: Sequence[bytes]) -> tuple[list[bytes | None], int]:
        """Read records, in the order of the keys.

        Returns:
            The records, None where there is none, and the engine's time in nanoseconds
            (0 unless shared: then the server's own clock counts).
        """
        ...

    def commit(self, swaps: Sequence[Swap], meta: Meta) -> list[Applied | bytes | None]:
        """Write swaps and meta atomically and durably.

        Returns:
            One per key, swap after swap: `APPLIED`, or what is stored now where it was not as
            expected.

        Raises:
            EngineError: The write failed; its outcome is unknown, and nothing may follow.
        """
        ...

    def scan(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """List entries with start <= key < end in byte order, at most `limit`.

        An empty `end` is the start of the server's own keys; those are listed only if `start` and
        `end` both lie among them.
        """
        ...

    def close(self) -> None:
        """Close the database; closing twice is no error."""
        ...
