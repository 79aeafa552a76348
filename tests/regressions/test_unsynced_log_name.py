"""LevelDB synced a new log file but not its name: a power cut could take acknowledged changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from distlock_server import blobs, folders
from distlock_server.blobs import BlobStore
from distlock_server.engines import open_engine
from distlock_server.engines.base import Meta, Swap

VALUE = bytes(300_000)


def test_names_of_log_files_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a commit returns, the folder was synced with the log that it went into."""
    pytest.importorskip("plyvel")
    folder = tmp_path / "db"
    synced: dict[Path, set[str]] = {}
    real = folders.sync_folder

    def record(synced_folder: Path) -> None:
        names = {file.name for file in synced_folder.iterdir()}
        real(synced_folder)
        synced[synced_folder] = names

    monkeypatch.setattr(folders, "sync_folder", record)
    engine = open_engine("leveldb", folder, 8)
    logs = set()
    for number in range(60):
        engine.commit([Swap.one(b"%d" % number, None, VALUE)], Meta())
        newest = max(folder.glob("*.log")).name
        assert newest in synced[folder]
        logs.add(newest)
    engine.close()
    assert len(logs) > 2, "the log was never changed: the test shows nothing"
    assert "db" in synced[tmp_path]


def test_folders_of_values_that_are_there_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of values that a killed server made, perhaps unsynced, is synced once more."""
    value, digest = (
        b"",
        bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    )
    BlobStore(tmp_path / "values").write_chunk(b"key", 1, 0, value, 0, digest)
    synced: list[Path] = []
    monkeypatch.setattr(blobs, "sync_folder", synced.append)
    (blob,) = (tmp_path / "values").rglob("*.blob")
    blob.unlink()
    BlobStore(tmp_path / "values").write_chunk(b"key", 1, 0, value, 0, digest)
    assert tmp_path / "values" in synced
