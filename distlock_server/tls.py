"""Keys and certificates: the server's own, made once, or those that its user names."""

from __future__ import annotations

import datetime as dt
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

TLS_NAME: Final = "distlock.internal"
"""A name in each certificate made here. Address files tell clients to check this one, so that the
certificate, which is trusted by itself and for nothing else, is good under any name and address."""

VALID_DAYS: Final = 3650

logger = logging.getLogger(__name__)

_SKEW: Final = dt.timedelta(days=1)
_SOON: Final = dt.timedelta(days=30)
_MAX_DNS_CHARS: Final = 253


class TlsError(Exception):
    """A key or certificate cannot be used; the message says why and what to do."""


class Tls(NamedTuple):
    """What a server with TLS has, as PEM.

    Attributes:
        key: Its private key.
        certificate: Its certificate, and those between it and the CA.
        client_ca: Clients must have a certificate of this CA; None: they need none.
        ca: What clients should trust, as far as it is known here; None: it is not.
        name: The name that clients should check; None: the one by which they reach the server.
    """

    key: bytes
    certificate: bytes
    client_ca: bytes | None
    ca: bytes | None
    name: str | None

    def __repr__(self) -> str:
        return "<key and certificate>"


def load(
    key_file: Path, certificate_file: Path, client_ca_file: Path | None, *, is_ours: bool
) -> Tls:
    """Read a server's key and certificate, and check that clients can accept them.

    Raises:
        TlsError: They cannot be used.
    """
    key_pem, certificate_pem = _read(key_file, "key"), _read(certificate_file, "certificate")
    chain = _certificates(certificate_pem, certificate_file)
    _check_key(key_pem, key_file, chain[0], certificate_file)
    _check_time(chain[0], certificate_file, is_ours=is_ours)
    client_ca, trusted = None, chain
    if client_ca_file is not None:
        client_ca = _read(client_ca_file, "CA certificate")
        trusted = [*chain, *_certificates(client_ca, client_ca_file)]
    ca = _issuer(chain[0], trusted)
    return Tls(
        key_pem,
        certificate_pem,
        client_ca,
        ca.public_bytes(serialization.Encoding.PEM) if ca is not None else None,
        TLS_NAME if is_ours else None,
    )


def make(key_file: Path, certificate_file: Path, hosts: Iterable[str]) -> None:
    """Make a key and a self-signed certificate for it, each unless it exists.

    Args:
        key_file: Where the key is or goes.
        certificate_file: The same for the certificate.
        hosts: Names and addresses of the server, beside those of this machine.

    Raises:
        OSError: A file cannot be written.
        TlsError: The key that exists cannot be used.
    """
    if not key_file.exists():
        made = ec.generate_private_key(ec.SECP256R1())
        pem = made.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_private(key_file, pem, keep=True)
    if not certificate_file.exists():
        key = _private_key(_read(key_file, "key"), key_file)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TlsError(f"the key {key_file} is none that was made here: name it with --tls_key")
        write_private(certificate_file, _self_signed(key, hosts), keep=True)


def write_private(path: Path, content: bytes, *, keep: bool = False) -> None:
    """Write a file that only this user may read: whole, or not at all.

    Args:
        path: The file.
        content: What to write.
        keep: If it exists by now, leave it.

    Raises:
        OSError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not (keep and _link(part, path)):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _link(part: Path, path: Path) -> bool:
    """Give a file its name unless that is taken; False: this file system has no links."""
    try:
        os.link(part, path)
    except FileExistsError:
        return True
    except OSError:
        return path.exists()
    return True


def is_private(path: Path) -> bool:
    """Tell whether only its owner may read a file."""
    return not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def _self_signed(key: ec.EllipticCurvePrivateKey, hosts: Iterable[str]) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "distlock")])
    now = dt.datetime.now(dt.timezone.utc)
    local = ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn())
    names = dict.fromkeys(filter(None, map(_san, (TLS_NAME, *local, *hosts))))
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)  # clocks of other machines may be behind
        .not_valid_after(now + dt.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _san(host: str) -> x509.GeneralName | None:
    """Give a host's entry of a certificate; None: it cannot stand in one."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        is_name = host.isascii() and 0 < len(host) <= _MAX_DNS_CHARS
        return x509.DNSName(host) if is_name else None


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"the {what} {path} cannot be read: {error.strerror}") from None


def _certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise TlsError(f"{path} holds no certificate in PEM form") from None


def _private_key(pem: bytes, path: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise TlsError(f"{path} holds no private key in PEM form without a password") from None


def _check_key(pem: bytes, path: Path, certificate: x509.Certificate, beside: Path) -> None:
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    mine = _private_key(pem, path).public_key().public_bytes(*form)
    if mine != certificate.public_key().public_bytes(*form):
        raise TlsError(f"the key {path} is not that of the certificate {beside}")


def _check_time(certificate: x509.Certificate, path: Path, *, is_ours: bool) -> None:
    """Refuse a certificate that has expired; warn of one that soon will."""
    ends = certificate.not_valid_after_utc
    left = ends - dt.datetime.now(dt.timezone.utc)
    if left > _SOON:
        return
    advice = (
        "delete it to have a new one made, and hand the new address file out"
        if is_ours
        else "get a new one from its CA"
    )
    if left > dt.timedelta(0):
        logger.warning("the certificate %s expires on %s; %s", path, f"{ends:%Y-%m-%d}", advice)
        return
    raise TlsError(
        f"the certificate {path} expired on {ends:%Y-%m-%d}, so that no client accepts it; {advice}"
    )


def _issuer(
    certificate: x509.Certificate, among: Iterable[x509.Certificate]
) -> x509.Certificate | None:
    """Find the certificate of the CA that issued one, or the one itself if it is self-signed."""
    for candidate in among:
        try:
            certificate.verify_directly_issued_by(candidate)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return candidate
    return None
