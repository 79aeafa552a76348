"""Turns on the event loop: of all long requests together one piece is worked on in each round.

Whoever gives the loop back after a piece (`asyncio.sleep(0)`) goes on in its next round, and so do
all others: a short request, which takes some rounds, would wait for a piece of each of them every
time. Here they stand in line.
"""

from __future__ import annotations

import asyncio
from collections import deque
from weakref import WeakKeyDictionary


class Turns:
    """The long requests of one event loop, waiting for their next piece."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give turns on a loop."""
        self._loop = loop
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_going = False

    async def wait(self) -> None:
        """Wait until it is the caller's turn."""
        turn = self._loop.create_future()
        self._waiting.append(turn)
        if not self._is_going:
            self._is_going = True
            self._loop.call_soon(self._give)
        await turn

    def _give(self) -> None:
        """Give the first in line its turn, in the round after this one, and go on with the next."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled: it is not wanted any more
                turn.set_result(None)
                self._loop.call_soon(self._give)
                return
        self._is_going = False


_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()


async def next_turn() -> None:
    """Let others go on; to be awaited after each piece of a request that takes milliseconds."""
    loop = asyncio.get_running_loop()
    turns = _of_loops.get(loop)
    if turns is None:
        turns = _of_loops[loop] = Turns(loop)
    await turns.wait()
