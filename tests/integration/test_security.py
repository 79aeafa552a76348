"""Real servers with TLS, tokens and client certificates, and who is let in."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from distlock_server.auth import ROLES
from distlock_server.blobs import BlobStore
from distlock_server.clock import SystemClock
from distlock_server.engines.memory import MemoryEngine
from distlock_server.security import Wanted, address_file, prepare
from distlock_server.server import Listen, Server
from distlock_server.tokens import Role
from run_once import channel as client_channel
from run_once import local
from run_once.access import Access
from run_once.client import LockClient, RetryPolicy
from run_once.config import load_config
from run_once.errors import AccessError, ConfigError, RunOnceError, ServerUnavailableError
from run_once.notify import notify_success
from run_once.session import Session
from tests.certificates import Authority
from tests.integration.test_legacy_client import Client as Client2021
from tests.servers import ServerProcess, connect

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


@pytest.fixture
def start(tmp_path: Path, cleanup: ExitStack) -> Start:
    """Give a function that starts a server with options."""

    def begin(host: str = "127.0.0.1", **options: Any) -> Running:
        unix_socket = options.pop("unix_socket", None)
        wanted = Wanted(host, tmp_path / "db", **options)
        running = Running(tmp_path / "results", wanted, unix_socket)
        cleanup.callback(running.server.stop)
        return running

    return begin


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Give one server with TLS and a token of each role, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("guarded")
    token_file = folder / "tokens"
    token_file.write_text("".join(f"{role} {token}\n" for role, token in TOKENS.items()))
    token_file.chmod(0o600)
    wanted = Wanted("127.0.0.1", folder / "db", secure=True, token_file=token_file)
    running = Running(folder / "results", wanted._replace(legacy_port=0))
    yield running
    running.server.stop()


def secure_channel(running: Running) -> grpc.Channel:
    """Make a channel with TLS, by means other than our client's."""
    assert running.security.tls is not None
    trusted = grpc.ssl_channel_credentials(running.security.tls.ca)
    return grpc.secure_channel(running.address, trusted)


@pytest.fixture(scope="module")
def stub_channel(guarded: Running) -> Iterator[grpc.Channel]:
    """Give a channel to that server."""
    with secure_channel(guarded) as channel:
        yield channel


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


# -- tokens and roles ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", REQUESTS)
@pytest.mark.parametrize("token", [None, "", "wrong-token-of-nobody", *TOKENS])
def test_roles(stub_channel: grpc.Channel, method: str, token: str | None) -> None:
    """A call passes with a role that is enough; else it is refused before it does anything."""
    call = getattr(LockTableStub(stub_channel), method)
    sent = TOKENS.get(token or "", token)
    result = code_of(lambda: call(REQUESTS[method], metadata=bearer(sent), timeout=TIMEOUT_S))
    needed = ROLES[TABLE + method]
    assert needed is not None
    if token not in TOKENS:
        assert result.startswith("UNAUTHENTICATED ")
    elif Role[token.upper()] < needed:
        assert result.startswith("PERMISSION_DENIED ")
        assert f"role {needed.label}" in result
        assert f"the role {token}" in result
    else:
        assert result.split()[0] not in {"UNAUTHENTICATED", "PERMISSION_DENIED"}
    assert not [one for one in (*TOKENS.values(), "wrong-token") if one in result]


def test_refused_calls_change_nothing(guarded: Running, stub_channel: grpc.Channel) -> None:
    """A claim without a token, and a reset by a worker, leave the key as it was."""
    stub, key = LockTableStub(stub_channel), b"unchanged"
    claim = pb.ClaimRequest(keys=[key], claim_id=os.urandom(16), ttl_ns=60 * 10**9)
    code_of(lambda: stub.Claim(claim, timeout=TIMEOUT_S))
    worker = bearer(TOKENS["work"])
    lookup = pb.LookupRequest(keys=[key])
    seen = stub.Lookup(lookup, metadata=worker, timeout=TIMEOUT_S)
    assert list(seen.states) == [pb.KEY_STATE_ABSENT]
    stub.Claim(claim, metadata=worker, timeout=TIMEOUT_S)
    reset = pb.ResetRequest(keys=[key], max_revision=2**60)
    code_of(lambda: stub.Reset(reset, metadata=worker, timeout=TIMEOUT_S))
    seen = stub.Lookup(lookup, metadata=worker, timeout=TIMEOUT_S)
    assert list(seen.states) == [pb.KEY_STATE_BUSY]


@pytest.mark.parametrize(
    "header", [f"Basic {TOKENS['admin']}", TOKENS["admin"], "Bearer", "Bearer  ", ""]
)
def test_malformed_header(stub_channel: grpc.Channel, header: str) -> None:
    """A header of another form is no token."""
    call = LockTableStub(stub_channel).Count
    metadata = (("authorization", header),)
    result = code_of(lambda: call(pb.CountRequest(), metadata=metadata, timeout=TIMEOUT_S))
    assert result.startswith("UNAUTHENTICATED ")


def test_health_needs_no_token(stub_channel: grpc.Channel) -> None:
    """Health answers without a token; reflection, which tells what there is, does not."""
    health = health_pb2_grpc.HealthStub(stub_channel)
    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch: Any = health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    reflect = reflection_pb2_grpc.ServerReflectionStub(stub_channel).ServerReflectionInfo
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    refused = code_of(lambda: list(reflect(iter([request]), timeout=TIMEOUT_S)))
    assert refused.startswith("UNAUTHENTICATED ")
    reader = bearer(TOKENS["read"])
    answers: Any = list(reflect(iter([request]), timeout=TIMEOUT_S, metadata=reader))
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "needs a token, and none was sent"),
        ("wrong-token-of-nobody", "none of this server's"),
        (TOKENS["read"], "needs a token of role work"),
    ],
)
def test_client_says_what_to_do(guarded: Running, token: str | None, words: str) -> None:
    """Our client raises a refusal at once, in one sentence with what to do and no token in it."""
    tls = guarded.wanted.database
    assert tls is not None
    ca = tls.with_name("db.secure") / "cert.pem"
    client = client_of(address=guarded.address, tls_ca=ca, token=token)
    with pytest.raises(AccessError, match=words) as raised:
        client.claim([b"x"], ttl_s=60)
    message = str(raised.value)
    assert message.count("\n") == 0
    assert "address file" in message or "RUN_ONCE_TOKEN" in message
    assert token is None or token not in message


def test_token_taken_away(tmp_path: Path, start: Start) -> None:
    """A token that is taken out of the file is refused soon after, without a restart."""
    token_file = tmp_path / "tokens"
    token_file.write_text(f"work {TOKENS['work']}\nread {TOKENS['read']}\n")
    running = start(token_file=token_file)
    client = client_of(address=running.address, token=TOKENS["work"])
    client.server_info()
    token_file.write_text(f"read {TOKENS['read']}\n")
    running.server._guard._tokens._looked_s -= 2  # type: ignore[union-attr]  # as if time went on
    with pytest.raises(AccessError, match="none of this server's"):
        client.server_info()


def test_own_user_on_the_unix_socket(start: Start) -> None:
    """Whoever may open the unix socket, the server's user alone, needs no token."""
    path = Path(os.environ["RUN_ONCE_RUNTIME_DIR"]) / "d.sock"
    running = start(secure=True, unix_socket=path)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert client_of(address=f"unix:{path}").reset([b"a"], 1)
    with pytest.raises(AccessError):
        client_of(address=running.address).server_info()


# -- certificates --------------------------------------------------------------------------------


def test_secure_end_to_end(start: Start, tmp_path: Path) -> None:
    """With the address file alone a client claims, completes and resets over TLS."""
    running = start(secure=True)
    client = client_of(address=running.write_address(tmp_path / "addr"))
    grant = client.claim([b"k"], ttl_s=60).grants[0]
    assert client.reset([grant.key], client.server_info().revision) == bytes([pb.KEY_STATE_RESET])


def test_made_certificate_under_any_name(start: Start, tmp_path: Path) -> None:
    """An address file stays good when the server is reached by a name that it does not know."""
    far = own_address()
    running = start("0.0.0.0", secure=True, public_host="lock.example.org")
    config = load_config(environ={}, address=running.write_address(tmp_path / "addr"))
    assert config.address == f"lock.example.org:{running.server.port}"
    client_to(f"{far}:{running.server.port}", config.access).server_info()


def test_ipv6(start: Start, tmp_path: Path) -> None:
    """A secure server on an IPv6 address is found and used by its address file."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
    running = start("::1", secure=True)
    config = load_config(environ={}, address=running.write_address(tmp_path / "addr"))
    assert config.address == f"[::1]:{running.server.port}"
    assert local.problem(config.address, config.access) is None
    assert local.problem(config.address, Access()) == (
        "it wants TLS, and this client was not told to use it"
    )


def cert_case(name: str, running: Running, tmp_path: Path) -> tuple[str, Access]:
    """Give the address and access of a client that cannot agree on TLS with a server."""
    other = Authority(tmp_path / "other")
    assert running.security.tls is None or running.security.tls.ca is not None
    ca = running.security.tls.ca if running.security.tls is not None else other.file.read_bytes()
    assert ca is not None
    return {
        "wrong CA": (running.address, Access(tls=True, ca=other.file.read_bytes())),
        "public CAs": (running.address, Access(tls=True)),
        "wrong name": (running.address, Access(tls=True, ca=ca, name="another.example.org")),
        "plaintext client": (running.address, Access()),
        "plaintext server": (running.address, Access(tls=True, ca=ca)),
    }[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong CA", "its certificate is not trusted"),
        ("public CAs", "its certificate is not trusted"),
        ("wrong name", "its certificate is not trusted .*another.example.org"),
        ("plaintext client", "it wants TLS"),
        ("plaintext server", "it does not speak TLS"),
    ],
)
def test_no_agreement_on_tls(name: str, words: str, start: Start, tmp_path: Path) -> None:
    """Whatever is wrong with TLS is said at once, as one sentence with what to do."""
    running = start() if name == "plaintext server" else start(secure=True)
    client = client_to(*cert_case(name, running, tmp_path))
    with pytest.raises(AccessError, match=words) as raised:
        client.claim([b"x"], ttl_s=60)
    assert "RUN_ONCE_ADDRESS=addrfile:///path" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_expired_certificate(cleanup: ExitStack, tmp_path: Path) -> None:
    """A server whose certificate expired while it ran is refused by the client, which says so."""
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("late", lasts_s=-5)
    pair = [(key.read_bytes(), certificate.read_bytes())]
    listen = Listen(credentials=grpc.ssl_server_credentials(pair))
    blobs = BlobStore(tmp_path / "results")
    server = Server(MemoryEngine(), blobs, SystemClock(), listen, lambda _reason: None)
    server.start()
    cleanup.callback(server.stop)
    client = client_of(address=f"127.0.0.1:{server.port}", tls_ca=authority.file)
    with pytest.raises(AccessError, match=r"not trusted \(certificate has expired\)"):
        client.server_info()


def test_own_ca(start: Start, tmp_path: Path) -> None:
    """A certificate of the user's own CA is accepted under its own names by who trusts the CA."""
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("server")
    token_file = tmp_path / "tokens"
    token_file.write_text(f"work {TOKENS['work']}\n")
    running = start(tls_cert=certificate, tls_key=key, token_file=token_file)
    options = {"tls_ca": authority.file, "token": TOKENS["work"]}
    for host in ("127.0.0.1", "localhost"):
        client_of(address=f"{host}:{running.server.port}", **options).server_info()


@pytest.mark.parametrize("which", ["right", "none", "other CA", "expired"])
def test_client_certificates(which: str, start: Start, tmp_path: Path) -> None:
    """With --tls_client_ca only a client with a valid certificate of that CA is let in."""
    authority, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other", "other")
    certificate, key = authority.issue("server")
    running = start(tls_cert=certificate, tls_key=key, tls_client_ca=authority.file)
    options: dict[str, Any] = {"tls_ca": authority.file}
    if which != "none":
        issuer = other if which == "other CA" else authority
        lasts_s = -5.0 if which == "expired" else 3600.0
        mine = issuer.issue("client", lasts_s=lasts_s)
        options.update(tls_cert=mine[0], tls_key=mine[1])
    client = client_of(address=running.address, **options)
    if which == "right":
        assert client.reset([b"a"], 1)
        return
    words = (
        "wants a certificate of this client"
        if which == "none"
        else "does not accept the certificate"
    )
    with pytest.raises(AccessError, match=words):
        client.server_info()


def test_certificate_and_token(start: Start, tmp_path: Path) -> None:
    """With both, a certificate alone is not enough, and the token says the role."""
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("server")
    mine = authority.issue("client")
    token_file = tmp_path / "tokens"
    token_file.write_text(f"read {TOKENS['read']}\n")
    running = start(
        tls_cert=certificate,
        tls_key=key,
        tls_client_ca=authority.file,
        token_file=token_file,
    )
    options = {"tls_ca": authority.file, "tls_cert": mine[0], "tls_key": mine[1]}
    with pytest.raises(AccessError, match="needs a token"):
        client_of(address=running.address, **options).server_info()
    reader = client_of(address=running.address, token=TOKENS["read"], **options)
    reader.server_info()
    with pytest.raises(AccessError, match="role admin"):
        reader.reset([b"a"], 1)


def test_unusable_client_certificate(tmp_path: Path) -> None:
    """A certificate and key that do not fit are named before anything is sent."""
    authority = Authority(tmp_path / "ca")
    certificate, _ = authority.issue("one")
    _, key = authority.issue("two")
    client = client_of(
        address="127.0.0.1:9", tls_ca=authority.file, tls_cert=certificate, tls_key=key
    )
    with pytest.raises(ConfigError, match=r"one\.pem and .*two\.key"):
        client.server_info()


def test_server_that_answered_is_not_probed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails after an answer is an outage, tried as long as any, and no question of TLS."""
    running = start(secure=True)
    config = load_config(environ={}, address=running.write_address(tmp_path / "addr"))
    transport = client_channel.GrpcTransport(running.address, access=config.access)
    client = LockClient(transport, retry=RetryPolicy(total_s=0.5))
    client.server_info()
    monkeypatch.setattr(client_channel, "why_no_tls", lambda *_: "something")
    running.server.stop()
    with pytest.raises(ServerUnavailableError):
        client.server_info()


def test_server_that_is_gone_is_still_tried(start: Start, tmp_path: Path) -> None:
    """A secure server that does not run is unavailable, tried again, and no question of TLS."""
    running = start(secure=True)
    address = running.write_address(tmp_path / "addr")
    running.server.stop()
    config = load_config(environ={}, address=address)
    transport = client_channel.GrpcTransport(running.address, access=config.access)
    client = LockClient(transport, retry=RetryPolicy(total_s=0.5))
    with pytest.raises(ServerUnavailableError):
        client.server_info()


# -- which server, with nothing configured -------------------------------------------------------


@pytest.mark.parametrize("options", ["secure", "token_file"])
def test_secure_server_is_not_passed_over(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    """A secure server where one is looked for first is an error, not a second server's start."""
    token_file = tmp_path / "tokens"
    token_file.write_text(f"work {TOKENS['work']}\n")
    running = start(**{options: True if options == "secure" else token_file})
    with pytest.raises(ConfigError, match=r"does not let this client in: .*addrfile"):
        local.find_server(load_config(environ={}), environ={}, default_address=running.address)


def test_handle_is_settled_with_the_address_file(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cleanup: ExitStack
) -> None:
    """A lease's handle, which has the address alone, is settled with the address file's token."""
    running = start(secure=True)
    monkeypatch.setenv("RUN_ONCE_ADDRESS", running.write_address(tmp_path / "addr"))
    session = Session.get(load_config())
    cleanup.callback(session.close)
    lease = session.claim([b"handed-on"], ttl_s=60).leases[0]
    notify_success(lease.handle)
    assert session.client.lookup([b"handed-on"]).states == bytes([pb.KEY_STATE_DONE])


# -- the service of 2021 -------------------------------------------------------------------------


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


def count_2021(target: str) -> str:
    """Call the service of 2021 in the clear; give the status."""
    with connect(target) as channel:
        stub = LockManagerServiceStub(channel)
        request = legacy_pb2.CountLocksRequest()
        return code_of(lambda: stub.CountLocks(request, timeout=TIMEOUT_S))


def test_2021_beyond_loopback(start: Start) -> None:
    """Of an --insecure server loopback may call the service of 2021, others only if it is on."""
    far = own_address()
    running = start("0.0.0.0", insecure=True)
    assert count_2021(running.address) == "OK"
    refused = count_2021(f"{far}:{running.server.port}")
    assert refused.startswith("PERMISSION_DENIED CountLocks: ")
    assert "on its own machine only" in refused
    client_of(address=f"{far}:{running.server.port}").server_info()
    allowing = start("0.0.0.0", insecure=True, legacy="on")
    assert count_2021(f"{far}:{allowing.server.port}") == "OK"


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


# -- the command ---------------------------------------------------------------------------------


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


def test_the_two_lines_work(
    start_server: Callable[..., ServerProcess], tmp_path: Path, cleanup: ExitStack
) -> None:
    """What the refusal shows starts a server that the command's client is let in to by the file.

    The file is private, and good for the next start. No token is in any output.
    """
    file = tmp_path / "run-once.addr"
    server = ServerProcess(
        tmp_path / "server", "--host=0.0.0.0", "--secure", f"--address_file={file}",
        "--public_host=localhost", "--legacy_port=0", "--log_level=debug",
    )  # fmt: skip
    cleanup.callback(server.close)
    server.start(await_answer=False)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()

    def run_once(*arguments: str, address: str, **more: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, **more, "RUN_ONCE_ADDRESS": address, "RUN_ONCE_RETRY_S": "20"}
        return subprocess.run(
            [sys.executable, "-m", "run_once.cli", *arguments],
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
