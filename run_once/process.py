"""Which process this is, without asking the system each time."""

from __future__ import annotations

import os
from typing import Final


class _Process:
    """This process.

    Attributes:
        pid: Its id; a forked child has its own.
    """

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.look()

    def look(self) -> None:
        """Ask the system."""
        self.pid = os.getpid()


THIS: Final = _Process()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=THIS.look)
