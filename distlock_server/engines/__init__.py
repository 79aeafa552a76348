"""Storage engines; `base.py` says what an engine is, `open_engine` opens one by name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Final

from distlock_server.engines.base import (
    Engine,
    EngineError,
    EngineKindError,
    EngineLockedError,
)
from distlock_server.engines.keyvalue import reason
from distlock_server.engines.memory import MemoryEngine
from distlock_server.folders import make_folder

__all__ = ["ENGINE_KINDS", "default_kind", "kind_in", "open_engine"]

ENGINE_KINDS: Final = ("leveldb", "rocksdb", "memory")
"""Names that `open_engine` knows."""

_NAMES: Final = {"leveldb": "LevelDB", "rocksdb": "RocksDB"}

_ROCKSDB_FILES: Final = ("IDENTITY", "OPTIONS-*", "rocksdict-config.json")
"""Files that RocksDB makes and LevelDB does not; the others have the same names in both."""

_LOCK_SIGNS: Final = (
    "Resource temporarily unavailable",
    "already held by process",
    "lock hold by current process",
)
"""How LevelDB and RocksDB say that somebody has the database open."""


def default_kind() -> str:
    """Give the engine for new databases: LevelDB, or RocksDB where plyvel is not installed."""
    return "leveldb" if importlib.util.find_spec("plyvel") else "rocksdb"


def kind_in(folder: Path) -> str | None:
    """Tell which kind of database is in a folder; None: no database, or none that is known."""
    try:
        if any(next(folder.glob(pattern), None) for pattern in _ROCKSDB_FILES):
            return "rocksdb"
        return "leveldb" if (folder / "CURRENT").exists() else None
    except OSError:
        return None  # `open_engine` says in words why the folder cannot be used


def open_engine(kind: str, path: str | os.PathLike[str], cache_mb: int) -> Engine:
    """Open a database, or make one.

    Args:
        kind: One of `ENGINE_KINDS`.
        path: The database's folder, made if it is missing; "memory" does not look at it.
        cache_mb: Memory for the engine's cache, in MiB, above 0.

    Returns:
        The engine.

    Raises:
        EngineLockedError: Another process has the database open.
        EngineKindError: The folder holds a database of another kind.
        EngineError: The folder or the database cannot be used.
    """
    if kind not in ENGINE_KINDS:
        raise EngineError(f"no engine is called {kind!r}: choose one of {', '.join(ENGINE_KINDS)}")
    if kind == "memory":
        return MemoryEngine()
    if cache_mb < 1:
        raise EngineError(f"a cache of {cache_mb} MB is too small: give 1 or more")
    folder = Path(path)
    _prepare_folder(folder)
    found = kind_in(folder)
    if found not in (None, kind):
        raise EngineKindError(
            f"{folder} holds a {_NAMES[found]} database, not {_NAMES[kind]}: "
            f"open it as {found}, or choose another folder"
        )
    try:
        return _open_embedded(kind, folder, cache_mb)
    except ImportError as error:
        raise EngineError(_missing_library(kind, error)) from error
    except Exception as error:
        text = reason(error)
        if any(sign in text for sign in _LOCK_SIGNS):
            raise EngineLockedError(
                f"the database in {folder} is in use by another process: "
                "stop that server, or choose another folder"
            ) from error
        raise EngineError(f"cannot open the {_NAMES[kind]} database in {folder}: {text}") from error


def _open_embedded(kind: str, folder: Path, cache_mb: int) -> Engine:
    # Imported when asked for: neither library is installed everywhere.
    if kind == "leveldb":
        from distlock_server.engines.leveldb import LevelDBEngine  # noqa: PLC0415

        return LevelDBEngine(folder, cache_mb)
    from distlock_server.engines.rocksdb import RocksDBEngine  # noqa: PLC0415

    return RocksDBEngine(folder, cache_mb)


def _prepare_folder(folder: Path) -> None:
    try:
        make_folder(folder)
    except FileExistsError as error:
        raise EngineError(f"{folder} is a file: a database needs a folder") from error
    except OSError as error:
        raise EngineError(
            f"cannot make the folder {folder} ({error.strerror}): choose another folder"
        ) from error
    needed = os.R_OK | os.W_OK | os.X_OK
    if not os.access(folder, needed, effective_ids=os.access in os.supports_effective_ids):
        raise EngineError(
            f"the folder {folder} cannot be written to: "
            "change its permissions, or choose another folder"
        )


def _missing_library(kind: str, error: ImportError) -> str:
    if kind == "leveldb":
        return (
            f"LevelDB needs plyvel ({error}), which has no wheel for Python 3.13 and newer: "
            "use the rocksdb engine there"
        )
    return f"RocksDB needs rocksdict ({error}): pip install 'run-once[rocksdb]'"
