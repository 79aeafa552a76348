"""Servers with TLS and tokens, and what calls them, for the tests of who is let in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from distlock_server.blobs import BlobStore
from distlock_server.clock import SystemClock
from distlock_server.engines.memory import MemoryEngine
from distlock_server.security import Wanted, address_file, prepare
from distlock_server.server import Listen, Server
from run_once import channel as client_channel
from run_once.access import Access
from run_once.client import LockClient, RetryPolicy
from run_once.config import load_config
from tests.servers import connect

TIMEOUT_S: Final = 20.0
TABLE: Final = "/distlock.v1.LockTable/"
OLD: Final = "/distlock.LockManagerService/"
TOKENS: Final = {
    "read": "token-of-a-reader-1",
    "work": "token-of-a-worker-1",
    "admin": "token-of-an-admin-1",
}
REQUESTS: Final[dict[str, Any]] = {
    "Claim": pb.ClaimRequest(keys=[b"a"], claim_id=bytes(16), ttl_ns=10**9),
    "Renew": pb.RenewRequest(),
    "Settle": pb.SettleRequest(),
    "Frontier": pb.FrontierRequest(n_keys=1),
    "Lookup": pb.LookupRequest(keys=[b"a"]),
    "Wait": pb.WaitRequest(),
    "List": pb.ListRequest(),
    "Count": pb.CountRequest(),
    "Reset": pb.ResetRequest(keys=[b"a"], max_revision=1),
    "Invalidate": pb.InvalidateRequest(),
    "UploadResult": pb.UploadResultRequest(),
    "DownloadResult": pb.DownloadResultRequest(),
    "GetServerInfo": pb.GetServerInfoRequest(),
}


class Running:
    """A server in this process as the command's options would have it."""

    def __init__(self, folder: Path, wanted: Wanted, unix_socket: Path | None = None) -> None:
        self.wanted = wanted
        self.security = prepare(wanted)
        listen = Listen(
            wanted.host,
            0,
            unix_socket,
            self.security.credentials,
            wanted.legacy_port,
        )
        self.server = Server(
            MemoryEngine(),
            BlobStore(folder),
            SystemClock(),
            listen,
            lambda _reason: None,
            guard=self.security.guard,
        )
        self.server.start()

    @property
    def address(self) -> str:
        """Where it is on loopback."""
        return f"127.0.0.1:{self.server.port}"

    def write_address(self, path: Path) -> str:
        """Write its address file, and give the address of that."""
        path.touch(0o600)
        path.write_bytes(address_file(self.security, self.wanted, self.server.port, None))
        return f"addrfile://{path}"


Start = Callable[..., Running]


def secure_channel(running: Running) -> grpc.Channel:
    """Make a channel with TLS, by means other than our client's."""
    assert running.security.tls is not None
    trusted = grpc.ssl_channel_credentials(running.security.tls.ca)
    return grpc.secure_channel(running.address, trusted)


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """Give the metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),) if token is not None else ()


def code_of(call: Callable[[], object]) -> str:
    """Make a call, and give its status and, after a blank, its sentence."""
    try:
        call()
    except grpc.RpcError as error:
        failed: Any = error
        return f"{failed.code().name} {failed.details()}"
    return "OK"


def client_to(address: str, access: Access = Access()) -> LockClient:  # noqa: B008 (frozen)
    """Make a client that would try for long what may be tried again."""
    transport = client_channel.GrpcTransport(address, access=access)
    return LockClient(transport, retry=RetryPolicy(total_s=TIMEOUT_S), owner="tester")


def client_of(**options: Any) -> LockClient:
    """Make a client as a program with these options would."""
    config = load_config(environ={}, cwd=Path("/"), home=Path("/"), **options)
    assert config.address is not None
    return client_to(config.address, config.access)


def count_2021(target: str) -> str:
    """Call the service of 2021 in the clear; give the status."""
    with connect(target) as channel:
        stub = LockManagerServiceStub(channel)
        request = legacy_pb2.CountLocksRequest()
        return code_of(lambda: stub.CountLocks(request, timeout=TIMEOUT_S))
