"""`Parallel` over our backend, on every supported joblib: 1.4 takes no backend's options itself."""

from __future__ import annotations

import inspect
from typing import Any, Final

import joblib
import pytest

from run_once.joblib_backend import RunOnceBackend
from run_once.joblib_options import OPTION_NAMES

_TAKES_OPTIONS: Final = any(
    parameter.kind is inspect.Parameter.VAR_KEYWORD
    for parameter in inspect.signature(joblib.Parallel).parameters.values()
)

needs_parallel_options = pytest.mark.skipif(
    not _TAKES_OPTIONS, reason="joblib 1.4's Parallel takes no options of a backend"
)


def make_parallel(**options: Any) -> joblib.Parallel:
    """Make a `Parallel` with options of joblib's and ours."""
    ours = {name: options.pop(name) for name in OPTION_NAMES & options.keys()}
    return joblib.Parallel(backend=RunOnceBackend(**ours), **options)
