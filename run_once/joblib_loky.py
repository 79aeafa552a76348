"""How loky starts its processes, where joblib is 1.4."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


@functools.cache
def start_without_fork() -> None:
    """Have loky of joblib 1.4 start its processes as that of 1.5 does: without a fork of Python's.

    It forks, closes all files in the child, and then starts Python there. gRPC's handlers run in
    that child, too: threads of newer releases find their files closed, and abort it. joblib has no
    public way to this; where the private one is another, nothing is changed.
    """
    try:
        module: Any = importlib.import_module("joblib.externals.loky.backend.fork_exec")
    except ImportError:
        return
    if hasattr(module, "close_fds") and hasattr(os, "posix_spawn"):
        module.fork_exec = _spawn


def _spawn(cmd: list[str], keep_fds: Iterable[int], env: Mapping[str, str] | None = None) -> int:
    """Start Python with loky's arguments and the files it names; give the process's id."""
    unwanted = _open_files() - {0, 1, 2, *keep_fds}
    return os.posix_spawn(
        sys.executable,
        cmd,
        {**os.environ, **(env or {})},
        file_actions=[(os.POSIX_SPAWN_CLOSE, fd) for fd in sorted(unwanted)],
    )


def _open_files() -> set[int]:
    """Give the open files where that can be told; what Python opens is not inherited anyway."""
    try:
        return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    except OSError:
        return set()
