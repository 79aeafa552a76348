"""Where the frontier of a list is: up to where those who share it have asked for its keys.

Workers that begin together on one list would ask for the same keys. So each asks, with its claims,
from where to ask next, and each place of a block is told to one of them only. That is a hint: no
rule rests on it, it is in memory only, and it is forgotten when nobody has asked for a while, so
that a later run begins at the front again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from distlock_server.clock import Clock

MAX_FRONTIERS: Final = 10_000
"""So many blocks are remembered, those asked about last: some 2 MB."""

FORGET_NS: Final = 5_000_000_000
"""After so long without a question a block is as if nobody had asked about it."""


class Block(NamedTuple):
    """A run of keys that all who share a list name alike.

    Attributes:
        digest: Of its keys; see `done_blocks.block_digest`.
        n_keys: How many they are.
    """

    digest: bytes
    n_keys: int


class Slice(NamedTuple):
    """Keys that follow each other in a block.

    Attributes:
        block: Which of the blocks asked about; their number: behind all of them.
        place: Place of the first key.
        n_keys: How many they are.
    """

    block: int
    place: int
    n_keys: int


class _Front(NamedTuple):
    place: int
    asked_ns: int


class Frontiers:
    """The frontiers of blocks, by digest; used by the event loop only."""

    def __init__(self, clock: Clock, max_blocks: int = MAX_FRONTIERS) -> None:
        """Start without any.

        Args:
            clock: Tells when nobody asks any more.
            max_blocks: So many are remembered.
        """
        self._clock = clock
        self._max_blocks = max_blocks
        self._fronts: OrderedDict[bytes, _Front] = OrderedDict()

    def next_slice(self, blocks: Sequence[Block], place: int, n_wanted: int) -> Slice:
        """Tell from where to ask next, and nobody else of that.

        Args:
            blocks: Blocks that follow each other in a list.
            place: Up to here in the first of them the caller asks by itself.
            n_wanted: How many keys are wanted.

        Returns:
            The first keys that nobody was told of; fewer if their block ends.
        """
        now_ns = self._clock.now_ns()
        for number, block in enumerate(blocks):
            front = max(self._place(block.digest, now_ns), 0 if number else place)
            n_keys = min(n_wanted, max(0, block.n_keys - front))
            self._move(block.digest, _Front(front + n_keys, now_ns))
            if n_keys:
                return Slice(number, front, n_keys)
        return Slice(len(blocks), 0, 0)

    def _place(self, digest: bytes, now_ns: int) -> int:
        """Give the frontier of a block; 0 if nobody asked lately."""
        front = self._fronts.get(digest)
        return 0 if front is None or now_ns - front.asked_ns > FORGET_NS else front.place

    def _move(self, digest: bytes, front: _Front) -> None:
        self._fronts[digest] = front
        self._fronts.move_to_end(digest)
        if len(self._fronts) > self._max_blocks:
            self._fronts.popitem(last=False)
