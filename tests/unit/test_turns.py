"""Turns on the event loop."""

from __future__ import annotations

import asyncio

from distlock_server.turns import next_turn

N_LONG = 20
N_ROUNDS = 50


def test_one_piece_in_each_round() -> None:
    """However many long requests there are, a round of the loop has one piece of one of them."""
    pieces: list[int] = []

    async def work(number: int) -> None:
        for _ in range(5):
            await next_turn()
            pieces.append(number)

    async def count_rounds() -> list[int]:
        seen = []
        tasks = [asyncio.create_task(work(number)) for number in range(N_LONG)]
        for _ in range(N_ROUNDS):
            before = len(pieces)
            await asyncio.sleep(0)
            seen.append(len(pieces) - before)
        await asyncio.gather(*tasks)
        return seen

    seen = asyncio.run(count_rounds())
    assert max(seen) == 1
    assert sum(seen) > N_ROUNDS // 2, "they were not at it"
    assert len(pieces) == 5 * N_LONG
    assert sorted(pieces[:N_LONG]) == list(range(N_LONG)), "each in its turn"


def test_who_has_gone_is_passed_over() -> None:
    """A request that is cancelled while it stands in line keeps nobody waiting."""

    async def run() -> None:
        gone = [asyncio.create_task(next_turn()) for _ in range(5)]
        last = asyncio.create_task(next_turn())
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await asyncio.wait_for(last, 10)

    asyncio.run(run())
