"""The queue before the committer: what goes first, and that nobody starves."""

from __future__ import annotations

from typing import Any

from distlock_server.pending import Pending, Rank
from distlock_server.queues import Queue


def _pending(name: str, n_keys: int = 1) -> Pending[Any]:
    rank = {"renew": Rank.RENEWAL, "end": Rank.ENDING}.get(name.split(maxsplit=1)[0], Rank.OTHER)
    return Pending([b"key"] * n_keys, lambda _group: name, name, rank=rank)


def _take(queue: Queue, max_keys: int) -> list[object]:
    return [pending.context for pending in queue.take(max_keys)]


def test_leases_go_first() -> None:
    """What came last and keeps a lease alive is in the next group, before ends and claims."""
    queue = Queue()
    for number in range(50):
        queue.put(_pending(f"claim {number}"))
    queue.put(_pending("end"))
    queue.put(_pending("renew"))
    assert _take(queue, 4) == ["renew", "end", "claim 0", "claim 1"]
    assert _take(queue, 2) == ["claim 2", "claim 3"]


def test_nothing_starves() -> None:
    """However many renewals come, each group has room for the others, even for a large one."""
    queue = Queue()
    queue.put(_pending("huge claim", 500))
    queue.put(_pending("claim"))
    queue.put(_pending("end 0"))
    queue.put(_pending("end 1"))
    for number in range(50):
        queue.put(_pending(f"renew {number}"))
    assert _take(queue, 4) == ["renew 0", "renew 1", "end 0", "huge claim"]
    assert _take(queue, 4) == ["renew 2", "renew 3", "end 1", "claim"]
    assert _take(queue, 4) == [f"renew {number}" for number in range(4, 8)]
    assert len(queue) == 42


def test_put_back() -> None:
    """What is to be run again is in front of what came later of its rank, in its old order."""
    queue = Queue()
    for name in ("claim 3", "renew 3", "end 2"):
        queue.put(_pending(name))
    queue.put_back(
        [_pending(name) for name in ("renew 1", "claim 1", "end 1", "renew 2", "claim 2")]
    )
    kinds = {"renew": 3, "end": 2, "claim": 3}
    assert _take(queue, 99) == [
        f"{kind} {n + 1}" for kind, many in kinds.items() for n in range(many)
    ]
    assert not queue


def test_clear() -> None:
    """All of each rank is given back."""
    queue = Queue()
    for name in ("claim", "end", "renew"):
        queue.put(_pending(name))
    assert [pending.context for pending in queue.clear()] == ["renew", "end", "claim"]
    assert not queue
    assert _take(queue, 9) == []
