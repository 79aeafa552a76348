"""Reading the caller's iterable: in pieces, of which those of a block fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from distlock_server.clock import ManualClock
from run_once.key_source import KeySource, key_maker
from run_once.todo import Chunk, Todo

BLOCK = 20
NAMES = [f"k{number % 13:02d}" for number in range(2 * BLOCK + 5)]
"""In a block some come twice."""


def source_of(items: Iterable[Any], clock: ManualClock | None = None) -> KeySource[Any]:
    """Give a source of short blocks."""
    return KeySource(
        items,
        key_maker(None, 0, ""),
        clock=clock or ManualClock(),
        block_keys=BLOCK,
        min_block_keys=3,
    )


def read_all(source: KeySource[Any], size: int) -> Todo[Any]:
    """Read in pieces."""
    todo: Todo[Any] = Todo()
    while not source.is_exhausted:
        todo.append(source.read(size, size))
    return todo


def blocks_of(todo: Todo[Any]) -> list[Chunk[Any]]:
    """Give the blocks, all of which are left."""
    return todo.shared(100)


@pytest.mark.parametrize("size", [1, 3, 7, 20])
@pytest.mark.parametrize("given", [list, iter])
def test_pieces_make_the_blocks_of_a_list(given: Callable[[Any], Any], size: int) -> None:
    """However it is read, and with keys that come twice, blocks have the same digests."""
    whole = blocks_of(read_all(source_of(NAMES), BLOCK))
    todo = read_all(source_of(given(NAMES)), size)
    blocks = blocks_of(todo)
    assert [len(block.keys) for block in whole] == [13, 13, 5]
    assert [block.digest for block in blocks] == [block.digest for block in whole]
    assert len(todo) == sum(len(block.keys) for block in blocks) == 31


def failing(n_items: int, error: bool) -> Iterator[Any]:
    """Give some keys, and then an error or what is no key."""
    yield from NAMES[:n_items]
    if error:
        raise OSError("the listing broke off")
    yield 1.5
    yield from NAMES[n_items:]


@pytest.mark.parametrize("error", [True, False])
def test_what_breaks_off_is_no_block(error: bool) -> None:
    """What came before is there, and not as a block."""
    source = source_of(failing(BLOCK + 9, error))
    todo = read_all(source, 4)
    assert type(source.error).__name__ == ("OSError" if error else "KeyTypeError")
    assert [len(block.keys) for block in blocks_of(todo)] == [13]
    todo.drop(blocks_of(todo)[0])
    assert todo.take(100)[1] == NAMES[BLOCK : BLOCK + 9]


def test_a_slow_block_is_given_up() -> None:
    """Who lists the same again and again is heard each time; the next block is another chance."""
    clock = ManualClock()

    def listing() -> Iterator[str]:
        while True:
            yield from NAMES[:5]
            clock.advance(1)

    source = source_of(listing(), clock)
    pieces = [source.read(5, 5) for _ in range(5)]
    assert [len(piece.keys) for piece in pieces] == [5] * 5
    assert [piece.is_first for piece in pieces] == [True] * 5
    assert not any(piece.is_block for piece in pieces)
    assert not source.is_block_quick


def test_the_block_after_one_that_was_given_up() -> None:
    """Where reading was slow in one block only, the others are blocks."""
    clock = ManualClock()

    def listing() -> Iterator[str]:
        for place, name in enumerate(NAMES):
            clock.advance(1 if place == 7 else 0)
            yield name

    whole = blocks_of(read_all(source_of(NAMES), BLOCK))
    todo = read_all(source_of(listing(), clock), 3)
    todo.take(20)
    assert [block.digest for block in blocks_of(todo)] == [block.digest for block in whole[1:]]


def test_what_comes_before_the_first_item_counts_not() -> None:
    """An iterable that takes its time to begin, and is quick then, is read by the block."""
    clock = ManualClock()

    def listing() -> Iterator[str]:
        clock.advance(5)
        yield from NAMES

    source = source_of(listing(), clock)
    source.read(5, 5)
    assert not source.is_block_quick
    source.read(1, 1)
    assert source.is_block_quick
