"""A loop that decorates a local function with `@run_once` and calls it.

    python examples/loop_decorator.py

`timeout=3` is how long the function may take. A call returns a status and the value.
"""

from __future__ import annotations

import argparse
from collections import Counter

from run_once import run_once


def main() -> None:
    """Work on the keys, and count the statuses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=100, help="number of keys")
    parser.add_argument("--namespace", default="example-decorator", help="keeps these keys apart")
    options = parser.parse_args()
    statuses: Counter[str] = Counter()
    for number in range(options.keys):
        key = f"square-{number}"

        @run_once(key, timeout=3, namespace=options.namespace)
        def square(number: int = number) -> int:
            return number * number

        status, _value = square()
        statuses[status.name] += 1
    print(", ".join(f"{name}: {count}" for name, count in sorted(statuses.items())))


if __name__ == "__main__":
    main()
