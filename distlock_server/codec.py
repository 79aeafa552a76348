"""Records and the server's own keys as bytes on disk; docs/storage.md has the layout.

Decoding is strict: what comes back is the record that was written, or a `CodecError`. Every record
ends in a checksum, for a flipped bit that the engine below did not see must not become a grant.
Records of 2021 have none; they are serialized `Lock` messages, known by their first byte.
"""

from __future__ import annotations

import enum
import functools
import struct
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from distlock_proto.legacy_pb2 import Lock
from distlock_server import codec_2021
from distlock_server.engines.base import SYSTEM_PREFIX, Swap
from distlock_server.state import (
    CLAIM_ID_BYTES,
    NO_CLAIM_ID,
    NO_RESULT,
    Done,
    Failed,
    Held,
    Record,
    Result,
    Storage,
)

# -- the server's own keys --------------------------------------------------------------------

FORMAT: Final = b"run-once 1"
"""Value of `FORMAT_KEY` in databases that this code reads and writes."""

FORMAT_KEY: Final = SYSTEM_PREFIX + b"sformat"
DATABASE_ID_KEY: Final = SYSTEM_PREFIX + b"sid"
REVISION_KEY: Final = SYSTEM_PREFIX + b"srevision"
TOKEN_KEY: Final = SYSTEM_PREFIX + b"stoken"
GENERATION_KEY: Final = SYSTEM_PREFIX + b"sgeneration"
COUNT_CURSOR_KEY: Final = SYSTEM_PREFIX + b"scounted"


class Kind(enum.IntEnum):
    """What a record is; counters and indexes go by it. The numbers are on disk."""

    HELD = 1
    FAILED = 2
    DONE = 3


_INDEX_PREFIX: Final = {Kind.HELD: SYSTEM_PREFIX + b"h", Kind.FAILED: SYSTEM_PREFIX + b"f"}


def index_key(kind: Kind, key: bytes) -> bytes:
    """Give the index entry of a held or failed key; done keys have none."""
    return _INDEX_PREFIX[kind] + key


_SPAN_PREFIX: Final = SYSTEM_PREFIX + b"r"
SPANS_END: Final = SYSTEM_PREFIX + b"s"
"""Entries of spans lie from `span_key(0)` to here; see `held_index.py`."""

_SPAN_TOKEN: Final = struct.Struct(">Q")
_KEY_END: Final = b"\xff"
"""Stands in no UTF-8."""


def span_key(first_token: int) -> bytes:
    """Give the entry of keys that were granted together: the first has this token, and so on."""
    return _SPAN_PREFIX + _SPAN_TOKEN.pack(first_token)


def encode_span(keys: Sequence[bytes]) -> bytes:
    """Encode the keys of a span, in the order of their tokens."""
    return _KEY_END.join(keys)


def decode_span(entry: bytes, raw: bytes) -> tuple[int, list[bytes]]:
    """Give the first token and the keys of a span.

    Raises:
        CodecError: This is none.
    """
    try:
        (first_token,) = _SPAN_TOKEN.unpack(entry.removeprefix(_SPAN_PREFIX))
    except struct.error as error:
        raise CodecError(f"{entry!r} is no entry of a span: {error}") from error
    return first_token, raw.split(_KEY_END)


def counter_key(namespace: bytes, kind: Kind) -> bytes:
    """Give the counter of a namespace's keys of one kind."""
    return SYSTEM_PREFIX + b"c" + bytes((kind,)) + namespace


FIRST_WITH_NAMESPACE: Final = b"\x1e"
FIRST_BEHIND_NAMESPACES: Final = b"\x1f"
"""All keys with a namespace lie between these two in byte order."""


def namespace_of(stored_key: bytes) -> bytes:
    r"""Give the namespace of a key as stored, ``\x1e<namespace>\x1f<key>``; else it is empty."""
    if not stored_key.startswith(b"\x1e"):
        return b""
    namespace, separator, _ = stored_key[1:].partition(b"\x1f")
    return namespace if separator else b""


def namespace_prefix(namespace: bytes) -> bytes:
    r"""Give what all keys of a namespace begin with; of those without, what proves nothing."""
    return b"\x1e" + namespace + b"\x1f" if namespace else b""


# -- records ----------------------------------------------------------------------------------

MAX_RECORD_BYTES: Final = 32 * 2**20
"""No record is longer; the limits on what clients send are far below."""

_VERSION_BYTE: Final = 0x11
_FIRST_BYTE_2021: Final = bytes((codec_2021.FIRST_BYTE,))

_KIND_MASK: Final = 0x03
_AHEAD: Final = 0x04
_EXPIRED: Final = 0x08
_DEADLINE: Final = 0x10
_CLAIM_ID: Final = 0x20
_DATA: Final = 0x40
_ERROR: Final = 0x80
_RELEASED: Final = 0x04
_RESULT: Final = 0x04
_FLAGS: Final = {
    Kind.HELD: _AHEAD | _EXPIRED | _DEADLINE | _CLAIM_ID | _DATA | _ERROR,
    Kind.FAILED: _RELEASED | _CLAIM_ID | _ERROR,
    Kind.DONE: _RESULT | _DATA,
}

_HEAD: Final = struct.Struct(">BBQQq")  # version, kind and flags, token, revision, since_wall_ns
NUMBERS_AT: Final = slice(2, 18)
"""Where token and revision stand in every record, 8 bytes each."""

_HELD: Final = struct.Struct(">qI")  # ttl_ns, attempts
_HEAD_AND_HELD: Final = struct.Struct(">BBQQqqI")  # both, as they follow each other
_ATTEMPTS: Final = struct.Struct(">I")
_RESULT_HEAD: Final = struct.Struct(">BQB")  # storage, size_bytes, length of sha256
_DEADLINE_NS: Final = struct.Struct(">q")
_LENGTH: Final = struct.Struct(">I")
CRC: Final = struct.Struct(">I")
"""The end of every record: a CRC-32 of all before it."""

_SHA256_BYTES: Final = 32
_MIN_RECORD_BYTES: Final = _HEAD.size + CRC.size
_STORAGES: Final = {int(storage): storage for storage in Storage}
_KINDS: Final = {int(kind): kind for kind in Kind}
_HELD_KIND: Final = int(Kind.HELD)
_DONE_KIND: Final = int(Kind.DONE)


class CodecError(Exception):
    """These bytes are no record; the message says what is wrong with them."""


class Opened(NamedTuple):
    """Both clocks, read once when the database was opened.

    Attributes:
        now_ns: The server's monotonic time.
        wall_ns: Wall time in nanoseconds since 1970.
    """

    now_ns: int
    wall_ns: int


def encode(
    record: Held | Failed | Done, *, is_expired: bool = False, deadline_ns: int | None = None
) -> bytes:
    """Encode a record.

    Args:
        record: The record; its `deadline_ns` is not looked at.
        is_expired: The lease ran out before a clean shutdown: it does not run anew.
        deadline_ns: For shared engines: the deadline on the engine's clock. None: only the ttl is
            stored, and the lease runs anew for it after a crash.

    Returns:
        The bytes to store.

    Raises:
        CodecError: The record is too long. The limits on requests keep that from happening.
    """
    assert not (is_expired and deadline_ns is not None), "a stored deadline says by itself"
    if isinstance(record, Held):
        if not (is_expired or record.last_error or record.data) and deadline_ns is None:
            body = _encode_plain_held(record)
        else:
            body = _encode_held(record, is_expired=is_expired, deadline_ns=deadline_ns)
    elif isinstance(record, Failed):
        body = _encode_failed(record)
    else:
        body = _encode_done(record)
    if len(body) + CRC.size > MAX_RECORD_BYTES:
        raise CodecError(f"a record takes at most {MAX_RECORD_BYTES} bytes, not {len(body)}")
    return body + CRC.pack(zlib.crc32(body))


def decode(raw: bytes, opened: Opened) -> Held | Failed | Done:
    """Decode a record.

    Args:
        raw: Bytes that `encode` gave, or a `Lock` that the server of 2021 wrote.
        opened: When the database was opened; leases without a stored deadline count from there.

    Returns:
        The record.

    Raises:
        CodecError: The bytes are no record, or damaged.
    """
    if len(raw) > MAX_RECORD_BYTES:
        raise CodecError(f"{len(raw)} bytes are more than a record can have")
    if raw[:1] == _FIRST_BYTE_2021:
        return codec_2021.to_record(_parse_2021(raw), *opened)
    if is_plain_done(raw):
        _, _, token, revision, since_wall_ns = _HEAD.unpack_from(raw)
        owner = _owner_of(raw[_HEAD.size : -CRC.size])
        if owner is not None:
            return Done(token, owner, since_wall_ns, revision=revision)
    kind = _own_kind(raw)
    body = raw[: -CRC.size]
    if len(raw) < _HEAD.size + CRC.size:
        raise CodecError(f"{len(raw)} bytes are too few")
    if zlib.crc32(body) != CRC.unpack_from(raw, len(body))[0]:
        raise CodecError("the checksum does not match")
    reader = _Reader(body)
    _, kind_flags, token, revision, since_wall_ns = reader.unpack(_HEAD)
    flags = kind_flags & ~_KIND_MASK
    if flags & ~_FLAGS[kind]:
        raise CodecError(f"flags {flags:#04x} are unknown for a {kind.name} record")
    head = _Head(flags, token, revision, since_wall_ns)
    record: Held | Failed | Done
    if kind is Kind.HELD:
        record = _decode_held(reader, head, opened)
    elif kind is Kind.FAILED:
        record = _decode_failed(reader, head)
    else:
        record = _decode_done(reader, head)
    reader.finish()
    return record


def is_plain_done(raw: bytes) -> bool:
    """Tell whether this is a done key's record without value and data, and undamaged."""
    return (
        len(raw) >= _MIN_RECORD_BYTES
        and raw[0] == _VERSION_BYTE
        and raw[1] == _DONE_KIND
        and zlib.crc32(raw[: -CRC.size]) == CRC.unpack_from(raw, len(raw) - CRC.size)[0]
    )


def kind_of(raw: bytes) -> Kind:
    """Tell what a record is without decoding it; the checksum is not looked at.

    Raises:
        CodecError: The bytes are no record.
    """
    if raw[:1] == _FIRST_BYTE_2021:
        return Kind.HELD if codec_2021.expires_in_ns(_parse_2021(raw)) else Kind.DONE
    return _own_kind(raw)


def is_marked_expired(raw: bytes) -> bool:
    """Tell whether the stored lease does not run anew; a renewal must then be stored at once."""
    return raw[:1] == bytes((_VERSION_BYTE,)) and (
        _own_kind(raw) is Kind.HELD and bool(raw[1] & _EXPIRED)
    )


def expired_swap(key: bytes, record: Record, raw: bytes | None) -> Swap:
    """Give the change that stores a lease as expired, for a clean shutdown."""
    assert isinstance(record, Held), "only leases expire"
    return Swap.one(key, raw, encode(record, is_expired=True))


class _Head(NamedTuple):
    """What all records have."""

    flags: int
    token: int
    revision: int
    since_wall_ns: int


class _Reader:
    """Takes a record apart from the front; every read is checked against its end."""

    __slots__ = ("_at", "_body")

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, size: int) -> bytes:
        """Take so many bytes."""
        end = self._at + size
        if end > len(self._body):
            raise CodecError(f"{size} bytes at {self._at} reach over the end")
        piece = self._body[self._at : end]
        self._at = end
        return piece

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """Take fixed fields."""
        try:
            fields = layout.unpack_from(self._body, self._at)
        except struct.error:
            raise CodecError(f"{layout.size} bytes at {self._at} reach over the end") from None
        self._at += layout.size
        return fields

    def block(self) -> bytes:
        """Take bytes that stand behind their length."""
        return self.take(self.unpack(_LENGTH)[0])

    def text(self) -> str:
        """Take UTF-8 that stands behind its length."""
        try:
            return self.block().decode()
        except UnicodeDecodeError as error:
            raise CodecError(f"a text is not UTF-8: {error}") from error

    def finish(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._body):
            raise CodecError(f"{len(self._body) - self._at} bytes are left over")


def _parse_2021(raw: bytes) -> Lock:
    try:
        return codec_2021.parse(raw)
    except ValueError as error:
        raise CodecError(f"not a Lock of 2021: {error}") from error


def _own_kind(raw: bytes) -> Kind:
    if len(raw) < _HEAD.size:
        raise CodecError(f"{len(raw)} bytes are too few")
    if raw[0] != _VERSION_BYTE:
        raise CodecError(f"first byte {raw[0]:#04x} is no record format known here")
    kind = _KINDS.get(raw[1] & _KIND_MASK)
    if kind is None:
        raise CodecError(f"kind {raw[1] & _KIND_MASK} is unknown")
    return kind


def _head(kind: Kind, flags: int, record: Held | Failed | Done) -> bytes:
    return _HEAD.pack(
        _VERSION_BYTE, kind | flags, record.token, record.revision, record.since_wall_ns
    )


def _block(value: bytes) -> bytes:
    return _LENGTH.pack(len(value)) + value


def _claim_id(claim_id: bytes) -> tuple[int, bytes]:
    assert claim_id == NO_CLAIM_ID or len(claim_id) == CLAIM_ID_BYTES
    return (_CLAIM_ID if claim_id else 0), claim_id


def _optional(flag: int, value: bytes) -> tuple[int, bytes]:
    return (flag, _block(value)) if value else (0, b"")


@functools.lru_cache(maxsize=1_000)
def _owner(owner: str) -> bytes:
    """Give the block of an owner label; few own many keys."""
    return _block(owner.encode())


@functools.lru_cache(maxsize=1_000)
def _owner_of(block: bytes) -> str | None:
    """Give the owner of a block; None if it is none."""
    if len(block) < _LENGTH.size or _LENGTH.unpack_from(block)[0] != len(block) - _LENGTH.size:
        return None
    try:
        return block[_LENGTH.size :].decode()
    except UnicodeDecodeError:
        return None


def _encode_held(record: Held, *, is_expired: bool, deadline_ns: int | None) -> bytes:
    deadline = b"" if deadline_ns is None else _DEADLINE_NS.pack(deadline_ns)
    claim_flag, claim_id = _claim_id(record.claim_id)
    error_flag, error = _optional(_ERROR, record.last_error.encode())
    data_flag, data = _optional(_DATA, record.data)
    flags = claim_flag | error_flag | data_flag
    flags |= _AHEAD if record.ahead else 0
    flags |= _EXPIRED if is_expired else 0
    flags |= _DEADLINE if deadline else 0
    fixed = _HELD.pack(record.ttl_ns, record.attempts)
    owner = _owner(record.owner)
    return _head(Kind.HELD, flags, record) + fixed + deadline + claim_id + owner + error + data


def _encode_plain_held(record: Held) -> bytes:
    """Encode what nearly all held records are, with the same outcome."""
    claim_flag, claim_id = _claim_id(record.claim_id)
    fixed = _HEAD_AND_HELD.pack(
        _VERSION_BYTE,
        _HELD_KIND | claim_flag | (_AHEAD if record.ahead else 0),
        record.token,
        record.revision,
        record.since_wall_ns,
        record.ttl_ns,
        record.attempts,
    )
    return fixed + claim_id + _owner(record.owner)


def _encode_failed(record: Failed) -> bytes:
    claim_flag, claim_id = _claim_id(record.claim_id)
    error_flag, error = _optional(_ERROR, record.error.encode())
    flags = claim_flag | error_flag | (_RELEASED if record.released else 0)
    return _head(Kind.FAILED, flags, record) + _ATTEMPTS.pack(record.attempts) + claim_id + error


def _encode_done(record: Done) -> bytes:
    if not record.data and record.result == NO_RESULT:
        fixed = _HEAD.pack(
            _VERSION_BYTE, _DONE_KIND, record.token, record.revision, record.since_wall_ns
        )
        return fixed + _owner(record.owner)
    data_flag, data = _optional(_DATA, record.data)
    flags = data_flag | (_RESULT if record.result != NO_RESULT else 0)
    result = _encode_result(record.result) if flags & _RESULT else b""
    return _head(Kind.DONE, flags, record) + _owner(record.owner) + result + data


def _encode_result(result: Result) -> bytes:
    assert len(result.sha256) in (0, _SHA256_BYTES), "a SHA-256 has 32 bytes"
    fixed = _RESULT_HEAD.pack(result.storage, result.size_bytes, len(result.sha256))
    return fixed + result.sha256 + _block(result.payload)


def _attempts(attempts: int) -> int:
    if attempts < 1:
        raise CodecError("a granted key has at least one attempt")
    return attempts


def _decode_held(reader: _Reader, head: _Head, opened: Opened) -> Held:
    ttl_ns, attempts = reader.unpack(_HELD)
    if ttl_ns < 0:
        raise CodecError(f"a lease of {ttl_ns} ns")
    deadline_ns = opened.now_ns + ttl_ns
    if head.flags & _EXPIRED:
        deadline_ns = opened.now_ns
    if head.flags & _DEADLINE:
        if head.flags & _EXPIRED:
            raise CodecError("a lease with a deadline is marked as expired")
        (deadline_ns,) = reader.unpack(_DEADLINE_NS)
    return Held(
        claim_id=reader.take(CLAIM_ID_BYTES) if head.flags & _CLAIM_ID else NO_CLAIM_ID,
        token=head.token,
        deadline_ns=deadline_ns,
        ttl_ns=ttl_ns,
        owner=reader.text(),
        since_wall_ns=head.since_wall_ns,
        attempts=_attempts(attempts),
        ahead=bool(head.flags & _AHEAD),
        last_error=reader.text() if head.flags & _ERROR else "",
        data=reader.block() if head.flags & _DATA else b"",
        revision=head.revision,
    )


def _decode_failed(reader: _Reader, head: _Head) -> Failed:
    (attempts,) = reader.unpack(_ATTEMPTS)
    return Failed(
        claim_id=reader.take(CLAIM_ID_BYTES) if head.flags & _CLAIM_ID else NO_CLAIM_ID,
        token=head.token,
        attempts=_attempts(attempts),
        error=reader.text() if head.flags & _ERROR else "",
        since_wall_ns=head.since_wall_ns,
        released=bool(head.flags & _RELEASED),
        revision=head.revision,
    )


def _decode_done(reader: _Reader, head: _Head) -> Done:
    return Done(
        token=head.token,
        owner=reader.text(),
        since_wall_ns=head.since_wall_ns,
        result=_decode_result(reader) if head.flags & _RESULT else NO_RESULT,
        data=reader.block() if head.flags & _DATA else b"",
        revision=head.revision,
    )


def _decode_result(reader: _Reader) -> Result:
    storage, size_bytes, sha256_bytes = reader.unpack(_RESULT_HEAD)
    if sha256_bytes not in (0, _SHA256_BYTES):
        raise CodecError(f"a SHA-256 of {sha256_bytes} bytes")
    kind = _STORAGES.get(storage)
    if kind is None:
        raise CodecError(f"storage {storage} is unknown")
    sha256 = reader.take(sha256_bytes)
    return Result(kind, reader.block(), size_bytes, sha256)
