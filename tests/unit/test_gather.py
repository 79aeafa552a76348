"""Calls of several threads that travel in one request, over a way that the test holds."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType

import pytest

from run_once.errors import LimitError, ServerUnavailableError
from run_once.gather import Gather, _Rider

LIMIT_S = 20.0
LONG_S = 2 * LIMIT_S


class Way:
    """What a gather sends over: each request is held until the test answers it.

    Attributes:
        sent: The requests so far.
        dropped: Items whose answers were handed back.
    """

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.dropped: list[str] = []
        self._changed = threading.Condition()
        self._answers: list[Future[list[str] | None]] = []

    def send(self, items: Sequence[str]) -> list[str]:
        """Send a request, and be held."""
        answer: Future[list[str] | None] = Future()
        with self._changed:
            self.sent.append(list(items))
            self._answers.append(answer)
            self._changed.notify_all()
        return answer.result(LIMIT_S) or [f"{item}!" for item in items]

    def drop(self, item: str, answer: str) -> None:
        """Note what came back for nobody."""
        assert answer == f"{item}!"
        self.dropped.append(item)

    def await_sent(self, count: int) -> list[str]:
        """Wait for so many requests; give the last."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.sent) >= count, LIMIT_S), self.sent
            assert len(self.sent) == count, self.sent
            return self.sent[-1]

    def answer(self, number: int, error: BaseException | None = None) -> None:
        """Let a request come back, or fail."""
        if error is None:
            self._answers[number].set_result(None)
        else:
            self._answers[number].set_exception(error)


@pytest.fixture
def way() -> Way:
    """Give a way that is held."""
    return Way()


@pytest.fixture
def gather(way: Way) -> Gather[str, str]:
    """Give a gather over it, in which nobody loses patience."""
    return Gather(way.send, way.drop, linger_s=0, patience_s=LONG_S)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Give threads."""
    with ThreadPoolExecutor(20) as pool:
        yield pool


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that nobody tells."""
    pause = threading.Event()
    for _ in range(int(LIMIT_S / 0.001)):
        if holds():
            return
        pause.wait(0.001)
    raise AssertionError("it did not come to that")


class Callers:
    """Threads that call, in an order that is known."""

    def __init__(self, gather: Gather[str, str], threads: ThreadPoolExecutor) -> None:
        self._gather = gather
        self._threads = threads

    def call(self, item: str, *, names: Sequence[str] = (), like: str = "") -> Future[str]:
        """Call in a thread; it travels or waits in line when this returns."""
        line = self._gather._yard._line
        sent = self._gather._yard._trips
        before = len(line) + len(sent)
        keys = [name.encode() for name in names or [item]]
        made = self._threads.submit(self._gather.call, item, keys, like)
        wait_until(lambda: len(line) + len(sent) > before)
        return made


@pytest.fixture
def callers(gather: Gather[str, str], threads: ThreadPoolExecutor) -> Callers:
    """Give threads that call."""
    return Callers(gather, threads)


def test_a_thread_alone_sends_each_call_at_once() -> None:
    """No call waits for another, and none is put together with one."""
    sent: list[list[str]] = []

    def send(items: Sequence[str]) -> list[str]:
        sent.append(list(items))
        return list(items)

    gather: Gather[str, str] = Gather(send, linger_s=LONG_S, patience_s=LONG_S)
    assert [gather.call(item, [item.encode()]) for item in "abc"] == ["a", "b", "c"]
    assert sent == [["a"], ["b"], ["c"]]


def test_who_waits_travels_together(way: Way, callers: Callers) -> None:
    """What waits while a request is under way goes in the next one; each gets its own answer."""
    first = callers.call("a")
    rest = [callers.call(item) for item in "bcd"]
    way.answer(0)
    assert way.await_sent(2) == ["b", "c", "d"]
    way.answer(1)
    assert [call.result(LIMIT_S) for call in (first, *rest)] == ["a!", "b!", "c!", "d!"]


def test_only_what_is_alike_travels_together(way: Way, callers: Callers) -> None:
    """Others go in a later request, in order."""
    likes = {"a": "x", "b": "y", "c": "x", "d": "y"}
    calls = [callers.call(item, like=like) for item, like in likes.items()]
    way.answer(0)
    assert way.await_sent(2) == ["b", "d"]
    way.answer(1)
    assert way.await_sent(3) == ["c"]
    way.answer(2)
    assert [call.result(LIMIT_S) for call in calls] == ["a!", "b!", "c!", "d!"]


def test_equal_keys_do_not_travel_together(way: Way, callers: Callers) -> None:
    """Two that name one key go one after the other."""
    calls = [callers.call("a")]
    calls += [callers.call(item, names=names) for item, names in (("b", "xy"), ("c", "yz"))]
    calls.append(callers.call("d"))
    way.answer(0)
    assert way.await_sent(2) == ["b", "d"]
    way.answer(1)
    assert way.await_sent(3) == ["c"]
    way.answer(2)
    assert [call.result(LIMIT_S) for call in calls] == ["a!", "b!", "c!", "d!"]


def test_a_request_is_bounded(way: Way, threads: ThreadPoolExecutor) -> None:
    """What does not fit goes in the next one."""
    gather: Gather[str, str] = Gather(way.send, max_names=2, linger_s=0, patience_s=LONG_S)
    callers = Callers(gather, threads)
    calls = [callers.call(item) for item in "abcd"]
    way.answer(0)
    assert way.await_sent(2) == ["b", "c"]
    way.answer(1)
    assert way.await_sent(3) == ["d"]
    way.answer(2)
    assert [call.result(LIMIT_S) for call in calls] == ["a!", "b!", "c!", "d!"]


def test_those_who_came_back_are_waited_for(way: Way, threads: ThreadPoolExecutor) -> None:
    """If several came back just before, the next request leaves when as many are there."""
    gather: Gather[str, str] = Gather(way.send, linger_s=LONG_S, patience_s=LONG_S)
    gather._yard._is_long_ago = lambda: False  # type: ignore[method-assign] # however slow the test
    callers = Callers(gather, threads)
    calls = [callers.call(item) for item in "ab"]
    way.answer(0)
    wait_until(lambda: gather._yard._lingering is not None)
    calls.append(callers.call("c"))
    assert way.await_sent(2) == ["b", "c"]
    way.answer(1)
    assert [call.result(LIMIT_S) for call in calls] == ["a!", "b!", "c!"]
    # Nobody is in line, but two came back: the next one to call waits for another.
    calls = [callers.call(item) for item in "de"]
    assert way.await_sent(3) == ["d", "e"]
    way.answer(2)
    assert [call.result(LIMIT_S) for call in calls] == ["d!", "e!"]


def test_one_refusal_meets_one_call(threads: ThreadPoolExecutor) -> None:
    """If a request is refused for one of its items, each is sent alone: the others are answered."""
    way = Way()

    def send(items: Sequence[str]) -> list[str]:
        if way.sent and "bad" in items:
            raise LimitError("bad")
        if len(items) == 1 and way.sent:
            return [f"{items[0]}!"]
        return way.send(items)

    gather: Gather[str, str] = Gather(send, linger_s=0, patience_s=LONG_S)
    callers = Callers(gather, threads)
    calls = {item: callers.call(item) for item in ("a", "good", "bad", "fine")}
    way.answer(0)
    for item in ("a", "good", "fine"):
        assert calls[item].result(LIMIT_S) == f"{item}!"
    with pytest.raises(LimitError, match="bad"):
        calls["bad"].result(LIMIT_S)


def test_an_unreachable_server_is_told_to_each(way: Way, callers: Callers) -> None:
    """Each call raises an error of its own, and the bound on retries is spent once."""
    calls = [callers.call(item) for item in "abc"]
    way.answer(0)
    way.await_sent(2)
    way.answer(1, ServerUnavailableError("gone"))
    errors = [call.exception(LIMIT_S) for call in calls[1:]]
    assert [str(error) for error in errors] == ["gone", "gone"]
    assert all(type(error) is ServerUnavailableError for error in errors)
    assert errors[0] is not errors[1]
    assert {error.__cause__ for error in errors if error is not None} <= {None, *errors}
    way.await_sent(2)
    assert calls[0].result(LIMIT_S) == "a!"


def test_an_interrupted_leader_strands_nobody(way: Way, callers: Callers) -> None:
    """Another repeats the same request, and what comes back for who is gone is handed on."""
    calls = [callers.call(item) for item in "abcd"]
    way.answer(0)
    assert way.await_sent(2) == ["b", "c", "d"]
    way.answer(1, KeyboardInterrupt())
    assert way.await_sent(3) == ["b", "c", "d"]
    way.answer(2, SystemExit())
    assert way.await_sent(4) == ["b", "c", "d"]
    way.answer(3)
    assert isinstance(calls[1].exception(LIMIT_S), KeyboardInterrupt)
    assert isinstance(calls[2].exception(LIMIT_S), SystemExit)
    assert calls[3].result(LIMIT_S) == "d!"
    assert way.dropped == ["b", "c"]


def test_an_interrupted_leader_lets_the_line_go_on(way: Way, callers: Callers) -> None:
    """If nobody travels with it, the next request leaves."""
    calls = [callers.call(item) for item in "abc"]
    way.answer(0, KeyboardInterrupt())
    assert way.await_sent(2) == ["b", "c"]
    way.answer(1)
    assert isinstance(calls[0].exception(LIMIT_S), KeyboardInterrupt)
    assert [call.result(LIMIT_S) for call in calls[1:]] == ["b!", "c!"]


class Waits:
    """Stands in for the waits of some calls.

    Attributes:
        ends: What ends the wait of an item: False, the end of its patience, or an interrupt.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: dict[str, Future[bool]] = {}
        real = _Rider.wait

        def wait(rider: _Rider[str], timeout_s: float) -> bool:
            end = self.ends.get(rider.item)
            if end is None:
                return real(rider, timeout_s)
            woken = end.result(LIMIT_S)
            self.ends.pop(rider.item, None)
            return woken

        monkeypatch.setattr(_Rider, "wait", wait)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Give waits that the test can end."""
    return Waits(monkeypatch)


@pytest.mark.parametrize("is_under_way", [False, True])
def test_who_is_interrupted_while_it_waits_is_out(
    way: Way, callers: Callers, waits: Waits, *, is_under_way: bool
) -> None:
    """In line it does not travel; under way, what comes back for it is handed on."""
    interrupt = waits.ends["c"] = Future()
    calls = {item: callers.call(item) for item in "abcd"}
    if is_under_way:
        way.answer(0)
        assert way.await_sent(2) == ["b", "c", "d"]
    interrupt.set_exception(KeyboardInterrupt())
    assert isinstance(calls["c"].exception(LIMIT_S), KeyboardInterrupt)
    if not is_under_way:
        way.answer(0)
        assert way.await_sent(2) == ["b", "d"]
    way.answer(1)
    assert [calls[item].result(LIMIT_S) for item in "abd"] == ["a!", "b!", "d!"]
    assert way.dropped == (["c"] if is_under_way else [])


def test_who_was_to_lead_and_is_interrupted_strands_nobody(
    way: Way, callers: Callers, waits: Waits
) -> None:
    """First in line and not yet awake: the next one leads."""
    interrupt = waits.ends["b"] = Future()
    calls = {item: callers.call(item) for item in "abcd"}
    way.answer(0)
    assert calls["a"].result(LIMIT_S) == "a!"
    interrupt.set_exception(KeyboardInterrupt())
    assert isinstance(calls["b"].exception(LIMIT_S), KeyboardInterrupt)
    assert way.await_sent(2) == ["c", "d"]
    way.answer(1)
    assert [calls[item].result(LIMIT_S) for item in "cd"] == ["c!", "d!"]


def test_patience_has_an_end(way: Way, callers: Callers, waits: Waits) -> None:
    """Who stood in line for too long sends its call alone, while the others go on waiting."""
    patience = waits.ends["b"] = Future()
    calls = {item: callers.call(item) for item in "abc"}
    patience.set_result(False)
    assert way.await_sent(2) == ["b"]
    way.answer(1)
    assert calls["b"].result(LIMIT_S) == "b!"
    way.answer(0)
    assert way.await_sent(3) == ["c"]
    way.answer(2)
    assert [calls[item].result(LIMIT_S) for item in "ac"] == ["a!", "c!"]


def test_a_leader_that_vanished_is_found_out(
    way: Way,
    gather: Gather[str, str],
    callers: Callers,
    waits: Waits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interrupt may cut even the leader's leaving short: who waits looks after a while."""
    yard = gather._yard
    real = yard.leave

    def leave(rider: _Rider[str]) -> None:
        if rider.item == "a":
            raise KeyboardInterrupt
        real(rider)

    monkeypatch.setattr(yard, "leave", leave)
    patience = waits.ends["b"] = Future()
    calls = {item: callers.call(item) for item in "abc"}
    way.answer(0)
    assert isinstance(calls["a"].exception(LIMIT_S), KeyboardInterrupt)
    patience.set_result(False)
    assert way.await_sent(2) == ["b", "c"]
    way.answer(1)
    assert [calls[item].result(LIMIT_S) for item in "bc"] == ["b!", "c!"]


def test_a_handler_within_a_call_does_not_wait_for_it() -> None:
    """A signal's handler that calls goes alone: the call below it on the stack cannot go on."""
    sent: list[list[str]] = []

    def send(items: Sequence[str]) -> list[str]:
        sent.append(list(items))
        if items[0] == "a":
            assert made.call("handler's", [b"a"]) == "handler's!"
        return [f"{item}!" for item in items]

    made: Gather[str, str] = Gather(send, linger_s=LONG_S, patience_s=LONG_S)
    assert made.call("a", [b"a"]) == "a!"
    assert sent == [["a"], ["handler's"]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_does_not_wait_for_its_parents_calls(
    way: Way, gather: Gather[str, str], callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork while a request is under way and others wait: the child's calls go at once."""
    calls = [callers.call(item) for item in "abc"]
    way.await_sent(1)
    with gather._yard._lock:  # as another thread may hold it
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(int(LIMIT_S))
                monkeypatch.setattr(gather, "_send", list)
                code = 0 if gather.call("d", [b"d"]) == "d" else 2
            finally:
                os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    way.answer(0)
    assert way.await_sent(2) == ["b", "c"]
    way.answer(1)
    assert [call.result(LIMIT_S) for call in calls] == ["a!", "b!", "c!"]


def test_a_call_cut_short_holds_nobody_up() -> None:
    """What an interrupted call of the same thread left behind is cleared away, not waited for."""
    gather: Gather[str, str] = Gather(list, patience_s=0.01)
    stale = _Rider("old", [b"a"], None, threading.get_ident())
    gather._yard._start(stale)
    assert gather.call("new", [b"b"]) == "new"
    assert not gather._yard._trips


def test_a_thread_whose_call_was_cut_short_at_its_end_travels_again() -> None:
    """It counts as inside of a call only while that is on its stack."""

    def call() -> FrameType:
        return sys._getframe()

    me = threading.get_ident()
    gather: Gather[str, str] = Gather(list)
    gather._yard.calls[me] = call()
    assert not gather._yard.is_inside(me)
    assert gather.call("new", [b"a"]) == "new"
    assert not gather._yard.calls
