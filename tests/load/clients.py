"""Clients of load tests: busy ones, crowds that do little, keepers of leases, floods."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import grpc

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from run_once.channel import GrpcTransport, TransportError
from run_once.client import LockClient, RetryPolicy, Settlement
from run_once.lease import Lease, LeaseKeeper
from tests.faults import traffic
from tests.faults.history import Op
from tests.faults.traffic import Profile, Recorder
from tests.servers import ServerProcess, connect

CROWD: Final = Path(__file__).with_name("crowd.py")
CROWD_TTL_S: Final = 4.5
KEPT_TTL_S: Final = 3.0
N_RIVALS: Final = 6

_PATIENT: Final = RetryPolicy(total_s=240.0, attempt_s=30.0)


class Busy(traffic.Client):
    """A client that goes on when it is refused for overload."""

    refused = 0

    def _one(self, caller: traffic.Caller) -> None:
        try:
            super()._one(caller)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            self.refused += 1
            time.sleep(self._random.uniform(0, 0.5))


class BusyClients:
    """Busy clients, each with a connection of its own, that write their history down."""

    def __init__(
        self, server: ServerProcess, recorder: Recorder, n_clients: int, rng: random.Random
    ) -> None:
        """Start them."""
        profile = Profile(n_clients=n_clients, n_keys=2 * n_clients, fresh=0.5, large=0.01)
        self._recorder = recorder
        self.clients = [
            Busy(server.address, recorder, profile, rng.randrange(2**32)) for _ in range(n_clients)
        ]
        for client in self.clients:
            client.start()

    def end(self) -> int:
        """End them, the server being gone or not; count the refused calls."""
        for client in self.clients:
            client.stop()
        for client in self.clients:
            client.join()
        if self._recorder.errors:
            raise self._recorder.errors[0]
        return sum(client.refused for client in self.clients)


class CrowdProcess:
    """A process of clients that hold leases and wait; see `crowd.py`."""

    def __init__(self, cleanup: ExitStack, address: str, n_clients: int) -> None:
        """Start it."""
        self.n_leases = n_clients // 2
        self._process = subprocess.Popen(
            [sys.executable, str(CROWD), address, str(n_clients), str(CROWD_TTL_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        cleanup.callback(self._close)

    def _close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def await_ready(self) -> None:
        """Return once all leases are granted."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the crowd has ended"

    def end(self, recorder: Recorder) -> Counter[str]:
        """Complete all leases, and give what happened; nothing may have been lost."""
        said, _ = self._process.communicate(timeout=100)
        counts, history = json.loads(said)
        counts = Counter(counts)
        for one in history:
            recorder.note(_ops(recorder, one))
        assert counts["LOST"] == 0, f"leases of holders that renewed were lost: {counts}"
        assert counts["COMPLETED"] == counts["woken"] == self.n_leases, counts
        return counts


def _ops(recorder: Recorder, lease: dict[str, Any]) -> list[Op]:
    """Give the history of one lease of a crowd."""
    start_ns, end_ns, revision = lease["claim"]
    op = Op(
        recorder.call_number(),
        lease["key"].encode(),
        "claim",
        start_ns,
        end_ns,
        revision,
        answer="GRANTED",
        claim_id=bytes.fromhex(lease["claim_id"]),
        token=lease["token"],
        number=int(CROWD_TTL_S * 1e9),
    )
    start_ns, end_ns, revision, answer = lease["complete"]
    completion = op._replace(
        call=recorder.call_number(),
        kind="complete",
        start_ns=start_ns,
        end_ns=end_ns,
        revision=revision,
        answer=answer,
        number=0,
    )
    return [op, completion]


class Kept:
    """Leases that real keepers keep alive; half of them start only while they are kept."""

    def __init__(self, address: str, n_keepers: int, n_leases: int, name: str) -> None:
        """Claim them."""
        self.lost: list[bytes] = []
        self.n_tries = 0
        self._is_over = threading.Event()
        self._clients = [_client(address) for _ in range(n_keepers)]
        self._keepers = [LeaseKeeper(client) for client in self._clients]
        self._leases: list[tuple[LockClient, Lease]] = []
        for number, (client, keeper) in enumerate(zip(self._clients, self._keepers, strict=True)):
            for ahead in (False, True):
                keys = [
                    f"{name}-{number}-{ahead}-{place}".encode()
                    for place in range(n_leases // n_keepers // 2)
                ]
                claimed = client.claim(keys, ttl_s=KEPT_TTL_S, ahead=ahead)
                assert len(claimed.grants) == len(keys)
                for grant in claimed.grants:
                    lease = keeper.adopt(
                        grant, ttl_s=KEPT_TTL_S, started=not ahead, on_lost=self._note
                    )
                    self._leases.append((client, lease))

        self._rivals = [
            threading.Thread(target=self._try_to_take, args=(address,), daemon=True)
            for _ in range(N_RIVALS)
        ]
        for rival in self._rivals:
            rival.start()

    def _try_to_take(self, address: str) -> None:
        """Claim all of the keys again and again, as somebody else."""
        client = _client(address)
        keys = [lease.key for _, lease in self._leases]
        while not self._is_over.wait(0.1):
            self.lost += [grant.key for grant in client.claim(keys, ttl_s=60).grants]
            self.n_tries += 1
        client.close()

    def _note(self, lease: Lease) -> None:
        self.lost.append(lease.key)

    def start(self) -> None:
        """Have those that were claimed ahead start: their next renewal must be written."""
        for _, lease in self._leases:
            lease.start()

    def complete(self) -> int:
        """Complete all of them; give their number."""
        self._is_over.set()
        for rival in self._rivals:
            rival.join(60)
        assert self.n_tries, "nobody tried to take the keys"
        assert self.lost == [], f"leases that were kept alive were lost: {self.lost}"
        for client, lease in self._leases:
            (answer,) = client.settle([Settlement(lease.grant, "complete")])
            assert answer.state == pb.KEY_STATE_COMPLETED, f"{lease} was lost"
        return len(self._leases)

    def close(self) -> None:
        """Keep nothing alive any more."""
        self._is_over.set()
        for keeper in self._keepers:
            keeper.close()
        for client in self._clients:
            client.close()


class Counting(GrpcTransport):
    """A way to the server that counts what is refused for overload."""

    n_refused = 0

    def call(self, method: str, request: Any, reply_type: Any, timeout_s: float) -> Any:
        """Send one request."""
        try:
            return super().call(method, request, reply_type, timeout_s)
        except TransportError as error:
            self.n_refused += error.code == "RESOURCE_EXHAUSTED"
            raise


class Flood:
    """Clients that claim and complete many keys in a request, refused or not.

    Attributes:
        slowest_s: The longest that a claim took.
    """

    def __init__(
        self,
        address: str,
        *,
        n_clients: int = 1,
        n_rounds: int = 1,
        n_keys: int = 1,
        name: str,
        key_bytes: int = 0,
    ) -> None:
        """Start them.

        Args:
            address: The server's.
            n_clients: How many, each with a connection of its own.
            n_rounds: How often each claims and completes.
            n_keys: How many keys at once.
            name: How the keys begin.
            key_bytes: How long they are at least.
        """
        self.slowest_s = 0.0
        self._key_bytes = key_bytes
        self.tokens: list[int] = []
        self._n_wanted = n_clients * n_rounds * n_keys
        self._transports = [Counting(address) for _ in range(n_clients)]
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(LockClient(transport, retry=_PATIENT), n_rounds, n_keys, f"{name}-{number}"),
                daemon=True,
            )
            for number, transport in enumerate(self._transports)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, client: LockClient, n_rounds: int, n_keys: int, name: str) -> None:
        try:
            for number in range(n_rounds):
                keys = [
                    f"{name}-{number}-{place}".ljust(self._key_bytes, "x").encode()
                    for place in range(n_keys)
                ]
                began_s = time.monotonic()
                claimed = client.claim(keys, ttl_s=600)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
                assert [grant.key for grant in claimed.grants] == keys, "not all was granted"
                self.tokens += [grant.token for grant in claimed.grants]
                answers = client.settle([Settlement(grant, "complete") for grant in claimed.grants])
                assert {answer.state for answer in answers} == {pb.KEY_STATE_COMPLETED}
        except BaseException as error:  # noqa: BLE001 - the test raises it again
            self._errors.append(error)
        finally:
            client.close()

    def end(self) -> int:
        """Wait until all is done, nothing twice; count what was refused."""
        for thread in self._threads:
            thread.join(300)
            assert not thread.is_alive(), "a client hangs"
        if self._errors:
            raise self._errors[0]
        assert len(set(self.tokens)) == len(self.tokens) == self._n_wanted
        return sum(transport.n_refused for transport in self._transports)


class LargeRequests:
    """Clients of 2021 that ask for a held lock with megabytes of data, until each has its answer.

    Attributes:
        n_refused: How often one was refused for overload.
        n_answered: How often one was told that the lock is held.
    """

    def __init__(self, address: str, *, n_clients: int, n_bytes: int) -> None:
        """Take the lock and start them."""
        self.n_refused = 0
        self.n_answered = 0
        self._address = address
        self._errors: list[BaseException] = []
        lock = legacy_pb2.Lock(global_id="large", data=bytes(n_bytes))
        lock.expires_in.FromSeconds(600)
        content = legacy_pb2.AcquireLockRequest(lock=lock).SerializeToString()
        lock.ClearField("data")
        with connect(address) as channel:
            first = legacy_pb2.AcquireLockRequest(lock=lock)
            LockManagerServiceStub(channel).AcquireLock(first, timeout=60)
        self._threads = [
            threading.Thread(target=self._run, args=(content,), daemon=True)
            for _ in range(n_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, content: bytes) -> None:
        try:
            with connect(self._address) as channel:
                call: Any = channel.unary_unary("/distlock.LockManagerService/AcquireLock")
                self._ask(call, content)
        except BaseException as error:  # noqa: BLE001 - the test raises it again
            self._errors.append(error)

    def _ask(self, call: Any, content: bytes) -> None:
        while True:
            try:
                reply = legacy_pb2.AcquireLockResponse.FromString(call(content, timeout=120))
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                self.n_refused += 1
                time.sleep(random.uniform(0, 1))
            else:
                assert not reply.HasField("acquired_lock")
                self.n_answered += 1
                return

    def end(self) -> None:
        """Wait until all have had their answers."""
        for thread in self._threads:
            thread.join(300)
            assert not thread.is_alive(), "a client hangs"
        if self._errors:
            raise self._errors[0]


def _client(address: str) -> LockClient:
    return LockClient(GrpcTransport(address), retry=_PATIENT)
