"""One worker of a loop that several share, and what it asked the server for: a child of benchmarks.

It notes each claim request and each item at the transport, on the clock that all processes of a
machine share. Its report: `items` [key, handed out, ended], `claims` [sent, answered, keys
granted], `freed` [answered, keys given back], `began` and `ended`, all times in seconds.
"""

from __future__ import annotations

import json
import time
from typing import Any

from child import child_job, child_ready
from distlock_proto import lock_table_pb2 as pb
from run_once import DistributedIterator
from run_once.channel import GrpcTransport

Claims = list[tuple[float, float, list[str]]]


def trace() -> tuple[Claims, list[tuple[float, list[str]]]]:
    """Have every claim and every release of this process noted; give the lists."""
    claims: Claims = []
    freed: list[tuple[float, list[str]]] = []
    plain: Any = GrpcTransport.call

    def call(self: GrpcTransport, method: str, request: Any, *args: Any, **more: Any) -> Any:
        sent_s = time.monotonic()
        reply = plain(self, method, request, *args, **more)
        if method.startswith("Claim"):
            states = bytes(reply.states)
            granted = [
                key.decode()
                for key, state in zip(request.keys, states, strict=True)
                if state == pb.KEY_STATE_GRANTED
            ]
            claims.append((sent_s, time.monotonic(), granted))
        elif method.startswith("Settle"):
            keys = [item.holder.key.decode() for item in request.settlements]
            given_back = [
                key
                # Behind them come those that are completed in the short form.
                for key, state in zip(keys, bytes(reply.states), strict=False)
                if state == pb.KEY_STATE_RELEASED
            ]
            freed.append((time.monotonic(), given_back))
        return reply

    GrpcTransport.call = call  # type: ignore[method-assign]
    return claims, freed


def main() -> None:
    """Loop over the keys of the job and sleep in each body as long as the job says."""
    job = child_job()
    claims, freed = trace()
    sleeps: list[float] = job.get("sleeps") or []
    items: list[tuple[str, float, float]] = []
    keys = [f"key-{number:06d}" for number in range(job["count"])]
    child_ready()
    began_s = time.monotonic()
    for key in DistributedIterator(keys, namespace=job["namespace"]):
        handed_s = time.monotonic()
        if sleeps:
            time.sleep(sleeps[int(key[4:])])
        items.append((key, handed_s, time.monotonic()))
    ended_s = time.monotonic()
    report = {"items": items, "claims": claims, "freed": freed, "began": began_s, "ended": ended_s}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
