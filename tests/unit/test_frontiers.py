"""From where to ask next: each place of a list is told once, in order, for a while."""

from __future__ import annotations

import pytest

from distlock_server.clock import ManualClock
from distlock_server.frontiers import FORGET_NS, Block, Frontiers, Slice

A, B, C = Block(b"a" * 16, 10), Block(b"b" * 16, 5), Block(b"c" * 16, 5)
NS_PER_S = 1_000_000_000


@pytest.fixture
def clock() -> ManualClock:
    """Give a clock that is moved by hand."""
    return ManualClock()


@pytest.fixture
def frontiers(clock: ManualClock) -> Frontiers:
    """Give frontiers that nobody asked for yet."""
    return Frontiers(clock, max_blocks=2)


def test_each_place_is_told_once(frontiers: Frontiers) -> None:
    """Slices follow each other, the last of a block is shorter, and then comes the next block."""
    told = [frontiers.next_slice([A, B], 0, 4) for _ in range(6)]
    assert told == [
        Slice(0, 0, 4),
        Slice(0, 4, 4),
        Slice(0, 8, 2),
        Slice(1, 0, 4),
        Slice(1, 4, 1),
        Slice(2, 0, 0),
    ]


def test_who_asked_by_himself_is_passed(frontiers: Frontiers) -> None:
    """What the caller asks for by itself is told to nobody; the frontier never goes back."""
    assert frontiers.next_slice([A], 3, 2) == Slice(0, 3, 2)
    assert frontiers.next_slice([A], 0, 2) == Slice(0, 5, 2)
    assert frontiers.next_slice([A, B], 10, 2) == Slice(1, 0, 2)
    assert frontiers.next_slice([A], 0, 2) == Slice(1, 0, 0)


def test_forgotten_when_nobody_asks(frontiers: Frontiers, clock: ManualClock) -> None:
    """A later run begins at the front; while somebody asks, nothing is forgotten."""
    frontiers.next_slice([A], 0, 4)
    clock.advance(FORGET_NS / NS_PER_S)
    assert frontiers.next_slice([A], 0, 1) == Slice(0, 4, 1)
    clock.advance(FORGET_NS / NS_PER_S + 0.001)
    assert frontiers.next_slice([A], 0, 1) == Slice(0, 0, 1)


def test_bounded(frontiers: Frontiers) -> None:
    """Beyond the bound the block is forgotten that was not asked about for the longest time."""
    for block in (A, B, A, C):
        frontiers.next_slice([block], 0, 2)
    assert frontiers.next_slice([A], 0, 1) == Slice(0, 4, 1)
    assert frontiers.next_slice([B], 0, 1) == Slice(0, 0, 1)
