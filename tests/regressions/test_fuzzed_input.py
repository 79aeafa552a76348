"""What fuzzing found: errors that were not the documented ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server.snapshot import SnapshotError, snapshot
from run_once import answers, result_frames
from run_once.errors import ResultError, ServerError
from run_once.options import CHECKS, BadValueError


@pytest.mark.parametrize("content", [b"MANIFEST-\xbb\n", b"MANIFEST-\x00", b"../x", b""])
def test_a_damaged_current(content: bytes, tmp_path: Path) -> None:
    """A database whose CURRENT is damaged cannot be copied, and is said to be damaged."""
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "CURRENT").write_bytes(content)
    with pytest.raises(SnapshotError, match="damaged"), snapshot(tmp_path / "db"):
        pass


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "~\0"])
def test_a_home_that_is_not_there(path: str) -> None:
    """The home folder of an unknown user is a value that cannot be used."""
    with pytest.raises(BadValueError, match="home folder"):
        CHECKS["data_dir"](path)


def test_a_url_that_is_none() -> None:
    """A URL that cannot be parsed is a value that cannot be used."""
    with pytest.raises(BadValueError, match="URL"):
        CHECKS["results"]("file://[x")


def test_states_that_do_not_fit() -> None:
    """A reply with too few states is malformed, whoever reads it."""
    with pytest.raises(ServerError, match="malformed"):
        answers.read_results([b"a", b"b"], pb.LookupReply(states=b"\x07", results=[pb.Result()]))


def test_a_size_that_cannot_be() -> None:
    """No memory is made ready for more than compressed bytes can hold."""
    frame = bytes(result_frames.dump("x" * 10_000, key=b"k", token=1, secret=b"s" * 16))
    body = frame[result_frames.HEADER_BYTES :]
    digest = hashlib.sha256(body).digest()
    fields = (result_frames.CODEC_ZLIB, 0, 2**40, 0.0, b"", digest)
    head = result_frames._signed_head(*fields, key=b"k", token=1, secret=b"s" * 16)
    with pytest.raises(ResultError, match="cannot be"):
        result_frames.load(head + body, key=b"k", token=1, secret=b"s" * 16)
