"""The keys that were read and not asked for yet, in order.

They come in chunks, of which the last may still grow. A chunk that is a whole block of the list is
shared with all who have the same list: while workers spread out, only the keys of it that the
server told this one are asked for, and those passed over are for the end of the pass.
"""

from __future__ import annotations

import hashlib
from collections import deque
from functools import cached_property
from typing import Final, Generic, NamedTuple, TypeVar

from distlock_proto import lock_table_pb2 as pb

ItemT = TypeVar("ItemT")

DIGEST_BYTES: Final = 16


class Piece(NamedTuple, Generic[ItemT]):
    """Items that were read together: a block of the list, or a part of one.

    Attributes:
        keys: Stored keys, each once in its block.
        items: The caller's objects, in the same order.
        is_first: It goes on with nothing: a block begins, or was given up.
        is_block: With it a block is complete, and others have the same.
    """

    keys: list[bytes]
    items: list[ItemT]
    is_first: bool
    is_block: bool


class Chunk(Generic[ItemT]):
    """Some items that follow each other, with their stored keys.

    Attributes:
        keys: Stored keys, each once.
        is_block: All of a block of the list, of which others have the same.
        is_new: Nobody has asked yet whether the block is done as a whole.
    """

    def __init__(self, keys: list[bytes], items: list[ItemT]) -> None:
        self.keys = keys
        self.is_block = False
        self.is_new = False
        self._items = items
        self._n_gone = 0  # taken before the chunk had grown: of these only keys are kept
        self._at = 0
        self._told_end = 0

    def __len__(self) -> int:
        return len(self.keys) - self._at

    @property
    def place(self) -> int:
        """Up to where its keys were asked for, passed over, or told to this pass."""
        return max(self._at, self._told_end)

    @cached_property
    def digest(self) -> bytes:
        """The digest of its keys, by which the server knows the block (see the wire's contract).

        It is remembered, and so not for a chunk that grows.
        """
        return hashlib.blake2b(b"\xff".join(self.keys), digest_size=DIGEST_BYTES).digest()

    def grow(self, piece: Piece[ItemT]) -> None:
        """Take in what was read next. Lists that were given out are left as they are."""
        n_gone = self._at - self._n_gone
        self._items = self._items[n_gone:] + piece.items if self.keys else piece.items
        self._n_gone = self._at
        self.keys = self.keys + piece.keys if self.keys else piece.keys
        self.is_block = piece.is_block
        self.is_new = piece.is_block and not self._at

    def item(self, place: int) -> ItemT:
        """Give the item at a place that was not taken."""
        return self._items[place - self._n_gone]

    def n_free(self, *, is_spread: bool) -> int:
        """Say how many keys at its front may be asked for."""
        if self.is_block and is_spread:
            return max(0, self._told_end - self._at)
        return len(self)

    def take(self, size: int) -> tuple[list[bytes], list[ItemT]]:
        """Take from the front."""
        begin, self._at = self._at, min(self._at + size, len(self.keys))
        self.is_new = False
        if begin == 0 and not self:
            return self.keys, self._items
        n_gone = self._n_gone
        return self.keys[begin : self._at], self._items[begin - n_gone : self._at - n_gone]

    def go_to(self, place: int, n_keys: int) -> tuple[int, int]:
        """Ask for so many keys from there on next; say from where to where keys are passed over.

        What was told before, and not asked for, must be taken out first if there is a gap.
        """
        begin = self._at
        if place > self.place:
            self._at = place
        self._told_end = place + n_keys
        return begin, self._at


class Passed(NamedTuple, Generic[ItemT]):
    """A block of which others ask for keys as well.

    Attributes:
        chunk: The block.
        spans: Where what others ask for begins and ends: it is looked at later.
    """

    chunk: Chunk[ItemT]
    spans: list[tuple[int, int]]


class Todo(Generic[ItemT]):
    """The chunks that were read and not asked for yet, in order.

    Attributes:
        is_spread: Of blocks, only what the server told is asked for.
        passed: What is left for later, by the chunk's identity.
    """

    def __init__(self) -> None:
        self.is_spread = False
        self.passed: dict[int, Passed[ItemT]] = {}
        self._chunks: deque[Chunk[ItemT]] = deque()
        self._open: Chunk[ItemT] = Chunk([], [])  # the last that was read, and may grow
        self._n_keys = 0

    def __len__(self) -> int:
        return self._n_keys

    def recount(self) -> None:
        """Count anew: a change of it may have been cut short."""
        self._n_keys = sum(map(len, self._chunks))

    def append(self, piece: Piece[ItemT]) -> None:
        """Put to the end what was read next: a block's pieces are one chunk."""
        if piece.is_first:
            self._open = Chunk([], [])
        chunk = self._open
        is_out = not chunk  # all that was read of it was taken
        chunk.grow(piece)
        if is_out and chunk:
            self._chunks.append(chunk)
        self._n_keys += len(piece.keys)
        if piece.is_block:
            self._open = Chunk([], [])  # the items of that one need not be kept any more

    def put_back(self, keys: list[bytes], items: list[ItemT]) -> None:
        """Put keys to the front."""
        if keys:
            self._chunks.appendleft(Chunk(keys, items))
            self._n_keys += len(keys)

    @property
    def is_stuck(self) -> bool:
        """Whether the server must be asked first which keys to ask for."""
        return bool(self._chunks) and not self._chunks[0].n_free(is_spread=self.is_spread)

    def new_blocks(self, limit: int) -> list[Chunk[ItemT]]:
        """Give the whole blocks at the front, none of whose keys was asked for."""
        found: list[Chunk[ItemT]] = []
        for chunk in self._chunks:
            if not chunk.is_new or len(found) == limit:
                break
            found.append(chunk)
        return found

    def drop(self, chunk: Chunk[ItemT]) -> None:
        """Take a chunk out."""
        self._chunks.remove(chunk)
        self._n_keys -= len(chunk)

    def take(self, size: int) -> tuple[list[bytes], list[ItemT]]:
        """Take so many keys from the front, each once; a repetition is left out."""
        keys: list[bytes] = []
        items: list[ItemT] = []
        n_parts = 0
        while self._chunks and len(keys) < size:
            chunk = self._chunks[0]
            n_free = chunk.n_free(is_spread=self.is_spread)
            if not n_free or (keys and chunk.is_new):
                break  # a block that is asked for as a whole is remembered if it is done
            more_keys, more_items = chunk.take(min(size - len(keys), n_free))
            if not chunk:
                self._chunks.popleft()
            self._n_keys -= len(more_keys)
            keys, items = (
                (keys + more_keys, items + more_items) if keys else (more_keys, more_items)
            )
            n_parts += 1
        return without_repeated(keys, items) if n_parts > 1 else (keys, items)

    # -- spreading out ----------------------------------------------------------------------------

    def shared(self, limit: int) -> list[Chunk[ItemT]]:
        """Give the first blocks, partly asked for or not, behind what was put back."""
        found: list[Chunk[ItemT]] = []
        for chunk in self._chunks:
            if chunk.is_block and len(found) < limit:
                found.append(chunk)
            elif found:
                break
        return found

    def follow(self, blocks: list[Chunk[ItemT]], told: pb.Slice) -> None:
        """Go on where the server said, and leave what lies before for later.

        Args:
            blocks: What was asked about.
            told: The answer.
        """
        for number, chunk in enumerate(blocks[: told.block + 1]):
            if chunk not in self._chunks:
                continue
            place, n_keys = len(chunk.keys), 0
            if number == told.block:
                place, n_keys = told.place, told.n_keys
            if place > chunk.place and (n_own := chunk.n_free(is_spread=True)):
                own = Chunk(*chunk.take(n_own))
                self._chunks.insert(self._chunks.index(chunk), own)
            begin, end = chunk.go_to(place, n_keys)
            if begin < end:
                self._n_keys -= end - begin
                self.passed.setdefault(id(chunk), Passed(chunk, [])).spans.append((begin, end))
            if not chunk:
                self._chunks.remove(chunk)

    def take_passed(self, chunk: Chunk[ItemT]) -> list[tuple[int, int]]:
        """Take what was passed over in a chunk: where each stretch begins and ends."""
        return self.passed.pop(id(chunk)).spans


def frontier_request(blocks: list[Chunk[ItemT]], n_keys: int) -> pb.FrontierRequest:
    """Make the question from where in these blocks to ask for so many keys next."""
    return pb.FrontierRequest(
        blocks=[pb.Block(digest=chunk.digest, n_keys=len(chunk.keys)) for chunk in blocks],
        place=blocks[0].place,
        n_keys=n_keys,
    )


def without_repeated(keys: list[bytes], items: list[ItemT]) -> tuple[list[bytes], list[ItemT]]:
    """Leave out the second and later ones of each key."""
    if len(set(keys)) == len(keys):
        return keys, items
    first: dict[bytes, ItemT] = {}
    for key, item in zip(keys, items, strict=True):
        first.setdefault(key, item)
    return list(first), list(first.values())
