"""The checker of histories accepts what one table may answer, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from distlock_proto import lock_table_pb2 as pb
from tests.simulation.history import BrokenPromiseError, Restart, Survivor, check_history
from tests.simulation.observed import Item, Operation

A, B = b"a" * 16, b"b" * 16
GRANTED, BUSY, DONE = pb.KEY_STATE_GRANTED, pb.KEY_STATE_BUSY, pb.KEY_STATE_DONE
COMPLETED, LOST, RESET = pb.KEY_STATE_COMPLETED, pb.KEY_STATE_LOST, pb.KEY_STATE_RESET


def operation(revision: int, *items: Item, life: int = 0, at_ns: int | None = None) -> Operation:
    """Make an operation that takes no time."""
    when_ns = revision if at_ns is None else at_ns
    return Operation(revision, life, 1, when_ns, "", items, when_ns, when_ns, revision)


def claim(claim_id: bytes, token: int, state: int = GRANTED) -> Item:
    """Make a claim's item."""
    return Item("claim", b"k", claim_id, token, state)


def complete(claim_id: bytes, token: int, state: int = COMPLETED) -> Item:
    """Make a completion's item."""
    return Item("complete", b"k", claim_id, token, state)


def restart(revision: int, kind: str, token: int, *, may_be_gone: bool = False) -> Restart:
    """Make a restart that finds one key."""
    found = Survivor(b"k", kind, token, b"", revision if token else 0, may_be_gone)
    return Restart(revision, 1, 0, 0, (found,))


def test_a_sound_history_is_accepted() -> None:
    """Grants, repetitions, a takeover, a completion, a reset, and a power cut."""
    check_history(
        [
            operation(1, claim(A, 1)),
            operation(1, claim(A, 1), at_ns=2),
            operation(1, claim(B, 0, BUSY), at_ns=3),
            operation(2, claim(B, 2), at_ns=4),
            operation(2, complete(A, 1, LOST), at_ns=5),
            operation(3, complete(B, 2), at_ns=6),
            operation(3, complete(B, 2), at_ns=7),
            restart(3, "done", 2),
            operation(3, claim(A, 0, DONE), life=1, at_ns=8),
            operation(4, Item("reset", b"k", b"", 0, RESET, 3), life=1, at_ns=9),
            operation(5, claim(A, 3), life=1, at_ns=10),
        ]
    )


@pytest.mark.parametrize(
    ("promise", "last"),
    [
        ("I2", operation(4, claim(A, 1))),
        ("I3", operation(4, complete(A, 1))),
        ("I4", operation(4, claim(A, 3))),
        ("I6", operation(4, complete(B, 2, LOST))),
        ("I6", operation(4, Item("reset", b"k", b"", 0, RESET, 2))),
        ("I7", restart(3, "held", 2)),
        ("I7", restart(3, "absent", 0)),
        ("I7", restart(2, "done", 2)),
        ("I8", operation(4, Item("look", b"k", b"", 2, BUSY))),
        ("I8", operation(2, claim(A, 0, BUSY), at_ns=9)),
    ],
)
def test_what_cannot_be_is_refused(promise: str, last: Operation | Restart) -> None:
    """After a completion each of these contradicts what was answered before."""
    before = [operation(2, claim(B, 2)), operation(3, complete(B, 2))]
    if promise == "I2":
        before = [operation(2, claim(B, 2)), operation(3, Item("reset", b"k", b"", 0, RESET, 3))]
    with pytest.raises(BrokenPromiseError) as caught:
        check_history([*before, last])
    assert caught.value.promise == promise


def test_what_was_not_acknowledged_may_be_gone_or_there() -> None:
    """A grant that nobody was told of may be found after a power cut; a reset may have worked."""
    check_history([restart(1, "held", 1), operation(1, claim(A, 0, BUSY), life=1)])
    check_history([operation(1, claim(A, 1)), restart(2, "absent", 0, may_be_gone=True)])


def test_two_changes_have_two_revisions() -> None:
    """A revision is that of one request's change."""
    other = Item("claim", b"other", A, 2, GRANTED)
    with pytest.raises(BrokenPromiseError, match="I8"):
        check_history([operation(1, claim(A, 1)), operation(1, other, at_ns=2)])


def test_checking_takes_no_search(report: Callable[[str], None]) -> None:
    """A long history is checked in a time that grows with its length only."""
    history = []
    for token in range(1, 20_000):
        history.append(operation(2 * token, claim(A[:-4] + token.to_bytes(4, "big"), token)))
        history.append(operation(2 * token + 1, Item("reset", b"k", b"", 0, RESET, 10**9)))
    began_s = time.process_time()
    check_history(history)
    report(f"{len(history) / (time.process_time() - began_s):.0f} operations a second")
