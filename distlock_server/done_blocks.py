"""Blocks of keys that were found wholly done: asking for them again costs no reading.

A list of keys that is finished for the most part is asked for in the same blocks by each run. What
is done stays so until something is undone, which the reset generation counts: another generation
forgets all blocks.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from distlock_server.limits import BLOCK_DIGEST_BYTES

MIN_BLOCK_KEYS: Final = 100
"""Smaller requests are not worth remembering."""

MAX_BLOCKS: Final = 100_000
"""So many blocks are remembered, those that were found done last: some 20 MB."""


def block_digest(keys: Sequence[bytes]) -> bytes:
    """Give the digest of a block; no key contains the byte between them."""
    return hashlib.blake2b(b"\xff".join(keys), digest_size=BLOCK_DIGEST_BYTES).digest()


class DoneBlocks:
    """The digests of blocks that are known to be done.

    The committer adds, the event loop asks: each step is a single operation on a dictionary.

    Attributes:
        min_keys: Smaller blocks are not remembered.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS, min_keys: int = MIN_BLOCK_KEYS) -> None:
        """Start without any."""
        self.min_keys = min_keys
        self._max_blocks = max_blocks
        self._found: OrderedDict[bytes, int] = OrderedDict()

    def add(self, keys: Sequence[bytes], generation: int) -> None:
        """Remember a block whose keys were all done in this reset generation, if it is worth it."""
        if len(keys) < self.min_keys:
            return
        digest = block_digest(keys)
        self._found[digest] = generation
        self._found.move_to_end(digest)
        if len(self._found) > self._max_blocks:
            self._found.popitem(last=False)

    def known(self, digests: Sequence[bytes], generation: int) -> bytes:
        """Tell of each block whether all of it is done: 1, or 0 if that is not known.

        Args:
            digests: The blocks.
            generation: The reset generation now: what was found in another one counts no more.
        """
        return bytes(self._found.get(digest) == generation for digest in digests)
