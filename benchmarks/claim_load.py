"""Clients that claim one key after the other, on one connection or each on its own: a child.

Its report: claims made, and half and 99 of 100 of their times in milliseconds.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

from child import child_job, child_ready, our_client
from client_2021 import Client2021
from run_once.keys import stored_key

TTL_S = 60.0


Claim: TypeAlias = Callable[[str], None]


def ours(address: str, stack: ExitStack) -> Claim:
    """Claim with our client."""
    client = stack.enter_context(our_client(address))

    def claim(key: str) -> None:
        answer = client.claim([stored_key(key, namespace="single")], ttl_s=TTL_S)
        assert answer.grants, key

    return claim


def old(address: str, stack: ExitStack) -> Claim:
    """Claim as the client of 2021 does."""
    client = Client2021(address)
    stack.callback(client.close)

    def claim(key: str) -> None:
        assert client.claim(key), key

    return claim


def connect(job: Mapping[str, Any], stack: ExitStack) -> list[Claim]:
    """Give each thread its way to claim."""
    make = ours if job["kind"] == "ours" else old
    if job["is_shared"]:
        return [make(job["address"], stack)] * job["clients"]
    return [make(job["address"], stack) for _ in range(job["clients"])]


def main() -> None:
    """Claim from so many threads for so long."""
    job = child_job()
    took_s: list[float] = []

    def client(number: int, claim: Callable[[str], None], keys: Iterator[int]) -> None:
        barrier.wait()
        end_s = time.perf_counter() + job["seconds"]
        while (start_s := time.perf_counter()) < end_s:
            claim(f"{os.getpid()}-{number}-{next(keys)}")
            took_s.append(time.perf_counter() - start_s)

    with ExitStack() as stack:
        claims = connect(job, stack)
        for number, claim in enumerate(claims):
            claim(f"{os.getpid()}-{number}-first")  # connects
        barrier = threading.Barrier(len(claims))
        threads = [
            threading.Thread(target=client, args=(number, claim, itertools.count()))
            for number, claim in enumerate(claims)
        ]
        child_ready()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    took_s.sort()
    p50_ms, p99_ms = (took_s[int(len(took_s) * part)] * 1000 for part in (0.5, 0.99))
    print(json.dumps({"claims": len(took_s), "p50_ms": p50_ms, "p99_ms": p99_ms}))


if __name__ == "__main__":
    main()
