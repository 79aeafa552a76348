"""What the options of the command ask for: TLS, tokens, who is answered; and the address file.

On loopback nothing is needed. Beyond it the server starts with TLS and a token or a client's
certificate, or with --insecure, and not otherwise.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import secrets
import shlex
import socket
from pathlib import Path
from typing import Final, NamedTuple

import grpc

from distlock_server import tls
from distlock_server.auth import Guard, Legacy
from distlock_server.tls import Tls, TlsError
from distlock_server.tokens import Role, TokenFileError, Tokens, read_tokens

logger = logging.getLogger(__name__)

ADDRESS_FORMAT: Final = "run-once-address-1"
"""What an address file says it is; see run_once/access.py."""

_TOKEN_BYTES: Final = 32
_ANY_HOST: Final = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 (compared, not bound)


class SecurityError(Exception):
    """The server must not start so; the message says what to do."""


class Wanted(NamedTuple):
    """The options of the command that matter here.

    Attributes:
        host: The TCP interface; None: not on TCP.
        database: Folder of the database; None: there is none.
        secure: Make what is missing of key, certificate and tokens.
        secure_dir: Where; None: beside the database.
        insecure: Do without TLS, tokens or the limit on clients of 2021 beyond loopback.
        tls_cert: The server's certificate.
        tls_key: Its key.
        tls_client_ca: Clients must have a certificate of this CA.
        token_file: Tokens and their roles.
        legacy: Who may use the service of 2021; None: peers on loopback, but with tokens in the
            clear nobody.
        legacy_port: Port on loopback, without TLS, for clients of 2021.
        public_host: How other machines reach this one; None: by its name.
        address_role: Role of the token in the address file; None: the highest there is.
    """

    host: str | None
    database: Path | None = None
    secure: bool = False
    secure_dir: Path | None = None
    insecure: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    legacy: Legacy | None = None
    legacy_port: int | None = None
    public_host: str | None = None
    address_role: str | None = None


class Security(NamedTuple):
    """How a server is protected.

    Attributes:
        tls: Its key and certificate; None: TCP is in the clear.
        guard: Checks each call; None: whoever reaches the server may do everything.
        token: The token for the address file; None: none is needed.
        is_open: Neither tokens nor client certificates are asked for.
    """

    tls: Tls | None
    guard: Guard | None
    token: str | None
    is_open: bool

    @property
    def credentials(self) -> grpc.ServerCredentials | None:
        """Key and certificate in gRPC's form."""
        if self.tls is None:
            return None
        return grpc.ssl_server_credentials(
            [(self.tls.key, self.tls.certificate)],
            root_certificates=self.tls.client_ca,
            require_client_auth=self.tls.client_ca is not None,
        )

    def __repr__(self) -> str:
        return f"<security: tls {self.tls is not None}, guard {self.guard is not None}>"


def prepare(wanted: Wanted) -> Security:
    """Check the options, make what `--secure` makes, and load keys and tokens.

    Raises:
        SecurityError: The server must not start so.
    """
    is_beyond = wanted.host is not None and not is_loopback(wanted.host)
    _check_options(wanted, is_beyond=is_beyond)
    token_file, is_ours = wanted.token_file, wanted.secure and wanted.tls_cert is None
    try:
        if wanted.secure:
            wanted, token_file = _make(wanted)
        encryption = _load_tls(wanted, is_ours=is_ours)
        tokens = Tokens(token_file) if token_file is not None else None
        token = _pick_token(token_file, wanted.address_role)
    except OSError as error:
        raise SecurityError(
            f"{error.filename}: {error.strerror}; name a folder for keys and tokens with "
            "--secure_dir"
        ) from None
    except (TlsError, TokenFileError) as error:
        raise SecurityError(str(error)) from None
    for path in (wanted.tls_key, token_file):
        if path is not None and not tls.is_private(path):
            logger.warning("%s can be read by other users of this machine: chmod 600 it", path)
    has_auth = tokens is not None or wanted.tls_client_ca is not None
    # In the clear, clients of 2021 would be a way around the tokens.
    legacy = wanted.legacy or ("off" if tokens is not None and encryption is None else "loopback")
    guard = None
    if has_auth or legacy == "off" or (legacy == "loopback" and is_beyond):
        guard = Guard(tokens, legacy, needs_certificate=wanted.tls_client_ca is not None)
    return Security(encryption, guard, token, not has_auth)


def is_loopback(host: str) -> bool:
    """Tell whether an interface is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_file(security: Security, wanted: Wanted, port: int, unix_socket: Path | None) -> bytes:
    """Give the content of the file that tells a client all it needs.

    The secret that results are signed with is not in it: the server does not have it.
    """
    if wanted.host is None:
        return _address_json(address=f"unix:{unix_socket}")
    host = wanted.public_host or wanted.host
    if host in _ANY_HOST:
        host = socket.gethostname()
    encryption = security.tls
    return _address_json(
        address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        tls=encryption is not None,
        ca=encryption.ca.decode() if encryption is not None and encryption.ca else None,
        tls_name=encryption.name if encryption is not None else None,
        token=security.token,
    )


def _address_json(**content: str | bool | None) -> bytes:
    given = {name: value for name, value in content.items() if value}
    return f"{json.dumps({'format': ADDRESS_FORMAT, **given}, indent=1)}\n".encode()


def _check_options(wanted: Wanted, *, is_beyond: bool) -> None:
    """Refuse what must not be, or means nothing."""
    has_tls = wanted.secure or wanted.tls_cert is not None
    has_auth = wanted.secure or wanted.token_file or wanted.tls_client_ca
    if (wanted.tls_cert is None) != (wanted.tls_key is None):
        raise SecurityError("--tls_cert and --tls_key go together: give both or neither")
    if wanted.tls_client_ca is not None and not has_tls:
        raise SecurityError("--tls_client_ca needs TLS: give --tls_cert and --tls_key, or --secure")
    if wanted.legacy_port is not None and (not has_tls or wanted.legacy in {"on", "off"}):
        raise SecurityError(
            "--legacy_port is for a server with TLS and --legacy=loopback: without TLS clients of "
            "run-once 0.4.2 use --port"
        )
    if not is_beyond:
        return
    if wanted.token_file is not None and not has_tls:
        raise SecurityError(
            f"tokens must not travel in the clear, and {wanted.host} can be reached from other "
            "machines: add --secure, or --tls_cert and --tls_key"
        )
    if not wanted.insecure and not (has_tls and has_auth):
        raise SecurityError(_how_to_secure(wanted))
    if not wanted.insecure and wanted.legacy == "on":
        raise SecurityError(
            "--legacy=on lets clients of run-once 0.4.2, which know neither TLS nor tokens, change "
            f"every lock, and {wanted.host} can be reached from other machines: add --insecure if "
            "everybody there is trusted, or leave --legacy away"
        )


def _how_to_secure(wanted: Wanted) -> str:
    database = shlex.quote(str(wanted.database or "FOLDER"))
    return (
        f"{wanted.host} can be reached from other machines, so TLS and a token are needed (or "
        "--insecure, where everybody who reaches the port is trusted). These two lines set it up, "
        "with a copy of the file on each machine:\n"
        f"    distlock --db={database} --host={wanted.host} --secure --address_file=run-once.addr\n"
        "    export RUN_ONCE_ADDRESS=addrfile://run-once.addr"
    )


def _make(wanted: Wanted) -> tuple[Wanted, Path | None]:
    """Make what is missing; give the options as if it had been named, and the token file."""
    folder = wanted.secure_dir
    if folder is None:
        if wanted.database is None:
            raise SecurityError("--secure without a database needs --secure_dir")
        database = wanted.database.resolve()
        folder = database.with_name(f"{database.name}.secure")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    token_file = wanted.token_file
    if token_file is None:  # a certificate alone says no role
        token_file = folder / "tokens"
        if not token_file.exists():
            lines = ["# role token"]
            lines += [f"{role.label} {secrets.token_hex(_TOKEN_BYTES)}" for role in reversed(Role)]
            tls.write_private(token_file, "\n".join([*lines, ""]).encode(), keep=True)
    if wanted.tls_cert is None:
        key, certificate = folder / "key.pem", folder / "cert.pem"
        hosts = [host for host in (wanted.host, wanted.public_host) if host not in _ANY_HOST]
        tls.make(key, certificate, filter(None, hosts))
        wanted = wanted._replace(tls_key=key, tls_cert=certificate)
    return wanted, token_file


def _load_tls(wanted: Wanted, *, is_ours: bool) -> Tls | None:
    key, certificate = wanted.tls_key, wanted.tls_cert
    if key is None or certificate is None:
        return None
    return tls.load(key, certificate, wanted.tls_client_ca, is_ours=is_ours)


def _pick_token(token_file: Path | None, role: str | None) -> str | None:
    """Choose the token of the address file."""
    if token_file is None:
        return None
    tokens = read_tokens(token_file)
    fitting = [token for token in tokens if role in {None, token.role.label}]
    if not fitting:
        raise SecurityError(f"--address_role={role}: {token_file} has no token of this role")
    return max(fitting, key=lambda token: token.role).text
