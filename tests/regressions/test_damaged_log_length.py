"""A flipped bit in a length near the end of a log dropped acknowledged changes silently."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from distlock_server.engines import open_engine
from distlock_server.engines.base import EngineError, Meta, Swap
from distlock_server.engines.log_ends import BLOCK_BYTES, damaged_end, record_places

N_KEYS = 300


@pytest.fixture(params=["leveldb", "rocksdb"])
def kind(request: pytest.FixtureRequest) -> str:
    """Give each engine in turn."""
    pytest.importorskip({"leveldb": "plyvel", "rocksdb": "rocksdict"}[request.param])
    return str(request.param)


@pytest.fixture
def killed(kind: str, tmp_path: Path) -> Path:
    """Give a database as a killed server leaves it: 300 keys, some of them only in the log."""
    engine = open_engine(kind, tmp_path / "live", 8)
    rng = random.Random(1)
    for number in range(N_KEYS):
        swap = Swap.one(b"%03d" % number, None, rng.randbytes(rng.randint(1, 300)))
        engine.commit([swap], Meta())
    shutil.copytree(tmp_path / "live", tmp_path / "killed")
    engine.close()
    return tmp_path / "killed"


def _last_block(file: Path) -> tuple[int, bytes]:
    content = file.read_bytes()
    start = len(content) // BLOCK_BYTES * BLOCK_BYTES
    return start, content[start:]


@pytest.mark.parametrize("pattern", ["*.log", "MANIFEST-*"])
def test_damaged_length_is_an_error(kind: str, killed: Path, tmp_path: Path, pattern: str) -> None:
    """Whichever bit of the lengths of the last records flips, the database does not open."""
    (file,) = killed.glob(pattern)
    start, block = _last_block(file)
    for place, _ in list(record_places(block))[-4:]:
        for bit in range(16):
            damaged = tmp_path / "damaged"
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(killed, damaged)
            content = bytearray(file.read_bytes())
            content[start + place + 4 + bit // 8] ^= 1 << bit % 8
            (damaged / file.name).write_bytes(content)
            with pytest.raises(EngineError):
                open_engine(kind, damaged, 8)


def test_record_cut_short_is_no_damage(kind: str, killed: Path) -> None:
    """Wherever the log ends, it is taken for a crash, and what came before is there."""
    (log,) = killed.glob("*.log")
    start, block = _last_block(log)
    place, length = list(record_places(block))[-1]
    for cut in range(1, 7 + length + 1, 7):
        log.write_bytes(log.read_bytes()[: start + place + 7 + length - cut])
        assert damaged_end(log) is None
    engine = open_engine(kind, killed, 8)
    assert len(engine.scan(b"", b"", 2 * N_KEYS)) == N_KEYS - 1
    engine.close()
