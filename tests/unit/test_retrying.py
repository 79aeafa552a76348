"""Retries, refusals and giving up, without a network."""

from __future__ import annotations

import logging
import random

import pytest
from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from distlock_server.clock import ManualClock
from run_once.channel import NO_TLS, ReplyT, TransportError
from run_once.client import Grant, LockClient, RetryPolicy
from run_once.errors import AccessError, LimitError, ServerError, ServerUnavailableError
from run_once.retrying import is_retried
from tests.fake_server import FakeServer, FakeTransport, Fault, make_client

RETRIED = ["UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"]
REFUSED = ["FAILED_PRECONDITION", "DATA_LOSS", "INTERNAL"]


class Hanging(FakeTransport):
    """A way on which every attempt hangs until its deadline, and the first one for a day."""

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Hang."""
        self.timeouts_s.append(timeout_s)
        self.server.clock.advance(86_400 if len(self.timeouts_s) == 1 else timeout_s)
        raise TransportError("DEADLINE_EXCEEDED", "hung")


@pytest.fixture
def transport() -> FakeTransport:
    """Give a way to an empty table."""
    return FakeTransport(FakeServer())


@pytest.fixture
def client(transport: FakeTransport) -> LockClient:
    """Give a client whose sleeping moves the clock."""
    return make_client(transport)


@pytest.fixture
def clock(transport: FakeTransport) -> ManualClock:
    """Give the clock of server and client."""
    return transport.server.clock


@pytest.mark.parametrize("code", RETRIED)
def test_retried(code: str, client: LockClient, transport: FakeTransport) -> None:
    """What may pass is tried again until it does."""
    transport.faults.extend([Fault(code)] * 5)
    assert client.lookup([b"a"]).states == bytes([pb.KEY_STATE_ABSENT])
    assert len(transport.timeouts_s) == 6


@pytest.mark.parametrize("code", REFUSED)
def test_refused(code: str, client: LockClient, transport: FakeTransport) -> None:
    """What will not pass is raised at once, as an error of ours that names server and code."""
    transport.faults.append(Fault(code, detail="because"))
    with pytest.raises(ServerError, match=rf"fake:1 \(from a test\).*{code}: because") as raised:
        client.lookup([b"a"])
    assert raised.value.code == code
    assert raised.value.__cause__ is None
    assert len(transport.timeouts_s) == 1


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("UNAUTHENTICATED", "RUN_ONCE_ADDRESS=addrfile:///path"),
        ("PERMISSION_DENIED", "ask whoever runs the server"),
        (NO_TLS, "RUN_ONCE_TLS_CA"),
    ],
)
def test_not_let_in(code: str, advice: str, client: LockClient, transport: FakeTransport) -> None:
    """A refused token, role or certificate is raised at once, and says what to do."""
    transport.faults.append(Fault(code, detail="because"))
    with pytest.raises(
        AccessError, match=rf"fake:1 \(from a test\): because; .*{advice}"
    ) as raised:
        client.lookup([b"a"])
    assert raised.value.code == code
    assert len(transport.timeouts_s) == 1


def test_limit_error(client: LockClient, transport: FakeTransport) -> None:
    """A request the server calls malformed is a LimitError with the server's sentence."""
    with pytest.raises(LimitError, match="a key comes twice"):
        client.claim([b"a", b"a"], ttl_s=60)
    transport.faults.append(Fault("RESOURCE_EXHAUSTED", detail="Sent message larger than max (9)"))
    with pytest.raises(LimitError, match="larger than max"):
        client.lookup([b"a"])


def test_not_our_server(client: LockClient, transport: FakeTransport) -> None:
    """A server without our service is named as such."""
    transport.faults.append(Fault("UNIMPLEMENTED"))
    with pytest.raises(ServerError, match="no distlock of version 1"):
        client.lookup([b"a"])


@pytest.mark.parametrize(
    ("code", "detail", "wanted"),
    [
        ("INTERNAL", "Received RST_STREAM with error code 2", True),
        ("INTERNAL", "Exception deserializing response!", False),
        ("UNKNOWN", "Stream removed", True),
        ("UNKNOWN", "Exception calling application: x", False),
        ("RESOURCE_EXHAUSTED", "too much is waiting", True),
        ("RESOURCE_EXHAUSTED", "Received message larger than max (5 vs. 4)", False),
    ],
)
def test_what_a_detail_decides(code: str, detail: str, *, wanted: bool) -> None:
    """Broken streams are tried again, bugs and oversize are not."""
    assert is_retried(TransportError(code, detail)) is wanted


def test_giving_up(
    client: LockClient,
    transport: FakeTransport,
    clock: ManualClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server that is gone is tried for two minutes, named once in the log and in the error."""
    transport.is_down = True
    start_ns = clock.now_ns()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ServerUnavailableError, match=r"fake:1 \(from a test\)") as raised,
    ):
        client.claim([b"a"], ttl_s=60)
    assert 110 < (clock.now_ns() - start_ns) / 1e9 <= 120
    assert 50 < len(transport.timeouts_s) < 1000
    assert set(transport.timeouts_s) == {10.0}
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "lock server fake:1 (from a test) has not"
    ]
    assert "RUN_ONCE_ADDRESS" in str(raised.value)


def test_overload_is_met_with_jitter(clock: ManualClock, transport: FakeTransport) -> None:
    """Clients that were refused at one moment come back at different ones, later each time."""
    policy = RetryPolicy()
    pauses: list[list[float]] = []
    for seed in range(200):
        transport.faults.extend([Fault("RESOURCE_EXHAUSTED", detail="too much is waiting")] * 8)
        pauses.append([])
        client = LockClient(
            transport, clock=clock, rng=random.Random(seed), sleep=pauses[-1].append, retry=policy
        )
        client.lookup([b"a"])
    for number, row in enumerate(zip(*pauses, strict=True)):
        bound_s = min(policy.max_backoff_s, policy.first_backoff_s * 2**number)
        assert 0 <= min(row) < 0.1 * bound_s
        assert 0.8 * bound_s < max(row) <= bound_s
        assert len(set(row)) == 200


def test_slow_attempts_count() -> None:
    """Attempts that hang count with their time; sleeping through one does not end the trying."""
    transport = Hanging(FakeServer())
    with pytest.raises(ServerUnavailableError, match="did not answer within 1"):
        make_client(transport).lookup([b"a"])
    assert 9 <= len(transport.timeouts_s) <= 12


def test_no_retry(transport: FakeTransport) -> None:
    """With a bound of zero, or a timeout for one attempt, there is one attempt."""
    client = make_client(transport, retry=RetryPolicy(total_s=0))
    transport.is_down = True
    with pytest.raises(ServerUnavailableError):
        client.lookup([b"a"])
    with pytest.raises(ServerUnavailableError, match="within 2 s"):
        make_client(transport).server_info(timeout_s=2)
    assert transport.timeouts_s == [10.0, 2.0]


def test_revive(transport: FakeTransport, clock: ManualClock) -> None:
    """A server of this machine's own that ended is started again, and the call goes through."""

    def revive() -> None:
        transport.is_down = False

    client = LockClient(transport, clock=clock, sleep=clock.advance, revive=revive)
    transport.is_down = True
    assert client.lookup([b"a"]).states == bytes([pb.KEY_STATE_ABSENT])


def test_malformed_answers(client: LockClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that breaks the contract is an error, never a wrong grant."""
    monkeypatch.setattr(FakeServer, "_claim", lambda *_: pb.ClaimReply(states=b"\x02"))
    with pytest.raises(ServerError, match="malformed"):
        client.claim([b"a"], ttl_s=60)
    monkeypatch.setattr(FakeServer, "_settle", lambda *_: pb.SettleReply(states=b"\x0a"))
    with pytest.raises(ServerError, match="malformed"):
        client.release_grants([Grant(b"a", bytes(16), 1, 1, 0)])


def test_close(client: LockClient, transport: FakeTransport) -> None:
    """Closing the client closes its connection."""
    client.close()
    assert transport.is_closed


def test_cut_by_a_fork(client: LockClient, transport: FakeTransport, clock: ManualClock) -> None:
    """Calls that were cancelled for a fork go on at once, however many; a wait ends in time."""
    start_ns = clock.now_ns()
    transport.faults.extend([Fault("FORKED")] * 1000)
    assert list(client.list()) == []
    assert clock.now_ns() == start_ns
    client.claim([b"a"], ttl_s=1000)
    transport.faults.extend([Fault("FORKED", "after"), Fault("FORKED", "after")])
    client.wait([b"a"], 30)
    assert clock.now_ns() - start_ns == 30 * 10**9
