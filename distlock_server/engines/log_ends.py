"""Ends of logs of LevelDB and RocksDB: cut short by a crash, or damaged?

Both take a record whose length reaches over the end of a log for one that was being written at a
crash, and drop it without a word. If it is the length that is damaged, what is dropped was
acknowledged, and so was all behind it. The two can be told apart: a record that was cut short lacks
bytes, so no part of what is there fits its checksum; a whole one with another length does.

A log is blocks of 32 KiB of records that do not cross their borders, each with a checksum (4 bytes,
CRC-32C over type and content, masked), a length (2) and a type (1). Manifests are logs as well.

And RocksDB never comes back from opening a database whose manifest has a record of a recycled kind,
which no manifest has: one flipped bit makes it so.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

BLOCK_BYTES: Final = 32_768

_HEAD: Final = struct.Struct("<IHB")
_RECYCLED: Final = frozenset({5, 6, 7, 8, 11})
"""Types of records in logs whose files are used again, which ours are not."""

_MASK_DELTA: Final = 0xA282EAD8
_POLYNOMIAL: Final = 0x82F63B78


class DamagedLogError(Exception):
    """A log lost its end by damage and not by a crash."""


def check_logs(folder: Path) -> None:
    """Check the ends of all logs and manifests of a database that nobody has open.

    Raises:
        DamagedLogError: The end of one is damaged: opening the database would drop it.
        OSError: A file cannot be read.
    """
    for file in sorted((*folder.glob("*.log"), *folder.glob("MANIFEST-*"))):
        place = damaged_end(file)
        if place is not None:
            raise DamagedLogError(
                f"the length of the record at byte {place} of {file.name} is damaged, and opening "
                "the database would drop what follows: restore a backup"
            )
    for file in sorted(folder.glob("MANIFEST-*")):
        place = recycled_record(file)
        if place is not None:
            raise DamagedLogError(
                f"the type of the record at byte {place} of {file.name} is damaged: restore a "
                "backup"
            )


def record_places(block: bytes) -> Iterator[tuple[int, int]]:
    """Give place and length of each record in a block of a log."""
    place = 0
    while place + _HEAD.size <= len(block):
        _, length, _ = _HEAD.unpack_from(block, place)
        yield place, length
        place += _HEAD.size + length


def damaged_end(file: Path) -> int | None:
    """Tell where a log has a record that is whole but for its length; None: nowhere."""
    size = file.stat().st_size
    start = max(0, size - 1) // BLOCK_BYTES * BLOCK_BYTES
    with file.open("rb") as opened:
        opened.seek(start)
        block = opened.read(BLOCK_BYTES)
    for place, length in record_places(block):
        end = place + _HEAD.size
        if end + length > len(block) and _has_whole_record(block, place):
            return start + place
    return None


def recycled_record(file: Path) -> int | None:
    """Tell where a log has a record of a recycled kind; None: nowhere."""
    start = 0
    with file.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            for place, _ in record_places(block):
                if block[place + _HEAD.size - 1] in _RECYCLED:
                    return start + place
            start += len(block)
    return None


def _has_whole_record(block: bytes, place: int) -> bool:
    """Tell whether the checksum of a record that seems cut short fits some shorter one."""
    masked, _, kind = _HEAD.unpack_from(block, place)
    rotated = (masked - _MASK_DELTA) & 0xFFFF_FFFF
    wanted = ((rotated >> 17) | (rotated << 15)) & 0xFFFF_FFFF
    table = _table()
    crc = _step(table, 0xFFFF_FFFF, kind)
    for byte in block[place + _HEAD.size :]:
        crc = _step(table, crc, byte)
        if crc ^ 0xFFFF_FFFF == wanted:
            return True
    return False


def _step(table: list[int], crc: int, byte: int) -> int:
    return table[(crc ^ byte) & 0xFF] ^ (crc >> 8)


def _table() -> list[int]:
    """Give the table of CRC-32C; made when it is needed: after a crash."""
    table = []
    for number in range(256):
        crc = number
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return table
