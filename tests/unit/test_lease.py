"""Leases and their keeper, stepped in one thread under a clock that is moved."""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time

import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server.clock import ManualClock
from run_once.client import LockClient
from run_once.errors import ServerUnavailableError
from run_once.lease import Lease, LeaseHandle, LeaseKeeper
from run_once.process import THIS
from tests.fake_server import FakeServer, FakeTransport, Fault, make_client


class Setup:
    """A table, a client and a keeper without a thread."""

    def __init__(self) -> None:
        self.server = FakeServer()
        self.transport = FakeTransport(self.server)
        self.client = make_client(self.transport)
        self.keeper = LeaseKeeper(self.client, use_thread=False)
        self.clock: ManualClock = self.server.clock
        self.lost: list[Lease] = []

    def claim(self, *keys: bytes, ttl_s: float = 60, keep_alive: bool = True) -> list[Lease]:
        """Claim keys and put their leases under the keeper's care."""
        return [
            self.keeper.adopt(grant, ttl_s=ttl_s, keep_alive=keep_alive, on_lost=self.lost.append)
            for grant in self.client.claim(keys, ttl_s=ttl_s).grants
        ]

    def steal(self, key: bytes) -> None:
        """Let another holder have a key whose lease has run out."""
        (answer,) = make_client(FakeTransport(self.server)).claim([key], ttl_s=1000).grants
        assert answer.key == key

    def renewals(self) -> list[int]:
        """Give the number of leases in each renew request so far."""
        return [
            len(request.renewals)
            for _, request in self.server.requests
            if isinstance(request, pb.RenewRequest)
        ]


@pytest.fixture
def setup() -> Setup:
    """Give an empty table."""
    return Setup()


def test_fresh_lease(setup: Setup) -> None:
    """A granted lease is held, and stops being held a margin before the server ends it."""
    (lease,) = setup.claim(b"a")
    assert lease.held
    assert (lease.key, lease.attempt, lease.lost_state) == (b"a", 1, 0)
    setup.clock.advance(56.9)
    assert lease.held
    setup.clock.advance(0.2)
    assert not lease.held
    assert setup.server.state_of(b"a") == pb.KEY_STATE_BUSY


def test_renewed_at_a_third(setup: Setup) -> None:
    """A kept lease is renewed about every third of its length, and so is held for ever."""
    (lease,) = setup.claim(b"a", ttl_s=60)
    due_ns = setup.keeper.step()
    assert due_ns is not None
    assert 20 <= (due_ns - setup.clock.now_ns()) / 1e9 <= 22
    for _ in range(20):
        setup.clock.advance((due_ns - setup.clock.now_ns()) / 1e9)
        due_ns = setup.keeper.step()
        assert due_ns is not None
        assert lease.held
    assert setup.renewals() == [1] * 20


def test_nothing_is_renewed_before_it_is_due(setup: Setup) -> None:
    """Stepping often costs no requests."""
    setup.claim(b"a")
    for _ in range(10):
        setup.clock.advance(1)
        setup.keeper.step()
    assert setup.renewals() == []


def test_one_request_for_all(setup: Setup) -> None:
    """Leases that are due, and those that nearly are, are renewed in one request."""
    setup.claim(b"a", b"b", b"c")
    setup.clock.advance(5)
    setup.claim(b"d")
    setup.clock.advance(17)
    setup.keeper.step()
    assert setup.renewals() == [4]


def test_short_and_long_leases(setup: Setup) -> None:
    """A long lease is not renewed as often as a short one beside it."""
    setup.claim(b"short", ttl_s=3)
    setup.claim(b"long", ttl_s=3000)
    for _ in range(100):
        setup.clock.advance(1)
        setup.keeper.step()
    assert set(setup.renewals()) == {1}
    assert len(setup.renewals()) >= 50


def test_nothing_kept(setup: Setup) -> None:
    """Without kept leases there is nothing to do, and a lease not kept is left to run out."""
    assert setup.keeper.step() is None
    (lease,) = setup.claim(b"a", ttl_s=10, keep_alive=False)
    assert setup.keeper.step() is None
    assert lease.held
    assert setup.keeper.leases() == []
    setup.clock.advance(10)
    assert not lease.held
    assert lease.is_open


def test_lost_is_final(setup: Setup) -> None:
    """LOST is told once, with the key's state, and nothing brings the lease back."""
    (lease,) = setup.claim(b"a", ttl_s=10)
    setup.clock.advance(11)
    setup.steal(b"a")
    assert setup.keeper.step() is None
    assert not lease.held
    assert lease.is_lost
    assert not lease.is_open
    assert lease.lost_state == pb.KEY_STATE_BUSY
    setup.keeper.step()
    assert setup.lost == [lease]
    assert setup.keeper.leases() == []


def test_doubtful_is_not_lost(setup: Setup) -> None:
    """A lease that ran out while the body kept the interpreter busy goes on with a renewal."""
    (lease,) = setup.claim(b"a", ttl_s=10)
    setup.clock.advance(25)
    assert not lease.held
    assert lease.is_open
    setup.keeper.step()
    assert lease.held
    assert setup.lost == []


def test_unreachable_server(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    """Without an answer it is tried again soon; past expiry it is not believed, but goes on."""
    (lease,) = setup.claim(b"a", ttl_s=30)
    setup.transport.is_down = True
    setup.clock.advance(15)
    with caplog.at_level(logging.WARNING):
        while lease.held:
            due_ns = setup.keeper.step()
            assert due_ns is not None
            assert 0 < due_ns - setup.clock.now_ns() <= 10**9
            setup.clock.advance((due_ns - setup.clock.now_ns()) / 1e9)
        assert caplog.records == []
        for _ in range(5):
            setup.keeper.step()
            setup.clock.advance(1)
    assert len(caplog.records) == 1
    assert "leases on 1 keys have run out" in caplog.text
    assert not lease.is_lost
    setup.transport.is_down = False
    setup.keeper.step()
    assert lease.held
    assert max(setup.transport.timeouts_s[1:]) == 10


def test_lost_reply_of_a_renewal(setup: Setup) -> None:
    """A renewal whose reply was lost is not believed before it was repeated."""
    (lease,) = setup.claim(b"a", ttl_s=30)
    setup.clock.advance(15)
    setup.transport.faults.append(Fault(when="after"))
    setup.keeper.step()
    assert 13 < lease.remaining_s < 14
    setup.clock.advance(1)
    setup.keeper.step()
    assert 28 < lease.remaining_s < 29


def test_renewals_that_overtake_each_other(setup: Setup) -> None:
    """The answer to an older renewal does not shorten the lease."""
    (lease,) = setup.claim(b"a", ttl_s=30)
    expires_ns = lease.grant.expires_ns
    lease.take_renewal(expires_ns + 5)
    lease.take_renewal(expires_ns)
    assert lease.grant.expires_ns == expires_ns + 5


def test_started(setup: Setup) -> None:
    """A lease that was claimed ahead loses the mark with the renewal after it started."""
    (grant,) = setup.client.claim([b"a"], ttl_s=30, ahead=True).grants
    lease = setup.keeper.adopt(grant, ttl_s=30, started=False)
    setup.clock.advance(15)
    setup.keeper.step()
    assert setup.server.state_of(b"a") == pb.KEY_STATE_BUSY_AHEAD
    lease.start()
    setup.clock.advance(15)
    setup.keeper.step()
    assert setup.server.state_of(b"a") == pb.KEY_STATE_BUSY


def test_renew_now(setup: Setup) -> None:
    """Leases, kept or not, can be renewed at once, and then are lost or held."""
    kept, stolen = setup.claim(b"a", b"b", ttl_s=10, keep_alive=False)
    setup.clock.advance(11)
    setup.steal(b"b")
    setup.keeper.renew_now([kept, stolen])
    assert kept.held
    assert stolen.is_lost
    setup.keeper.renew_now([stolen])
    assert setup.renewals() == [2]


def test_lost_behind_a_settlement(setup: Setup) -> None:
    """A renewal that comes after the completion is answered LOST, which is no loss."""
    (lease,) = setup.claim(b"a", ttl_s=10)
    setup.keeper.begin_settling(lease)
    setup.client.settle([_completion(lease)])
    setup.clock.advance(11)
    setup.keeper.step()
    assert not lease.is_lost
    setup.keeper.end_settling(lease)
    assert lease.is_settled
    assert not lease.held
    assert setup.lost == []
    assert setup.keeper.step() is None


def test_settlement_answered_lost(setup: Setup) -> None:
    """A refused settlement is a loss; telling it twice is not."""
    (lease,) = setup.claim(b"a", ttl_s=10)
    setup.keeper.end_settling(lease, lost_state=pb.KEY_STATE_DONE)
    setup.keeper.end_settling(lease, lost_state=pb.KEY_STATE_BUSY)
    assert lease.lost_state == pb.KEY_STATE_DONE
    assert setup.lost == [lease]


def test_on_lost_that_raises(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    """A callback that raises is logged, and the other leases are told all the same."""
    first, second = setup.claim(b"a", b"b", ttl_s=10)

    def fail(_lease: Lease) -> None:
        raise RuntimeError("planted")

    first.on_lost = fail
    setup.clock.advance(11)
    setup.steal(b"a")
    setup.steal(b"b")
    setup.keeper.step()
    assert first.is_lost
    assert setup.lost == [second]
    assert "on_lost of key b'a' raised" in caplog.text


def test_handle(setup: Setup) -> None:
    """The handle pickles and can settle the key; the lease itself says to use it."""
    (lease,) = setup.claim(b"a")
    handle: LeaseHandle = pickle.loads(pickle.dumps(lease.handle))
    assert handle == lease.handle
    assert (handle.address, handle.key, handle.token) == ("fake:1", b"a", lease.token)
    assert handle.grant.claim_id == lease.grant.claim_id
    with pytest.raises(TypeError, match=r"pass lease\.handle"):
        pickle.dumps(lease)


def test_child_holds_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forked child no lease is held, nothing is renewed, and the keeper takes no lease."""
    (lease,) = setup.claim(b"a", ttl_s=10)
    grant = lease.grant
    pid = os.getpid()
    monkeypatch.setattr(THIS, "pid", pid + 1)
    assert not lease.held
    assert not lease.is_open
    setup.clock.advance(5)
    assert setup.keeper.step() is None
    assert setup.keeper.leases() == []
    with pytest.raises(RuntimeError, match="forked"):
        setup.keeper.adopt(grant, ttl_s=10)
    setup.keeper.close()
    monkeypatch.undo()
    assert setup.keeper.leases() == [lease]
    assert setup.renewals() == []


def test_repr(setup: Setup) -> None:
    """A lease shows key, token and what remains."""
    (lease,) = setup.claim(b"a")
    assert repr(lease) == "<Lease b'a' token=1 open, 57 s left>"


def test_closed_keeper(setup: Setup) -> None:
    """A closed keeper renews nothing and takes no lease, so that the process can end."""
    setup.claim(b"a", ttl_s=10)
    setup.keeper.close()
    setup.claim(b"b", ttl_s=10)
    assert setup.keeper.step() is None


def _completion(lease: Lease):  # type: ignore[no-untyped-def] # noqa: ANN202 (shorter than its import)
    from run_once.client import Settlement

    return Settlement(lease.grant, "complete")


class _Threaded(Setup):
    """A keeper with its thread, on the machine's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.client = LockClient(self.transport)
        self.keeper = LeaseKeeper(self.client)


def _await(condition: object, timeout_s: float = 20.0) -> None:
    """Wait for something that another thread does."""
    assert callable(condition)
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.005)


def test_thread_renews_and_ends() -> None:
    """The thread starts with the first kept lease, is a daemon, renews, and ends at close."""
    setup = _Threaded()
    assert setup.keeper._thread.thread is None
    setup.claim(b"a", ttl_s=3000, keep_alive=False)
    assert setup.keeper._thread.thread is None
    setup.claim(b"slow", ttl_s=3000)
    _await(lambda: setup.keeper._thread.thread is not None)
    thread = setup.keeper._thread.thread
    assert isinstance(thread, threading.Thread)
    assert thread.daemon
    (lease,) = setup.claim(b"fast", ttl_s=0.3)
    _await(lambda: len(setup.renewals()) >= 3)
    setup.keeper.drop(lease)
    setup.keeper.close()
    _await(lambda: not thread.is_alive())


def test_thread_outlives_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    """An error that nobody thought of is logged, and renewing goes on."""
    setup = _Threaded()
    renew = setup.client.renew
    raised: list[bool] = []

    def fail_once(*arguments: object, **options: object) -> object:
        if not raised:
            raised.append(True)
            raise ZeroDivisionError
        return renew(*arguments, **options)  # type: ignore[arg-type]

    setup.client.renew = fail_once  # type: ignore[method-assign,assignment]
    setup.claim(b"a", ttl_s=0.3)
    _await(lambda: len(setup.renewals()) >= 1)
    setup.keeper.close()
    assert "renewing leases failed" in caplog.text


def test_unavailable_is_an_error_elsewhere(setup: Setup) -> None:
    """A renewal on request reports a server that is gone, unlike the background's."""
    (lease,) = setup.claim(b"a")
    setup.transport.is_down = True
    with pytest.raises(ServerUnavailableError):
        setup.keeper.renew_now([lease])
