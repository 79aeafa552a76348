"""Blocks that are known to be done: remembered for one reset generation, those found done last."""

from __future__ import annotations

from distlock_server.done_blocks import DoneBlocks, block_digest


def test_another_generation_knows_nothing() -> None:
    """What was found before something was undone counts no more."""
    blocks = DoneBlocks()
    blocks.add(b"a" * 16, 4)
    assert blocks.known([b"a" * 16, b"b" * 16], 4) == b"\x01\x00"
    assert blocks.known([b"a" * 16], 5) == b"\x00"
    blocks.add(b"a" * 16, 5)
    assert blocks.known([b"a" * 16], 5) == b"\x01"


def test_bounded() -> None:
    """Beyond the bound that one is forgotten which was not found done for the longest time."""
    blocks = DoneBlocks(max_blocks=2)
    for name in (b"a", b"b", b"a", b"c"):
        blocks.add(name * 16, 1)
    assert blocks.known([b"a" * 16, b"b" * 16, b"c" * 16], 1) == b"\x01\x00\x01"


def test_a_digest_names_keys_and_order() -> None:
    """Other keys, another order, or keys that are parted otherwise have another digest."""
    keys = [b"ab", b"c"]
    others = ([b"a", b"bc"], [b"c", b"ab"], [b"ab"], [b"ab", b"c", b""], [b"abc"])
    assert block_digest(keys) not in {block_digest(other) for other in others}
