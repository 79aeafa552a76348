"""What a power cut left, told from what was under way when it came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from distlock_server.batch import Items
from distlock_server.pending import Pending
from distlock_server.state import Done, Failed, Held, Record
from tests.simulation.history import BrokenPromiseError, Survivor


def keys_to_remove(requests: Iterable[tuple[str, Message]]) -> set[bytes]:
    """Give the keys that unanswered requests may have made absent."""
    keys: set[bytes] = set()
    for _, request in requests:
        if isinstance(request, pb.SettleRequest):
            keys |= {s.holder.key for s in request.settlements if s.WhichOneof("how") == "release"}
        elif isinstance(request, pb.ResetRequest):
            keys |= set(request.keys)
        elif isinstance(request, pb.InvalidateRequest):
            keys |= {item.key for item in request.invalidations}
    return keys


def keys_to_reset(requests: Iterable[tuple[str, Message]]) -> set[bytes]:
    """Give the keys that unanswered resets may have made absent, whoever held them."""
    resets = [request for _, request in requests if isinstance(request, pb.ResetRequest)]
    return {key for request in resets for key in request.keys}


def survivor(key: bytes, record: Record, *, may_be_gone: bool) -> Survivor:
    """Put a record into the words of the history."""
    if record is None:
        return Survivor(key, "absent", 0, b"", 0, may_be_gone)
    if isinstance(record, Done):
        return Survivor(key, "done", record.token, b"", record.revision, may_be_gone)
    kind = "free" if isinstance(record, Failed) and record.released else "failed"
    kind = "held" if isinstance(record, Held) else kind
    return Survivor(key, kind, record.token, record.claim_id, record.revision, may_be_gone)


def check_whole(
    unanswered: Iterable[Pending[Any]],
    peek: Callable[[bytes], Record],
    acknowledged: int,
    removed: set[bytes],
) -> None:
    """Check that each request that was being written is there wholly or not at all.

    Args:
        unanswered: The requests; those that were run know what they made of each key.
        peek: Reads a key from the disk.
        acknowledged: Nothing up to this revision was being written.
        removed: Keys that may have been removed by a later request of the same write.
    """
    for pending in unanswered:
        if isinstance(pending.value, Items):
            are_there = [
                _is_there(peek(key), item.record)
                for key, item in zip(pending.keys, pending.value.items, strict=True)
                if item.record is not None
                and item.record.revision > acknowledged
                and key not in removed
            ]
            if any(are_there) and not all(are_there):
                _broken(pending.keys, are_there)


def _is_there(stored: Record, made: Record) -> bool:
    return stored is not None and made is not None and stored.revision >= made.revision


def _broken(keys: Sequence[bytes], are_there: list[bool]) -> None:
    raise BrokenPromiseError("I7", f"a request on {keys} was written in part: {are_there}")
