"""Real servers for tests: as a process of its own, and inside the test's process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from distlock_server.blobs import BlobStore
from distlock_server.clock import Clock, ManualClock
from distlock_server.engines.base import Engine
from distlock_server.server import Died, Idle, Listen, Server

START_TIMEOUT_S: Final = 60.0
"""How long a server may take to answer on a busy machine."""

CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


def connect(target: str) -> grpc.Channel:
    """Make a channel of its own to a server."""
    return grpc.insecure_channel(target, options=CHANNEL_OPTIONS)


def await_health(target: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once the server says that it is serving; raise after the timeout."""
    with connect(target) as channel:
        health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True
        )


class ServerProcess:
    """One `distlock` process over a database that stays when the process is killed.

    Attributes:
        folder: Where its database and files are.
        db: The database.
        port: The TCP port, once started.
        host: Where it is reached.
        environment: More variables for the next start.
        command_prefix: What the next start is wrapped in (`ip netns exec …`).
        program: What is run: arguments of the interpreter.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        """Prepare a server; `start` starts it.

        Args:
            folder: Where its database and files go.
            arguments: More options of the command.
        """
        self.folder = folder
        self.db = folder / "db"
        self.port = 0
        self.host = "127.0.0.1"
        self.environment: dict[str, str] = {}
        self.command_prefix: list[str] = []
        self.program = ["-m", "distlock_server"]
        self._arguments = arguments
        self._port_file = folder / "port"
        self._log_file = folder / "distlock.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def log(self) -> str:
        """What the process has written to stderr, over all its starts."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    def start(self, *, await_answer: bool = True) -> None:
        """Start the process, on the same port as before if there was one.

        Args:
            await_answer: Return once it answers in the clear; else once it listens.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._port_file.unlink(missing_ok=True)
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self.command_prefix,
                    sys.executable,
                    *self.program,
                    f"--db={self.db}",
                    f"--port={self.port}",
                    f"--port_file={self._port_file}",
                    *self._arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, **self.environment},
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._port_file.exists():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(
                    f"the server did not start (status {self._process.poll()}):\n{self.log}"
                )
            time.sleep(0.02)
        self.port = int(self._port_file.read_text(encoding="ascii"))
        if await_answer:
            await_health(self.address)

    def kill(self) -> None:
        """End the process as a crash would."""
        self._end(signal.SIGKILL)

    def terminate(self, timeout_s: float = 15.0) -> int:
        """Ask the process to end; return its exit status."""
        return self._end(signal.SIGTERM, timeout_s)

    def wait(self, timeout_s: float = 15.0) -> int:
        """Wait for the process to end by itself; return its exit status."""
        assert self._process is not None, "not started"
        return self._process.wait(timeout_s)

    def restart(self) -> None:
        """Kill it if it runs, and start it again on the same port."""
        self.kill()
        self.start()

    def close(self) -> None:
        """End the process whatever its state; not having one is no error."""
        if self._process is not None:
            self.kill()

    def _end(self, number: int, timeout_s: float = 15.0) -> int:
        assert self._process is not None, "not started"
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(timeout_s)


class InprocServer:
    """A server in this process, over a given engine, under a clock that the test moves.

    Attributes:
        clock: Its clock.
        server: The server itself.
        reasons: Why it asked to be ended.
    """

    def __init__(
        self, engine: Engine, folder: Path, clock: Clock, idle_exit_s: float | None = None
    ) -> None:
        """Start it.

        Args:
            engine: Its database, closed with it.
            folder: Where large values go.
            clock: Its clock.
            idle_exit_s: See `Server`.
        """
        self.clock = clock
        self.reasons: list[Idle | Died] = []
        self.server = Server(
            engine, BlobStore(folder), clock, Listen(), self.reasons.append, idle_exit_s=idle_exit_s
        )
        self.server.start()
        self.channel = connect(self.address)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.server.port}"

    @property
    def table(self) -> LockTableStub:
        """A stub of `distlock.v1.LockTable`."""
        return LockTableStub(self.channel)

    @property
    def legacy(self) -> LockManagerServiceStub:
        """A stub of the service of 2021."""
        return LockManagerServiceStub(self.channel)

    def advance(self, seconds: float) -> None:
        """Move the clock forward, and have parked waits look."""
        assert isinstance(self.clock, ManualClock), "this clock moves by itself"
        self.clock.advance(seconds)
        self.server.wake_waits()

    def close(self) -> None:
        """Stop it; twice is no error."""
        self.channel.close()
        self.server.stop()
