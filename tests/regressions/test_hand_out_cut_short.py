"""Keys of a loop that was interrupted, or whose server answered late, stayed held or went unsaid.

Found by the simulation: a key whose renewal failed while it was handed out was kept alive by nobody
who worked on it, as was all that a loop held whose end was interrupted; leases that had run out
were handed out; and what was done, and could not be settled, was not mentioned after a `break`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pytest
from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from run_once.ahead import ClaimAhead
from run_once.config import Config
from run_once.errors import ServerUnavailableError
from run_once.key_pass import KeyPass
from run_once.key_source import KeySource, key_maker
from run_once.live import LiveItem, registry
from run_once.loop import Loop
from run_once.pass_options import PassOptions
from tests.fake_server import FakeServer, FakeTransport, ReplyT, make_session

NAMES = "abcdef"
MS = 1_000_000


@pytest.fixture(autouse=True)
def _without_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody claims ahead, or gives back, but the test."""
    monkeypatch.setattr(ClaimAhead, "wake", lambda self: None)


class _Transport(FakeTransport):
    """Renewals are interrupted, or answered late: the next so many of them."""

    is_interrupted = False
    n_late = 0

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        if method == "Renew" and self.is_interrupted:
            raise KeyboardInterrupt
        reply = super().call(method, request, reply_type, timeout_s)
        if method == "Renew" and self.n_late:
            self.n_late -= 1
            self.server.clock.advance(61)
        return reply


class Running:
    """A pass that holds all of its keys ahead, since bodies of a millisecond are expected.

    Attributes:
        woken: How often the thread that claims ahead was woken.
    """

    def __init__(self, names: Iterable[str] = NAMES, *, is_explicit: bool = False) -> None:
        self.server = FakeServer()
        self.transport = _Transport(self.server)
        self.session = make_session(self.transport)
        self.woken = 0
        options = PassOptions(
            ttl_s=60.0,
            is_kept=True,
            is_for_good=False,
            is_explicit=is_explicit,
            chunksize=10,
            waits=False,
            max_attempts=0,
            max_ahead=100,
        )
        clock = self.server.clock
        source = KeySource(names, key_maker(None, 0, ""), clock=clock)
        self.running = KeyPass(source, self.session, options, clock)
        self.running.pace.note_body(MS)
        self.running.pace.note_request(50 * MS)
        self.running.wake = self._wake
        self.loop: Loop[str] = Loop(
            lambda: self.running, Config(progress=False), is_explicit=is_explicit
        )

    def _wake(self) -> None:
        self.woken += 1

    def next(self) -> LiveItem[str]:
        """Take an item from the loop."""
        live = self.loop.claim_next()
        assert live is not None
        return live

    def states(self) -> list[int]:
        """Give what the server says of the keys."""
        return [self.server.state_of(name.encode()) for name in NAMES]


def test_an_interrupted_hand_out_keeps_nothing() -> None:
    """The key that was to be handed out is given back with the others."""
    made = Running()
    made.next()
    made.server.clock.advance(100)
    made.transport.is_interrupted = True
    with pytest.raises(KeyboardInterrupt):
        made.loop.claim_next()
    assert made.session.keeper.leases() == []
    assert made.states() == [pb.KEY_STATE_DONE] + [pb.KEY_STATE_ABSENT] * 5


def test_a_lease_that_has_run_out_is_not_handed_out() -> None:
    """Renewals that come later than the lease ends: an error that says what to do."""
    made = Running()
    made.next()
    made.server.clock.advance(100)
    made.transport.n_late = 100
    with pytest.raises(ServerUnavailableError, match="choose a longer one"):
        made.loop.claim_next()
    assert made.session.keeper.leases() == []


def test_a_late_renewal_is_renewed_again() -> None:
    """One late answer costs nothing but another renewal."""
    made = Running()
    made.next()
    made.server.clock.advance(100)
    made.transport.n_late = 1
    assert made.next().held
    made.loop.close()


def test_somebody_looks_after_what_the_first_claim_held_ahead() -> None:
    """The thread that gives back what is overdue is awake, though plenty is held ahead."""
    made = Running([f"k{number}" for number in range(200)])
    live = made.running.claim_next()
    assert live is not None
    assert len(made.running._ready) > made.running._low_water
    assert made.woken
    assert made.running.step_ahead() is not None
    made.session.release(made.running.close())
    registry().remove(live)


def test_an_interrupted_end_gives_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a loop that is left waits for acknowledgements: nothing stays held."""
    made = Running()
    made.next()

    def interrupted(timeout_s: float | None = None) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(made.session.settler, "flush", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.loop.close()
    assert made.session.keeper.leases() == []
    assert made.states() == [pb.KEY_STATE_ABSENT] * 6


def test_an_interrupted_end_of_an_explicit_loop_keeps_nothing_ahead() -> None:
    """Ctrl-C while the server is told of what has started: the rest is given back."""
    made = Running(is_explicit=True)
    lives = [made.next(), made.next()]
    made.transport.is_interrupted = True
    with pytest.raises(KeyboardInterrupt):
        made.loop.close()
    assert {lease.key for lease in made.session.keeper.leases()} == {b"a", b"b"}
    assert made.states()[2:] == [pb.KEY_STATE_ABSENT] * 4
    made.transport.is_interrupted = False
    for live in lives:
        live.complete()
        registry().remove(live)


def test_a_break_tells_what_was_not_settled(caplog: pytest.LogCaptureFixture) -> None:
    """Who leaves a loop while the server is gone is told how much of what is done is unsettled."""
    made = Running()
    made.next()
    made.transport.is_down = True
    made.next()
    with caplog.at_level(logging.WARNING, "run_once.loop"):
        made.loop.close()
    assert "did not acknowledge 1 finished keys" in caplog.text


def test_a_forked_child_takes_over_what_its_parent_held_ahead() -> None:
    """It asks for the same keys again, once: what the parent gives back is the child's."""
    made = Running()
    made.next()
    child = make_session(made.transport)
    running = made.running
    assert len(running._ready) == len(NAMES) - 1
    given_back = made.session.keeper.leases()[1:]
    running.after_fork(child)
    made.session.release(given_back)
    seen = []
    while (live := running.claim_next()) is not None:
        seen.append(live.item)
        live.complete()
        registry().remove(live)
    assert seen == list(NAMES[1:])
