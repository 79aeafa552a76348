"""The version of the installed package."""

from __future__ import annotations

import functools
import importlib.metadata


@functools.cache
def version() -> str:
    """Give the version of run-once, or "unknown" in a tree that is not installed."""
    try:
        return importlib.metadata.version("run-once")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
