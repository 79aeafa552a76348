"""The commands: when not to start, the two lines that set it up, and no token in any output."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from run_once import channel as client_channel
from run_once.client import LockClient, RetryPolicy
from run_once.config import load_config
from run_once.errors import RunOnceError
from tests.integration.security_servers import TOKENS, Running
from tests.network import Network
from tests.servers import ServerProcess


def distlock(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "distlock_server", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_refusal_to_start(tmp_path: Path) -> None:
    """Beyond loopback without more the command ends at once, shows two lines, makes nothing."""
    done = distlock(f"--db={tmp_path / 'db'}", "--host=0.0.0.0", "--port=0")
    assert done.returncode == 1
    first, command, export = done.stderr.splitlines()
    assert first.startswith("distlock: 0.0.0.0 can be reached from other machines, so TLS and a")
    assert command.split()[0] == "distlock"
    assert "--secure --address_file=" in command
    assert export.strip().startswith("export RUN_ONCE_ADDRESS=addrfile://")
    assert not (tmp_path / "db").exists()


@pytest.mark.needs_root
def test_the_two_lines_work(network: Network, tmp_path: Path, cleanup: ExitStack) -> None:
    """What the refusal shows starts a server that the command's client is let in to by the file.

    The file is private, and good for the next start. No token is in any output.
    """
    file = tmp_path / "run-once.addr"
    server = ServerProcess(
        tmp_path / "server", "--host=0.0.0.0", "--secure", f"--address_file={file}",
        "--public_host=localhost", "--legacy_port=0", "--log_level=debug",
    )  # fmt: skip
    server.command_prefix = network.prefix
    cleanup.callback(server.close)
    server.start(await_answer=False)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()

    def run_once(*arguments: str, address: str, **more: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, **more, "RUN_ONCE_ADDRESS": address, "RUN_ONCE_RETRY_S": "20"}
        return subprocess.run(
            [*network.prefix, sys.executable, "-m", "run_once.cli", *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    status = run_once("status", address=f"addrfile://{file}")
    assert status.returncode == 0, status.stderr
    where = run_once("where", address=f"addrfile://{file}")
    assert "it answers" in where.stdout
    bare = {"RUN_ONCE_TLS_CA": str(server.folder / "db.secure" / "cert.pem")}
    wrong = {**bare, "RUN_ONCE_TOKEN": "a-token-of-nobody-at-all"}
    denied = run_once("list", address=f"localhost:{server.port}", **wrong)
    assert "none of this server's" in denied.stderr
    refused = run_once("where", address=f"localhost:{server.port}")
    assert refused.returncode == 1
    assert "does not let this client in: it wants TLS" in refused.stdout
    outputs = [status, where, denied, refused, run_once("list", address=f"localhost:{server.port}")]
    assert server.terminate() == 0
    server.start(await_answer=False)
    assert file.read_bytes() == before
    tokens = (server.folder / "db.secure" / "tokens").read_text().split()[4::2]
    assert len(tokens) == 3
    shown = server.log + "".join(done.stdout + done.stderr for done in outputs)
    assert "RUN_ONCE_ADDRESS=addrfile://" in shown
    assert "refused 1 calls" in server.log
    assert "a-token-of-nobody" not in shown
    assert not [token for token in tokens if token in shown]
    assert not re.search(r"\b[0-9a-f]{64}\b", shown)
    assert "PRIVATE KEY" not in shown


@pytest.mark.parametrize("how", ["missing folder", "no token of the role", "file in the way"])
def test_address_file_that_cannot_be_written(tmp_path: Path, how: str) -> None:
    """What cannot be written, or has no such token, is one sentence and status 1."""
    (tmp_path / "file").write_text("x")
    token_file = tmp_path / "tokens"
    token_file.write_text(f"work {TOKENS['work']}\n")
    token_file.chmod(0o600)
    options = {
        "missing folder": [f"--address_file={tmp_path / 'no' / 'addr'}"],
        "no token of the role": [f"--token_file={token_file}", "--address_role=admin"],
        "file in the way": ["--secure", f"--secure_dir={tmp_path / 'file'}"],
    }[how]
    done = distlock(f"--db={tmp_path / 'db'}", "--port=0", *options)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("distlock: ")
    assert "Traceback" not in done.stderr
    assert TOKENS["work"] not in done.stderr


def connect_and_ask(**options: Any) -> None:
    """Do what a program with these options would do first."""
    config = load_config(environ={}, **options)
    transport = client_channel.GrpcTransport(str(config.address), access=config.access)
    LockClient(transport, retry=RetryPolicy(total_s=config.retry_s)).server_info()


def test_errors_of_all_kinds_show_no_token(guarded: Running, tmp_path: Path) -> None:
    """Neither text nor repr of an error, nor its traceback's chain, has the token in it."""
    token = "a-token-to-look-for-everywhere"
    ca = (guarded.wanted.database or tmp_path).with_name("db.secure") / "cert.pem"
    cases: list[dict[str, Any]] = [
        {"address": guarded.address, "tls_ca": ca},
        {"address": guarded.address},
        {"address": "lock.example.org:1"},
        {"address": "127.0.0.1:1", "retry_s": 0.1},
    ]
    for case in cases:
        with pytest.raises(RunOnceError) as raised:
            connect_and_ask(token=token, **case)
        error: BaseException | None = raised.value
        while error is not None:
            assert token not in f"{error!s}{error!r}{vars(error)}"
            error = error.__cause__ or error.__context__
