"""Room for requests and replies: who is let in, who waits, who is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from distlock_server import admission
from distlock_server.admission import Arrival, Hold, Lane
from distlock_server.limits import MAX_MESSAGE_BYTES

ONE = MAX_MESSAGE_BYTES


def _run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_room_for_the_largest_until_the_size_is_known() -> None:
    """A call is let in while the largest message has room; who waits comes in, in order."""

    async def work() -> None:
        lane = Lane(2 * ONE)
        assert await lane.enter()
        assert await lane.enter()
        waiting = [asyncio.create_task(lane.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        lane.leave(ONE - 10)
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        lane.leave(10)
        assert await waiting[0]
        assert not waiting[1].done()
        lane.leave(ONE)
        assert await waiting[1]
        assert lane.n_bytes == 2 * ONE
        waiting[2].cancel()
        await asyncio.gather(waiting[2], return_exceptions=True)
        lane.leave(2 * ONE)
        assert lane.n_bytes == 0

    _run(work())


def test_no_room_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that finds no room in time is refused; with too many before it, at once."""
    monkeypatch.setattr(admission, "LANE_WAIT_S", 0.05)

    async def work() -> None:
        lane = Lane(ONE, max_outside=1)
        assert await lane.enter()
        waiting = asyncio.create_task(lane.enter())
        await asyncio.sleep(0)
        assert not await lane.enter()
        assert not waiting.done()
        assert not await waiting
        lane.leave(ONE)
        assert await lane.enter()

    _run(work())


def test_cancelled_just_when_let_in() -> None:
    """A call that ends in the moment in which it is let in gives its room back."""

    async def work() -> None:
        lane = Lane(ONE)
        assert await lane.enter()
        waiting = asyncio.create_task(lane.enter())
        await asyncio.sleep(0)
        lane.leave(ONE)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert lane.n_bytes == 0

    _run(work())


def test_slow_senders_get_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the requests that do not arrive soon, half of the lane's room is left to others."""
    monkeypatch.setattr(admission, "PROMPT_S", 0.02)
    monkeypatch.setattr(admission, "ARRIVAL_S", 60.0)

    async def arrive(lane: Lane, seen: list[bool]) -> None:
        arrival = Arrival(lane)
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            seen.append(arrival.is_late)
        finally:
            arrival.end()

    async def work() -> None:
        lane = Lane(4 * ONE)
        seen: list[bool] = []
        await asyncio.gather(*(arrive(lane, seen) for _ in range(4)))
        assert seen == [True, True]
        assert lane.slow_down()
        assert lane.slow_down()
        assert not lane.slow_down()

    _run(work())


def test_room_is_held_until_the_call_is_over() -> None:
    """A call gives back what it holds when its task ends, and no more than that."""

    async def call(lane: Lane, ended: asyncio.Event) -> None:
        assert await lane.enter()
        hold = Hold(lane, ONE)
        hold.become(1_000)
        await ended.wait()

    async def work() -> None:
        lane, ended = Lane(2 * ONE), asyncio.Event()
        calls = [asyncio.create_task(call(lane, ended)) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert lane.n_bytes == 3_000
        assert lane.take(2 * ONE - 3_000)
        assert not lane.take(1)
        ended.set()
        await asyncio.gather(*calls)
        await asyncio.sleep(0)
        assert lane.n_bytes == 2 * ONE - 3_000

    _run(work())
