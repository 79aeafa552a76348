"""Processes that a benchmark starts, and a client: what they share with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from run_once.channel import GrpcTransport
from run_once.client import LockClient

HERE = Path(__file__).parent
CHILD_LIMIT_S = 300.0


@contextmanager
def our_client(address: str) -> Iterator[LockClient]:
    """Give a client with a connection of its own."""
    client = LockClient(GrpcTransport(address), owner="benchmark")
    try:
        yield client
    finally:
        client.close()


class Child:
    """A process of ours that is told its job, says when it is ready, and starts when told to."""

    def __init__(self, script: str, job: Mapping[str, Any]) -> None:
        """Start it, and wait until it is ready."""
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline().strip()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def go(self) -> None:
        """Have it start."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """Wait for what it has to say."""
        out, _ = self._process.communicate(timeout=CHILD_LIMIT_S)
        if self._process.returncode:
            raise SystemExit(f"a child ended with {self._process.returncode}")
        return json.loads(out)

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


def child_job() -> Any:
    """Give a child its job."""
    return json.loads(sys.argv[1])


def child_ready(said: str = "ready") -> None:
    """Say that this child is ready, and wait for the start."""
    print(said, flush=True)
    sys.stdin.readline()
