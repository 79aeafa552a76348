"""Tells joblib of the backend "run_once": at once, or as soon as joblib is imported.

joblib takes some 150 ms to import, with numpy behind it. Loops, decorated functions and the command
do without it, so it is not imported here; where it comes later, a finder sees it come.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

BACKEND_NAME: Final = "run_once"

_WATCHED: Final = "joblib.parallel"


def register() -> None:
    """Register the backend's name with joblib, now or when joblib is imported."""
    module = sys.modules.get(_WATCHED)
    if module is not None and hasattr(module, "register_parallel_backend"):
        _register(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def make_backend(*args: Any, **kwargs: Any) -> Any:
    """Make the backend; its module is imported by the first `Parallel` that asks for it."""
    from run_once.joblib_backend import RunOnceBackend  # noqa: PLC0415 (on first use)

    return RunOnceBackend(*args, **kwargs)


def _register(joblib_parallel: ModuleType) -> None:
    """Register the name."""
    joblib_parallel.register_parallel_backend(BACKEND_NAME, make_backend)


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the import of joblib's `parallel`, and leaves with it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the module as the others would, with our loader around theirs."""
        if fullname != _WATCHED:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        for finder in others:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads as another loader does, then registers the backend."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        # Whatever else a loader offers, such as a module's source for tracebacks.
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Make the module as the inner loader does."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and register."""
        self._inner.exec_module(module)
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        _register(module)
