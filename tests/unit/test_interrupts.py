"""Ctrl-C at any moment of a loop: what nobody works on is free, and nothing stays locked.

A loop runs over a few keys again and again, and each time the interrupt comes a little later.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final

import pytest

import run_once
from distlock_proto import lock_table_pb2 as pb
from run_once.ahead import ClaimAhead
from run_once.config import Config
from run_once.decorator import _run_done
from run_once.key_pass import KeyPass
from run_once.key_source import KeySource, key_maker
from run_once.live import registry
from run_once.loop import Loop
from run_once.pass_options import PassOptions
from run_once.session import Session
from run_once.task import run_task
from tests.fake_server import FakeServer, FakeTransport, make_session

NAMES: Final = "abcdef"
MS: Final = 1_000_000
FOLDER: Final = str(Path(run_once.__file__).parent)
BOUND_S: Final = 20.0
REPEATED: Final = 2


@pytest.fixture(autouse=True)
def _without_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody claims ahead but who asks for items."""
    monkeypatch.setattr(ClaimAhead, "wake", lambda self: None)


class _Interrupt:
    """Raises KeyboardInterrupt at one of the places where the interpreter looks for signals.

    Those are the beginnings of functions and the ends of calls of C, counted over all of the
    project; a profiler sees them.

    Attributes:
        places: What was passed.
        where: The place of the interrupt; "": there was none.
    """

    def __init__(self, at_place: int | None) -> None:
        self.places: list[str] = []
        self.where = ""
        self._at_place = at_place

    def __call__(self, frame: FrameType, event: str, _arg: object) -> None:
        if event not in {"call", "c_return"} or self.where:
            return
        if not frame.f_code.co_filename.startswith(FOLDER):
            return
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({event})"
        if len(self.places) == self._at_place:
            self.where = place
            raise KeyboardInterrupt
        self.places.append(place)


def each_place(places: list[str]) -> list[int]:
    """Give the numbers of places: of those that are passed again and again, the first few."""
    seen: Counter[str] = Counter()
    chosen: list[int] = []
    for number, place in enumerate(places):
        seen[place] += 1
        if seen[place] <= REPEATED:
            chosen.append(number)
    return chosen


def make_loop(
    session: Session, server: FakeServer, *, is_kept: bool, is_for_good: bool, is_explicit: bool
) -> Loop[str]:
    """Make a loop that holds some keys ahead, since bodies of a millisecond are expected."""
    options = PassOptions(
        ttl_s=60.0,
        is_kept=is_kept,
        is_for_good=is_for_good,
        is_explicit=is_explicit,
        chunksize=2,
        waits=False,
        max_attempts=0,
        max_ahead=3,
    )
    source = KeySource(NAMES, key_maker(None, 0, ""), clock=server.clock)
    running = KeyPass(source, session, options, server.clock)
    running.pace.note_body(MS)
    running.pace.note_request(50 * MS)
    return Loop(lambda: running, Config(progress=False), is_explicit=is_explicit)


def in_time(work: Callable[[], None], where: str) -> None:
    """Do something that must not hang."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(BOUND_S)
    if thread.is_alive():
        faulthandler.dump_traceback()
        pytest.fail(f"hangs after an interrupt at {where}")


@pytest.mark.parametrize(
    ("is_kept", "is_for_good", "is_explicit"),
    [
        pytest.param(True, False, False, id="kept"),
        pytest.param(True, False, True, id="explicit"),
        pytest.param(False, False, True, id="timeout"),
        pytest.param(True, True, False, id="for good"),
    ],
)
def test_an_interrupt_at_any_place_of_a_loop(
    is_kept: bool, is_for_good: bool, is_explicit: bool
) -> None:
    """What was not handed out is free again, and what was done is done."""
    modes = {"is_kept": is_kept, "is_for_good": is_for_good, "is_explicit": is_explicit}

    def run(at_place: int | None) -> _Interrupt:
        server = FakeServer()
        session = make_session(FakeTransport(server))
        loop = make_loop(session, server, **modes)
        interrupt = _Interrupt(at_place)
        taken: list[str] = []
        try:
            sys.setprofile(interrupt)
            while (live := loop.claim_next()) is not None:
                taken.append(live.item)
                if is_explicit:
                    live.complete()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        where = interrupt.where
        in_time(loop.close, where)
        check(session, server, taken, where, is_explicit=is_explicit)
        rest = make_loop(session, server, **modes)
        in_time(lambda: finish(rest, is_explicit=is_explicit), where)
        left = [name for name in NAMES if server.state_of(name.encode()) != pb.KEY_STATE_DONE]
        assert set(left) <= (set(taken[-1:]) if is_explicit else set()), where
        session.keeper.close()
        return interrupt

    numbers = each_place(run(None).places)
    assert len(numbers) > 200
    for number in numbers:
        run(number)


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("is_for_good", [True, False])
def test_an_interrupt_at_any_place_of_a_task(keep_alive: bool, is_for_good: bool) -> None:
    """The key of a function that was cut short is free again."""

    def run(at_place: int | None) -> _Interrupt:
        server = FakeServer()
        session = make_session(FakeTransport(server))
        interrupt = _Interrupt(at_place)
        try:
            sys.setprofile(interrupt)
            if is_for_good:
                _run_done(session, b"a", list, Config())
            else:
                run_task(session, b"a", lambda _lease: None, ttl_s=60.0, keep_alive=keep_alive)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        states = (
            {pb.KEY_STATE_ABSENT, pb.KEY_STATE_DONE} if interrupt.where else {pb.KEY_STATE_DONE}
        )
        assert server.state_of(b"a") in states, interrupt.where
        check(session, server, [], interrupt.where, is_explicit=False)
        return interrupt

    for number in each_place(run(None).places):
        run(number)


def finish(loop: Loop[str], *, is_explicit: bool) -> None:
    """Do what is left."""
    while (live := loop.claim_next()) is not None:
        if is_explicit:
            live.complete()


def check(
    session: Session, server: FakeServer, taken: list[str], where: str, *, is_explicit: bool
) -> None:
    """See what is held, free and done after a loop that was interrupted."""
    states = {name: server.state_of(name.encode()) for name in NAMES}
    held = {
        name
        for name, state in states.items()
        if state in {pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD}
    }
    done = {name for name, state in states.items() if state == pb.KEY_STATE_DONE}
    may_be_held = set(taken[-1:]) if is_explicit else set()
    assert held <= may_be_held, f"{held} stay held after an interrupt at {where}"
    assert {lease.key.decode() for lease in session.keeper.leases()} <= may_be_held, where
    assert done >= set(taken[:-1]), f"lost after an interrupt at {where}"
    assert session._under_way == {}, where
    session.complete(session.claim([b"another"], ttl_s=60).leases[0])
    together = session.client._together
    for gather in (together._claims, together._ends):
        assert not gather._yard.is_inside(threading.get_ident()), where
        assert not gather._yard._trips, where
        assert not gather._yard._line, where
    live = registry()
    assert live._items.keys() == live._unnamed.keys(), where
    left = list(live._items)
    assert {item.item for item in left} <= may_be_held, where
    for item in left:
        registry().remove(item)
