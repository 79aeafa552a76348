"""Large values in chunks, over a caller whose answers the test writes."""

from __future__ import annotations

from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once.buffers import Parts
from run_once.client import Grant
from run_once.errors import ResultDamagedError
from run_once.transfers import download_result, upload_result

DATA = bytes(range(200))


class FakeCaller:
    """Keeps what is sent, and answers downloads with chunks of `chunk_bytes`."""

    def __init__(self, chunk_bytes: int = 64) -> None:
        self.received = bytearray()
        self.chunk_bytes = chunk_bytes

    def call(self, method: str, request: Any, reply_type: Any, **options: Any) -> tuple[Any, int]:
        """Answer."""
        start = request.offset_bytes
        if method == "UploadResult":
            assert len(self.received) == start
            self.received += request.chunk
            return pb.UploadResultReply(received_bytes=len(self.received)), 0
        chunk = DATA[start : start + self.chunk_bytes]
        return pb.DownloadResultReply(chunk=chunk, size_bytes=len(DATA)), 0


def test_parts_are_sent_as_their_sum() -> None:
    """Chunks do not end where a part ends, and the checksum is that of the whole."""
    caller: Any = FakeCaller()
    grant = Grant(key=b"k", claim_id=b"c" * 16, token=1, attempt=1, expires_ns=0)
    limits = pb.GetServerInfoReply(max_result_bytes=1000, max_chunk_bytes=64)
    parts = Parts([DATA[:10], memoryview(DATA)[10:150], b"", DATA[150:]])
    result = upload_result(caller, grant, parts, limits)
    assert result == upload_result(FakeCaller(), grant, DATA, limits)  # type: ignore[arg-type]
    assert caller.received == DATA


def test_a_value_comes_into_memory_of_its_own() -> None:
    """It may be written to."""
    caller: Any = FakeCaller()
    data = download_result(caller, b"k", 1, len(DATA))
    assert bytes(data) == DATA
    data[0] = 7


@pytest.mark.parametrize("chunk_bytes", [0, 199])
def test_another_length_is_damage(chunk_bytes: int) -> None:
    """Nothing comes, or more than was announced."""
    caller: Any = FakeCaller(chunk_bytes)
    if chunk_bytes:
        caller.call = lambda *_, **__: (pb.DownloadResultReply(chunk=DATA, size_bytes=199), 0)
    with pytest.raises(ResultDamagedError):
        download_result(caller, b"k", 1, 199 if chunk_bytes else len(DATA))
