"""A plain loop over 100,000 string keys, shared by as many processes as you start.

    python examples/loop_100k.py & python examples/loop_100k.py & wait

Nothing needs to be configured on one machine. Each key costs two requests and synced writes, so on
a small machine it takes some minutes (`--progress` shows how far it is). Interrupt it, start it
again: it goes on where it was. Once all keys are done, it ends at once; `run-once reset --prefix ""
--namespace example-loop` has them done again.
"""

from __future__ import annotations

import argparse
import hashlib

from run_once import DistributedIterator


def main() -> None:
    """Work on the keys, and say how many of them were this process's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=100_000, help="number of keys")
    parser.add_argument("--namespace", default="example-loop", help="keeps these keys apart")
    parser.add_argument("--progress", action="store_true", help="show how far it has come")
    options = parser.parse_args()
    keys = [f"item/{number:06d}" for number in range(options.keys)]
    loop = DistributedIterator(keys, namespace=options.namespace, progress=options.progress)
    for key in loop:
        hashlib.sha256(key.encode()).hexdigest()  # the work
    counts = loop.counts
    print(f"done here: {counts.completed:,}; found done: {counts.found_done:,}")


if __name__ == "__main__":
    main()
