"""What is left to ask for: in order, each key once, and of blocks only what the server told."""

from __future__ import annotations

import random

import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server.clock import ManualClock
from distlock_server.frontiers import Block, Frontiers
from run_once.todo import Piece, Todo, frontier_request

BLOCK = 10


def names(begin: int, end: int) -> list[bytes]:
    """Give the keys of places in the list."""
    return [b"k%04d" % number for number in range(begin, end)]


def block(number: int) -> Piece[bytes]:
    """Give a block of the list."""
    keys = names(number * BLOCK, (number + 1) * BLOCK)
    return Piece(keys, keys, is_first=True, is_block=True)


@pytest.fixture
def todo() -> Todo[bytes]:
    """Give two blocks, of which only what is told is asked for."""
    made: Todo[bytes] = Todo()
    made.append(block(0))
    made.append(block(1))
    made.is_spread = True
    return made


def passed(todo: Todo[bytes]) -> list[bytes]:
    """Take what was passed over."""
    found: list[bytes] = []
    for part in list(todo.passed.values()):
        for begin, end in todo.take_passed(part.chunk):
            found += part.chunk.keys[begin:end]
    return found


def test_only_what_was_told(todo: Todo[bytes]) -> None:
    """Nothing is asked for before the server told what to ask for, and no more than that."""
    assert todo.is_stuck
    assert todo.take(5) == ([], [])
    todo.follow(todo.shared(2), pb.Slice(block=0, place=3, n_keys=4))
    assert not todo.is_stuck
    assert todo.take(10)[0] == names(3, 7)
    assert todo.is_stuck
    assert len(todo) == 13
    assert passed(todo) == names(0, 3)


def test_what_was_told_before_is_kept(todo: Todo[bytes]) -> None:
    """A part of a slice that was not asked for yet is no part of what is passed over."""
    todo.follow(todo.shared(2), pb.Slice(block=0, place=1, n_keys=3))
    assert todo.take(1)[0] == names(1, 2)
    assert frontier_request(todo.shared(2), 2).place == 4
    todo.follow(todo.shared(2), pb.Slice(block=0, place=6, n_keys=2))
    assert todo.take(10)[0] == names(2, 4) + names(6, 8)
    assert passed(todo) == names(0, 1) + names(4, 6)
    todo.follow(todo.shared(2), pb.Slice(block=0, place=8, n_keys=1))
    assert todo.take(10)[0] == names(8, 9)


def test_put_back_comes_first(todo: Todo[bytes]) -> None:
    """What was put back may be asked for at once, whatever the server told."""
    todo.put_back([b"x"], [b"x"])
    todo.follow(todo.shared(2), pb.Slice(block=1, place=0, n_keys=2))
    assert todo.take(10)[0] == [b"x"]
    assert todo.take(10)[0] == names(10, 12)
    assert passed(todo) == names(0, 10)


def test_behind_all_blocks(todo: Todo[bytes]) -> None:
    """Where all keys are in hand already, all are left for later."""
    todo.follow(todo.shared(2), pb.Slice(block=2))
    assert len(todo) == 0
    assert passed(todo) == names(0, 20)


def test_not_spread_asks_for_all(todo: Todo[bytes]) -> None:
    """With long bodies the frontier is nobody's concern; whole blocks are asked for as such."""
    todo.is_spread = False
    assert todo.take(15)[0] == names(0, 10)
    assert todo.take(4)[0] == names(10, 14)
    todo.put_back([b"x"], [b"x"])
    assert todo.take(15)[0] == [b"x", *names(14, 20)]


# ---------------------------------------------------------------- a chunk that grows


def piece(begin: int, end: int) -> Piece[bytes]:
    """Give what was read of the first block, or all of it."""
    keys = names(begin, end)
    return Piece(keys, keys, is_first=begin == 0, is_block=end == BLOCK)


def test_pieces_are_one_block() -> None:
    """A block that was read in pieces is the same as one that was read at once."""
    todo: Todo[bytes] = Todo()
    for begin, end in ((0, 3), (3, 4), (4, 10)):
        assert not todo.shared(1)
        todo.append(piece(begin, end))
        assert len(todo) == end
    todo.append(block(1))
    whole: Todo[bytes] = Todo()
    whole.append(block(0))
    assert [chunk.digest for chunk in todo.shared(2)][:1] == [whole.shared(1)[0].digest]
    assert [len(chunk) for chunk in todo.new_blocks(2)] == [10, 10]


@pytest.mark.parametrize("n_taken", [2, 3])
def test_taken_before_it_grew(n_taken: int) -> None:
    """What was asked for is asked for no more, told to nobody, and given out for good."""
    todo: Todo[bytes] = Todo()
    todo.is_spread = True
    todo.append(piece(0, 3))
    taken = todo.take(n_taken)
    assert taken == (names(0, n_taken), names(0, n_taken))
    assert len(todo) == 3 - n_taken
    todo.append(piece(3, 6))
    assert todo.take(1) == (names(n_taken, n_taken + 1),) * 2
    todo.append(piece(6, 10))
    assert taken == (names(0, n_taken), names(0, n_taken))
    assert len(todo) == 9 - n_taken
    assert todo.is_stuck
    assert not todo.new_blocks(1)
    blocks = todo.shared(1)
    assert blocks[0].keys == names(0, 10)
    assert frontier_request(blocks, 2).place == n_taken + 1
    todo.follow(blocks, pb.Slice(block=0, place=6, n_keys=4))
    assert passed(todo) == names(n_taken + 1, 6)
    assert [blocks[0].item(place) for place in range(n_taken + 1, 6)] == names(n_taken + 1, 6)
    assert todo.take(10) == (names(6, 10),) * 2
    assert len(todo) == 0


def test_all_taken_when_it_ends() -> None:
    """A block of which nothing is left is none to ask about; the next one begins anew."""
    todo: Todo[bytes] = Todo()
    todo.append(piece(0, 9))
    todo.take(9)
    todo.append(Piece([], [], is_first=False, is_block=True))
    assert not todo.is_stuck
    assert not todo.shared(1)
    todo.append(block(1))
    assert [chunk.keys for chunk in todo.shared(2)] == [names(10, 20)]


@pytest.mark.parametrize("seed", range(20))
def test_workers_part_a_list(seed: int) -> None:
    """Workers that ask in any order, for as much as they like, have each key once between them."""
    rng = random.Random(seed)
    frontiers = Frontiers(ManualClock())
    workers: list[Todo[bytes]] = [Todo() for _ in range(3)]
    for todo in workers:
        todo.is_spread = True
        for number in range(4):
            todo.append(block(number))
    taken: list[list[bytes]] = [[] for _ in workers]
    while any(workers):
        number = rng.choice([number for number, todo in enumerate(workers) if len(todo)])
        todo = workers[number]
        if todo.is_stuck or rng.random() < 0.4:
            blocks = todo.shared(rng.randint(1, 3))
            if not blocks:
                continue
            asked = frontier_request(blocks, rng.randint(1, 7))
            shared = [Block(one.digest, one.n_keys) for one in asked.blocks]
            told = frontiers.next_slice(shared, asked.place, asked.n_keys)
            todo.follow(blocks, pb.Slice(block=told.block, place=told.place, n_keys=told.n_keys))
        keys = todo.take(rng.randint(1, 6))[0]
        if keys and rng.random() < 0.2:
            todo.put_back(keys, keys)
        else:
            taken[number] += keys
    assert sorted(key for keys in taken for key in keys) == names(0, 40)
    for todo, keys in zip(workers, taken, strict=True):
        assert sorted(passed(todo) + keys) == names(0, 40)
