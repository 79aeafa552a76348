"""The records of a batch as bytes: what they have in common is encoded once."""

from __future__ import annotations

import itertools
import operator
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from distlock_server import codec
from distlock_server.state import Done, Held, Record

_HOLDERS: Final[dict[type, Callable[[Any], Any]]] = {
    Held: operator.attrgetter("claim_id"),
    Done: operator.attrgetter("owner"),
}

_MANY: Final = 4
"""Fewer records are encoded one by one, which is quicker then."""


def encode_all(
    records: Sequence[Record], *, stores_deadline: bool = False
) -> Sequence[bytes | None]:
    """Encode records as `codec.encode` does, which for those that are alike is quicker.

    Args:
        records: The records; None: there is none.
        stores_deadline: Held ones get their deadlines with them, for shared engines.
    """
    kinds = set(map(type, records))
    if len(records) < _MANY or len(kinds) > 1:
        return [_encode_one(record, stores_deadline=stores_deadline) for record in records]
    (kind,) = kinds
    if kind is Done or (kind is Held and not stores_deadline):
        found: list[bytes | None] = []
        for _, run in itertools.groupby(records, _HOLDERS[kind]):
            found += _encode_run(list(run), kind)
        return found
    return [_encode_one(record, stores_deadline=stores_deadline) for record in records]


def _encode_run(records: list[Any], kind: type[Held | Done]) -> Sequence[bytes]:
    """Encode records of one holder, which mostly are alike."""
    found = _encode_alike(records, kind) if len(records) >= _MANY else None
    return list(map(codec.encode, records)) if found is None else found


def _encode_one(record: Record, *, stores_deadline: bool) -> bytes | None:
    """Encode a record with all that it has."""
    if record is None:
        return None
    if stores_deadline and isinstance(record, Held):
        return codec.encode(record, deadline_ns=record.deadline_ns)
    return codec.encode(record)


def _encode_alike(records: Sequence[Any], kind: type[Held | Done]) -> list[bytes] | None:
    """Encode records that differ in token and revision only, column by column.

    These two stand at the same place in all records, and what is around them is that of the first.

    Returns:
        None if they differ in more.
    """
    columns = dict(zip(kind._fields, zip(*records), strict=True))  # noqa: B905 - all are of a kind
    tokens, revisions = columns.pop("token"), columns.pop("revision")
    columns.pop("deadline_ns", None)
    count = len(records)
    if any(column.count(column[0]) != count for column in columns.values()):
        return None
    raw = codec.encode(records[0])
    first, last = raw[: codec.NUMBERS_AT.start], raw[codec.NUMBERS_AT.stop : -codec.CRC.size]
    layout = struct.Struct(f">{len(first)}sQQ{len(last)}s")
    bodies = list(
        map(layout.pack, itertools.repeat(first), tokens, revisions, itertools.repeat(last))
    )
    return list(map(operator.add, bodies, map(codec.CRC.pack, map(zlib.crc32, bodies))))
