"""The real run-once 0.4.2 of 2021, from its wheel: its server's binary and its client.

The wheel is taken from RUN_ONCE_2021_WHEEL, from `.cache-2021/`, or downloaded there once. Where
none of that works, or its binary does not run, the tests that need it are skipped and say why.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Final, Protocol

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from distlock_proto import legacy_pb2
from distlock_proto import legacy_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from tests.servers import connect

CACHE: Final = Path(__file__).parents[1] / ".cache-2021"
WHEEL: Final = "run_once-0.4.2-*.whl"
CLIENT_NEEDS: Final = ("protobuf==3.20.3", "grpcio==1.49.1")
DOWNLOAD_TIMEOUT_S: Final = 90.0
START_TIMEOUT_S: Final = 20.0


def find_wheel() -> Path:
    """Give the wheel, downloaded if need be; skip the test if there is none."""
    named = os.environ.get("RUN_ONCE_2021_WHEEL")
    if named:
        return Path(named)
    found = next(CACHE.glob(WHEEL), None)
    if found is None:
        _pip("download", "--no-deps", "run-once==0.4.2", "-d", str(CACHE))
        found = next(CACHE.glob(WHEEL), None)
    if found is None:
        pytest.skip("the wheel of run-once 0.4.2 is not there: set RUN_ONCE_2021_WHEEL")
    return found


def unpack(folder: Path) -> Path:
    """Unpack the wheel; return the folder that the client is imported from."""
    with zipfile.ZipFile(find_wheel()) as wheel:
        wheel.extractall(folder)
    return folder


def client_python() -> Path:
    """Give a Python that the client of 2021 runs on, with the old libraries that it needs."""
    venv = CACHE / "venv"
    ready = venv / "ready"
    python = venv / "bin" / "python"
    if not ready.exists():
        made = CACHE / f"venv-{os.getpid()}"
        shutil.rmtree(made, ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "venv", str(made)], check=True, timeout=DOWNLOAD_TIMEOUT_S
        )
        _pip("install", "--only-binary=:all:", *CLIENT_NEEDS, python=made / "bin" / "python")
        (made / "ready").touch()
        if not venv.exists():
            made.rename(venv)
        else:
            shutil.rmtree(made, ignore_errors=True)
    return python


def _pip(*arguments: str, python: Path | None = None) -> None:
    CACHE.mkdir(exist_ok=True)
    command = [str(python or sys.executable), "-m", "pip", "-q", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*command, *arguments],
            timeout=DOWNLOAD_TIMEOUT_S,
            capture_output=True,
            text=True,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"pip {arguments[0]} for run-once 0.4.2: {error}")
    if done.returncode:
        pytest.skip(f"pip {arguments[0]} for run-once 0.4.2: {done.stderr.strip()[-300:]}")


class Running(Protocol):
    """A server of either kind."""

    port: int

    @property
    def address(self) -> str:
        """Host and port."""
        ...


def acquire(key: str, ns: int | None = 10**10, overwrite: bool = False, **more: Any) -> Any:
    """Make a request for one lock."""
    lock = pb.Lock(global_id=key, **more)
    if ns is not None:
        lock.expires_in.CopyFrom(Duration(seconds=ns // 10**9, nanos=ns % 10**9))
    return pb.AcquireLockRequest(lock=lock, overwrite=overwrite)


class Server2021:
    """The server of 2021 as a process."""

    def __init__(self, unpacked: Path, folder: Path) -> None:
        """Start it on a free port, with its database in a folder."""
        self.unpacked = unpacked
        binary = unpacked / "cmake-build-release" / "distlock"
        binary.chmod(0o755)
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.db = folder / "db"
        try:
            self._process = subprocess.Popen(
                [str(binary), f"--db={self.db}", f"--port={self.port}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            pytest.skip(f"the binary of 2021 does not run here: {error}")
        self._await()

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(15)

    def _await(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                pytest.skip(f"the binary of 2021 ends with {self._process.returncode} here")
            try:
                with connect(self.address) as channel:
                    request = legacy_pb2.GetCurrentServerTimeRequest()
                    LockManagerServiceStub(channel).GetCurrentServerTime(request, timeout=1)
            except grpc.RpcError:
                time.sleep(0.05)
            else:
                return
        raise AssertionError("the server of 2021 did not answer")
