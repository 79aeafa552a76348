"""The comparison of server models ends its streams without a word."""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks are not installed")


class StoppedContext:
    """A stream whose server stops while it is read."""

    def __init__(self) -> None:
        """Begin with a server that runs."""
        self.is_read = asyncio.Event()
        self.stopped = asyncio.Event()

    async def read(self) -> bytes:
        """Fail as gRPC does, once the server has stopped."""
        self.is_read.set()
        await self.stopped.wait()
        raise grpc.aio.BaseError("Server already stopped.")


def test_a_stream_of_a_stopped_server_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that fails behind a cancelled stream leaves no task's error unseen."""
    pytest.importorskip("plyvel")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    servers: Any = importlib.import_module("server_model_servers")
    unseen: list[dict[str, Any]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: unseen.append(context))
        options = argparse.Namespace(disk_s=0.0, admit=1)
        table = servers.Table(str(tmp_path / "db"), servers.set_all, options)
        context = StoppedContext()
        stream = asyncio.create_task(table.aio_stream(loop.create_future())(None, context))
        try:
            await context.is_read.wait()
            stream.cancel()
            await asyncio.wait([stream])
            context.stopped.set()
            for _ in range(5):  # turns of the loop, for the read to end
                await asyncio.sleep(0)
        finally:
            table.committer.close()
        gc.collect()

    asyncio.run(run())
    assert unseen == []
