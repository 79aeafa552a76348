"""Requests of the largest size: each of them as long, or as much work, as the server allows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from google.protobuf.duration_pb2 import Duration

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_server.limits import MAX_KEYS_PER_REQUEST, MAX_MESSAGE_BYTES
from tests.hostile.methods import LEGACY, LOCK_TABLE, Method

N_KEYS: Final = MAX_KEYS_PER_REQUEST
KEY_BYTES: Final = 1_024

Request = tuple[Method, bytes]
_BY_NAME: Final = {method.name: method for method in (*LOCK_TABLE, *LEGACY)}


def long_keys(rng: random.Random) -> list[bytes]:
    """Give as many keys as a request may have, as long as they may be; of ten kinds."""
    stem = b"large-%d-" % rng.randrange(10)
    return [stem + b"%0*d" % (KEY_BYTES - len(stem), number) for number in range(N_KEYS)]


def _holders(rng: random.Random) -> list[pb.Holder]:
    return [pb.Holder(key=key, claim_id=b"i" * 16, token=7) for key in long_keys(rng)]


def claim(rng: random.Random) -> Request:
    """Claim them, for so short that the next finds them expired."""
    request = pb.ClaimRequest(keys=long_keys(rng), claim_id=rng.randbytes(16), ttl_ns=1)
    return _BY_NAME["Claim"], request.SerializeToString()


def renew(rng: random.Random) -> Request:
    """Renew them all, which are not held."""
    renewals = [pb.Renewal(holder=holder, ttl_ns=10**9) for holder in _holders(rng)]
    return _BY_NAME["Renew"], pb.RenewRequest(renewals=renewals).SerializeToString()


def settle(rng: random.Random) -> Request:
    """Fail them all, with what fits of texts."""
    fail = pb.Fail(error="e" * 500)
    settlements = [pb.Settlement(holder=holder, fail=fail) for holder in _holders(rng)]
    return _BY_NAME["Settle"], pb.SettleRequest(settlements=settlements).SerializeToString()


def lookup(rng: random.Random) -> Request:
    """Read them all with all that is known."""
    request = pb.LookupRequest(keys=long_keys(rng), want_infos=True, want_results=True)
    return _BY_NAME["Lookup"], request.SerializeToString()


def page(rng: random.Random) -> Request:
    """Read the longest page."""
    return _BY_NAME["List"], pb.ListRequest(want_results=True).SerializeToString()


def count(rng: random.Random) -> Request:
    """Count all that may be counted by reading it."""
    return _BY_NAME["Count"], pb.CountRequest(prefix=b"large").SerializeToString()


def list_locks(rng: random.Random) -> Request:
    """List with as many patterns as may be, none of which matches."""
    patterns = [
        legacy_pb2.LockMatchExpression(global_id_regex=f"(a|large-)*[0-9]+x{number:03}.*")
        for number in range(1_000)
    ]
    request = legacy_pb2.ListLocksRequest(includes=patterns)
    return _BY_NAME["ListLocks"], request.SerializeToString()


def _acquire(key: str, data: bytes = b"") -> legacy_pb2.AcquireLockRequest:
    lock = legacy_pb2.Lock(global_id=key, expires_in=Duration(nanos=1), data=data)
    return legacy_pb2.AcquireLockRequest(lock=lock)


def acquire_many(rng: random.Random) -> Request:
    """Acquire as many locks as fit into a message."""
    requests = [_acquire(f"many-{number}-{'x' * 60}") for number in range(100_000)]
    message = legacy_pb2.AcquireManyRequest(requests=requests)
    return _BY_NAME["AcquireMany"], message.SerializeToString()


def batch(rng: random.Random) -> Request:
    """Acquire as many as one transaction may, with data."""
    any_requests = [
        legacy_pb2.AnyRequest(acquire_lock_request=_acquire(f"batch-{number}", b"d" * 1_000))
        for number in range(N_KEYS)
    ]
    message = legacy_pb2.ProcessBatchRequest(requests=any_requests, is_synchronized=True)
    return _BY_NAME["ProcessBatch"], message.SerializeToString()


def many_parts(rng: random.Random) -> Request:
    """Send as many items as there is room for; two bytes are enough for one."""
    method = _BY_NAME[rng.choice(("Renew", "Settle", "Invalidate", "ProcessBatch", "AcquireMany"))]
    return method, b"\x0a\x00" * (MAX_MESSAGE_BYTES // 2 - 1_000)


def one_key(rng: random.Random) -> Request:
    """Send one key that takes all the room."""
    return _BY_NAME["Claim"], pb.ClaimRequest(keys=[bytes(16_000_000)]).SerializeToString()


def OVERSIZE(rng: random.Random) -> Request:  # noqa: N802 - stands beside LARGEST
    """Send more than gRPC takes."""
    return _BY_NAME["Claim"], bytes(MAX_MESSAGE_BYTES + 1_000)


LARGEST: Final[tuple[Callable[[random.Random], Request], ...]] = (
    claim,
    renew,
    settle,
    lookup,
    page,
    count,
    list_locks,
    acquire_many,
    batch,
    many_parts,
    one_key,
)
