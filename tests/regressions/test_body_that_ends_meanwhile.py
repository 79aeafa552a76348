"""A body that ended while the other thread looked how long it takes: claiming ahead ended, too."""

from __future__ import annotations

import pytest

from run_once.key_pass import KeyPass
from run_once.key_source import KeySource, key_maker
from run_once.live import registry
from run_once.pass_options import PassOptions
from tests.fake_server import FakeServer, FakeTransport, make_session

MS = 1_000_000
OPTIONS = PassOptions(
    ttl_s=60.0,
    is_kept=True,
    is_for_good=False,
    is_explicit=True,
    chunksize=10,
    waits=False,
    max_attempts=0,
    max_ahead=12,
)


class EndingPass(KeyPass[str]):
    """A pass whose body ends when somebody has read since when it runs.

    Attributes:
        ends_after: So many reads.
    """

    ends_after = 100
    _since_ns: int | None = None

    @property
    def _out_ns(self) -> int | None:
        since_ns = self._since_ns
        self.ends_after -= 1
        if not self.ends_after:
            self._since_ns = None
        return since_ns

    @_out_ns.setter
    def _out_ns(self, since_ns: int | None) -> None:
        self._since_ns = since_ns


@pytest.mark.parametrize("look", ["_want", "_take_overdue", "_next_look_s"])
@pytest.mark.parametrize("holds_ahead", [True, False])
@pytest.mark.parametrize("ends_after", [1, 2])
def test_the_time_of_a_body_is_read_once(look: str, holds_ahead: bool, ends_after: int) -> None:
    """Each look goes by one reading, whatever comes right behind it."""
    server = FakeServer()
    source = KeySource(
        [f"k{number}" for number in range(50)], key_maker(None, 0, ""), clock=server.clock
    )
    running = EndingPass(source, make_session(FakeTransport(server)), OPTIONS, server.clock)
    running.pace.note_body(10 * MS)
    running.pace.note_request(50 * MS)
    live = running.claim_next()
    assert live is not None
    if not holds_ahead:
        running.session.release([lease for _, lease in running._ready])
        running._ready.clear()
    running.ends_after = ends_after
    getattr(running, look)()
    running.session.release(running.close())
    registry().remove(live)
