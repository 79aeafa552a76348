"""Values on their way to the server and back: pickled, compressed where it pays, signed.

A stored value is a frame: a fixed header, then the body. Its parts answer three different
questions, in this order, before anything is unpickled:

- Is it whole? A CRC of the header and the body's SHA-256. If not, the value is lost
  (`ResultDamagedError`), and the key may be made not done.
- Does it belong to this key and this completion? Both are named in the header.
- Was it written by someone who has our secret? HMAC-SHA256 over stored key, token, header and
  the body's SHA-256. If not, that is an error (`SignatureError`) and never a reason to compute
  again.
"""

from __future__ import annotations

import hashlib
import hmac
import pickle
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import cloudpickle

from run_once.errors import ResultDamagedError, ResultError, ResultMissingError, SignatureError
from run_once.secret import Secret, how_to_share, load_secret

if TYPE_CHECKING:
    from distlock_proto import lock_table_pb2 as pb
    from run_once.client import Grant, LockClient
    from run_once.lease import Lease

MAGIC: Final = b"run1"
FRAME_VERSION: Final = 1
CODEC_RAW: Final = 0
CODEC_ZLIB: Final = 1

PICKLE_PROTOCOL: Final = 5

MIN_COMPRESSED_BYTES: Final = 4096
"""Shorter bodies are stored as they are."""

MAX_COMPRESSED_RATIO: Final = 0.9
"""Compression must save at least a tenth."""

# magic, frame version, codec, two zero bytes, token, fingerprint of the key, fingerprint of the
# secret, length of the pickle, seconds that the call ran, SHA-256 of the body
_HEAD: Final = struct.Struct(">4sBBHQ8s4sQd32s")
_MAC_BYTES: Final = 32
_CRC: Final = struct.Struct(">I")
HEADER_BYTES: Final = _HEAD.size + _MAC_BYTES + _CRC.size
"""What signing adds to a value, in bytes."""

_SAMPLE_BYTES: Final = 64 << 10


class _Head(NamedTuple):
    magic: bytes
    version: int
    codec: int
    reserved: int
    token: int
    key_id: bytes
    secret_id: bytes
    size_bytes: int
    run_s: float
    body_sha256: bytes


class Loaded(NamedTuple):
    """A stored value.

    Attributes:
        value: The value.
        run_s: For how many seconds the call ran that made it; 0: not known.
    """

    value: Any
    run_s: float


def dump(value: Any, *, key: bytes, token: int, secret: bytes, run_s: float = 0.0) -> bytes:
    """Turn a value into the bytes that are stored.

    Args:
        value: Anything that cloudpickle takes.
        key: The stored key it is the value of.
        token: The fencing token of the completion.
        secret: What it is signed with.
        run_s: For how many seconds the call ran; 0: not known.

    Returns:
        The frame, `HEADER_BYTES` longer than the pickle unless that compresses well.

    Raises:
        ResultError: The value cannot be pickled.
    """
    try:
        pickled = cloudpickle.dumps(value, protocol=PICKLE_PROTOCOL)
    except Exception as error:
        kind = type(value)
        raise ResultError(
            f"the value of key {_shown(key)}, a {kind.__module__}.{kind.__qualname__}, cannot be "
            f"stored ({type(error).__name__}: {error}), so the key is not done: return something "
            "that can be pickled"
        ) from error
    codec, body = _compressed(pickled)
    digest = hashlib.sha256(body).digest()
    head = _HEAD.pack(
        MAGIC,
        FRAME_VERSION,
        codec,
        0,
        token,
        _key_id(key),
        _secret_id(secret),
        len(pickled),
        run_s,
        digest,
    )
    mac = _sign(head, key, token, secret)
    return b"".join((head, mac, _CRC.pack(zlib.crc32(head + mac)), body))


def load(data: bytes | memoryview, *, key: bytes, token: int, secret: bytes) -> Loaded:
    """Check stored bytes and turn them back into the value.

    Args:
        data: What `dump` returned, perhaps on another machine.
        key: The stored key whose value is wanted.
        token: The token of its completion.
        secret: This user's secret.

    Returns:
        The value, and how long the call ran.

    Raises:
        ResultDamagedError: The bytes are not whole: the value is lost.
        SignatureError: They are whole, but not signed for this key and token with this secret.
        ResultError: They are genuine, but cannot be loaded in this environment.
    """
    view = memoryview(data)
    head, mac, body = _split(view, key)
    _check_signature(head, bytes(view[: _HEAD.size]), mac, key=key, token=token, secret=secret)
    pickled = _decompressed(head, body, key)
    try:
        return Loaded(pickle.loads(pickled), head.run_s)  # noqa: S301 - signed with this user's secret
    except Exception as error:
        raise ResultError(
            f"the value of key {_shown(key)} is genuine but cannot be loaded here "
            f"({type(error).__name__}: {error}): install the modules and versions that it was "
            "made with"
        ) from error


class ResultStore:
    """Stores values of completed keys and gets them back.

    Small values travel inside the settlement and the reply; others are uploaded before the key is
    completed.

    Args:
        client: The typed client of the server, or what gives it when it is needed.
        secret: What values are signed with; None: `load_secret`, on first use.
        max_inline_bytes: Larger frames are uploaded; 0: as the server says.
    """

    def __init__(
        self,
        client: LockClient | Callable[[], LockClient],
        *,
        secret: Secret | None = None,
        max_inline_bytes: int = 0,
    ) -> None:
        self._given_client = client
        self._own_secret = secret
        self._max_inline_bytes = max_inline_bytes

    @property
    def _client(self) -> LockClient:
        given = self._given_client
        return given() if callable(given) else given

    def store(self, lease: Lease | Grant, value: Any, run_s: float = 0.0) -> pb.Result:
        """Make the result with which a lease is completed.

        Args:
            lease: The lease (or its grant) on the key.
            value: The value.
            run_s: For how many seconds the call ran; 0: not known.

        Returns:
            The result to complete the key with; large values are with the server already.

        Raises:
            ResultError: The value cannot be stored, so the key must not be completed.
        """
        from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 - loads protobuf

        holder: Any = lease
        grant: Grant = getattr(holder, "grant", holder)
        data = dump(value, key=grant.key, token=grant.token, secret=self._secret(), run_s=run_s)
        digest = hashlib.sha256(data).digest()
        limit_bytes = self._max_inline_bytes or self._client.limits().max_inline_result_bytes
        if len(data) > limit_bytes:
            return self._client.upload_result(grant, data, digest)
        return pb.Result(
            storage=pb.Result.STORAGE_INLINE, payload=data, size_bytes=len(data), sha256=digest
        )

    def load(self, key: bytes, token: int, result: pb.Result) -> Loaded:
        """Return the value of a done key.

        Args:
            key: The key as stored.
            token: The token of its completion.
            result: Its result, as a reply had it.

        Returns:
            The value, and how long the call ran.

        Raises:
            ResultMissingError: The key is done without a value, or its value is gone.
            ResultDamagedError: The value is damaged.
            SignatureError: The value was signed with another secret.
            ResultError: The value cannot be loaded here.
        """
        from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 - loads protobuf

        if result.storage == pb.Result.STORAGE_NONE:
            raise ResultMissingError(f"key {_shown(key)} is done, but no value was stored with it")
        if result.storage == pb.Result.STORAGE_URL:
            raise ResultError(
                f"the value of key {_shown(key)} is at a URL, which this version cannot load"
            )
        if result.storage == pb.Result.STORAGE_INLINE and result.payload:
            data = result.payload
        else:
            data = self._client.download_result(key, token, result.size_bytes)
        return load(data, key=key, token=token, secret=self._secret())

    def _secret(self) -> Secret:
        if self._own_secret is None:
            self._own_secret = load_secret()
        return self._own_secret


def is_inline(result: pb.Result | None) -> bool:
    """Tell whether a result brings its value along."""
    from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 - loads protobuf

    return result is not None and result.storage == pb.Result.STORAGE_INLINE


def _split(view: memoryview, key: bytes) -> tuple[_Head, bytes, memoryview]:
    """Take a frame apart, and check that it is whole."""
    if len(view) < HEADER_BYTES or bytes(view[:4]) != MAGIC:
        raise ResultDamagedError(f"the value of key {_shown(key)} is cut off or is none of ours")
    end = _HEAD.size + _MAC_BYTES
    (crc,) = _CRC.unpack(view[end:HEADER_BYTES])
    head = _Head(*_HEAD.unpack(view[: _HEAD.size]))
    if crc != zlib.crc32(view[:end]):
        raise ResultDamagedError(f"the header of the value of key {_shown(key)} is damaged")
    if head.version != FRAME_VERSION:
        raise ResultError(
            f"the value of key {_shown(key)} has format {head.version}, and this version of "
            f"run-once reads format {FRAME_VERSION}: upgrade it"
        )
    body = view[HEADER_BYTES:]
    if not hmac.compare_digest(hashlib.sha256(body).digest(), head.body_sha256):
        raise ResultDamagedError(f"the value of key {_shown(key)} fails its checksum")
    return head, bytes(view[_HEAD.size : end]), body


def _check_signature(
    head: _Head, packed: bytes, mac: bytes, *, key: bytes, token: int, secret: bytes
) -> None:
    if hmac.compare_digest(_sign(packed, key, token, secret), mac):
        return
    if head.key_id != _key_id(key):
        text = "belongs to another key: someone moved it there. Reset the key to compute it again"
    elif head.token != token:
        text = (
            f"belongs to the completion with token {head.token}, not {token}: someone moved it "
            "there. Reset the key to compute it again"
        )
    elif head.secret_id != _secret_id(secret):
        text = (
            "was signed with another secret, so it is not loaded. If it is from another machine "
            f"of yours, share the secret: {how_to_share()}"
        )
    else:
        text = (
            "has a bad signature though it names this secret: it was changed on the way or on the "
            "server. Reset the key to compute it again"
        )
    raise SignatureError(f"the value of key {_shown(key)} {text}")


def _sign(head: bytes, key: bytes, token: int, secret: bytes) -> bytes:
    # The body is in it by its SHA-256, which the head holds.
    message = b"run-once result\0%d:%b%d:%b" % (len(key), key, token, head)
    return hmac.digest(secret, message, "sha256")


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"run-once key\0" + key).digest()[:8]


def _secret_id(secret: bytes) -> bytes:
    # 32 bits tell two secrets apart for the error's sake, and say nothing else of them.
    return hmac.digest(secret, b"run-once secret id", "sha256")[:4]


def _compressed(pickled: bytes) -> tuple[int, bytes]:
    """Compress where it pays; a sample from the middle keeps noise from being tried whole."""
    if len(pickled) <= MIN_COMPRESSED_BYTES:
        return CODEC_RAW, pickled
    middle = len(pickled) // 2
    sample = pickled[max(0, middle - _SAMPLE_BYTES // 2) : middle + _SAMPLE_BYTES // 2]
    if not _pays(sample, zlib.compress(sample, 1)):
        return CODEC_RAW, pickled
    body = zlib.compress(pickled, 1)
    return (CODEC_ZLIB, body) if _pays(pickled, body) else (CODEC_RAW, pickled)


def _pays(before: bytes, after: bytes) -> bool:
    return len(after) <= len(before) * MAX_COMPRESSED_RATIO


def _decompressed(head: _Head, body: memoryview, key: bytes) -> bytes | memoryview:
    if head.codec == CODEC_RAW:
        return body
    if head.codec != CODEC_ZLIB:
        raise ResultError(
            f"the value of key {_shown(key)} is packed by method {head.codec}, which this version "
            "of run-once does not know: upgrade it"
        )
    return zlib.decompress(body, bufsize=max(head.size_bytes, 1))


def _shown(key: bytes) -> str:
    return repr(key.decode("utf-8", "backslashreplace"))
