"""Clients that use a real server and write down what they did: the traffic of fault tests."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import grpc

from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.faults.history import NEVER, Checked, Op, ViolationError, check
from tests.servers import connect

LONG_TTL_NS: Final = 600 * 10**9
RPC_TIMEOUT_S: Final = 20.0
PROGRESS_LIMIT_S: Final = 30.0

_NAMES: Final = {state: name.removeprefix("KEY_STATE_") for name, state in pb.KeyState.items()}


Held: TypeAlias = tuple[bytes, bytes, int]
"""A lease: key, claim id, token."""


class Profile(NamedTuple):
    """What kind of traffic.

    Attributes:
        n_clients: Clients at once.
        n_keys: Keys that they share, fresh ones apart.
        fresh: Share of claims that name a key nobody has used.
        n_at_once: Keys in a claim at most.
        large: Share of completions with a value of its own file.
        value_bytes: Length of other values at most.
        ttl_ns: Length of leases.
    """

    n_clients: int = 4
    n_keys: int = 40
    fresh: float = 0.3
    n_at_once: int = 3
    large: float = 0.04
    value_bytes: int = 200
    ttl_ns: int = LONG_TTL_NS


class Recorder:
    """The history of all clients, and the values that were sent."""

    def __init__(self, place: Path | None = None) -> None:
        """Start with nothing; a history that is impossible is written to `place`."""
        self._place = place
        self.ops: list[Op] = []
        self.large: dict[tuple[bytes, int], bytes] = {}
        self.errors: list[BaseException] = []
        self._n_settled = 0
        self._calls = itertools.count(1)
        self._moved = threading.Condition()

    def call_number(self) -> int:
        """Give a new number for a call."""
        return next(self._calls)

    def note(self, ops: Sequence[Op]) -> None:
        """Take the operations of one call."""
        with self._moved:
            self.ops.extend(ops)
            self._moved.notify_all()

    def server_is_dead(self) -> None:
        """What has no answer now cannot happen later: the server is gone."""
        now_ns = time.monotonic_ns()
        with self._moved:
            for place in range(self._n_settled, len(self.ops)):
                op = self.ops[place]
                if op.end_ns == NEVER:
                    self.ops[place] = op._replace(gone_ns=now_ns)
            self._n_settled = len(self.ops)

    @property
    def n_acknowledged(self) -> int:
        """Operations with an answer."""
        return sum(op.end_ns != NEVER for op in self.ops)

    @property
    def max_token(self) -> int:
        """The largest token that anybody saw."""
        return max((op.token for op in self.ops if op.end_ns != NEVER), default=0)

    def await_ops(self, n_more: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Return once so many more operations are recorded, or it is over."""
        wanted = len(self.ops) + n_more
        deadline_s = time.monotonic() + PROGRESS_LIMIT_S
        with self._moved:
            while len(self.ops) < wanted and not is_over():
                self._moved.wait(0.05)
                assert time.monotonic() < deadline_s, "there was no load"

    def check(self) -> Checked:
        """Check the history; a key that is left undecided fails as well."""
        try:
            checked = check(self.ops)
        except ViolationError:
            if self._place is not None:
                self._place.write_text("".join(f"{op}\n" for op in self.ops), encoding="utf-8")
            raise
        assert checked.n_undecided == 0, f"{checked.n_undecided} operations are undecided"
        return checked


class Client:
    """One client in a thread of its own; it ends with the first error of a call."""

    def __init__(self, address: str, recorder: Recorder, profile: Profile, seed: int) -> None:
        """Prepare; `start` starts it.

        Args:
            address: The server's.
            recorder: Where it writes down what it did.
            profile: What it does.
            seed: Of its choices.
        """
        self._address = address
        self._recorder = recorder
        self._profile = profile
        self._random = random.Random(seed)
        self._held: list[Held] = []
        self._settled: list[Held] = []
        self._revision = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start."""
        self._thread.start()

    def stop(self) -> None:
        """End after the call under way."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "a client hangs"

    def _run(self) -> None:
        try:
            with connect(self._address) as channel:
                caller = Caller(LockTableStub(channel), self._recorder)
                while not self._stop.is_set():
                    self._one(caller)
        except grpc.RpcError:
            return
        except BaseException as error:  # noqa: BLE001 - the test raises it again
            self._recorder.errors.append(error)

    def _one(self, caller: Caller) -> None:
        draw = self._random.random()
        if draw < 0.4 or not self._held:
            self._claim(caller)
        elif draw < 0.82:
            self._settle(caller)
        elif draw < 0.88:
            key = self._random.choice(self._held)[0]
            caller.reset([key, self._shared_key()], self._revision - self._random.randrange(3))
        elif draw < 0.93:
            caller.renew(*self._random.choice(self._held), self._profile.ttl_ns)
        elif draw < 0.96 and self._settled:
            # Late: a duplicate of what was settled, or of a lease that is long lost.
            key, claim_id, token = self._random.choice(self._settled)
            caller.settle("complete", key, claim_id, token, b"late")
        else:
            caller.lookup([self._shared_key(), self._random.choice(self._held)[0]])
        self._revision = max(self._revision, caller.revision)

    def _shared_key(self) -> bytes:
        return b"shared-%d" % self._random.randrange(self._profile.n_keys)

    def _claim(self, caller: Caller) -> None:
        keys = {
            b"fresh-" + self._random.randbytes(6).hex().encode()
            if self._random.random() < self._profile.fresh
            else self._shared_key()
            for _ in range(self._random.randint(1, self._profile.n_at_once))
        }
        claim_id = self._random.randbytes(16)
        self._held += caller.claim(sorted(keys), claim_id, self._profile.ttl_ns)
        del self._held[:-30]  # the rest stay held for ever

    def _settle(self, caller: Caller) -> None:
        held = self._held.pop(self._random.randrange(len(self._held)))
        self._settled = [*self._settled[-20:], held]
        how = self._random.choice(["complete", "complete", "fail", "release"])
        value = b""
        if how == "complete":
            value = self._random.randbytes(self._random.randint(1, self._profile.value_bytes))
            if self._random.random() < self._profile.large:
                value = self._random.randbytes(100_000)
                if not caller.upload(*held, value):
                    how = "release"
        caller.settle(how, *held, value)


class Caller:
    """Calls of the lock table that write themselves down.

    Attributes:
        revision: The last one seen.
    """

    def __init__(self, stub: Any, recorder: Recorder) -> None:
        """Call by a stub and write into a recorder."""
        self.revision = 0
        self._stub = stub
        self._recorder = recorder

    def _call(self, method: Any, request: Any, ops: list[Op]) -> Any:
        """Call, and write the operations down without an answer if there is none."""
        number, start_ns = self._recorder.call_number(), time.monotonic_ns()
        ops[:] = [op._replace(call=number, start_ns=start_ns, n_keys=len(ops)) for op in ops]
        try:
            reply = method(request, timeout=RPC_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise  # nothing was done
            self._recorder.note(ops)
            raise
        end_ns = time.monotonic_ns()
        self.revision = max(self.revision, reply.revision)
        answers = [_NAMES[state] for state in reply.states]
        ops[:] = [
            op._replace(end_ns=end_ns, revision=reply.revision, answer=answer)
            for op, answer in zip(ops, answers, strict=True)
        ]
        return reply

    def claim(self, keys: list[bytes], claim_id: bytes, ttl_ns: int) -> list[Held]:
        """Claim keys; give what was granted as key, claim id, token."""
        ops = [Op(0, key, "claim", 0, claim_id=claim_id, number=ttl_ns) for key in keys]
        request = pb.ClaimRequest(keys=keys, claim_id=claim_id, ttl_ns=ttl_ns)
        reply = self._call(self._stub.Claim, request, ops)
        tokens = iter(reply.tokens)
        ops = [op._replace(token=next(tokens)) if op.answer == "GRANTED" else op for op in ops]
        self._recorder.note(ops)
        return [(op.key, claim_id, op.token) for op in ops if op.token]

    def settle(self, how: str, key: bytes, claim_id: bytes, token: int, value: bytes = b"") -> str:
        """Settle a lease; give the answer."""
        return self.settle_many([(how, key, claim_id, token, value)])[0]

    def settle_many(self, settlements: Sequence[tuple[str, bytes, bytes, int, bytes]]) -> list[str]:
        """Settle leases, each a way, its key, claim id and token, and a value; give the answers."""
        request, ops = pb.SettleRequest(), []
        for how, key, claim_id, token, value in settlements:
            holder = pb.Holder(key=key, claim_id=claim_id, token=token)
            settlement = request.settlements.add(holder=holder)
            if how == "complete":
                settlement.complete.result.CopyFrom(_result(value))
            elif how == "fail":
                settlement.fail.error = "planned"
            else:
                settlement.release.SetInParent()
            ops.append(Op(0, key, how, 0, claim_id=claim_id, token=token, value=_short(value)))
        self._call(self._stub.Settle, request, ops)
        self._recorder.note(ops)
        return [op.answer for op in ops]

    def renew(self, key: bytes, claim_id: bytes, token: int, ttl_ns: int) -> str:
        """Renew a lease; give the answer."""
        return self.renew_many([(key, claim_id, token)], ttl_ns)[0]

    def renew_many(self, leases: Sequence[Held], ttl_ns: int) -> list[str]:
        """Renew leases; give the answers."""
        request, ops = pb.RenewRequest(), []
        for key, claim_id, token in leases:
            holder = pb.Holder(key=key, claim_id=claim_id, token=token)
            request.renewals.add(holder=holder, ttl_ns=ttl_ns)
            ops.append(Op(0, key, "renew", 0, claim_id=claim_id, token=token, number=ttl_ns))
        self._call(self._stub.Renew, request, ops)
        self._recorder.note(ops)
        return [op.answer for op in ops]

    def reset(self, keys: list[bytes], max_revision: int) -> None:
        """Reset keys that did not change since."""
        keys = list(dict.fromkeys(keys))
        max_revision = max(1, max_revision)
        ops = [Op(0, key, "reset", 0, number=max_revision) for key in keys]
        self._call(self._stub.Reset, pb.ResetRequest(keys=keys, max_revision=max_revision), ops)
        self._recorder.note(ops)

    def lookup(self, keys: list[bytes]) -> None:
        """Read keys, values included."""
        keys = list(dict.fromkeys(keys))
        ops = [Op(0, key, "lookup", 0) for key in keys]
        request = pb.LookupRequest(keys=keys, want_infos=True, want_results=True)
        reply = self._call(self._stub.Lookup, request, ops)
        self._recorder.note(
            [
                op._replace(token=info.token, value=_shown(info))
                for op, info in zip(ops, reply.infos, strict=True)
            ]
        )

    def upload(self, key: bytes, claim_id: bytes, token: int, value: bytes) -> bool:
        """Send a large value; tell whether the lease was still held."""
        half = len(value) // 2
        try:
            for offset, chunk in ((0, value[:half]), (half, value[half:])):
                request = pb.UploadResultRequest(
                    holder=pb.Holder(key=key, claim_id=claim_id, token=token),
                    offset_bytes=offset,
                    chunk=chunk,
                    size_bytes=len(value),
                    sha256=hashlib.sha256(value).digest(),
                )
                self._stub.UploadResult(request, timeout=RPC_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                return False
            raise
        self._recorder.large[key, token] = value
        return True

    def download(self, key: bytes, token: int) -> bytes:
        """Fetch a large value."""
        request = pb.DownloadResultRequest(key=key, token=token)
        reply = self._stub.DownloadResult(request, timeout=RPC_TIMEOUT_S)
        return bytes(reply.chunk)


def _result(value: bytes) -> Any:
    if len(value) < 50_000:
        return pb.Result(storage=pb.Result.STORAGE_INLINE, payload=value)
    digest = hashlib.sha256(value).digest()
    return pb.Result(storage=pb.Result.STORAGE_SERVER, size_bytes=len(value), sha256=digest)


def _short(value: bytes) -> bytes:
    """Give what stands for a value in the history."""
    return hashlib.sha256(value).digest() if len(value) >= 50_000 else value


def _shown(info: Any) -> bytes:
    if info.result.storage == pb.Result.STORAGE_SERVER:
        return bytes(info.result.sha256)
    return bytes(info.result.payload)


def read_back(address: str, recorder: Recorder) -> int:
    """Look every key up that any client named, and fetch every large value; count the keys."""
    with connect(address) as channel:
        caller = Caller(LockTableStub(channel), recorder)
        keys = sorted({op.key for op in recorder.ops})
        for first in range(0, len(keys), 5_000):
            caller.lookup(keys[first : first + 5_000])
        seen = {op.key: op for op in recorder.ops[-len(keys) :]} if keys else {}
        for (key, token), value in recorder.large.items():
            op = seen.get(key)
            if op is None:
                continue
            if op.answer == "DONE" and op.token == token and op.value == _short(value):
                assert caller.download(key, token) == value, f"the value of {key!r} is another"
    return len(keys)


def check_counts(address: str) -> None:
    """Check that the kept counters and indexes agree with a scan."""
    with connect(address) as channel:
        stub = LockTableStub(channel)
        kept = stub.Count(pb.CountRequest(), timeout=RPC_TIMEOUT_S)
        infos = stub.List(pb.ListRequest(), timeout=RPC_TIMEOUT_S)
        found = {"DONE": 0, "FAILED": 0}
        n_held = 0
        while True:
            for info in infos.infos:
                name = _NAMES[info.state]
                if name in found:
                    found[name] += 1
                else:
                    n_held += 1
            if not infos.next_start_key:
                break
            request = pb.ListRequest(start_key=infos.next_start_key)
            infos = stub.List(request, timeout=RPC_TIMEOUT_S)
        assert (kept.done, kept.failed, kept.held + kept.expired) == (
            found["DONE"],
            found["FAILED"],
            n_held,
        )


def claim_new(address: str, recorder: Recorder) -> int:
    """Claim a key that nobody has used; give its token."""
    with connect(address) as channel:
        caller = Caller(LockTableStub(channel), recorder)
        ((_, _, token),) = caller.claim(
            [b"new-" + os.urandom(6).hex().encode()], os.urandom(16), LONG_TTL_NS
        )
        return token
