"""Calls of `distlock.v1.LockTable` in the short forms that tests need."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
import pytest

from distlock_proto import lock_table_pb2 as pb
from tests.servers import InprocServer

TTL_NS: Final = 60 * 10**9
Call = Callable[[], Any]


def states_of(reply: Any) -> list[str]:
    """Give the names of a reply's states."""
    return [pb.KeyState.Name(state).removeprefix("KEY_STATE_") for state in reply.states]


def claim(server: InprocServer, keys: Sequence[bytes], claim_id: bytes = b"", **more: Any) -> Any:
    """Claim keys with a new claim id unless one is given."""
    request = pb.ClaimRequest(
        keys=keys, claim_id=claim_id or os.urandom(16), ttl_ns=more.pop("ttl_ns", TTL_NS), **more
    )
    return server.table.Claim(request)


def hold(server: InprocServer, key: bytes, **more: Any) -> pb.Holder:
    """Claim one key and give its holder."""
    claim_id = os.urandom(16)
    reply = claim(server, [key], claim_id, **more)
    assert states_of(reply) == ["GRANTED"]
    return pb.Holder(key=key, claim_id=claim_id, token=reply.tokens[0])


def settle(server: InprocServer, holder: pb.Holder, **how: Any) -> Any:
    """Settle one lease."""
    return server.table.Settle(pb.SettleRequest(settlements=[pb.Settlement(holder=holder, **how)]))


def renew(server: InprocServer, holder: pb.Holder, **more: Any) -> Any:
    """Renew one lease."""
    more.setdefault("ttl_ns", TTL_NS)
    return server.table.Renew(pb.RenewRequest(renewals=[pb.Renewal(holder=holder, **more)]))


def lookup(server: InprocServer, *keys: bytes, **more: Any) -> Any:
    """Look keys up."""
    return server.table.Lookup(pb.LookupRequest(keys=keys, **more))


def refused(call: Call, code: grpc.StatusCode, *words: str) -> None:
    """Check that a call is refused with a status and a sentence that has all these words."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert error.code() is code, error.details()
    for word in words:
        assert word in error.details()


def upload_request(holder: pb.Holder, value: bytes, offset: int = 0, end: int | None = None) -> Any:
    """Make the request for one chunk of a value."""
    return pb.UploadResultRequest(
        holder=holder,
        offset_bytes=offset,
        chunk=value[offset:end],
        size_bytes=len(value),
        sha256=hashlib.sha256(value).digest(),
    )


def stored(value: bytes) -> pb.Complete:
    """Make a completion that names an uploaded value."""
    return pb.Complete(
        result=pb.Result(
            storage=pb.Result.STORAGE_SERVER,
            size_bytes=len(value),
            sha256=hashlib.sha256(value).digest(),
        )
    )
