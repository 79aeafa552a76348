"""Starts the detached server of `run_once.local`, once per user and machine."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from distlock_proto import lock_table_pb2 as pb
from run_once.channel import GrpcTransport, TransportError
from run_once.errors import ConfigError
from run_once.local import Places, answers, read_note, write_whole

_LOCK_WAIT_S: Final = 90.0
_START_WAIT_S: Final = 60.0
_END_WAIT_S: Final = 6.0
_LIST_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.03
_PACKAGES: Final = ("distlock_server", "distlock_proto")
_INSTALLED: Final = ("site-packages", "dist-packages")
_LOG_LINES: Final = 3
_MAX_LOG_BYTES: Final = 1_000_000
_children: Final[list[subprocess.Popen[bytes]]] = []


def find_running(own: Places) -> str | None:
    """Give the address of the server if it runs and answers."""
    path = read_note(own).get("socket")
    candidates = {str(path), str(own.socket)} if path else {str(own.socket)}
    for candidate in sorted(candidates, key=lambda found: found != path):
        if Path(candidate).exists() and answers(f"unix:{candidate}"):
            return f"unix:{candidate}"
    return None


def holder_at(address: str) -> str | None:
    """Give the owner of a lease that runs at a server; None: there is none, or it cannot be asked.

    A page of what is held is looked at, not all of it.
    """
    transport = GrpcTransport(address)
    try:
        request = pb.ListRequest(filter=pb.LIST_FILTER_HELD)
        reply = transport.call("List", request, pb.ListReply, _LIST_TIMEOUT_S)
    except TransportError:
        return None
    finally:
        transport.close()
    states = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)
    owners = [info.owner for info in reply.infos if info.state in states]
    return (owners[0] or "somebody unnamed") if owners else None


def start(own: Places, *, idle_exit_s: float) -> tuple[str, bool]:
    """Start the server, unless another process does so at the same time.

    Args:
        own: Where its things are.
        idle_exit_s: It ends after so long without a request.

    Returns:
        Its address, and whether it was started here.

    Raises:
        ConfigError: It does not start; the message quotes its log.
    """
    with _locked(own):
        running = find_running(own)
        if running is not None:
            return running, False
        _await_end(own)
        process = _launch(own, idle_exit_s)
        _await_answer(own, process)
        note = {"pid": process.pid, "socket": str(own.socket)}
        write_whole(own.note, json.dumps(note))
        return f"unix:{own.socket}", True


@contextlib.contextmanager
def _locked(own: Places) -> Iterator[None]:
    """Let one process at a time start a server."""
    with own.start_lock.open("a") as file:
        end_s = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end_s:
                    raise ConfigError(
                        f"another process has been starting a lock server for {_LOCK_WAIT_S:.0f} "
                        f"s ({own.start_lock} is locked); see {own.log}, or run `distlock` yourself"
                    ) from None
                time.sleep(_POLL_S)
            except OSError as error:  # a file system without locks
                raise ConfigError(
                    f"{own.start_lock} cannot be locked: {error.strerror}; set RUN_ONCE_DATA_DIR "
                    "to a folder on a local disk"
                ) from None
        yield


def _launch(own: Places, idle_exit_s: float) -> subprocess.Popen[bytes]:
    """Start the process, detached from this one's terminal, session and streams."""
    if not sys.executable:
        raise ConfigError(
            "no lock server is configured, and this program has no Python to start one with; run "
            "`distlock` and set RUN_ONCE_ADDRESS"
        )
    command = [
        sys.executable,
        "-m",
        "distlock_server",
        f"--db={own.database}",
        f"--unix_socket={own.socket}",
        f"--idle_exit_s={idle_exit_s:g}",
    ]
    is_long = own.log.exists() and own.log.stat().st_size > _MAX_LOG_BYTES
    with own.log.open("wb" if is_long else "ab") as log:
        process = subprocess.Popen(  # noqa: S603 (arguments of our own, no shell)
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=own.folder,
            env=_environment(),
            start_new_session=True,
        )
    if not _children:
        atexit.register(_let_go)
    _children.append(process)
    return process


def _await_answer(own: Places, process: subprocess.Popen[bytes]) -> None:
    """Wait until the new server answers."""
    end_s = time.monotonic() + _START_WAIT_S
    while not answers(f"unix:{own.socket}"):
        is_gone = process.poll() is not None
        if is_gone or time.monotonic() > end_s:
            if not is_gone:
                process.terminate()
            problem = "did not start" if is_gone else f"did not answer within {_START_WAIT_S:.0f} s"
            raise ConfigError(
                f"no lock server is configured, and this machine's own {problem}: "
                f"{_end_of(own.log)} (log: {own.log}). Run `distlock` yourself and set "
                "RUN_ONCE_ADDRESS, or set RUN_ONCE_DATA_DIR to another folder"
            )
        time.sleep(_POLL_S)


def _await_end(own: Places) -> None:
    """Give the last server time to leave the database, if it is just ending."""
    for child in [child for child in _children if child.poll() is not None]:
        _children.remove(child)
    pid = read_note(own).get("pid")
    end_s = time.monotonic() + _END_WAIT_S
    while isinstance(pid, int) and _is_alive(pid) and time.monotonic() < end_s:
        time.sleep(_POLL_S)


def _is_alive(pid: int) -> bool:
    """Tell whether a process of this user exists."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _environment() -> dict[str, str]:
    """Give the environment in which Python finds the server where this process would."""
    environ = dict(os.environ)
    parents = []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ConfigError(f"package {name} is missing: install run-once again")
        parents.append(Path(spec.origin).parent.parent)
    extra = [str(parent) for parent in parents if parent.name not in _INSTALLED]
    before = environ.get("PYTHONPATH", "")
    environ["PYTHONPATH"] = os.pathsep.join([*extra, *([before] if before else [])])
    return environ


def _end_of(log: Path) -> str:
    """Quote the last lines of the log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LOG_LINES:]
    return " / ".join(line.strip()[:300] for line in lines) or "its log is empty"


def _let_go() -> None:
    """Leave the server running: Popen would warn of a child that outlives this process."""
    for child in _children:
        if child.poll() is None:
            child.returncode = 0
