"""Nothing configured: this machine's own server, with real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from run_once import cli, local
from run_once.config import SOURCE_LISTENING, SOURCE_OWN, Config, load_config
from run_once.errors import ConfigError
from run_once.local import find_server, places
from run_once.task import Session, run_task
from tests.servers import ServerProcess

NOWHERE = "127.0.0.1:9"
WAIT_S = 30.0

SCRIPT = """
import dataclasses, json, sys
from run_once import local
from run_once.config import load_config
from run_once.task import Session, run_task
local.find_server.__kwdefaults__["default_address"] = "127.0.0.1:9"
config = load_config().resolved()
session = Session.get(config)
outcome = run_task(session, sys.argv[1].encode(), lambda lease: 1, ttl_s=60)
info = session.client.server_info()
print(json.dumps([config.address, outcome.is_completed, info.database_id.hex()]))
"""


def _own_pid() -> int | None:
    """Give the process id in the note of the test's own server."""
    own = places(load_config(), os.environ)
    try:
        pid = json.loads(own.note.read_text(encoding="utf-8"))["pid"]
    except OSError:
        return None
    assert isinstance(pid, int)
    return pid


def _is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and was not waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _end(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """End a server by its id, and wait until it is gone."""
    if not _is_alive(pid):
        return
    os.kill(pid, number)
    end_s = time.monotonic() + WAIT_S
    while _is_alive(pid) and time.monotonic() < end_s:
        time.sleep(0.02)
    assert not _is_alive(pid)


@pytest.fixture(autouse=True)
def _ended(hermetic_environment: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no server behind, and find the sentences said anew."""
    monkeypatch.setattr(local, "_ANNOUNCED", set())
    yield
    pid = _own_pid()
    if pid is not None:
        _end(pid)


def _run(*keys: str) -> list[tuple[str, bool, str, str]]:
    """Run the script once per key, all at once: address, did it run, database, stderr."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT, key],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for key in keys
    ]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=110)
        assert process.returncode == 0, err
        address, ran, database = json.loads(out)
        found.append((address, ran, database, err))
    return found


def test_survives_the_process_that_started_it() -> None:
    """The first process starts a server and says so; the next one uses it and its done keys."""
    ((address, ran, database, err),) = _run("a")
    assert ran
    assert err.count("\n") == 1
    assert "started this machine's own lock server" in err
    assert "other machines do not see it" in err
    pid = _own_pid()
    assert pid is not None
    assert _is_alive(pid)
    ((again, ran, same_database, err),) = _run("a")
    assert not ran
    assert (again, same_database, err) == (address, database, "")
    assert _own_pid() == pid


def test_many_processes_at_once_start_one() -> None:
    """Of several processes that start at once one starts the server, and all use it."""
    found = _run("a", "a", "b", "c")
    assert len({(address, database) for address, _, database, _ in found}) == 1
    assert sum(ran for _, ran, _, _ in found) == 3
    assert sum("started this machine's own" in err for _, _, _, err in found) == 1


def test_crash_and_restart() -> None:
    """After a crash the next process starts the server again over the same database."""
    ((_, _, database, _),) = _run("a")
    pid = _own_pid()
    assert pid is not None
    _end(pid)
    ((_, ran, same_database, err),) = _run("a")
    assert (ran, same_database) == (False, database)
    assert "started" in err
    assert _own_pid() != pid


def test_revived_in_the_midst_of_a_run(tmp_path: Path) -> None:
    """A server that ended while a process was idle is started again by the next call."""
    config = _own_config()
    session = Session.get(config)
    assert run_task(session, b"a", lambda _: 1, ttl_s=60).is_completed
    pid = _own_pid()
    assert pid is not None
    _end(pid, signal.SIGTERM)
    assert not run_task(session, b"a", lambda _: 1, ttl_s=60).did_run
    assert _own_pid() != pid


def test_idle_exit() -> None:
    """The server ends by itself when nobody has asked it anything for some time."""
    _own_config(idle_exit_s=1.0)
    pid = _own_pid()
    assert pid is not None
    end_s = time.monotonic() + WAIT_S
    while _is_alive(pid) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert not _is_alive(pid)


def test_server_that_listens_is_used(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """A distlock where one is looked for first is used; the change from the own one is said."""
    config = load_config()
    found = find_server(config, environ={}, default_address=server.address)
    assert found == (server.address, SOURCE_LISTENING)
    assert _own_pid() is None
    assert capsys.readouterr().err == ""
    assert find_server(config, environ={}, default_address=NOWHERE).source == SOURCE_OWN
    said = capsys.readouterr().err
    assert f"the last run used {server.address}" in said
    find_server(config, environ={}, default_address=server.address)
    assert f"the lock server is {server.address} now" in capsys.readouterr().err


def test_two_servers_in_use_are_refused(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody works with the own server, one that listens does not part the work in two."""
    config = _own_config()
    session = Session.get(config)
    claimed = session.claim([b"a"], ttl_s=60)
    with pytest.raises(ConfigError, match="two are in use") as raised:
        find_server(load_config(), environ={}, default_address=server.address)
    for text in (
        f"RUN_ONCE_ADDRESS={server.address}",
        f"RUN_ONCE_ADDRESS={config.address}",
        session.client.owner,
    ):
        assert text in str(raised.value)
    monkeypatch.setattr(local, "DEFAULT_ADDRESS", server.address)
    result = CliRunner().invoke(cli.main, ["where"])
    assert result.exit_code == 1
    assert "two are in use" in result.output
    session.complete(claimed.leases[0])
    found = find_server(load_config(), environ={}, default_address=server.address)
    assert found.source == SOURCE_LISTENING


def test_server_that_listens_is_used_within_jobs(server: ServerProcess) -> None:
    """On several nodes a forwarded server is as good as a configured one."""
    environ = {"SLURM_JOB_NUM_NODES": "4"}
    found = find_server(load_config(), environ=environ, default_address=server.address)
    assert found.address == server.address
    with pytest.raises(ConfigError, match="4 nodes"):
        find_server(load_config(), environ=environ, default_address=NOWHERE)


def test_database_in_use(tmp_path: Path) -> None:
    """If another process has the database and does not answer, the error says so."""
    config = _own_config()
    own = places(config, os.environ)
    pid = _own_pid()
    assert pid is not None
    own.note.unlink()
    own.socket.unlink()
    try:
        with pytest.raises(ConfigError, match="did not start"):
            find_server(load_config(), environ={}, default_address=NOWHERE)
    finally:
        _end(pid)


def _own_config(idle_exit_s: float = 600.0) -> Config:
    """Start this test's own server from here; give the configuration that names it."""
    config = load_config(idle_exit_s=idle_exit_s)
    found = find_server(config, environ={}, default_address=NOWHERE)
    assert found.source == SOURCE_OWN
    return dataclasses.replace(config, address=found.address, source=found.source)
