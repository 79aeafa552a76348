"""A thousand clients that wait for one key: how soon do all know, and what does waiting cost?

python benchmarks/waiters.py

Each client has a long poll (`Wait`) open, over a hundred connections. What waiting costs is the
server's share of one core while nothing happens. The time counts from sending the completion.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc.aio

from child import Child, child_job, child_ready, our_client
from common import Sample, cpu_s, lock_server
from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from report import Report, median, run
from run_once.client import Settlement
from run_once.keys import stored_key

TITLE = "Clients that wait for one key"
CONNECTIONS = 100
POLL_S, TTL_S = 20, 600.0
SETTLED_S = 1.0


async def wait() -> None:
    """Be the clients: wait for the key, and tell when the last of them knew."""
    job = child_job()
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.aio.insecure_channel(job["address"], options)
        for _ in range(min(CONNECTIONS, job["clients"]))
    ]
    stubs: list[Any] = [LockTableStub(channel) for channel in channels]
    request = pb.WaitRequest(keys=[job["key"].encode()], timeout_ns=POLL_S * 10**9)

    async def client(number: int) -> float:
        while True:
            reply = await stubs[number % len(stubs)].Wait(request, timeout=POLL_S + 10)
            if reply.states[0] == pb.KEY_STATE_DONE:
                return time.monotonic()

    tasks = [asyncio.create_task(client(number)) for number in range(job["clients"])]
    await asyncio.sleep(SETTLED_S)  # until all polls are parked
    await asyncio.get_running_loop().run_in_executor(None, child_ready)
    knew = sorted(await asyncio.gather(*tasks))
    print(json.dumps({"half": knew[len(knew) // 2], "last": knew[-1]}))


def measure(report: Report) -> None:
    """Wait and complete, again and again."""
    clients, idle_s = report.pick(1_000, 50), 0.2 if report.quick else 3.0
    half, last, idle = [], [], []
    with lock_server() as server, our_client(server.address) as client:
        for number in range(report.runs):
            key = stored_key(f"waited-for-{number}")
            (grant,) = client.claim([key], ttl_s=TTL_S).grants
            job = {"address": server.address, "clients": clients, "key": key.decode()}
            child = Child("waiters.py", job)
            child.go()
            before_s = cpu_s(server.pid)
            time.sleep(idle_s)
            idle.append(Sample(100 * (cpu_s(server.pid) - before_s) / idle_s))
            sent_s = time.monotonic()
            client.settle([Settlement(grant, "complete")])
            knew = child.result()
            half.append(Sample(knew["half"] - sent_s))
            last.append(Sample(knew["last"] - sent_s))
    how = f"{clients:,} open Wait calls over {min(CONNECTIONS, clients)} connections"
    report.add("until half of them know", half, "s", how)
    report.add("until all know", last, "s", how)
    report.add("the server while they wait", idle, "% of a core", how)
    report.at_most("until all know", median(last), 0.5, "s")
    report.at_most("the server while they wait", median(idle), 5, "% of a core")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        asyncio.run(wait())
    else:
        run("waiters", TITLE, measure)
