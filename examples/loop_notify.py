"""A loop that says itself what succeeded: each key is exclusively ours for 60 seconds.

    python examples/loop_notify.py

The lease is not renewed. Only `notify_success` makes a key done; `notify_failure` leaves it to
whoever asks next.
"""

from __future__ import annotations

import argparse

from run_once import DistributedIterator, LeaseLostError, notify_failure, notify_success


def process(key: str) -> None:
    """Work on one key; every seventh fails."""
    if int(key.removeprefix("item-")) % 7 == 0:
        raise ValueError(f"{key} cannot be processed")


def main() -> None:
    """Work on the keys, and say what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=100, help="number of keys")
    parser.add_argument("--namespace", default="example-notify", help="keeps these keys apart")
    options = parser.parse_args()
    keys = [f"item-{number}" for number in range(1, options.keys + 1)]
    succeeded, failed = 0, 0
    for key in DistributedIterator(keys, timeout=60, namespace=options.namespace):
        try:
            process(key)
            notify_success(key)
            succeeded += 1
        except LeaseLostError as error:
            print(error)  # it took longer than 60 s, and another was granted the key
        except ValueError as error:
            notify_failure(key, error)
            failed += 1
    print(f"succeeded: {succeeded}; failed: {failed}")


if __name__ == "__main__":
    main()
