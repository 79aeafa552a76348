"""One lease that ran out, and a newer one on its key: the process kept none of its leases.

A renewal or settlement that named the key twice was refused as a whole, again and again.
"""

from __future__ import annotations

from distlock_proto import lock_table_pb2 as pb
from run_once.session import Ending
from tests.fake_server import FakeServer, FakeTransport, make_session


def test_all_leases_are_kept() -> None:
    """The older lease is found to be lost; the newer one and the others are renewed."""
    session = make_session(FakeTransport(FakeServer()))
    clock = session.client.clock
    (older,) = session.claim([b"a"], ttl_s=10).leases
    (other,) = session.claim([b"b"], ttl_s=100).leases
    session.client.transport.server.clock.advance(11)  # type: ignore[attr-defined]
    (newer,) = session.claim([b"a"], ttl_s=10).leases
    session.keeper.step(clock.now_ns() + 60 * 10**9)
    assert (older.is_lost, newer.is_lost, other.is_lost) == (True, False, False)
    assert session.keeper.leases() == [other, newer]


def test_all_leases_are_released() -> None:
    """Settling both in one call answers each for itself, in order."""
    server = FakeServer()
    session = make_session(FakeTransport(server))
    (older,) = session.claim([b"a"], ttl_s=10).leases
    server.clock.advance(11)
    newer, other = session.claim([b"a", b"b"], ttl_s=10).leases
    endings = [Ending(older, "release"), Ending(newer, "complete"), Ending(other, "release")]
    states = [answer.state for answer in session.settle(endings)]
    assert states == [pb.KEY_STATE_LOST, pb.KEY_STATE_COMPLETED, pb.KEY_STATE_RELEASED]
    assert server.state_of(b"a") == pb.KEY_STATE_DONE
