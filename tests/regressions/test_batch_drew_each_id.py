"""A batch of 2021 drew a claim id for each step, and let the committer go first each time."""

from __future__ import annotations

import os

import pytest

from distlock_proto import legacy_pb2 as pb
from distlock_server import legacy_batch


def test_ids_are_drawn_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand steps draw some ten times, and have an id each."""
    draws: list[int] = []
    draw = os.urandom

    def counted(n_bytes: int) -> bytes:
        draws.append(n_bytes)
        return draw(n_bytes)

    monkeypatch.setattr(os, "urandom", counted)
    request = pb.AcquireLockRequest(lock=pb.Lock(global_id="k"))
    request.lock.expires_in.seconds = 1
    ids = {legacy_batch.parse_acquires([request])[0].claim_id for _ in range(10_000)}
    assert len(ids) == 10_000
    assert len(draws) <= 11
