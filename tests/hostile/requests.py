"""Hostile requests to a real server process, in batches, and what must hold after each of them.

`run_hostile` is what the tests and the soak run call.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.hostile.largest import LARGEST, OVERSIZE
from tests.hostile.methods import METHODS, READING, Method, raw_call
from tests.hostile.sockets import attack
from tests.hostile.values import Maker, mutated
from tests.servers import ServerProcess, connect

BATCH: Final = 50
PROBE_S: Final = 0.1
"""How long the health probe may take after a batch."""

PROBES: Final = 3
"""The best of so many counts: the machine may be busy with something else, a server that is stuck
or has work left over is so for all of them."""

STALL_S: Final = 1.0
"""However busy the machine is, not even one of them may take so long."""

ANSWER_S: Final = 30.0
"""What is not answered by then never is."""

MAX_MEMORY_BYTES: Final = 700 << 20
MAX_LOG_BYTES: Final = 1 << 20
_HOUR_NS: Final = 3600 * 10**9
_OURS: Final = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
"""What an exception in our code, or in gRPC's around it, looks like."""

_IMPATIENT: Final = frozenset({grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})
_METADATA: Final[tuple[tuple[tuple[str, str | bytes], ...], ...]] = (
    (("authorization", "Bearer none-of-this-server"),),
    (("authorization", "Basic x"), ("authorization", "Bearer")),
    (("x-bin", bytes(range(256))),),
    (("grpc-timeout", "999999999999S"),),
    (("grpc-encoding", "nonsense"),),
    (("x", "y" * 20_000),),
    tuple((f"x-{number}", "y" * 50) for number in range(500)),
)


class Target:
    """The server under attack, with data that must stay, and a connection for the probes."""

    def __init__(self, folder: Path) -> None:
        """Prepare it; `start` starts it."""
        self.server = ServerProcess(folder, "--engine=leveldb")
        self.channels: list[grpc.Channel] = []

    def start(self) -> None:
        """Start it and write the data: done, failed and held keys, and one live lease."""
        self.server.start()
        self.pid = self.server.pid
        self.safe = connect(self.server.address)
        self.table = LockTableStub(self.safe)
        self.health = health_pb2_grpc.HealthStub(self.safe)
        self.channels = [connect(self.server.address) for _ in range(3)]
        self.keys = [b"\x1evalid\x1fkey-%d" % number for number in range(60)]
        claim_id = b"valid-valid-vali"
        reply = self.table.Claim(
            pb.ClaimRequest(keys=self.keys, claim_id=claim_id, ttl_ns=24 * _HOUR_NS, owner="valid")
        )
        self.holders = [
            pb.Holder(key=key, claim_id=claim_id, token=token)
            for key, token in zip(self.keys, reply.tokens, strict=True)
        ]
        settlements = [_settlement(number, holder) for number, holder in enumerate(self.holders)]
        self.table.Settle(pb.SettleRequest(settlements=settlements[:-20]))
        self.before = self.seen()

    def seen(self) -> list[bytes]:
        """Give what a reader sees of the data, less what runs on by itself."""
        request = pb.LookupRequest(keys=self.keys, want_infos=True, want_results=True)
        infos = self.table.Lookup(request, timeout=ANSWER_S).infos
        for info in infos:
            info.remaining_ns = 0
        return [info.SerializeToString() for info in infos]

    def revision(self) -> int:
        """Give the store's revision behind all that was sent so far."""
        reply = self.table.Lookup(pb.LookupRequest(keys=[b"nobody's"]), timeout=ANSWER_S)
        return int(reply.revision)

    def probe(self) -> float:
        """Ask whether it is well; give the best time of some, in seconds."""
        times = []
        for _ in range(PROBES):
            started_s = time.perf_counter()
            reply = self.health.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)
            times.append(time.perf_counter() - started_s)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        assert max(times) <= STALL_S, f"a health probe took {max(times):.3f} s"
        return min(times)

    def check(self) -> float:
        """Check that it lives, answers soon, has failed on nothing and keeps within its memory."""
        best_s = self.probe()
        assert best_s <= PROBE_S, f"the health probe took {best_s:.3f} s"
        assert self.server.pid == self.pid
        assert "Traceback" not in self.server.log, self.server.log[-3_000:]
        n_bytes = memory_bytes(self.pid)
        assert n_bytes <= MAX_MEMORY_BYTES, f"it uses {n_bytes >> 20} MiB"
        return best_s

    def finish(self) -> None:
        """Check that data and lease are what they were, end it, and check the database."""
        assert self.seen() == self.before, "data of others was changed"
        live = self.holders[-1]
        renewals = [pb.Renewal(holder=live, ttl_ns=_HOUR_NS, started=True)]
        renewed = self.table.Renew(pb.RenewRequest(renewals=renewals), timeout=ANSWER_S)
        assert renewed.states == bytes([pb.KEY_STATE_RENEWED])
        settlement = pb.Settlement(holder=live, complete=pb.Complete())
        settled = self.table.Settle(pb.SettleRequest(settlements=[settlement]), timeout=ANSWER_S)
        assert settled.states == bytes([pb.KEY_STATE_COMPLETED])
        assert len(self.server.log) <= MAX_LOG_BYTES, "it has filled its log"
        for channel in (*self.channels, self.safe):
            channel.close()
        assert self.server.terminate() == 0, self.server.log[-3_000:]
        command = [sys.executable, "-m", "distlock_server", "check", f"--db={self.server.db}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "no damage found" in done.stdout, done.stdout + done.stderr


def _settlement(number: int, holder: pb.Holder) -> pb.Settlement:
    if number % 2:
        return pb.Settlement(holder=holder, fail=pb.Fail(error=f"error {number}"))
    value = b"value %d" % number
    result = pb.Result(storage=pb.Result.STORAGE_INLINE, payload=value)
    return pb.Settlement(holder=holder, complete=pb.Complete(result=result))


def memory_bytes(pid: int) -> int:
    """Give how much memory a process uses; 0 where that cannot be known."""
    with contextlib.suppress(OSError):
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * 4096
    return 0


class Sent(NamedTuple):
    """A call under way; whoever is patient must get an answer."""

    method: Method
    call: Any
    is_patient: bool
    began_s: float
    raw: bytes


class Attack:
    """Makes the calls of a run, and judges their answers."""

    def __init__(self, target: Target, rng: random.Random) -> None:
        """Attack a server by a source of chance."""
        self._target = target
        self._rng = rng
        self._maker = Maker(rng)
        self.figures: Counter[str] = Counter(
            tried=0, answered=0, refused=0, given_up=0, below=0, unchanged=0, probes=0
        )

    def batch(self, n_requests: int) -> None:
        """Send requests at once, wait for all answers, and check the server."""
        with contextlib.ExitStack() as cleanup:
            calls = [self._next(cleanup) for _ in range(n_requests)]
            for call in calls:
                if call is not None:
                    self._judge(call)
            self.figures["tried"] += n_requests
            self._target.check()
            self.figures["probes"] += 1

    def one_by_one(self, n_requests: int) -> None:
        """Send requests alone: one that is refused must not have changed anything."""
        for _ in range(n_requests):
            method = self._rng.choice([m for m in METHODS if m.name not in READING])
            before = self._target.revision()
            code = self._judge(self._send(method, self._message(method)))
            # A batch that is not synchronized does what stands before the step that is refused.
            if code is not grpc.StatusCode.OK and method.name != "ProcessBatch":
                assert self._target.revision() == before, f"{method.path}, {code}: it changed data"
                self.figures["unchanged"] += 1
        self.figures["tried"] += n_requests
        self._target.check()
        self.figures["probes"] += 1

    def _next(self, cleanup: contextlib.ExitStack) -> Sent | None:
        """Start a call; None: there is nothing to wait for."""
        rng = self._rng
        method, dice = rng.choice(METHODS), rng.random()
        if dice < 0.02:
            attack(self._target.server.port, rng, cleanup)
            self.figures["below"] += 1
            return None
        if dice < 0.027:
            method, raw = rng.choice((*LARGEST, OVERSIZE))(rng)
            return self._send(method, raw)
        if dice < 0.07:
            path = rng.choice(("/nobody/Knows", method.path + "x", "/", "/distlock.v1.LockTable/"))
            return self._send(method._replace(path=path), b"")
        raw = self._message(method)
        if dice < 0.1:
            return self._send(method, raw, metadata=rng.choice(_METADATA))
        if dice < 0.16:
            return self._send(method, raw, timeout_s=rng.choice((0.0, 0.0005, 0.003)))
        sent = self._send(method, raw)
        if dice < 0.2:
            sent.call.cancel()
            return sent._replace(is_patient=False)
        return sent

    def _message(self, method: Method) -> bytes:
        """Make the bytes of a request: well formed, damaged, or foreign."""
        rng, dice = self._rng, self._rng.random()
        if dice < 0.08:
            return rng.randbytes(rng.randrange(2_000))
        kind = rng.choice(METHODS).request if dice < 0.14 else method.request
        raw: bytes = self._maker.make(kind).SerializeToString()
        return mutated(raw, rng) if dice > 0.7 else raw

    def _send(
        self, method: Method, raw: bytes, *, timeout_s: float | None = None, metadata: Any = None
    ) -> Sent:
        """Start a call; one that would wait or stream is given up soon."""
        if timeout_s is None:
            is_long = method.is_streaming or method.name == "Wait"
            timeout_s = 0.3 if is_long else ANSWER_S
        channel: Any = self._rng.choice(self._target.channels)
        options = {"timeout": timeout_s, "metadata": metadata}
        if method.name == "ServerReflectionInfo":
            call = channel.stream_stream(method.path)(iter([raw]), **options)
        elif method.is_streaming:
            call = channel.unary_stream(method.path)(raw, **options)
        else:
            call = raw_call(channel, method.path).future(raw, **options)
        return Sent(method, call, timeout_s == ANSWER_S, time.monotonic(), raw)

    def _judge(self, sent: Sent) -> grpc.StatusCode:
        """Wait for an answer, and check that it is one."""
        method, call, is_patient, began_s, raw = sent
        try:
            # Of a call for one reply `result`, of a stream what it gives.
            for _ in call if method.is_streaming else (call.result(),):
                pass
            code = grpc.StatusCode.OK
        except (grpc.FutureCancelledError, grpc.RpcError):
            code = call.code()
        assert code not in _OURS, f"{method.path}: {code}: {call.details()}"
        if code is grpc.StatusCode.OK:
            self.figures["answered"] += 1
        elif code in _IMPATIENT:
            self.figures["given_up"] += 1
            for_s = time.monotonic() - began_s
            assert not is_patient, (
                f"{method.path}: {code} ({call.details()}) after {for_s:.1f} s of {ANSWER_S} s, "
                f"{len(raw)} bytes, of them {raw[:200].hex()}"
            )
        else:
            assert code is not grpc.StatusCode.UNAVAILABLE, f"{method.path}: {call.details()}"
            self.figures["refused"] += 1
        return code


def run_hostile(folder: Path, seed: int, n_requests: int) -> Counter[str]:
    """Send hostile requests to a server process that this starts and ends.

    Args:
        folder: Where the server's files go.
        seed: Decides about everything that is sent.
        n_requests: How many.

    Returns:
        How many were tried, of those answered, refused, given up by the caller, and sent below
        gRPC; how many refusals were seen to change nothing; how often health was probed.

    Raises:
        AssertionError: Something does not hold; names the seed.
    """
    rng = random.Random(seed)
    target = Target(folder)
    try:
        target.start()
        attack = Attack(target, rng)
        left = n_requests
        while left > 0:
            n_batch = min(left, BATCH)
            step = attack.one_by_one if rng.random() < 0.15 else attack.batch
            step(n_batch)
            left -= n_batch
        target.finish()
    except Exception as error:
        raise AssertionError(f"hostile requests with seed {seed}: {error!r}") from error
    finally:
        for channel in target.channels:
            channel.close()
        target.server.close()
    return attack.figures
