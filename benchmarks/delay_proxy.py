"""A TCP proxy that holds every byte back for a while, as a longer network would.

python benchmarks/delay_proxy.py HOST:PORT MILLISECONDS     # prints the port it listens on

Half of the delay is added in each direction, so that a round trip takes so much longer. Order and
bandwidth stay as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

CHUNK_BYTES = 1 << 16


async def forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float
) -> None:
    """Pass bytes on, each after the delay."""
    loop = asyncio.get_running_loop()

    def write(data: bytes) -> None:
        if not writer.is_closing():
            writer.write(data)

    with contextlib.suppress(ConnectionError):
        while data := await reader.read(CHUNK_BYTES):
            loop.call_later(delay_s, write, data)
    loop.call_later(delay_s, writer.close)


async def serve(host: str, port: int, delay_s: float) -> None:
    """Listen on a free port for ever."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, port)
        for pair in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(forward(*pair, delay_s / 2))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    target_host, _, target_port = sys.argv[1].rpartition(":")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(target_host, int(target_port), float(sys.argv[2]) / 1000))
