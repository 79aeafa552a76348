"""Very many operations on a real server in a short time: clients that name many keys in each call.

Nothing is killed here, so every call has an answer; what is looked for is an order that no correct
server can have done it in. Clients in threads share the keys, and their leases run out.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.faults.history import Checked
from tests.faults.traffic import LONG_TTL_NS, Caller, Held, Recorder, check_counts
from tests.servers import connect

N_CLIENTS: Final = 8
N_SHARED: Final = 3_000
N_AT_ONCE: Final = (20, 300)
SHORT_TTL_NS: Final = 5_000_000
N_SHORT: Final = 3
"""So many clients let their leases run out."""
LIMIT_S: Final = 300.0

MIN_TAKEOVERS: Final = 100
MIN_REFUSED: Final = 1_000
"""Fewer leases that ran out, or claims of keys that others hold, would make a run void."""


class BatchClient(threading.Thread):
    """A client that claims, renews, settles, looks and resets, many keys in one call."""

    def __init__(
        self, address: str, recorder: Recorder, seed: int, n_ops: int, ttl_ns: int
    ) -> None:
        """Prepare it; it ends once all clients have done so many operations."""
        super().__init__(daemon=True)
        self._address = address
        self._recorder = recorder
        self._rng = random.Random(seed)
        self._n_ops = n_ops
        # One for all its leases: the checker knows no renewal that changes the length.
        self._ttl_ns = ttl_ns
        self._held: list[Held] = []
        self._settled: list[Held] = []

    def run(self) -> None:
        """Do it."""
        try:
            with connect(self._address) as channel:
                caller = Caller(LockTableStub(channel), self._recorder)
                while len(self._recorder.ops) < self._n_ops and not self._recorder.errors:
                    self._one(caller)
        except BaseException as error:  # noqa: BLE001 - the test raises it again
            self._recorder.errors.append(error)

    def _one(self, caller: Caller) -> None:
        draw = self._rng.random()
        n_keys = self._rng.randint(*N_AT_ONCE)
        if draw < 0.4 or not self._held:
            self._held += caller.claim(self._keys(n_keys), self._rng.randbytes(16), self._ttl_ns)
        elif draw < 0.75:
            self._settle(caller, n_keys)
        elif draw < 0.8:
            caller.renew_many(self._some(self._held, n_keys), self._ttl_ns)
        elif draw < 0.85 and self._settled:
            # Late: duplicates of what was settled, or of leases that are long lost.
            some = self._some(self._settled, n_keys)
            caller.settle_many([("complete", *held, b"late") for held in some])
        elif draw < 0.93:
            caller.reset(self._keys(n_keys), caller.revision - self._rng.randrange(500))
        else:
            caller.lookup(self._keys(n_keys))

    def _settle(self, caller: Caller, n_keys: int) -> None:
        some = self._some(self._held, n_keys)
        ways = self._rng.choices(["complete", "complete", "fail", "release"], k=len(some))
        settlements = [
            (how, *held, self._rng.randbytes(8) if how == "complete" else b"")
            for how, held in zip(ways, some, strict=True)
        ]
        caller.settle_many(settlements)
        gone = {held[0] for held in some}
        self._held = [held for held in self._held if held[0] not in gone]
        self._settled = [*self._settled[-300:], *some]

    def _keys(self, n_keys: int) -> list[bytes]:
        first = self._rng.randrange(N_SHARED)
        return [b"shared-%d" % ((first + n) % N_SHARED) for n in range(n_keys)]

    def _some(self, held: Sequence[Held], n_keys: int) -> list[Held]:
        """Draw some, each key at most once: a request names none twice."""
        drawn = self._rng.sample(held, min(n_keys, len(held)))
        return list({one[0]: one for one in drawn}.values())


def check_batches(address: str, seed: int, n_ops: int, place: Path) -> Checked:
    """Do so many operations on a fresh server at least, and check their history.

    Args:
        address: The server's.
        seed: Of what the clients choose.
        n_ops: So many.
        place: Takes the history if it is impossible.

    Raises:
        ViolationError: No correct server can have answered so.
        AssertionError: A key was left undecided, or the run could not have failed.
    """
    recorder = Recorder(place)
    rng = random.Random(seed)
    clients = [
        BatchClient(address, recorder, rng.randrange(2**32), n_ops, ttl_ns)
        for ttl_ns in (*[SHORT_TTL_NS] * N_SHORT, *[LONG_TTL_NS] * (N_CLIENTS - N_SHORT))
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(LIMIT_S)
        assert not client.is_alive(), "a client hangs"
    if recorder.errors:
        raise recorder.errors[0]
    checked = recorder.check()
    check_counts(address)
    n_refused = sum(op.kind == "claim" and op.answer == "BUSY" for op in recorder.ops)
    assert checked.n_takeovers >= MIN_TAKEOVERS, "hardly a lease ran out: void"
    assert n_refused >= MIN_REFUSED, "hardly a key was wanted by two: void"
    assert checked.n_unanswered == 0
    return checked
