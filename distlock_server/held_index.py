"""Which keys are held, on disk: a start finds them by this index and reads no others.

A key has an entry of its own. Keys that are granted together have one for all of them, a *span*,
which costs a fraction of as many entries: their tokens follow each other, so the token of a lease
tells its span. A key leaves its span when its lease ends, in whatever way; nothing is written for
that but its record, and the entry is deleted with the last. A record tells whether its key is still
of a span: it is held, under the token that the span has for it.

Only for engines of one server: the spans are known to its memory alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Final, TypeAlias

from distlock_server import codec

Put: TypeAlias = tuple[bytes, bytes | None]

MIN_SPAN_KEYS: Final = 8
"""Fewer keys have entries of their own."""


class HeldIndex:
    """The spans of a database; guarded by whoever plans its writes.

    Attributes:
        min_keys: Fewer keys have entries of their own.
    """

    def __init__(self) -> None:
        """Start without any."""
        self.min_keys = MIN_SPAN_KEYS
        # First token of a span and the first one behind it, by turns: no two spans overlap.
        self._borders: list[int] = []
        self._n_left: dict[int, int] = {}

    @property
    def n_spans(self) -> int:
        """Number of spans."""
        return len(self._n_left)

    def load(self, first_token: int, n_tokens: int, n_left: int) -> None:
        """Take in a span that is stored; spans come in the order of their tokens."""
        self._borders += (first_token, first_token + n_tokens)
        self._n_left[first_token] = n_left

    def add(self, keys: Sequence[bytes], tokens: Sequence[int]) -> Put | None:
        """Note that absent keys were granted.

        Returns:
            The entry to write for all of them; None: each needs one of its own.
        """
        first, count = tokens[0], len(tokens)
        if count < self.min_keys or list(tokens) != list(range(first, first + count)):
            return None
        self.load(first, count, count)
        return codec.span_key(first), codec.encode_span(keys)

    def leave(self, tokens: Sequence[int], puts: list[Put]) -> bool | None:
        """Note that leases ended.

        Args:
            tokens: Their tokens.
            puts: Where entries to delete are added.

        Returns:
            Whether they were in spans; None, and nothing is noted: some were.
        """
        borders = self._borders
        # The number of borders up to a token is odd inside of a span.
        places = Counter([bisect_right(borders, token) for token in tokens])
        if len({place & 1 for place in places}) > 1:
            return None
        if not next(iter(places)) & 1:
            return False
        # From behind, so that what is deleted moves no place that is still to come.
        for place in sorted(places, reverse=True):
            first = borders[place - 1]
            self._n_left[first] -= places[place]
            if not self._n_left[first]:
                del self._n_left[first], borders[place - 1 : place + 1]
                puts.append((codec.span_key(first), None))
        return True
