"""Processes that a benchmark starts, and a client: what they share with it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

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
    """A process of ours that is told its job, says when it is ready, and starts when told to.

    What it writes to stderr is shown if it fails; that keys were left to others is no news here.
    """

    def __init__(self, script: str, job: Mapping[str, Any]) -> None:
        """Start it, and wait until it is ready."""
        self._script = script
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline().strip()
        if not self.said:
            self._fail()

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
            self._fail()
        return json.loads(out)

    def _fail(self) -> NoReturn:
        self._process.wait(CHILD_LIMIT_S)
        self._errors.seek(0)
        raise SystemExit(f"{self._script}, as a child, failed:\n{self._errors.read()}")

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def child_job() -> Any:
    """Give a child its job."""
    return json.loads(sys.argv[1])


def child_ready(said: str = "ready") -> None:
    """Say that this child is ready, and wait for the start."""
    print(said, flush=True)
    sys.stdin.readline()
