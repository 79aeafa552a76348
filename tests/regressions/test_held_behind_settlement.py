"""A lease was believed although its release had reached the server and only the reply was lost.

Found by the simulation: another worker was granted the key while `held` of the first was true.
"""

from __future__ import annotations

import pytest

from run_once.errors import ServerUnavailableError
from run_once.session import Ending
from tests.fake_server import FakeServer, FakeTransport, Fault, make_session


@pytest.mark.parametrize("how", ["release", "fail", "complete"])
def test_not_held_once_a_settlement_was_sent(how: str) -> None:
    """Whose settlement may have been taken does not believe in the lease any more."""
    server = FakeServer()
    transport, other = FakeTransport(server), make_session(FakeTransport(server))
    session = make_session(transport)
    (lease,) = session.claim([b"k"], ttl_s=60).leases
    assert lease.held
    transport.faults.append(Fault(when="after"))
    with pytest.raises(ServerUnavailableError):
        session.settle([Ending(lease, how)], timeout_s=1)  # type: ignore[arg-type] # one of How
    assert not lease.held
    assert len(other.claim([b"k"], ttl_s=60).leases) == (how != "complete")


def test_not_held_while_a_settlement_is_on_its_way() -> None:
    """The lease is not believed from the moment in which its settlement is sent."""
    session = make_session(FakeTransport(FakeServer()))
    (lease,) = session.claim([b"k"], ttl_s=60).leases
    session.keeper.begin_settling(lease)
    assert not lease.held
    assert lease.is_open
