"""The engines that the contract suites run on, and small helpers for both."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from distlock_server.engines.base import Engine, Meta, Swap

CACHE_MB = 8
NO_META = Meta()
LIBRARIES = {"leveldb": "plyvel", "rocksdb": "rocksdict"}


def kind_param(kind: str) -> Any:
    """Give a test parameter that is skipped where the engine's library is missing."""
    library = LIBRARIES.get(kind)
    missing = library is not None and importlib.util.find_spec(library) is None
    return pytest.param(kind, marks=pytest.mark.skipif(missing, reason=f"{library} is missing"))


ALL_KINDS = [kind_param(kind) for kind in ("memory", "leveldb", "rocksdb")]
DISK_KINDS = [kind_param(kind) for kind in ("leveldb", "rocksdb")]


def put(key: bytes, value: bytes | None, expected: bytes | None = None) -> Swap:
    """Give a swap without index entries or counters."""
    return Swap.one(key, expected, value)


def read_one(engine: Engine, key: bytes) -> bytes | None:
    """Read one entry."""
    return engine.read([key])[0][0]
