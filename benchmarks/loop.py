"""How much does the loop cost? `DistributedIterator` with an empty body, cold and done.

python benchmarks/loop.py
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from common import lock_server, medians, seconds, show
from run_once import DistributedIterator

COLD = 1_000
DONE = 20_000
_runs = itertools.count()


def loop(keys: list[str], namespace: str) -> None:
    """Run the loop with an empty body."""
    for _ in DistributedIterator(keys, namespace=namespace):
        pass


def synced_writes(count: int) -> None:
    """Write and sync a small file so often: this disk's limit for one change at a time."""
    import os  # noqa: PLC0415 - used here alone

    with tempfile.TemporaryDirectory() as folder:
        descriptor = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT)
        try:
            for _ in range(count):
                os.write(descriptor, b"x" * 100)
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def main() -> None:
    """Measure and print."""
    keys = [f"key-{number:07d}" for number in range(DONE)]
    with lock_server():
        for first in range(0, DONE, 10_000):
            from run_once import load_config  # noqa: PLC0415 - after the server is up
            from run_once.keys import stored_key  # noqa: PLC0415
            from run_once.task import Ending, Session  # noqa: PLC0415

            session = Session.get(load_config())
            part = [stored_key(key, namespace="done") for key in keys[first : first + 10_000]]
            leases = session.claim(part, ttl_s=60, keep_alive=False).leases
            session.settle([Ending(lease, "complete") for lease in leases])
        cold_s, done_s, disk_s = medians(
            5,
            lambda: seconds(lambda: loop(keys[:COLD], f"cold-{next(_runs)}")),
            lambda: seconds(lambda: loop(keys, "done")),
            lambda: seconds(lambda: synced_writes(COLD)),
        )
    rows = [
        ("claim, empty body, complete", COLD, f"{COLD / cold_s:,.0f}"),
        ("skip keys that are done", DONE, f"{DONE / done_s:,.0f}"),
        ("limit: one synced write each on this disk", COLD, f"{COLD / disk_s:,.0f}"),
    ]
    show("The loop, one process, medians of 5", ("what", "keys", "keys/s"), rows, "loop")


if __name__ == "__main__":
    main()
