"""Answers about blocks rest on the revision that their reply names.

The reply took its blocks from before a reset and its revision from after it: one that came between
the two reads, or, where keys were asked for as well, between the request and its turn.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server.done_blocks import block_digest
from distlock_server.state import Reset
from distlock_server.table import Table
from tests.servers import InprocServer
from tests.service_calls import claim, lookup, states_of

KEYS = [b"k%03d" % number for number in range(200)]
DIGEST = block_digest(KEYS)


@pytest.fixture
def table(inproc_server: InprocServer) -> Table:
    """Give the table of a server that knows a block to be done."""
    claim_id = os.urandom(16)
    granted = claim(inproc_server, KEYS, claim_id)
    part = pb.Completions(claim_id=claim_id, keys=KEYS, tokens=granted.tokens)
    inproc_server.table.Settle(pb.SettleRequest(completions=[part]))
    lookup(inproc_server, *KEYS)
    assert inproc_server.server.table is not None
    return inproc_server.server.table


def submit_reset(table: Table, told: Callable[[object], None]) -> None:
    """Queue the reset of a key, as another request does."""
    table.submit(KEYS[:1], lambda txn: txn.apply(KEYS[0], Reset(10**9)), told)


def test_a_reset_between_two_reads(
    inproc_server: InprocServer, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that counts as done is so at the reply's revision, whatever is written meanwhile."""
    known, before = table.store.done_blocks.known, table.revision
    is_written = threading.Event()
    take_over = table._take_over

    def note(*args: Any) -> Any:
        is_written.set()
        return take_over(*args)

    def known_then_reset(digests: Sequence[bytes], generation: int) -> bytes:
        answer = known(digests, generation)
        submit_reset(table, lambda _pending: None)
        assert is_written.wait(30)
        return answer

    monkeypatch.setattr(table, "_take_over", note)
    monkeypatch.setattr(table.store.done_blocks, "known", known_then_reset)
    reply = inproc_server.table.Lookup(pb.LookupRequest(blocks=[DIGEST]))
    assert reply.blocks == b"\x01"
    assert reply.revision == before
    assert table.revision > before


def test_a_reset_between_the_request_and_its_turn(
    inproc_server: InprocServer, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and keys of one request are answered as of one revision."""
    submit = table.submit

    def reset_first(*args: Any, **more: Any) -> Any:
        monkeypatch.setattr(table, "submit", submit)
        submit_reset(table, lambda _pending: None)
        return submit(*args, **more)

    monkeypatch.setattr(table, "submit", reset_first)
    reply = inproc_server.table.Lookup(pb.LookupRequest(keys=KEYS[:1], blocks=[DIGEST]))
    assert states_of(reply) == ["ABSENT"]
    assert reply.blocks == b"\x00"
