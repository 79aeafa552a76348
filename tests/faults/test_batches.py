"""The history of very many operations on a real server is one that a correct server can make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.faults.batches import check_batches
from tests.servers import ServerProcess

N_OPS = 100_000


def test_very_many_operations_are_linearizable(
    server: ServerProcess, seed: int, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """Eight clients with many keys in each call see an order that is possible; none is undecided.

    Keys are wanted by several at once, and leases run out and are taken over.
    """
    checked = check_batches(server.address, seed, N_OPS, tmp_path / "history")
    assert checked.n_ops >= N_OPS
    report(
        f"{checked.n_ops:,} operations (seed {seed}), {checked.n_takeovers:,} leases taken over, "
        f"{checked.n_undecided} undecided"
    )
