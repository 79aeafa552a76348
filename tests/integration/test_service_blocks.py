"""Completions in their short form, and blocks of keys that are known to be done."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_server import limits
from run_once.todo import Chunk
from tests.servers import InprocServer
from tests.service_calls import TTL_NS, claim, lookup, refused, states_of

KEYS = [b"k%03d" % number for number in range(200)]
DIGEST = Chunk(KEYS, KEYS).digest
"""As the client makes it."""


def complete(server: InprocServer, keys: list[bytes]) -> Any:
    """Claim keys and complete them in the short form."""
    claim_id = os.urandom(16)
    granted = claim(server, keys, claim_id)
    assert set(states_of(granted)) == {"GRANTED"}
    part = pb.Completions(claim_id=claim_id, keys=keys, tokens=granted.tokens)
    return server.table.Settle(pb.SettleRequest(completions=[part]))


def known(server: InprocServer, digest: bytes = DIGEST) -> bool:
    """Ask for a block."""
    (answer,) = server.table.Lookup(pb.LookupRequest(blocks=[digest])).blocks
    return bool(answer)


def test_completions(inproc_server: InprocServer) -> None:
    """Keys of one claim are completed together; each is answered behind the settlements."""
    ours, theirs = os.urandom(16), os.urandom(16)
    granted = claim(inproc_server, [b"a", b"b", b"c"], ours)
    other = claim(inproc_server, [b"d"], theirs)
    holder = pb.Holder(key=b"c", claim_id=ours, token=granted.tokens[2])
    request = pb.SettleRequest(
        settlements=[pb.Settlement(holder=holder, fail=pb.Fail(error="no"))],
        completions=[
            pb.Completions(claim_id=ours, keys=[b"a", b"b"], tokens=granted.tokens[:2]),
            pb.Completions(claim_id=ours, keys=[b"d"], tokens=other.tokens),
        ],
    )
    reply = inproc_server.table.Settle(request)
    assert states_of(reply) == ["FAILED", "COMPLETED", "COMPLETED", "LOST"]
    assert list(reply.lost_states) == [pb.KEY_STATE_BUSY]
    again = inproc_server.table.Settle(request)
    assert states_of(again) == states_of(reply)
    assert again.revision == reply.revision
    assert states_of(lookup(inproc_server, b"a", b"b", b"c", b"d")) == [
        "DONE",
        "DONE",
        "FAILED",
        "BUSY",
    ]


@pytest.mark.parametrize(
    ("part", "word"),
    [
        (pb.Completions(claim_id=b"short", keys=[b"a"], tokens=[1]), "claim_id"),
        (pb.Completions(claim_id=b"i" * 16, keys=[b"a"], tokens=[1, 2]), "2 tokens for 1 keys"),
        (pb.Completions(claim_id=b"i" * 16, keys=[b"a", b"a"], tokens=[1, 2]), "twice"),
        (pb.Completions(claim_id=b"i" * 16, keys=[b"\xff"], tokens=[1]), "UTF-8"),
        (pb.Completions(claim_id=b"i" * 16, keys=[b""], tokens=[1]), "0 bytes"),
    ],
)
def test_bad_completions(inproc_server: InprocServer, part: pb.Completions, word: str) -> None:
    """Completions that do not fit together are refused, and nothing is changed."""
    refused(
        lambda: inproc_server.table.Settle(pb.SettleRequest(completions=[part])),
        grpc.StatusCode.INVALID_ARGUMENT,
        word,
    )


def test_too_many_completions(inproc_server: InprocServer) -> None:
    """The limit on keys counts both forms together."""
    keys = [b"%d" % number for number in range(limits.MAX_KEYS_PER_REQUEST + 1)]
    part = pb.Completions(claim_id=b"i" * 16, keys=keys, tokens=range(len(keys)))
    refused(
        lambda: inproc_server.table.Settle(pb.SettleRequest(completions=[part])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "completions",
    )


@pytest.mark.parametrize("blocks", [[b"short"], [b"d" * 16] * (limits.MAX_BLOCKS_PER_REQUEST + 1)])
def test_bad_blocks(inproc_server: InprocServer, blocks: list[bytes]) -> None:
    """Digests of another length, or too many of them, are refused."""
    refused(
        lambda: inproc_server.table.Lookup(pb.LookupRequest(blocks=blocks)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "blocks",
    )


@pytest.mark.parametrize("ask", [claim, lambda server, keys: lookup(server, *keys)])
def test_a_done_block_is_known(inproc_server: InprocServer, ask: Callable[..., Any]) -> None:
    """A block is known once a claim or lookup of just these keys found all of them done."""
    complete(inproc_server, KEYS[:-1])
    ask(inproc_server, KEYS[:-1])
    assert not known(inproc_server)
    assert states_of(lookup(inproc_server, *KEYS))[-1] == "ABSENT"
    assert not known(inproc_server)
    complete(inproc_server, KEYS[-1:])
    assert not known(inproc_server)
    assert set(states_of(ask(inproc_server, KEYS))) == {"DONE"}
    assert known(inproc_server)
    assert not known(inproc_server, b"?" * 16)


def reset(server: InprocServer) -> None:
    """Reset a key."""
    revision = lookup(server, KEYS[7]).revision
    server.table.Reset(pb.ResetRequest(keys=[KEYS[7]], max_revision=revision))


def invalidate(server: InprocServer) -> None:
    """Drop a done key's result."""
    (info,) = lookup(server, KEYS[7], want_infos=True).infos
    item = pb.Invalidation(key=KEYS[7], token=info.token)
    server.table.Invalidate(pb.InvalidateRequest(invalidations=[item]))


def release_2021(server: InprocServer) -> None:
    """Release a lock as a client of 2021 does."""
    lock = legacy_pb2.Lock(global_id=KEYS[7].decode())
    server.legacy.ReleaseLock(legacy_pb2.ReleaseLockRequest(lock=lock))


def seize_2021(server: InprocServer) -> None:
    """Take a lock whatever its state, as a client of 2021 does."""
    lock = legacy_pb2.Lock(global_id=KEYS[7].decode())
    lock.expires_in.seconds = 60
    server.legacy.AcquireLock(legacy_pb2.AcquireLockRequest(lock=lock, overwrite=True))


@pytest.mark.parametrize("undo", [reset, invalidate, release_2021, seize_2021])
def test_undoing_anything_forgets_the_block(
    inproc_server: InprocServer, undo: Callable[[InprocServer], None]
) -> None:
    """From the moment in which something done was undone, no block counts as done."""
    complete(inproc_server, KEYS)
    lookup(inproc_server, *KEYS)
    assert known(inproc_server)
    undo(inproc_server)
    assert not known(inproc_server)
    assert set(states_of(lookup(inproc_server, *KEYS))) != {"DONE"}
    assert not known(inproc_server)


def test_an_undoing_in_the_same_group(inproc_server: InprocServer) -> None:
    """A block that is found done just before a reset, in one write with it, is not known after."""
    complete(inproc_server, KEYS)
    table = inproc_server.server.table
    assert table is not None

    def found_then_reset(txn: Any) -> None:
        assert txn.are_plainly_done(KEYS)
        txn.note_done(KEYS)
        from distlock_server.state import Reset

        txn.apply(KEYS[7], Reset(10**9))
        assert not txn.are_plainly_done(KEYS)

    done: list[Any] = []
    table.submit(KEYS, found_then_reset, done.append)
    assert states_of(lookup(inproc_server, KEYS[7])) == ["ABSENT"]
    assert done
    assert not known(inproc_server)


def test_values_are_given_with_done_keys(inproc_server: InprocServer) -> None:
    """Who wants results gets one for each done key, those without a value included."""
    complete(inproc_server, KEYS)
    reply = claim(inproc_server, KEYS, want_results=True)
    assert len(reply.results) == len(KEYS)
    assert all(result.token for result in reply.results)
    assert len({result.token for result in reply.results}) == len(KEYS)
    held = claim(inproc_server, [*KEYS, b"free"])
    assert states_of(held)[-1] == "GRANTED"
    assert TTL_NS >= held.remaining_ns[0] > 0
