"""What a result file begins with: key, token, size and SHA-256 of the value behind it."""

from __future__ import annotations

import os
import struct
import zlib
from typing import BinaryIO, Final, NamedTuple

_MAGIC: Final = b"ROBLOB1\n"
_FIXED: Final = struct.Struct(">8sQQ32sI")  # magic, token, size_bytes, sha256, length of the key
_CRC: Final = struct.Struct(">I")
_MAX_KEY_BYTES: Final = 1 << 16


class Header(NamedTuple):
    """Whose value a file holds, and what that must be.

    Attributes:
        key: The key as stored.
        token: The holder's fencing token.
        size_bytes: Length of the value.
        sha256: SHA-256 of the value, 32 bytes.
    """

    key: bytes
    token: int
    size_bytes: int
    sha256: bytes

    @property
    def n_bytes(self) -> int:
        """Length of the header itself; the value begins there."""
        return _FIXED.size + len(self.key) + _CRC.size

    def pack(self) -> bytes:
        """Give the header's bytes."""
        fixed = _FIXED.pack(_MAGIC, self.token, self.size_bytes, self.sha256, len(self.key))
        return fixed + self.key + _CRC.pack(zlib.crc32(fixed + self.key))


def read_header(file: BinaryIO) -> Header | None:
    """Read what a file begins with; None if that is no header or a damaged one."""
    fixed = file.read(_FIXED.size)
    if len(fixed) != _FIXED.size:
        return None
    magic, token, size_bytes, sha256, key_bytes = _FIXED.unpack(fixed)
    if magic != _MAGIC or key_bytes > _MAX_KEY_BYTES:
        return None
    rest = file.read(key_bytes + _CRC.size)
    key, crc = rest[:key_bytes], rest[key_bytes:]
    if crc != _CRC.pack(zlib.crc32(fixed + key)):
        return None
    return Header(key, token, size_bytes, sha256)


def is_whole(file: BinaryIO, header: Header) -> bool:
    """Tell whether an open file has the length that its header says."""
    return os.fstat(file.fileno()).st_size == header.n_bytes + header.size_bytes
