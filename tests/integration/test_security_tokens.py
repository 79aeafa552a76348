"""Tokens and roles of a real server: who may do what."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from distlock_server.auth import ROLES
from distlock_server.tokens import Role
from run_once.errors import AccessError
from tests.integration.security_servers import (
    REQUESTS,
    TABLE,
    TIMEOUT_S,
    TOKENS,
    Running,
    Start,
    bearer,
    client_of,
    code_of,
)


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
