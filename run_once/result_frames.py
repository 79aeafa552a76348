"""Values as they are stored: pickled, compressed where it pays, signed.

A stored value is a frame: a fixed header, then the body. Its parts answer three different
questions, in this order, before anything is unpickled:

- Is it whole? A CRC of the header and the body's SHA-256. If not, the value is lost
  (`ResultDamagedError`), and the key may be made not done.
- Does it belong to this key and this completion? Both are named in the header.
- Was it written by someone who has our secret? HMAC-SHA256 over stored key, token, header and
  the body's SHA-256. If not, that is an error (`SignatureError`) and never a reason to compute
  again.

The body is the pickle, or, if large buffers stay out of it, a table, the pickle and the buffers,
each of which begins at a multiple of 64 bytes from the start of the frame.
"""

from __future__ import annotations

import hmac
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final, NamedTuple

from run_once.buffers import ALIGNED_BYTES, CHUNK_BYTES, Parts, aligned_buffer
from run_once.errors import ResultDamagedError, ResultError, SignatureError
from run_once.keys import display_key
from run_once.result_pickles import from_pickle, to_pickle
from run_once.secret import how_to_get

MAGIC: Final = b"run1"
FRAME_VERSION: Final = 1
CODEC_RAW: Final = 0
CODEC_ZLIB: Final = 1
CODEC_TABLE: Final = 2
"""The body begins with a table of its parts, each with a codec of its own."""

MIN_COMPRESSED_BYTES: Final = 4096
"""Shorter parts are stored as they are."""

MAX_COMPRESSED_RATIO: Final = 0.9
"""Compression must save at least a tenth."""

# magic, frame version, codec, parts in the table, token, fingerprint of the key, fingerprint of the
# secret, length of the pickle, seconds that the call ran, fingerprint of the function's source,
# SHA-256 of the body
_HEAD: Final = struct.Struct(">4sBBHQQ4sQd4s32s")
_NO_SOURCE_ID: Final = bytes(4)
_MAC_BYTES: Final = 32
_CRC: Final = struct.Struct(">I")
_SIGNED_BYTES: Final = _HEAD.size + _MAC_BYTES
HEADER_BYTES: Final = _SIGNED_BYTES + _CRC.size
"""What signing adds to a value, in bytes."""

_MAX_EXPANSION: Final = 1_100
"""Deflate cannot do better than about 1,030 to 1: no more memory is made ready than that."""

_ENTRY: Final = struct.Struct(">BQQ")  # codec, bytes as stored, bytes as they were
_LEVEL: Final = 1
_SAMPLES: Final = 4
_SAMPLE_BYTES: Final = 16 << 10
_JOINED_BYTES: Final = 64 << 10


class _Head(NamedTuple):
    magic: bytes
    version: int
    codec: int
    n_parts: int
    token: int
    key_id: int
    secret_id: bytes
    size_bytes: int
    run_s: float
    source_id: bytes
    body_sha256: bytes


class _Entry(NamedTuple):
    codec: int
    stored_bytes: int
    size_bytes: int


class Loaded(NamedTuple):
    """A stored value.

    Attributes:
        value: The value.
        run_s: For how many seconds the call ran that made it; 0: not known.
        source_id: Fingerprint of the source that made it; empty: not known.
    """

    value: Any
    run_s: float
    source_id: bytes


def dump(
    value: Any,
    *,
    key: bytes,
    token: int,
    secret: bytes,
    run_s: float = 0.0,
    source_id: bytes = b"",
) -> bytes | Parts:
    """Turn a value into the bytes that are stored.

    Args:
        value: Anything that cloudpickle takes.
        key: The stored key it is the value of.
        token: The fencing token of the completion.
        secret: What it is signed with.
        run_s: For how many seconds the call ran; 0: not known.
        source_id: Fingerprint of its function's source, of 4 bytes; empty: not known.

    Returns:
        The frame, `HEADER_BYTES` longer than the pickle unless that compresses well. A large one is
        in parts, which may be the memory of the value itself.

    Raises:
        ResultError: The value cannot be pickled.
    """
    try:
        pickled, buffers = to_pickle(value)
    except Exception as error:
        kind = type(value)
        raise ResultError(
            f"the value of key {_shown(key)}, a {kind.__module__}.{kind.__qualname__}, cannot be "
            f"stored ({type(error).__name__}: {error}), so the key is not done: return something "
            "that can be pickled"
        ) from error
    if not buffers and len(pickled) <= MIN_COMPRESSED_BYTES:
        fields = (CODEC_RAW, 0, len(pickled), run_s, source_id, sha256(pickled).digest())
        return _signed_head(*fields, key=key, token=token, secret=secret) + pickled
    if buffers:
        codec, n_parts, body = CODEC_TABLE, 1 + len(buffers), _with_table([pickled, *buffers])
    else:
        codec, part = _compressed(memoryview(pickled))
        n_parts, body = 0, [part]
    digest = sha256()
    for piece in body:
        digest.update(piece)
    fields = (codec, n_parts, len(pickled), run_s, source_id, digest.digest())
    frame = Parts([_signed_head(*fields, key=key, token=token, secret=secret), *body])
    return bytes(frame) if len(frame) <= _JOINED_BYTES else frame


def load(data: bytes | memoryview, *, key: bytes, token: int, secret: bytes) -> Loaded:
    """Check stored bytes and turn them back into the value.

    Args:
        data: What `dump` made, perhaps on another machine. If it may be written to and begins at a
            multiple of 64, arrays stay in it; otherwise large ones are copied once.
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
    head = _whole(view, key)
    _check_signature(head, view, key=key, token=token, secret=secret)
    try:
        return Loaded(
            _value(head, view),
            head.run_s,
            b"" if head.source_id == _NO_SOURCE_ID else head.source_id,
        )
    except _UnknownCodecError as error:
        raise ResultError(
            f"the value of key {_shown(key)} is packed by method {error}, which this version of "
            "run-once does not know: upgrade it"
        ) from None
    except Exception as error:
        raise ResultError(
            f"the value of key {_shown(key)} is genuine but cannot be loaded here "
            f"({type(error).__name__}: {error}): install the modules and versions that it was "
            "made with"
        ) from error


class _UnknownCodecError(Exception):
    """A part is packed in a way that this version does not know."""


def _whole(view: memoryview, key: bytes) -> _Head:
    """Check that a frame is whole, and give its head."""
    if len(view) < HEADER_BYTES or bytes(view[:4]) != MAGIC:
        raise ResultDamagedError(f"the value of key {_shown(key)} is cut off or is none of ours")
    head = _Head._make(_HEAD.unpack_from(view))
    if _CRC.unpack_from(view, _SIGNED_BYTES)[0] != zlib.crc32(view[:_SIGNED_BYTES]):
        raise ResultDamagedError(f"the header of the value of key {_shown(key)} is damaged")
    if head.version != FRAME_VERSION:
        raise ResultError(
            f"the value of key {_shown(key)} has format {head.version}, and this version of "
            f"run-once reads format {FRAME_VERSION}: upgrade it"
        )
    if sha256(view[HEADER_BYTES:]).digest() != head.body_sha256:
        raise ResultDamagedError(f"the value of key {_shown(key)} fails its checksum")
    return head


def _check_signature(
    head: _Head, view: memoryview, *, key: bytes, token: int, secret: bytes
) -> None:
    expected = _sign(bytes(view[: _HEAD.size]), key, token, secret)
    if hmac.compare_digest(expected, view[_HEAD.size : _SIGNED_BYTES]):
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
            "was signed with another secret than this machine has, so it is not loaded. If it is "
            f"from another machine of yours, {how_to_get()}. To have it computed anew instead: "
            f"{display_key(key).reset_command}"
        )
    else:
        text = (
            "has a bad signature though it names this secret: it was changed on the way or on the "
            "server. Reset the key to compute it again"
        )
    raise SignatureError(f"the value of key {_shown(key)} {text}")


def _signed_head(
    codec: int,
    n_parts: int,
    size_bytes: int,
    run_s: float,
    source_id: bytes,
    body_sha256: bytes,
    *,
    key: bytes,
    token: int,
    secret: bytes,
) -> bytes:
    """Make the header."""
    head = _HEAD.pack(
        MAGIC,
        FRAME_VERSION,
        codec,
        n_parts,
        token,
        _key_id(key),
        _secret_id(secret),
        size_bytes,
        run_s,
        source_id,
        body_sha256,
    )
    signed = head + _sign(head, key, token, secret)
    return signed + _CRC.pack(zlib.crc32(signed))


def _sign(head: bytes, key: bytes, token: int, secret: bytes) -> bytes:
    # The body is in it by its SHA-256, which the head holds.
    mac = _keyed(secret).copy()
    mac.update(b"run-once result\0%d:%b%d:%b" % (len(key), key, token, head))
    return mac.digest()


@lru_cache(maxsize=8)
def _keyed(secret: bytes) -> hmac.HMAC:
    """Make what a signature begins with; half of the work is the same for all of them."""
    return hmac.new(secret, digestmod="sha256")


def _key_id(key: bytes) -> int:
    # Only tells which sentence an error needs; what binds a value to its key is the signature.
    return len(key) << 32 | zlib.crc32(key)


@lru_cache(maxsize=8)
def _secret_id(secret: bytes) -> bytes:
    # 32 bits tell two secrets apart for the error's sake, and say nothing else of them.
    return hmac.digest(secret, b"run-once secret id", "sha256")[:4]


def _with_table(parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """Lay parts out behind a table, each with nothing before it but what aligns it."""
    table = []
    body: list[bytes | memoryview] = []
    position = HEADER_BYTES + _ENTRY.size * len(parts)
    for each in parts:
        codec, part = _compressed(memoryview(each))
        table.append(_ENTRY.pack(codec, len(part), len(each)))
        gap_bytes = -position % ALIGNED_BYTES
        body += [bytes(gap_bytes), part]
        position += gap_bytes + len(part)
    return [b"".join(table), *body]


def _value(head: _Head, view: memoryview) -> Any:
    """Take the body of a genuine frame apart, and unpickle it."""
    if head.codec != CODEC_TABLE:
        return from_pickle(_raw(view[HEADER_BYTES:], head.codec, head.size_bytes))
    if view.readonly:
        # An array that was loaded must be as good as a fresh one, so it may be written to.
        copy = aligned_buffer(len(view))
        copy[:] = view
        view = copy
    (codec, pickled, size_bytes), *buffers = _parts(head, view)
    return from_pickle(
        _raw(pickled, codec, size_bytes),
        [_raw(part, codec, size_bytes) for codec, part, size_bytes in buffers],
    )


def _parts(head: _Head, view: memoryview) -> Iterator[tuple[int, memoryview, int]]:
    """Yield codec, stored bytes and original length of each part."""
    position = HEADER_BYTES + _ENTRY.size * head.n_parts
    for number in range(head.n_parts):
        entry = _Entry._make(_ENTRY.unpack_from(view, HEADER_BYTES + _ENTRY.size * number))
        position += -position % ALIGNED_BYTES
        yield entry.codec, view[position : position + entry.stored_bytes], entry.size_bytes
        position += entry.stored_bytes


def _compressed(part: memoryview) -> tuple[int, bytes | memoryview]:
    """Compress where it pays; samples keep noise from being tried whole."""
    size_bytes = len(part)
    if size_bytes <= MIN_COMPRESSED_BYTES:
        return CODEC_RAW, part
    sample = _sample(part)
    if len(zlib.compress(sample, _LEVEL)) > len(sample) * MAX_COMPRESSED_RATIO:
        return CODEC_RAW, part
    packer = zlib.compressobj(_LEVEL)
    packed: list[bytes] = []
    left_bytes = int(size_bytes * MAX_COMPRESSED_RATIO)
    for start in range(0, size_bytes, CHUNK_BYTES):
        packed.append(packer.compress(part[start : start + CHUNK_BYTES]))
        left_bytes -= len(packed[-1])
        if left_bytes < 0:
            return CODEC_RAW, part
    packed.append(packer.flush())
    if len(packed[-1]) > left_bytes:
        return CODEC_RAW, part
    return CODEC_ZLIB, b"".join(packed)


def _sample(part: memoryview) -> bytes | memoryview:
    """Take some stretches, evenly spread."""
    if len(part) <= _SAMPLES * _SAMPLE_BYTES:
        return part
    step = len(part) // _SAMPLES
    starts = range((step - _SAMPLE_BYTES) // 2, len(part) - _SAMPLE_BYTES, step)
    return b"".join(part[start : start + _SAMPLE_BYTES] for start in starts[:_SAMPLES])


def _raw(part: memoryview, codec: int, size_bytes: int) -> memoryview:
    """Undo `_compressed`; what was compressed gets memory of its own, to be written to."""
    if codec == CODEC_RAW:
        return part
    if codec != CODEC_ZLIB:
        raise _UnknownCodecError(codec)
    if size_bytes > len(part) * _MAX_EXPANSION:
        raise ValueError(f"{len(part)} compressed bytes cannot be {size_bytes} bytes")
    room = aligned_buffer(size_bytes)
    unpacker = zlib.decompressobj()
    end = 0
    for start in range(0, len(part), CHUNK_BYTES):
        data: bytes | memoryview = part[start : start + CHUNK_BYTES]
        while data:
            found = unpacker.decompress(data, CHUNK_BYTES)
            room[end : end + len(found)] = found
            end += len(found)
            data = unpacker.unconsumed_tail
    rest = unpacker.flush()
    room[end : end + len(rest)] = rest
    return room


def _shown(key: bytes) -> str:
    return repr(key.decode("utf-8", "backslashreplace"))
