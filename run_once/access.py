"""How a client is let in: TLS, its certificate, its token; and the file that tells all of it.

`distlock --address_file` writes such a file, and `RUN_ONCE_ADDRESS=addrfile:///path` reads it. The
secret that results are signed with is never in it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from run_once.errors import ConfigError
from run_once.options import ADDRESS_FILE, SYSTEM, parse_address
from run_once.warn import warn_user

if TYPE_CHECKING:
    import grpc

ADDRESS_FORMAT: Final = "run-once-address-1"
"""What an address file says it is; see distlock_server/security.py."""

_MAX_FILE_BYTES: Final = 1_000_000
_PROBE_S: Final = 1.0
_PROBES: Final = 2
"""A server that is just ending may break a handshake off, too: it does so once."""


@dataclass(frozen=True)
class Access:
    """What opens a server; nothing of it for one that is open.

    Attributes:
        tls: Use TLS.
        ca: Certificates to trust, PEM; empty: those that come with gRPC.
        name: Name that the certificate must have; empty: the host's in the address.
        cert_file: This client's certificate.
        key_file: Its private key.
        token: Shown with each call.
    """

    tls: bool = False
    ca: bytes = field(default=b"", repr=False)
    name: str = ""
    cert_file: str = ""
    key_file: str = ""
    token: str = field(default="", repr=False)


OPEN: Final = Access()
"""Neither TLS nor a token."""


def is_unix(address: str) -> bool:
    """Tell whether an address is a unix socket's."""
    return address.startswith("unix:")


def let_in(
    address: str | None,
    *,
    token: str | None,
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
) -> tuple[str | None, Access]:
    """Gather what opens a server; options come before what an address file says.

    Args:
        address: Where it is, or an address file; None: that is found later, on this machine.
        token: The option.
        tls_ca: The option.
        tls_cert: The option.
        tls_key: The option.

    Returns:
        Its address, and what opens it.

    Raises:
        ConfigError: A file cannot be used, or a token would travel in the clear.
    """
    found = OPEN
    if address is not None and address.startswith(ADDRESS_FILE):
        address, found = read_address_file(Path(address.removeprefix(ADDRESS_FILE)))
    if (tls_cert is None) != (tls_key is None):
        raise ConfigError("RUN_ONCE_TLS_CERT and RUN_ONCE_TLS_KEY go together: set both or neither")
    access = Access(
        tls=found.tls or bool(tls_ca or tls_cert),
        ca=found.ca if tls_ca is None else _trusted(tls_ca),
        name=found.name if tls_ca is None else "",
        cert_file=tls_cert or "",
        key_file=tls_key or "",
        token=token or found.token,
    )
    if access.token and not access.tls and address is not None and not _stays_here(address):
        raise ConfigError(
            f"the token would travel in the clear to {address}: set RUN_ONCE_TLS_CA to the "
            "certificate of the server or its CA (`system`: a public one), or RUN_ONCE_ADDRESS="
            "addrfile:///path to a copy of the file that `distlock --address_file` writes there"
        )
    return address, access


def _stays_here(address: str) -> bool:
    """Tell whether what is sent there cannot be read on the way."""
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        return is_unix(address) or ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def read_address_file(path: Path) -> tuple[str, Access]:
    """Read what `distlock --address_file` wrote.

    Raises:
        ConfigError: It is not there, cannot be read, or is no such file.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"address file {path} cannot be read: {error.strerror}; copy the file there that "
            "`distlock --address_file` wrote on the server's machine"
        ) from None
    try:
        address, access = _parse(content)
    except (ValueError, ConfigError):  # without the text: there is a token in it
        raise ConfigError(
            f"{path} is no address file, or a damaged one; copy it again from the server's "
            "machine, where `distlock --address_file` wrote it"
        ) from None
    if access.token and mode & (stat.S_IRWXG | stat.S_IRWXO):
        warn_user(
            f"address file {path} can be read by other users, who can then use the lock server as "
            f"you do: run `chmod 600 {path}`"
        )
    return address, access


def _parse(content: bytes) -> tuple[str, Access]:
    """Read the content of an address file; ValueError: it is none."""
    given = json.loads(content)
    if not isinstance(given, dict) or given.get("format") != ADDRESS_FORMAT:
        raise ValueError("another format")
    texts = {name: _string(given, name) for name in ("address", "ca", "tls_name", "token")}
    access = Access(
        tls=given.get("tls") is True,
        ca=texts["ca"].encode("ascii"),
        name=texts["tls_name"],
        token=texts["token"],
    )
    if access.ca:
        _check_ca(access.ca)
    if texts["address"].startswith(ADDRESS_FILE):
        raise ValueError("a file that names another")
    return parse_address(texts["address"]), access


def _string(given: dict[str, Any], name: str) -> str:
    value = given.get(name, "")
    if not isinstance(value, str) or not value.isascii():
        raise ValueError(name)
    return value


def _trusted(tls_ca: str) -> bytes:
    """Read the certificates of the option tls_ca."""
    if tls_ca == SYSTEM:
        return b""
    pem = _read(tls_ca, "RUN_ONCE_TLS_CA")
    try:
        _check_ca(pem)
    except ValueError:
        raise ConfigError(f"RUN_ONCE_TLS_CA: {tls_ca} holds no certificate in PEM form") from None
    return pem


def _check_ca(pem: bytes) -> None:
    """Raise ValueError for what is no certificate: gRPC would only fail to connect."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except ssl.SSLError:
        raise ValueError("no certificate") from None


def _read(path: str, option: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error.strerror}") from None


def credentials(access: Access) -> grpc.ChannelCredentials:
    """Give what gRPC needs for TLS.

    Raises:
        ConfigError: The client's certificate or key cannot be read.
    """
    import grpc  # noqa: PLC0415 (only who connects needs it)

    certificate = key = None
    if access.cert_file:
        certificate = _read(access.cert_file, "RUN_ONCE_TLS_CERT")
        key = _read(access.key_file, "RUN_ONCE_TLS_KEY")
        try:
            _client_context(access)
        except (ssl.SSLError, OSError):
            raise ConfigError(
                f"RUN_ONCE_TLS_CERT and RUN_ONCE_TLS_KEY: {access.cert_file} and {access.key_file} "
                "are no certificate and its key in PEM form without a password"
            ) from None
    return grpc.ssl_channel_credentials(access.ca or None, key, certificate)


def why_no_tls(address: str, access: Access) -> str:
    """Find out what gRPC does not say: why client and server cannot agree on TLS.

    Returns:
        A clause that says what is wrong; "": nothing is, or nobody listens there.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    problem = ""
    for _ in range(_PROBES):
        try:
            with socket.create_connection((host, int(port)), _PROBE_S) as raw:
                raw.settimeout(_PROBE_S)
                if access.tls:
                    problem = _why_not_secure(raw, access, access.name or host)
                else:
                    problem = _why_not_plain(raw)
        except (OSError, ValueError):
            return ""
        if not problem:
            return ""
    return problem


def _why_not_plain(raw: socket.socket) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: does it answer TLS at all?
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(OSError), context.wrap_socket(raw) as secure:
        if secure.selected_alpn_protocol() == "h2":
            return "it wants TLS, and this client was not told to use it"
    return ""


def _why_not_secure(raw: socket.socket, access: Access, name: str) -> str:
    try:
        with _client_context(access).wrap_socket(raw, server_hostname=name) as secure:
            # gRPC's server speaks first, unless it does not like the client's certificate.
            return "" if _first_byte(secure) else _refused_certificate(access)
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not trusted ({error.verify_message.rstrip('.')})"
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"}:
            return "it does not speak TLS, and this client was told to use it"
        if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
            return _refused_certificate(access)
        return ""


def _first_byte(secure: ssl.SSLSocket) -> bytes:
    try:
        return secure.recv(1)
    except TimeoutError:
        return b"?"  # a busy one: no refusal


def _refused_certificate(access: Access) -> str:
    if access.cert_file:
        return "it does not accept the certificate of this client"
    return "it wants a certificate of this client, which has none"


def _client_context(access: Access) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if access.ca:
        context.load_verify_locations(cadata=access.ca.decode("ascii"))
    else:
        context.load_default_certs()
    if access.cert_file:
        context.load_cert_chain(access.cert_file, access.key_file, password=_no_password)
    return context


def _no_password() -> str:
    return ""
