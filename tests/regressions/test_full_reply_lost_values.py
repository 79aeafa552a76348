"""Values in records that a reply had no room for were taken for lost, and computed again."""

from __future__ import annotations

from pathlib import Path

import joblib
import pytest

import run_once
from run_once.channel import GrpcTransport
from run_once.client import LockClient, Settlement
from run_once.results import ResultStore
from run_once.secret import Secret
from tests.servers import ServerProcess

COUNT = 400
VALUE_BYTES = 40_000


def large(number: int, folder: Path) -> bytes:
    """Note a run; return what fits into a record, while all together fit into no reply."""
    with (folder / "runs").open("a") as runs:
        runs.write(f"{number}\n")
    return number.to_bytes(4, "big") * (VALUE_BYTES // 4)


def test_they_are_asked_for_again(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rerun finds all of them, and computes nothing."""
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)
    # Compressed they would fit.
    monkeypatch.setattr("run_once.result_frames.MIN_COMPRESSED_BYTES", 1 << 30)
    calls = [joblib.delayed(large)(number, tmp_path) for number in range(COUNT)]
    with joblib.parallel_config("run_once", inner="threading", n_jobs=2):
        first = joblib.Parallel(batch_size=COUNT)(calls)
        assert joblib.Parallel(batch_size=COUNT)(calls) == first
    report = run_once.last_report()
    assert report is not None
    assert report.hits == COUNT
    assert len((tmp_path / "runs").read_text().splitlines()) == COUNT


def test_they_can_be_downloaded(server: ServerProcess) -> None:
    """Also in pieces, and by nobody who names another completion."""
    client = LockClient(GrpcTransport(server.address))
    store = ResultStore(client, secret=Secret(b"s" * 32))
    (grant,) = client.claim([b"k"], ttl_s=60).grants
    result = store.store(grant, "value")
    client.settle([Settlement(grant, "complete", result)])
    assert result.payload
    without_payload = type(result)(storage=result.storage, size_bytes=result.size_bytes)
    assert store.load(b"k", grant.token, without_payload).value == "value"
    with pytest.raises(run_once.ResultMissingError):
        client.download_result(b"k", grant.token + 1, result.size_bytes)
    client.close()
