"""Registers our backend in every Python process that a test of joblib's starts.

joblib has no entry point for backends, and its tests' scripts do not import run_once. Nothing is
imported before joblib is: resource trackers and workers come here, too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any


def make_backend(**options: Any) -> Any:
    """Make our backend; it is imported by its first use."""
    from run_once.joblib_backend import RunOnceBackend

    return RunOnceBackend(**options)


class RegisteringLoader(SourceFileLoader):
    """Loads joblib.parallel, and adds our backend to its table."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then register."""
        super().exec_module(module)
        module.BACKENDS.setdefault("run_once", make_backend)


class Finder:
    """Finds joblib.parallel, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Give joblib.parallel's spec with our loader."""
        del path, target
        if name != "joblib.parallel":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            spec.loader = RegisteringLoader(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())
