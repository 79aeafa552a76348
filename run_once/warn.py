"""Warnings that point at the user's line, not at ours."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Final

from run_once.errors import RunOnceWarning

_PACKAGE: Final = f"{Path(__file__).parent}/"


def warn_user(message: str, category: type[RunOnceWarning] = RunOnceWarning) -> None:
    """Warn at the nearest caller outside of this package.

    Args:
        message: What was wrong, and what to do.
        category: Class of the warning.
    """
    depth = 1
    frame = sys._getframe(1)  # noqa: SLF001 (the only way to the caller's line before Python 3.12)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
        depth += 1
    warnings.warn(message, category, stacklevel=depth + 1)
