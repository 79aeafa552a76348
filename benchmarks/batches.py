"""Batches of keys claimed by one client, synced, beside Redis with `appendfsync always`.

python benchmarks/batches.py
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import limits
from child import our_client
from common import Sample, lock_server, rate, sized, take_turns
from peers import Redis, redis_server
from report import Report, ratio, run
from run_once.client import LockClient
from run_once.keys import stored_key

TITLE = "Batches of keys claimed by one client"
BATCHES = (1, 10, 100, 1_000, 5_000)
TARGETS = {100: 0.5, 1_000: 0.8}
TTL_S = 60
OWNER = "batches@benchmark"
_numbers = itertools.count()


def new_keys(count: int) -> list[str]:
    """Give keys that nobody has named."""
    return [f"key-{number:09d}" for number in itertools.islice(_numbers, count)]


def ours(client: LockClient, size: int, batches: int) -> None:
    """Claim batches with our client."""
    for _ in range(batches):
        keys = [stored_key(key, namespace="batches") for key in new_keys(size)]
        assert len(client.claim(keys, ttl_s=TTL_S).grants) == size


def lua(redis: Redis, size: int, batches: int) -> None:
    """Lock batches with a script."""
    for _ in range(batches):
        assert redis.lua_claim(keys=new_keys(size), args=[OWNER, TTL_S * 1000]) == size


def set_nx(redis: Redis, _size: int, count: int) -> None:
    """Lock single keys, each with a command of its own."""
    for key in new_keys(count):
        assert redis.client.set(key, OWNER, nx=True, px=TTL_S * 1000)


def side(
    report: Report, size: int, pid: int | None, claim: Callable[[int], None]
) -> Callable[[], Sample]:
    """Give one run of a side, as long as it should be."""
    batches = sized(1, report.pick(1_000_000 // size, 20), report.goal_s(0.4), claim)
    return lambda: rate(batches * size, lambda: claim(batches), pid)


def measure(report: Report) -> None:
    """Measure each size of batches, the sides taking turns."""
    with (
        lock_server() as server,
        our_client(server.address) as client,
        redis_server(report) as redis,
        limits.leveldb(report) as leveldb,
    ):
        for size in BATCHES:
            of = functools.partial(side, report, size)
            sides = {"run-once": of(server.pid, functools.partial(ours, client, size))}
            if redis is not None:
                sides["Redis, Lua"] = of(redis.pid, functools.partial(lua, redis, size))
                if size == 1:
                    sides["Redis, SET"] = of(redis.pid, functools.partial(set_nx, redis, size))
            if leveldb is not None:
                write = functools.partial(leveldb.write, keys=size)
                sides["limit: LevelDB"] = of(None, write)
            add(report, size, take_turns(report.runs, sides))
    limits.disk(report)


CALLS = {
    "run-once": "LockClient.claim(keys), synced",
    "Redis, Lua": "EVALSHA of SET NX PX for each key, appendfsync always",
    "Redis, SET": "SET key NX PX, appendfsync always",
    "limit: LevelDB": "plyvel, write_batch(sync=True), no rule and no wire",
}


def add(report: Report, size: int, taken: dict[str, list[Sample]]) -> None:
    """Add what was measured with batches of this size."""
    for name, samples in taken.items():
        report.add(f"{name}, batches of {size:,}", samples, how=CALLS[name])
        report.point("batch", name, size, samples)
    if size in TARGETS and "Redis, Lua" in taken:
        what = f"batches of {size:,} beside Redis"
        report.at_least(what, ratio(taken["run-once"], taken["Redis, Lua"]), TARGETS[size])


if __name__ == "__main__":
    run("batches", TITLE, measure)
