"""Records as the server of 2021 wrote them: serialized `Lock` messages, without a checksum."""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from distlock_proto.legacy_pb2 import Lock
from distlock_server.state import NO_CLAIM_ID, Done, Held

FIRST_BYTE: Final = 0x0A
"""First byte of a serialized `Lock`: the tag of its global_id, which is never empty."""

MAX_STORED_NS: Final = 2**62
"""Durations and wall times are cut off here, at some 146 years: ours have 64 bits."""

_NS_PER_S: Final = 10**9


def parse(raw: bytes) -> Lock:
    """Parse a record.

    Raises:
        ValueError: The bytes are no `Lock`.
    """
    lock = Lock()
    try:
        lock.ParseFromString(raw)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    # No checksum tells of damage: what a serializer would not have written is taken for it.
    lock.DiscardUnknownFields()
    if lock.ByteSize() != len(raw):
        raise ValueError("it has fields that a Lock has not, or has one twice")
    return lock


def expires_in_ns(lock: Lock) -> int:
    """Give for how long the lock was asked; 0: for ever, which is done."""
    return lock.expires_in.seconds * _NS_PER_S + lock.expires_in.nanos


def to_record(lock: Lock, now_ns: int, wall_ns: int) -> Held | Done:
    """Judge a lock once, by wall time, when the database is opened.

    Args:
        lock: The lock as it was stored.
        now_ns: The server's monotonic time at the opening.
        wall_ns: Wall time at the opening.

    Returns:
        The record; its token and revision are 0, and it belongs to no claim id.
    """
    asked_ns = expires_in_ns(lock)
    acquired_ns = lock.acquired_since.seconds * _NS_PER_S + lock.acquired_since.nanos
    since_wall_ns = min(max(acquired_ns, 0), MAX_STORED_NS)
    if asked_ns == 0:
        return Done(0, lock.last_owner_name, since_wall_ns, data=lock.data)
    ttl_ns = min(max(asked_ns, 0), MAX_STORED_NS)
    # A wall clock that was set back since does not make a lease longer than it was asked for.
    remaining_ns = min(max(acquired_ns + asked_ns - wall_ns, 0), ttl_ns)
    return Held(
        claim_id=NO_CLAIM_ID,
        token=0,
        deadline_ns=now_ns + remaining_ns,
        ttl_ns=ttl_ns,
        owner=lock.last_owner_name,
        since_wall_ns=since_wall_ns,
        data=lock.data,
    )
