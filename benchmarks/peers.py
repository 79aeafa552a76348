"""What run-once is measured beside: its own release of 2021, and Redis. Each may be missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from client_2021 import Client2021
from common import Sample
from report import Report
from tests import legacy_2021

REDIS_START_S = 10.0

# A lock for each key that has none, with its owner, for some milliseconds; those got are counted.
LUA_CLAIM = """
local got = 0
for _, key in ipairs(KEYS) do
  if redis.call('SET', key, ARGV[1], 'NX', 'PX', ARGV[2]) then got = got + 1 end
end
return got
"""


@contextmanager
def server_2021(
    report: Report, folder: Path | None = None
) -> Iterator[legacy_2021.Server2021 | None]:
    """Run the server of 2021 out of its wheel; None where it is not to be had.

    Args:
        report: Is told what is missing.
        folder: Its database is in `db` of this; None: a temporary one.
    """
    with tempfile.TemporaryDirectory(prefix="run-once-2021-") as made:
        try:
            unpacked = legacy_2021.unpack(Path(made) / "wheel")
            server = legacy_2021.Server2021(unpacked, folder or Path(made))
        except pytest.skip.Exception as why:
            report.skip(f"run-once 0.4.2: {why}")
            yield None
            return
        try:
            yield server
        finally:
            server.close()


LOOP_2021 = """
import sys, time
from run_once import DistributedIterator, notify_success
form, count, chunksize = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def loop(form, count):
    handed_out = 0
    for key in DistributedIterator([form % n for n in range(count)], 60, chunksize=chunksize):
        notify_success(key)
        handed_out += 1
    return handed_out

loop("first-" + form, 50)  # connects
start_s = time.perf_counter()
handed_out = loop(form, count)
print(handed_out, time.perf_counter() - start_s)
"""


PROTOBUF_KIND = (
    "from google.protobuf.internal import api_implementation; print(api_implementation.Type())"
)


class Running2021(NamedTuple):
    """A server of 2021 and a client of it.

    Attributes:
        address: Where it is.
        pid: Its process.
        client: The calls of its client, made by today's gRPC.
        unpacked: Where its own client can be imported from.
    """

    address: str
    pid: int
    client: Client2021
    unpacked: Path

    def own_loop(
        self, python: Path, form: str, count: int, chunksize: int = 10, *, is_done: bool = False
    ) -> Sample:
        """Run the loop of 2021 by its own client with the gRPC of its time; give keys a second.

        Args:
            python: Has what that client needs.
            form: A key is `form % number`.
            count: How many keys.
            chunksize: Its option.
            is_done: All keys are done, and none is to be handed out; else all are.
        """
        with tempfile.TemporaryDirectory() as home:
            host, _, port = self.address.rpartition(":")
            ini = f"[DEFAULT]\naddress = {host}\nport = {port}\n"
            (Path(home) / ".run_once.ini").write_text(ini)
            done = subprocess.run(
                [str(python), "-c", LOOP_2021, form, str(count), str(chunksize)],
                cwd=self.unpacked,
                env={"HOME": home, "PATH": os.environ.get("PATH", "")},
                check=True,
                stdout=subprocess.PIPE,
            )
        handed_out, took_s = done.stdout.split()
        assert int(handed_out) == (0 if is_done else count), handed_out
        return Sample(count / float(took_s))


def python_2021(report: Report) -> Path | None:
    """Give a Python that runs the client of 2021 as it was; None where there is none, or quick.

    Its protobuf has compiled code for Python 3.10 and older only. Above, it falls back to code in
    plain Python, which is up to five times slower: no peer to be compared with.
    """
    if report.quick:
        return None  # it may have to be made first
    try:
        python = legacy_2021.client_python()
    except pytest.skip.Exception as why:
        report.skip(f"the client of run-once 0.4.2: {why}")
        return None
    asked = [str(python), "-c", PROTOBUF_KIND]
    kind = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    if kind == "python":
        report.skip(
            "the client of run-once 0.4.2 itself: its protobuf is not compiled for this Python, "
            "and would make it slower than it was (Python 3.10 has it)"
        )
        return None
    return python


@contextmanager
def running_2021(report: Report, folder: Path | None = None) -> Iterator[Running2021 | None]:
    """Give a server of 2021 with a client, or None; see `server_2021`."""
    with server_2021(report, folder) as server:
        if server is None:
            yield None
            return
        client = Client2021(server.address)
        try:
            yield Running2021(server.address, server.pid, client, server.unpacked)
        finally:
            client.close()


class Redis:
    """A Redis server that syncs each write before it answers, and a client of it."""

    def __init__(self, folder: Path) -> None:
        """Start it on a unix socket in a folder, and connect."""
        import redis  # noqa: PLC0415 - optional

        path = folder / "socket"
        self._process = subprocess.Popen(
            [
                *("redis-server", "--port", "0", "--unixsocket", str(path)),
                *("--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always"),
                *("--save", "", "--daemonize", "no", "--loglevel", "warning"),
            ],
            stdout=subprocess.DEVNULL,
        )
        self.pid = self._process.pid
        self.client: Any = redis.Redis(unix_socket_path=str(path))
        self.lua_claim: Any = self.client.register_script(LUA_CLAIM)
        end_s = time.monotonic() + REDIS_START_S
        while True:
            try:
                self.client.ping()
            except redis.RedisError:
                if time.monotonic() > end_s:
                    self.close()
                    raise
                time.sleep(0.02)
            else:
                return

    def close(self) -> None:
        """End it."""
        self.client.close()
        self._process.terminate()
        self._process.wait()


@contextmanager
def redis_server(report: Report) -> Iterator[Redis | None]:
    """Run a Redis server; None where it is not installed."""
    if shutil.which("redis-server") is None:
        report.skip("Redis: there is no redis-server (Debian: apt-get install redis-server)")
        yield None
        return
    if importlib.util.find_spec("redis") is None:
        report.skip("Redis: its Python client is missing (pip install 'run-once[bench]')")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="run-once-redis-") as folder:
        server = Redis(Path(folder))
        try:
            yield server
        finally:
            server.close()
