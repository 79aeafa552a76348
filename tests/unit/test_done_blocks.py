"""Blocks that are known to be done: remembered for one reset generation, those found done last."""

from __future__ import annotations

from distlock_server.done_blocks import DoneBlocks, block_digest

A, B, C = [b"a1", b"a2"], [b"b1", b"b2"], [b"c1", b"c2"]


def known(blocks: DoneBlocks, *named: list[bytes], generation: int) -> list[int]:
    """Ask for blocks."""
    return list(blocks.known([block_digest(keys) for keys in named], generation))


def test_another_generation_knows_nothing() -> None:
    """What was found before something was undone counts no more."""
    blocks = DoneBlocks(min_keys=2)
    blocks.add(A, 4)
    assert known(blocks, A, B, generation=4) == [1, 0]
    assert known(blocks, A, generation=5) == [0]
    blocks.add(A, 5)
    assert known(blocks, A, generation=5) == [1]


def test_bounded() -> None:
    """Beyond the bound that one is forgotten which was not found done for the longest time."""
    blocks = DoneBlocks(max_blocks=2, min_keys=2)
    for keys in (A, B, A, C):
        blocks.add(keys, 1)
    assert known(blocks, A, B, C, generation=1) == [1, 0, 1]


def test_small_ones_are_not_worth_it() -> None:
    """A block of few keys is read each time."""
    blocks = DoneBlocks(min_keys=3)
    blocks.add(A, 1)
    assert known(blocks, A, generation=1) == [0]


def test_a_digest_names_keys_and_order() -> None:
    """Other keys, another order, or keys that are parted otherwise have another digest."""
    keys = [b"ab", b"c"]
    others = ([b"a", b"bc"], [b"c", b"ab"], [b"ab"], [b"ab", b"c", b""], [b"abc"])
    assert block_digest(keys) not in {block_digest(other) for other in others}
