"""Claim -> run -> complete, fail or release, without a network."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server.clock import ManualClock
from distlock_server.state import Done
from run_once import session as session_module
from run_once.answers import SettleAnswer
from run_once.client import LockClient
from run_once.config import Config
from run_once.errors import (
    LimitError,
    NotHeldError,
    ResultError,
    ResultTooLargeError,
    ServerError,
    ServerUnavailableError,
)
from run_once.lease import Lease
from run_once.process import THIS
from run_once.task import Ending, Ran, Session, run_task, settle_ran
from tests.fake_server import FakeServer, FakeTransport, Fault, make_client, make_session


@pytest.fixture
def server() -> FakeServer:
    """Give an empty table."""
    return FakeServer()


@pytest.fixture
def transport(server: FakeServer) -> FakeTransport:
    """Give a way to it."""
    return FakeTransport(server)


@pytest.fixture
def session(transport: FakeTransport) -> Session:
    """Give a session without a thread."""
    return make_session(transport)


@pytest.fixture
def clock(server: FakeServer) -> ManualClock:
    """Give the clock of all."""
    return server.clock


@pytest.fixture
def other(server: FakeServer) -> LockClient:
    """Give another claimant."""
    return make_client(FakeTransport(server))


def _value(_lease: Lease) -> int:
    return 42


def _payload(_lease: Lease, value: int) -> pb.Result:
    return pb.Result(storage=pb.Result.STORAGE_INLINE, payload=b"%d" % value, size_bytes=2)


# ---------------------------------------------------------------- run_task


def test_success(session: Session, server: FakeServer) -> None:
    """The body runs under a held lease; value and result are kept, and the key is done."""
    held: list[bool] = []

    def body(lease: Lease) -> int:
        held.append(lease.held)
        return 42

    outcome = run_task(session, b"a", body, ttl_s=60, store=_payload)
    assert outcome.is_completed
    assert outcome.did_run
    assert (outcome.value, outcome.error, held) == (42, None, [True])
    assert outcome.lease is not None
    assert outcome.lease.is_settled
    record = server.records[b"a"]
    assert isinstance(record, Done)
    assert record.result.payload == b"42"
    assert session.keeper.leases() == []


def test_done_and_busy(session: Session, other: LockClient) -> None:
    """A key that is done or held by another does not run; a result comes if it is wanted."""
    run_task(session, b"a", _value, ttl_s=60, store=_payload)
    ran = run_task(session, b"a", _value, ttl_s=60, want_result=True)
    assert (ran.state, ran.did_run, ran.value) == (pb.KEY_STATE_DONE, False, None)
    assert ran.result is not None
    assert ran.result.payload == b"42"
    other.claim([b"b"], ttl_s=60)
    assert run_task(session, b"b", _value, ttl_s=60).state == pb.KEY_STATE_BUSY


def test_failure(session: Session) -> None:
    """An exception is in the outcome, its traceback's end with the key, which may be retried."""

    def body(_lease: Lease) -> int:
        raise ZeroDivisionError("the reason")

    outcome = run_task(session, b"a", body, ttl_s=60)
    assert outcome.state == pb.KEY_STATE_FAILED
    assert isinstance(outcome.error, ZeroDivisionError)
    (info,) = session.client.lookup([b"a"], want_infos=True).infos
    assert info.error.endswith("ZeroDivisionError: the reason")
    assert len(info.error) <= 100
    assert run_task(session, b"a", _value, ttl_s=60, max_attempts=1).state == (
        pb.KEY_STATE_EXHAUSTED
    )
    retried = run_task(session, b"a", _value, ttl_s=60)
    assert retried.lease is not None
    assert retried.lease.attempt == 2


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupt(session: Session, interrupt: type[BaseException]) -> None:
    """An interrupted body gives its key back, attempt included, and the interrupt goes on."""

    def body(_lease: Lease) -> int:
        raise interrupt

    with pytest.raises(interrupt):
        run_task(session, b"a", body, ttl_s=60)
    assert session.client.lookup([b"a"]).states[0] == pb.KEY_STATE_ABSENT
    assert session.keeper.leases() == []


def test_interrupt_with_the_server_gone(
    session: Session, transport: FakeTransport, clock: ManualClock
) -> None:
    """An interrupt is not held up by a server that is gone."""

    def body(_lease: Lease) -> int:
        transport.is_down = True
        raise KeyboardInterrupt

    start_ns = clock.now_ns()
    with pytest.raises(KeyboardInterrupt):
        run_task(session, b"a", body, ttl_s=60)
    assert clock.now_ns() - start_ns <= 2 * 10**9
    assert transport.timeouts_s[-1] <= 2


def test_lost_at_completion(session: Session, clock: ManualClock, other: LockClient) -> None:
    """A run whose lease another was granted is not accepted, and says what became of the key."""

    def body(_lease: Lease) -> int:
        clock.advance(61)
        other.claim([b"a"], ttl_s=60)
        return 42

    outcome = run_task(session, b"a", body, ttl_s=60)
    assert outcome.state == pb.KEY_STATE_LOST
    assert outcome.lost_state == pb.KEY_STATE_BUSY
    assert (outcome.value, outcome.error) == (42, None)
    assert outcome.lease is not None
    assert outcome.lease.is_lost


def test_late_completion_is_accepted(session: Session, clock: ManualClock) -> None:
    """A lease that ran out may still complete if nobody else was granted the key."""

    def body(_lease: Lease) -> int:
        clock.advance(100)
        return 42

    assert run_task(session, b"a", body, ttl_s=60, keep_alive=False).is_completed


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (TypeError("cannot pickle"), ResultError),
        (ResultTooLargeError("too large"), ResultTooLargeError),
    ],
)
def test_store_that_fails(session: Session, raised: Exception, kind: type[Exception]) -> None:
    """A value that cannot be stored leaves its key not done, and the error says so."""

    def store(_lease: Lease, _value: int) -> pb.Result:
        raise raised

    outcome = run_task(session, b"a", _value, ttl_s=60, store=store)
    assert outcome.state == pb.KEY_STATE_FAILED
    assert type(outcome.error) is kind
    if kind is ResultError:
        assert "the key is not done" in str(outcome.error)
        assert outcome.error.__cause__ is raised
    assert session.client.lookup([b"a"]).states[0] == pb.KEY_STATE_FAILED


def test_store_that_finds_the_lease_lost(
    session: Session, clock: ManualClock, other: LockClient
) -> None:
    """If the lease was lost while storing, that is the outcome, not the store's error."""

    def store(_lease: Lease, _value: int) -> pb.Result:
        clock.advance(61)
        other.claim([b"a"], ttl_s=60)
        raise RuntimeError("not held")

    outcome = run_task(session, b"a", _value, ttl_s=60, store=store)
    assert (outcome.state, outcome.error, outcome.value) == (pb.KEY_STATE_LOST, None, 42)


def test_server_gone_at_completion(session: Session, transport: FakeTransport) -> None:
    """A completion that nobody acknowledges is an error; the lease is not renewed any more."""

    def body(_lease: Lease) -> int:
        transport.is_down = True
        return 42

    with pytest.raises(ServerUnavailableError):
        run_task(session, b"a", body, ttl_s=60)
    assert session.keeper.leases() == []


def test_server_gone_at_failure(
    session: Session, transport: FakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    """The body's exception is not hidden by a server that is gone."""

    def body(_lease: Lease) -> int:
        transport.is_down = True
        raise ZeroDivisionError

    outcome = run_task(session, b"a", body, ttl_s=60)
    assert isinstance(outcome.error, ZeroDivisionError)
    assert outcome.state == pb.KEY_STATE_UNSPECIFIED
    assert "key b'a' failed, and the lock server was not told" in caplog.text


def test_refused_completion(session: Session, transport: FakeTransport) -> None:
    """A completion that the server refuses fails the key with the server's reason."""
    transport.faults.extend([None, Fault("FAILED_PRECONDITION", detail="not uploaded")])
    outcome = run_task(session, b"a", _value, ttl_s=60)
    assert outcome.state == pb.KEY_STATE_FAILED
    assert isinstance(outcome.error, ServerError)


def test_claimed_before(session: Session, server: FakeServer) -> None:
    """A lease claimed ahead is used as it is, and starting clears the mark."""
    (lease,) = session.claim([b"a"], ttl_s=60, ahead=True).leases
    assert not lease.started

    def body(given: Lease) -> int:
        assert given is lease
        assert given.started
        return 42

    assert run_task(session, b"a", body, ttl_s=60, claimed=lease).is_completed
    assert server.methods().count("Claim") == 1


def test_given_claim_id(session: Session, other: LockClient) -> None:
    """With a claim id that another chose, that one can find out the token and free the key."""

    def body(lease: Lease) -> int:
        found = other.claim([b"a"], ttl_s=60, claim_id=bytes(range(16)))
        assert found.grants[0].token == lease.token
        return 42

    assert run_task(session, b"a", body, ttl_s=60, claim_id=bytes(range(16))).is_completed


# ---------------------------------------------------------------- sessions


def test_late_grant_is_renewed_first(session: Session, transport: FakeTransport) -> None:
    """A lease that had run out on its way is renewed before anybody believes in it."""
    transport.faults.append(Fault(when="after"))
    transport.back_s = 40
    claimed = session.claim([b"a"], ttl_s=60)
    transport.back_s = 0
    assert transport.server.methods() == ["Claim", "Claim", "Renew"]
    assert claimed.states == bytes([pb.KEY_STATE_GRANTED])
    assert claimed.leases[0].held


def test_late_grant_that_was_lost(
    session: Session, transport: FakeTransport, other: LockClient, clock: ManualClock
) -> None:
    """If such a lease is lost by then, its key is reported as held by another."""
    handle = transport.server.handle

    def slow(method: str, request: pb.ClaimRequest) -> object:
        reply = handle(method, request)
        if method == "Claim":
            transport.server.handle = handle  # type: ignore[method-assign]
            clock.advance(61)
            other.claim([b"a"], ttl_s=60)
        return reply

    transport.server.handle = slow  # type: ignore[method-assign,assignment]
    claimed = session.claim([b"a", b"b"], ttl_s=60)
    assert list(claimed.states) == [pb.KEY_STATE_BUSY, pb.KEY_STATE_GRANTED]
    assert [lease.key for lease in claimed.leases] == [b"b"]


def test_settle_mixed(session: Session, server: FakeServer) -> None:
    """Leases and handles of others end in one request, in their own ways."""
    first, second, third = session.claim([b"a", b"b", b"c"], ttl_s=60).leases
    answers = session.settle(
        [
            Ending(first, "complete"),
            Ending(second.handle, "fail", error="broken"),
            Ending(third, "release"),
        ]
    )
    assert [answer.state for answer in answers] == [
        pb.KEY_STATE_COMPLETED,
        pb.KEY_STATE_FAILED,
        pb.KEY_STATE_RELEASED,
    ]
    assert server.methods().count("Settle") == 1


def test_release_leaves_others_alone(session: Session, server: FakeServer) -> None:
    """Releasing what is settled already, or nothing, sends nothing."""
    (lease,) = session.claim([b"a"], ttl_s=60).leases
    session.complete(lease)
    session.release([lease])
    session.release([])
    assert server.methods().count("Settle") == 1


def test_child_cannot_settle(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child that settles its parent's lease is told to use the handle."""
    (lease,) = session.claim([b"a"], ttl_s=60).leases
    pid = os.getpid()
    monkeypatch.setattr(THIS, "pid", pid + 1)
    with pytest.raises(NotHeldError, match=r"lease\.handle"):
        session.complete(lease)
    session.release([lease])
    assert session.client.lookup([b"a"]).states[0] == pb.KEY_STATE_BUSY
    assert session.complete(lease.handle).state == pb.KEY_STATE_COMPLETED


def test_close(session: Session, server: FakeServer, transport: FakeTransport) -> None:
    """The end of a process releases what it keeps, leaves fixed leases, and closes."""
    session.claim([b"kept"], ttl_s=60)
    session.claim([b"fixed"], ttl_s=60, keep_alive=False)
    session.close()
    assert server.state_of(b"kept") == pb.KEY_STATE_ABSENT
    assert server.state_of(b"fixed") == pb.KEY_STATE_BUSY
    assert transport.is_closed
    assert transport.timeouts_s[-1] == 2


def test_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """One session serves all who mean the same server, and a child process gets its own."""
    sessions = session_module._Sessions()
    monkeypatch.setattr(session_module, "_SESSIONS", sessions)
    config = Config(address="127.0.0.1:1", source="argument")
    session = Session.get(config)
    assert session.address == "127.0.0.1:1"
    assert Session.get(dataclasses.replace(config, lease_s=1)) is session
    assert Session.get(dataclasses.replace(config, address="127.0.0.1:2")) is not session
    assert Session.get(dataclasses.replace(config, retry_s=1)) is not session
    sessions._reset()
    assert Session.get(config) is not session
    sessions._close_all()


def test_one_refused_completion_costs_no_other(
    session: Session, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is refused is parted until only what is refused by itself is left."""
    keys = [f"key-{number}".encode() for number in range(9)]
    leases = session.claim(keys, ttl_s=60, keep_alive=False).leases
    sizes: list[int] = []
    settle = session.settle

    def refusing(endings: Sequence[Ending], **more: float | None) -> list[SettleAnswer]:
        sizes.append(len(endings))
        is_bad = any(each.lease.key == keys[4] and each.how == "complete" for each in endings)
        if is_bad or len(endings) > 5:
            raise LimitError("too much")
        return settle(endings, **more)

    monkeypatch.setattr(session, "settle", refusing)
    ran = Ran(1, has_value=True)
    outcomes = settle_ran(session, [(lease, ran) for lease in leases])
    assert [outcome.is_completed for outcome in outcomes] == [key != keys[4] for key in keys]
    assert isinstance(outcomes[4].error, LimitError)
    assert [outcome.lease for outcome in outcomes] == leases
    assert len(sizes) < len(keys), "it is parted into halves, not into single ones"
