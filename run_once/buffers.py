"""Memory for large values: pieces that are never joined, and room to read into."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

ALIGNED_BYTES: Final = 64
"""Arrays begin at multiples of this, as numpy's own do: a cache line, and any vector register."""

CHUNK_BYTES: Final = 8 << 20
"""What is copied at once where a library takes no view."""


class Parts:
    """Bytes in several pieces that count as one.

    A piece may be the memory of the user's array, so the parts are to be used up at once.
    """

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Take the pieces, in order."""
        self._pieces = [memoryview(piece) for piece in pieces]
        self._size_bytes = sum(len(piece) for piece in self._pieces)

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, part: slice, /) -> bytes:
        first, end, step = part.indices(self._size_bytes)
        assert step == 1, "parts are cut into stretches only"
        found = []
        for piece in self._pieces:
            if end <= 0:
                break
            if first < len(piece):
                found.append(piece[max(0, first) : end])
            first -= len(piece)
            end -= len(piece)
        return b"".join(found)

    def __bytes__(self) -> bytes:
        return b"".join(self._pieces)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yield views of all the bytes, none longer than `max_bytes`."""
        for piece in self._pieces:
            for start in range(0, len(piece), max_bytes):
                yield piece[start : start + max_bytes]


def sha256(data: bytes | Parts) -> bytes:
    """Give the SHA-256, 32 bytes."""
    if not isinstance(data, Parts):
        return hashlib.sha256(data).digest()
    digest = hashlib.sha256()
    for chunk in data.chunks():
        digest.update(chunk)
    return digest.digest()


def aligned_buffer(size_bytes: int) -> memoryview:
    """Make room for so many bytes, writable, and beginning at a multiple of `ALIGNED_BYTES`."""
    room = bytearray(size_bytes + ALIGNED_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    start = -address % ALIGNED_BYTES
    return memoryview(room)[start : start + size_bytes]
