"""Counting a database that was written without counters, as the server of 2021 wrote it.

It is done a piece at a time between two groups, in byte order. `counted_below` is the border:
changes of keys below it move the counters, changes above it do not, since those keys are still to
be counted.
The border is stored with each piece, so that a restart goes on where the count stood.
"""

from __future__ import annotations

import logging
from collections import Counter

from distlock_server import codec
from distlock_server.codec import Kind, Opened
from distlock_server.engines.base import Engine, Meta
from distlock_server.plan import index_puts

logger = logging.getLogger(__name__)

PIECE = 2_000
"""Keys counted at once: a few milliseconds."""


class OldBase:
    """The count of a database that came without counters."""

    def __init__(self, engine: Engine, opened: Opened) -> None:
        """Make a count over an engine; see `begin` and `resume`."""
        self._engine = engine
        self._opened = opened
        self.counted_below: bytes | None = None

    @property
    def is_counted(self) -> bool:
        """Whether nothing is left to count."""
        return self.counted_below is None

    def begin(self) -> tuple[tuple[bytes, bytes | None], ...]:
        """Look at a database without a format mark; return what to store about the count."""
        if not self._engine.scan(b"", b"", 1):
            return ()
        self.counted_below = b""
        return ((codec.COUNT_CURSOR_KEY, b""),)

    def resume(self) -> None:
        """Go on where an earlier run stopped."""
        (self.counted_below,), _ = self._engine.read([codec.COUNT_CURSOR_KEY])

    def count_piece(self) -> list[tuple[bytes, bytes]]:
        """Count the next piece and write it.

        Returns:
            The held keys of the piece with their bytes.

        Raises:
            EngineError: The write failed.
        """
        if self.counted_below is None:
            return []
        page = self._engine.scan(self.counted_below, b"", PIECE)
        counts: Counter[bytes] = Counter()
        puts: list[tuple[bytes, bytes | None]] = []
        held: list[tuple[bytes, bytes]] = []
        for key, raw in page:
            try:
                kind = codec.kind_of(raw)
                codec.decode(raw, self._opened)
            except codec.CodecError as error:
                logger.warning("the record of key %r is damaged and not counted: %s", key, error)
                continue
            counts[codec.counter_key(codec.namespace_of(key), kind)] += 1
            puts += index_puts(key, None, kind)
            if kind is Kind.HELD:
                held.append((key, raw))
        border = page[-1][0] + b"\x00" if len(page) == PIECE else None
        puts.append((codec.COUNT_CURSOR_KEY, border))
        self._engine.commit([], Meta(tuple(puts), tuple(counts.items())))
        self.counted_below = border
        return held
