"""Many clients in one process, each with a connection of its own, that do little.

Every other one holds a lease and renews it; the next one waits for that key. At the end of stdin
each lease is completed, and what happened is one line of JSON on stdout: counts, and for each lease
what a history needs. "ready" on stdout: all have their leases.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc.aio

from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub

_PASSING: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
_RPC_TIMEOUT_S: Final = 20.0
_WAIT_S: Final = 50


class Crowd:
    """The clients of one process."""

    def __init__(self, address: str, ttl_s: float) -> None:
        self.counts: Counter[str] = Counter()
        self.history: list[dict[str, Any]] = []
        self.ending = asyncio.Event()
        self._address = address
        self._ttl_ns = int(ttl_s * 1e9)

    def stub(self) -> Any:
        """Make a connection."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        return LockTableStub(grpc.aio.insecure_channel(self._address, options=options))

    async def hold(self, key: bytes, held: asyncio.Event) -> None:
        """Claim a key and renew its lease until the end, then complete it."""
        stub, claim_id = self.stub(), os.urandom(16)
        claim = pb.ClaimRequest(keys=[key], claim_id=claim_id, ttl_ns=self._ttl_ns)
        claimed, reply = await self._timed(stub.Claim, claim)
        (token,) = reply.tokens
        self.counts["leases"] += 1
        held.set()
        holder = pb.Holder(key=key, claim_id=claim_id, token=token)
        while not await self._is_over(self._ttl_ns / 3e9):
            renewal = pb.Renewal(holder=holder, ttl_ns=self._ttl_ns, started=True)
            reply = await self._patiently(stub.Renew, pb.RenewRequest(renewals=[renewal]))
            self.counts[_name(reply.states[0])] += 1
        settlement = pb.Settlement(holder=holder, complete=pb.Complete())
        settle = pb.SettleRequest(settlements=[settlement])
        completed, reply = await self._timed(stub.Settle, settle)
        self.counts[_name(reply.states[0])] += 1
        self.history.append(
            {
                "key": key.decode(),
                "claim_id": claim_id.hex(),
                "token": token,
                "claim": claimed,
                "complete": [*completed, _name(reply.states[0])],
            }
        )

    async def wait(self, key: bytes, held: asyncio.Event) -> None:
        """Wait for a key until it is done."""
        stub = self.stub()
        await held.wait()
        request = pb.WaitRequest(keys=[key], timeout_ns=_WAIT_S * 10**9)
        while True:
            self.counts["waits"] += 1
            reply = await self._patiently(stub.Wait, request, _WAIT_S + _RPC_TIMEOUT_S)
            name = _name(reply.states[0])
            if name == "DONE":
                self.counts["woken"] += 1
                return
            if name != "BUSY":
                self.counts[f"waited for {name}"] += 1

    async def _timed(
        self, method: Callable[..., Awaitable[Any]], request: Any
    ) -> tuple[list[Any], Any]:
        start_ns = time.monotonic_ns()
        reply = await self._patiently(method, request)
        return [start_ns, time.monotonic_ns(), reply.revision], reply

    async def _patiently(
        self, method: Callable[..., Awaitable[Any]], request: Any, timeout_s: float = _RPC_TIMEOUT_S
    ) -> Any:
        while True:
            try:
                return await method(request, timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING:
                    raise
                self.counts[error.code().name] += 1
            await asyncio.sleep(random.uniform(0, 0.5))

    async def _is_over(self, after_s: float) -> bool:
        try:
            await asyncio.wait_for(self.ending.wait(), after_s * random.uniform(0.8, 1))
        except asyncio.TimeoutError:
            return False
        return True


def _name(state: int) -> str:
    return pb.KeyState.Name(state).removeprefix("KEY_STATE_")


async def run(address: str, n_clients: int, ttl_s: float) -> None:
    """Be the crowd."""
    crowd = Crowd(address, ttl_s)
    tasks, holders = [], []
    for number in range(n_clients // 2):
        key, held = b"crowd-%d-%d" % (os.getpid(), number), asyncio.Event()
        tasks += [crowd.hold(key, held), crowd.wait(key, held)]
        holders.append(held)
    work: asyncio.Future[Any] = asyncio.gather(*tasks)
    for held in holders:
        started: asyncio.Future[Any] = asyncio.ensure_future(held.wait())
        await asyncio.wait([work, started], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()  # raises what went wrong
    _say("ready")
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    crowd.ending.set()
    await work
    _say(json.dumps([crowd.counts, crowd.history]))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
