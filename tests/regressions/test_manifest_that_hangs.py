"""A flipped bit in a manifest kept RocksDB from ever coming back from opening the database."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distlock_server.engines import open_engine
from distlock_server.engines.base import Meta, Swap
from distlock_server.engines.log_ends import record_places

OPEN = """
import sys
from pathlib import Path
from distlock_server.engines import open_engine
from distlock_server.engines.base import EngineError
try:
    open_engine(sys.argv[1], Path(sys.argv[2]), 8)
except EngineError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize("kind", ["leveldb", "rocksdb"])
@pytest.mark.parametrize("record", [0, -1])
def test_recycled_type(kind: str, record: int, tmp_path: Path) -> None:
    """A record of a kind that no manifest has is an error, at once."""
    pytest.importorskip({"leveldb": "plyvel", "rocksdb": "rocksdict"}[kind])
    folder = tmp_path / "db"
    engine = open_engine(kind, folder, 8)
    engine.commit([Swap.one(b"key", None, b"value")], Meta())
    engine.close()
    (manifest,) = folder.glob("MANIFEST-*")
    content = bytearray(manifest.read_bytes())
    place, _ = list(record_places(bytes(content)))[record]
    content[place + 6] ^= 4
    manifest.write_bytes(content)
    command = [sys.executable, "-c", OPEN, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "refused: " in done.stderr
    assert manifest.name in done.stderr
    assert "restore a backup" in done.stderr
