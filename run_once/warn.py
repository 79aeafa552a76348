"""Warnings that point at the user's line, not at ours."""

from __future__ import annotations

import sys
import warnings
from typing import Any, Final, NamedTuple

from run_once.errors import RunOnceWarning

_BETWEEN: Final = frozenset({"contextlib", "joblib", "run_once", "sklearn"})
"""Packages between the user's line and a warning."""


class UserLine(NamedTuple):
    """A line of the user's program."""

    filename: str
    number: int
    module: str
    registry: dict[Any, Any]
    """What Python remembers of the module's warnings."""

    def warn(self, message: str, category: type[RunOnceWarning] = RunOnceWarning) -> None:
        """Warn at this line, from any thread.

        Args:
            message: What was wrong, and what to do.
            category: Class of the warning.
        """
        warnings.warn_explicit(
            message, category, self.filename, self.number, self.module, self.registry
        )


def user_line() -> UserLine:
    """Find the nearest caller outside of this package and of those that call it."""
    frame = sys._getframe(1)  # noqa: SLF001 (the only way to the caller's line before Python 3.12)
    while frame.f_back is not None and _is_between(frame.f_globals.get("__name__")):
        frame = frame.f_back
    module = str(frame.f_globals.get("__name__", "<unknown>"))
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    return UserLine(frame.f_code.co_filename, frame.f_lineno, module, registry)


def warn_user(message: str, category: type[RunOnceWarning] = RunOnceWarning) -> None:
    """Warn at the user's line.

    Args:
        message: What was wrong, and what to do.
        category: Class of the warning.
    """
    user_line().warn(message, category)


def _is_between(module: object) -> bool:
    return str(module).partition(".")[0] in _BETWEEN
