"""Pieces that count as one, and room that is aligned."""

from __future__ import annotations

import ctypes
import hashlib

from hypothesis import given
from hypothesis import strategies as st

from run_once.buffers import ALIGNED_BYTES, Parts, aligned_buffer, sha256

_pieces = st.lists(st.binary(max_size=9), max_size=5)


@given(_pieces, st.integers(0, 50), st.integers(0, 50))
def test_parts_are_cut_as_their_sum_would_be(pieces: list[bytes], first: int, end: int) -> None:
    """Length, slices, chunks and checksum do not show where one piece ends."""
    parts, whole = Parts(pieces), b"".join(pieces)
    assert len(parts) == len(whole)
    assert bytes(parts) == whole
    assert parts[first:end] == whole[first:end]
    assert b"".join(parts.chunks(3)) == whole
    assert all(len(chunk) <= 3 for chunk in parts.chunks(3))
    assert sha256(parts) == sha256(whole) == hashlib.sha256(whole).digest()


@given(st.integers(0, 300))
def test_room_is_aligned(size: int) -> None:
    """It is as long as was asked for, empty, writable, and begins at a multiple of 64."""
    room = aligned_buffer(size)
    assert len(room) == size
    assert bytes(room) == bytes(size)
    assert not room.readonly
    if size:
        address = ctypes.addressof(ctypes.c_char.from_buffer(room))
        assert address % ALIGNED_BYTES == 0
