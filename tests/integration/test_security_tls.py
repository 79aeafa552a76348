"""TLS and certificates of a real server and its clients: who agrees with whom."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from distlock_proto import lock_table_pb2 as pb
from distlock_server.blobs import BlobStore
from distlock_server.clock import SystemClock
from distlock_server.engines.memory import MemoryEngine
from distlock_server.server import Listen, Server
from run_once import channel as client_channel
from run_once import local
from run_once.access import Access
from run_once.client import LockClient, RetryPolicy
from run_once.config import load_config
from run_once.errors import AccessError, ConfigError, ServerUnavailableError
from run_once.notify import notify_success
from run_once.session import Session
from tests.certificates import Authority
from tests.integration.security_servers import TOKENS, Running, Start, client_of, client_to


def test_secure_end_to_end(start: Start, tmp_path: Path) -> None:
    """With the address file alone a client claims, completes and resets over TLS."""
    running = start(secure=True)
    client = client_of(address=running.write_address(tmp_path / "addr"))
    grant = client.claim([b"k"], ttl_s=60).grants[0]
    assert client.reset([grant.key], client.server_info().revision) == bytes([pb.KEY_STATE_RESET])


def test_made_certificate_under_any_name(start: Start, tmp_path: Path) -> None:
    """An address file stays good when the server is reached by a name that it does not know."""
    unknown = "127.0.0.2"  # loopback as well, on Linux at least
    try:
        socket.create_server((unknown, 0)).close()
    except OSError as error:
        pytest.skip(f"this machine has one loopback address only: {error}")
    start(secure=True)  # makes the certificate, and names 127.0.0.1 in it
    running = start(unknown, secure=True, public_host="lock.example.org")
    assert running.security.tls is not None
    assert unknown not in names_of(running.security.tls.ca)
    config = load_config(environ={}, address=running.write_address(tmp_path / "addr"))
    assert config.address == f"lock.example.org:{running.server.port}"
    client_to(f"{unknown}:{running.server.port}", config.access).server_info()


def names_of(certificate: bytes | None) -> str:
    """Give the names that a certificate is good for."""
    assert certificate is not None
    loaded = x509.load_pem_x509_certificate(certificate)
    names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return repr(names.value)


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
