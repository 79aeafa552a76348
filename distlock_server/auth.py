"""Who may call which method: the one table of roles, and the interceptor that asks for them.

Whoever may open the server's unix socket is the server's own
user, and needs none.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, NamedTuple, TypeAlias
from urllib.parse import unquote

import grpc

from distlock_server.status import refuse
from distlock_server.tokens import Role, Tokens

logger = logging.getLogger(__name__)

LOG_EVERY_S: Final = 10.0
"""How often refusals are logged, at most."""

Legacy: TypeAlias = Literal["loopback", "on", "off"]
"""Which peers the service of 2021, which knows no tokens, answers."""


_TABLE: Final = "/distlock.v1.LockTable/"
_LEGACY: Final = "/distlock.LockManagerService/"

ROLES: Final[dict[str, Role | None]] = {
    f"{_TABLE}Claim": Role.WORK,
    f"{_TABLE}Frontier": Role.WORK,
    f"{_TABLE}Renew": Role.WORK,
    f"{_TABLE}Settle": Role.WORK,
    f"{_TABLE}Invalidate": Role.WORK,
    f"{_TABLE}UploadResult": Role.WORK,
    f"{_TABLE}Lookup": Role.READ,
    f"{_TABLE}Wait": Role.READ,
    f"{_TABLE}List": Role.READ,
    f"{_TABLE}Count": Role.READ,
    f"{_TABLE}DownloadResult": Role.READ,
    f"{_TABLE}GetServerInfo": Role.READ,
    f"{_TABLE}Reset": Role.ADMIN,
    # Each of the four may take or remove a lock whatever its state.
    f"{_LEGACY}AcquireLock": Role.ADMIN,
    f"{_LEGACY}AcquireMany": Role.ADMIN,
    f"{_LEGACY}ReleaseLock": Role.ADMIN,
    f"{_LEGACY}ProcessBatch": Role.ADMIN,
    f"{_LEGACY}ListLocks": Role.READ,
    f"{_LEGACY}CountLocks": Role.READ,
    f"{_LEGACY}GetCurrentServerTime": Role.READ,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.READ,
    # Whatever watches over the server need not be able to read its keys.
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
}
"""The role that each method needs; None: not even a token. What is not here needs ADMIN."""


class Refusal(NamedTuple):
    """Why a call is not let in."""

    code: grpc.StatusCode
    sentence: str


class Guard(grpc.aio.ServerInterceptor):
    """Lets a call through to its method if its sender may make it."""

    def __init__(self, tokens: Tokens | None, legacy: Legacy, *, needs_certificate: bool) -> None:
        """Guard a server.

        Args:
            tokens: The tokens; None: the server asks for none.
            legacy: Which peers of the service of 2021 are answered.
            needs_certificate: TLS connections have a client's certificate; others, which have
                none, are answered on a unix socket only (and see `legacy`).
        """
        self._tokens = tokens
        self._legacy = legacy
        self._needs_certificate = needs_certificate
        self._logged_s = -LOG_EVERY_S
        self._n_refused = 0

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Give the method's handler with the check before it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or ROLES.get(method, Role.ADMIN) is None:
            return handler
        token = _bearer(handler_call_details.invocation_metadata)

        async def admit(context: Any) -> None:
            refusal = self.refusal(method, token, context.peer(), is_tls=_is_tls(context))
            if refusal is not None:
                self._log(refusal, context.peer())
                await refuse(context, *refusal)

        return _guarded(handler, admit)

    def refusal(self, method: str, token: str, peer: str, *, is_tls: bool) -> Refusal | None:
        """Decide about a call; None: it may pass.

        Args:
            method: Full name of the method.
            token: The token sent with it; empty: none.
            peer: The sender as gRPC names it.
            is_tls: It came over TLS.
        """
        name = method.rpartition("/")[2]
        if method.startswith(_LEGACY):
            sentence = self._legacy_refusal(peer)
            if sentence:
                return Refusal(grpc.StatusCode.PERMISSION_DENIED, f"{name}: {sentence}")
            if self._legacy == "on" or not is_tls:  # clients of 2021 have neither TLS nor token
                return None
        if peer.startswith("unix:"):
            return None
        if self._tokens is None:
            if self._needs_certificate and not is_tls:
                return Refusal(
                    grpc.StatusCode.UNAUTHENTICATED,
                    f"{name} needs TLS with a client certificate of this server's CA",
                )
            return None
        return self._token_refusal(self._tokens, name, token, ROLES.get(method) or Role.ADMIN)

    def _log(self, refusal: Refusal, peer: str) -> None:
        """Say now and then who is refused, without a line for each of a million calls."""
        self._n_refused += 1
        now_s = time.monotonic()
        if now_s - self._logged_s < LOG_EVERY_S:
            return
        self._logged_s = now_s
        logger.warning(
            "refused %d calls since the last such line, this one of %s: %s",
            self._n_refused,
            unquote(peer),
            refusal.sentence,
        )
        self._n_refused = 0

    def _legacy_refusal(self, peer: str) -> str:
        if self._legacy == "off":
            return (
                "this server does not answer clients of run-once 0.4.2, which know no tokens; "
                "install run-once 1.0 or newer, or start distlock with --legacy=loopback or, with "
                "TLS, --legacy_port"
            )
        if self._legacy == "loopback" and not is_local(peer):
            return (
                "this server answers clients of run-once 0.4.2, which know neither TLS nor tokens, "
                "on its own machine only; install run-once 1.0 or newer, connect through ssh -L, "
                "or start distlock with --legacy=on --insecure"
            )
        return ""

    def _token_refusal(self, tokens: Tokens, name: str, token: str, need: Role) -> Refusal | None:
        if not token:
            return Refusal(
                grpc.StatusCode.UNAUTHENTICATED, f"{name} needs a token, and none was sent"
            )
        role = tokens.role_of(token)
        if role is None:
            return Refusal(
                grpc.StatusCode.UNAUTHENTICATED, "the token that was sent is none of this server's"
            )
        if role < need:
            return Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{name} needs a token of role {need.label}, and the one that was sent has the "
                f"role {role.label}",
            )
        return None


def is_local(peer: str) -> bool:
    """Tell whether a peer, as gRPC names it, is on this machine.

    That includes whoever is forwarded to a loopback address of it, as by ssh -L.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind == "unix":
        return True
    try:
        address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _bearer(metadata: Any) -> str:
    """Take the token out of a call's metadata."""
    for name, value in metadata or ():
        if name == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            return token.strip() if scheme.lower() == "bearer" else ""
    return ""


def _is_tls(context: Any) -> bool:
    return b"ssl" in tuple(context.auth_context().get("transport_security_type", ()))


def _guarded(handler: Any, admit: Callable[[Any], Awaitable[None]]) -> Any:
    """Put a check before a handler."""
    codec = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.unary_unary:

        async def answer(request: Any, context: Any) -> Any:
            await admit(context)
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, **codec)
    if handler.stream_unary:  # as `Admission` gives: refused before the request is read

        async def read_and_answer(requests: Any, context: Any) -> Any:
            await admit(context)
            return await handler.stream_unary(requests, context)

        return grpc.stream_unary_rpc_method_handler(read_and_answer, **codec)
    assert handler.stream_stream, "no method of ours answers with a stream to one request"

    async def stream(requests: Any, context: Any) -> None:  # as `Streams` gives
        await admit(context)
        await handler.stream_stream(requests, context)

    return grpc.stream_stream_rpc_method_handler(stream, **codec)
