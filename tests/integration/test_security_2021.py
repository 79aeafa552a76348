"""Who may call the service of 2021, which knows neither TLS nor tokens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from distlock_server.auth import ROLES
from distlock_server.tokens import Role
from tests.integration.security_servers import (
    OLD,
    REQUESTS,
    TABLE,
    TIMEOUT_S,
    TOKENS,
    Running,
    Start,
    bearer,
    client_of,
    code_of,
    count_2021,
)
from tests.integration.test_legacy_client import Client as Client2021
from tests.network import Network
from tests.servers import ServerProcess, connect

REQUESTS_2021: Final[dict[str, Any]] = {
    "AcquireLock": legacy_pb2.AcquireLockRequest(),
    "AcquireMany": legacy_pb2.AcquireManyRequest(),
    "ReleaseLock": legacy_pb2.ReleaseLockRequest(),
    "ProcessBatch": legacy_pb2.ProcessBatchRequest(),
    "ListLocks": legacy_pb2.ListLocksRequest(),
    "CountLocks": legacy_pb2.CountLocksRequest(),
    "GetCurrentServerTime": legacy_pb2.GetCurrentServerTimeRequest(),
}


def own_address() -> str:
    """Give an address of this machine that is not on loopback; skip the test without one."""
    for family, far in ((socket.AF_INET, "192.0.2.77"),):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((far, 9))  # sends nothing: only the route is looked up
            except OSError:
                continue
            address = str(probe.getsockname()[0])
        if not address.startswith("127."):
            return address
    pytest.skip("this machine has no address but those on loopback")


@pytest.mark.needs_root
@pytest.mark.parametrize("legacy", ["loopback", "on"])
def test_2021_beyond_loopback(
    legacy: str, network: Network, tmp_path: Path, cleanup: ExitStack
) -> None:
    """Of an --insecure server loopback may call the service of 2021, others only if it is on."""
    server = ServerProcess(
        tmp_path / "server", "--host=0.0.0.0", "--insecure", f"--legacy={legacy}"
    )
    server.command_prefix, server.host = network.prefix, network.guest
    cleanup.callback(server.close)
    server.start()
    near = f"127.0.0.1:{server.port}"
    code = f"from {count_2021.__module__} import count_2021; print(count_2021({near!r}))"
    command = [*network.prefix, sys.executable, "-c", code]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output(command, env=environ, text=True, timeout=60) == "OK\n"
    far = count_2021(server.address)
    if legacy == "on":
        assert far == "OK"
    else:
        assert far.startswith("PERMISSION_DENIED CountLocks: ")
        assert "on its own machine only" in far
    client_of(address=server.address).server_info()


@pytest.mark.parametrize("method", REQUESTS_2021)
@pytest.mark.parametrize("token", [None, "wrong-token-of-nobody", *TOKENS])
def test_roles_of_2021(stub_channel: grpc.Channel, method: str, token: str | None) -> None:
    """Over TLS each method of 2021 passes with a role that is enough for it, and no less."""
    call = getattr(LockManagerServiceStub(stub_channel), method)
    metadata = bearer(TOKENS.get(token or "", token))
    result = code_of(lambda: call(REQUESTS_2021[method], metadata=metadata, timeout=TIMEOUT_S))
    needed = ROLES[OLD + method]
    assert needed is not None
    if token not in TOKENS:
        assert result.startswith("UNAUTHENTICATED ")
    elif Role[token.upper()] < needed:
        assert result.startswith("PERMISSION_DENIED ")
    else:
        assert result.split()[0] not in {"UNAUTHENTICATED", "PERMISSION_DENIED"}


def test_every_method_has_its_role() -> None:
    """The tests of roles call every method that there is, of both services."""
    asked = {TABLE + method for method in REQUESTS} | {OLD + method for method in REQUESTS_2021}
    assert {name for name in ROLES if name.startswith((TABLE, OLD))} == asked


def test_2021_switched_off(start: Start) -> None:
    """With --legacy=off nobody is answered, on a unix socket neither."""
    path = Path(os.environ["RUN_ONCE_RUNTIME_DIR"]) / "d.sock"
    running = start(legacy="off", unix_socket=path)
    for target in (running.address, f"unix:{path}"):
        assert count_2021(target).startswith("PERMISSION_DENIED ")


def test_2021_is_no_way_round_the_tokens(guarded: Running, stub_channel: grpc.Channel) -> None:
    """Over TLS an old method needs a token; the port in the clear serves old methods alone."""
    stub = LockManagerServiceStub(stub_channel)
    request = legacy_pb2.CountLocksRequest()
    result = code_of(lambda: stub.CountLocks(request, timeout=TIMEOUT_S))
    assert result.startswith("UNAUTHENTICATED ")
    clear = f"127.0.0.1:{guarded.server.legacy_port}"
    assert count_2021(clear) == "OK"
    with connect(clear) as channel:
        call = LockTableStub(channel).Count
        result = code_of(lambda: call(pb.CountRequest(), timeout=TIMEOUT_S))
    assert result.startswith("UNAUTHENTICATED ")
    far = own_address()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((far, guarded.server.legacy_port), 5)


def test_2021_on_loopback_with_tokens(start: Start, tmp_path: Path) -> None:
    """A server with tokens in the clear answers 2021 only if told to."""
    token_file = tmp_path / "tokens"
    token_file.write_text(f"work {TOKENS['work']}\n")
    assert count_2021(start(token_file=token_file).address).startswith("PERMISSION_DENIED ")
    assert count_2021(start(token_file=token_file, legacy="loopback").address) == "OK"


def test_client_of_2021_at_a_secure_server(
    python_2021: Path, unpacked_2021: Path, tmp_path: Path, guarded: Running
) -> None:
    """The real client of 2021 works on loopback against a secure server's port for it."""

    class Port:
        port = guarded.server.legacy_port
        address = f"127.0.0.1:{guarded.server.legacy_port}"

    client = Client2021(python_2021, unpacked_2021, tmp_path / "home-2021", Port())
    script = """
def main():
    got = []
    for key in DistributedIterator(["old%d" % i for i in range(5)], timeout=60):
        got.append(key)
        notify_success(key)
    return got
"""
    assert sorted(client.run(script)) == [f"old{number}" for number in range(5)]
