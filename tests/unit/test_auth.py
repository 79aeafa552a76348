"""Roles, token files, and the decision about each call."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import AsyncMock

import grpc
import pytest

from distlock_proto import legacy_pb2, lock_table_pb2
from distlock_server.auth import ROLES, Guard, Legacy, is_local
from distlock_server.tokens import Role, TokenFileError, Tokens, read_tokens

TABLE: Final = "/distlock.v1.LockTable/"
OLD: Final = "/distlock.LockManagerService/"
READ, WORK, ADMIN = "r" * 16, "w" * 16, "a" * 16
LINES: Final = f"# role token\n\nread {READ}\nwork\t{WORK}\n admin {ADMIN} \n"
FAR: Final = "ipv4:192.0.2.7:4711"
NEAR: Final = "ipv4:127.0.0.1:4711"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give a token file with one token of each role."""
    path = tmp_path / "tokens"
    path.write_text(LINES)
    return path


def guard(file: Path | None, legacy: Legacy = "loopback", certificate: bool = False) -> Guard:
    """Make a guard."""
    return Guard(Tokens(file) if file is not None else None, legacy, needs_certificate=certificate)


def verdict(
    guarded: Guard, method: str, token: str = "", peer: str = FAR, is_tls: bool = True
) -> str:
    """Give the status that a call is refused with; "": it may pass."""
    refusal = guarded.refusal(method, token, peer, is_tls=is_tls)
    return "" if refusal is None else refusal.code.name


def test_every_method_has_a_role() -> None:
    """The table names each method of both contracts, so that none has a role by accident."""
    services = (
        lock_table_pb2.DESCRIPTOR.services_by_name["LockTable"],
        legacy_pb2.DESCRIPTOR.services_by_name["LockManagerService"],
    )
    named = {f"/{one.full_name}/{method.name}" for one in services for method in one.methods}
    assert named == {method for method in ROLES if method.startswith("/distlock.")}


def test_methods_outside_of_the_table_are_guarded(file: Path) -> None:
    """A method that somebody adds and forgets is checked before it runs; health is not."""

    async def answer(_request: object, _context: object) -> None:
        raise AssertionError("it was called")

    handler: Any = grpc.unary_unary_rpc_method_handler(answer)

    async def find(_details: object) -> Any:
        return handler

    def guarded_handler(method: str) -> Any:
        details = SimpleNamespace(method=method, invocation_metadata=())
        return asyncio.run(guard(file).intercept_service(find, details))

    assert guarded_handler("/grpc.health.v1.Health/Check") is handler
    context = SimpleNamespace(
        peer=lambda: FAR, auth_context=dict, abort=AsyncMock(side_effect=OSError)
    )
    with pytest.raises(OSError):  # noqa: PT011 (ours)
        asyncio.run(guarded_handler("/another.Service/Method").unary_unary(None, context))
    assert context.abort.call_args.args[0] is grpc.StatusCode.UNAUTHENTICATED


def test_refusals_are_logged_now_and_then(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A thousand refusals are one line, which says who it was and why."""
    guarded = guard(file)
    refusal = guarded.refusal(f"{TABLE}Claim", READ, FAR, is_tls=True)
    assert refusal is not None
    for _ in range(1000):
        guarded._log(refusal, FAR)
    (record,) = caplog.records
    assert FAR in record.getMessage()
    assert "role work" in record.getMessage()
    guarded._logged_s -= 20
    guarded._log(refusal, FAR)
    assert "refused 1000 calls" in caplog.records[1].getMessage()


def test_methods_that_change_are_not_for_readers() -> None:
    """A reader may call what changes nothing, and nothing else; only an admin may reset."""
    readable = {"Lookup", "Wait", "List", "Count", "DownloadResult", "GetServerInfo"}
    for method, role in ROLES.items():
        if method.startswith(TABLE):
            assert (role is Role.READ) == (method.removeprefix(TABLE) in readable), method
    assert ROLES[f"{TABLE}Reset"] is Role.ADMIN
    assert ROLES[f"{OLD}ReleaseLock"] is Role.ADMIN


@pytest.mark.parametrize("method", ["Lookup", "Claim", "Reset", "MadeTomorrow"])
@pytest.mark.parametrize("token", ["", "x" * 16, READ, WORK, ADMIN])
def test_token_matrix(file: Path, method: str, token: str) -> None:
    """No or a wrong token is UNAUTHENTICATED, too low a role is PERMISSION_DENIED.

    A method that is not in the table needs the highest.
    """
    needed = {"Lookup": Role.READ, "Claim": Role.WORK}.get(method, Role.ADMIN)
    has = {READ: Role.READ, WORK: Role.WORK, ADMIN: Role.ADMIN}.get(token)
    expected = "UNAUTHENTICATED" if has is None else "PERMISSION_DENIED" if has < needed else ""
    assert verdict(guard(file), TABLE + method, token) == expected


@pytest.mark.parametrize("is_tls", [True, False])
@pytest.mark.parametrize("peer", [FAR, NEAR, "unix:"])
@pytest.mark.parametrize("legacy", ["loopback", "on", "off"])
@pytest.mark.parametrize("method", ["ReleaseLock", "ListLocks"])
def test_clients_of_2021(file: Path, legacy: Legacy, peer: str, is_tls: bool, method: str) -> None:
    """off: nobody is answered; loopback: local peers; on: all. Over TLS a local one needs a token.

    What may do TLS may send a token, and must not go round it by an old method.
    """
    if legacy == "off" or (legacy == "loopback" and peer == FAR):
        expected = "PERMISSION_DENIED"
    elif legacy == "loopback" and is_tls and peer == NEAR:
        expected = "UNAUTHENTICATED"
    else:
        expected = ""
    assert verdict(guard(file, legacy), OLD + method, "", peer, is_tls) == expected


def test_old_method_over_tls_with_a_token(file: Path) -> None:
    """Over TLS an old method needs its role as any other."""
    guarded = guard(file)
    assert verdict(guarded, f"{OLD}ReleaseLock", WORK, NEAR) == "PERMISSION_DENIED"
    assert verdict(guarded, f"{OLD}ReleaseLock", ADMIN, NEAR) == ""


def test_certificate_in_place_of_a_token() -> None:
    """With client certificates and no tokens TLS is enough, and what is in the clear is refused."""
    guarded = guard(None, certificate=True)
    assert verdict(guarded, f"{TABLE}Reset", is_tls=True) == ""
    assert verdict(guarded, f"{TABLE}Lookup", peer=NEAR, is_tls=False) == "UNAUTHENTICATED"
    assert verdict(guarded, f"{TABLE}Reset", peer="unix:", is_tls=False) == ""


def test_open_server() -> None:
    """A guard that only watches over the old service lets everything else through."""
    assert verdict(guard(None), f"{TABLE}Reset", is_tls=False) == ""
    assert verdict(guard(None), f"{OLD}ListLocks", is_tls=False) == "PERMISSION_DENIED"


def test_refusals_show_no_token(file: Path) -> None:
    """No sentence has a token in it, wrong ones included."""
    for method in ROLES:
        for token in (READ, WORK, "secretsecretsecret"):
            refusal = guard(file).refusal(method, token, FAR, is_tls=True)
            assert refusal is None or token not in refusal.sentence
    assert READ not in repr(read_tokens(file))
    assert READ not in f"{read_tokens(file)[0]}"


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:127.0.0.1:5", True),
        ("ipv4:127.9.9.9:5", True),
        ("ipv6:[::1]:5", True),
        ("ipv6:%5B::1%5D:5", True),
        ("ipv6:[::ffff:127.0.0.1]:5", True),
        ("unix:", True),
        ("unix:/run/x", True),
        ("ipv4:192.0.2.7:5", False),
        ("ipv6:[fe80::1%25eth0]:5", False),
        ("ipv6:[::ffff:192.0.2.7]:5", False),
        ("ipv4:127.0.0.1.example.com:5", False),
        ("", False),
        ("unknown", False),
    ],
)
def test_local_peers(peer: str, expected: bool) -> None:
    """Loopback addresses and unix sockets are local; what cannot be read is not."""
    assert is_local(peer) is expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no token"),
        ("# nothing\n", "no token"),
        (f"root {READ}", "line 1"),
        (f"read {READ}\nwork", "line 2"),
        (f"read {READ} {WORK}", "line 1"),
        ("read short", "needs 16"),
        (f"read {READ}\nadmin {READ}", "twice"),
        (f"read {READ}é", "ASCII"),
    ],
)
def test_bad_token_files(tmp_path: Path, text: str, words: str) -> None:
    """What is wrong with a token file is said with its line and without a token."""
    path = tmp_path / "tokens"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TokenFileError, match=words) as raised:
        read_tokens(path)
    assert READ not in str(raised.value)
    assert "short" not in str(raised.value)


def test_missing_token_file(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(TokenFileError, match="tokens cannot be read"):
        read_tokens(tmp_path / "tokens")


def test_changed_token_file(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A changed file counts within a second: a removed token is refused, a new one accepted.

    A file that is damaged or gone takes no token away, and is logged without its content.
    """
    now_s = [0.0]
    tokens = Tokens(file, now_s=lambda: now_s[0])
    assert tokens.role_of(WORK) is Role.WORK
    file.write_text(f"work {'n' * 16}\n")
    now_s[0] += 1.0
    assert tokens.role_of(WORK) is None
    assert tokens.role_of("n" * 16) is Role.WORK
    with caplog.at_level(logging.ERROR):
        for damage in (lambda: file.write_text(f"chief {ADMIN}"), file.unlink):
            damage()
            now_s[0] += 1.0
            assert tokens.role_of("n" * 16) is Role.WORK
    assert caplog.text.count("stay valid") == 2
    assert ADMIN not in caplog.text
