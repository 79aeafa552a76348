"""Named places at which a test can have the server crash; they do nothing otherwise.

`DISTLOCK_FAILPOINT=name:n` ends the process, as a crash would, when it comes to that place for the
n-th time. Only tests set it.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Final

VARIABLE: Final = "DISTLOCK_FAILPOINT"

POINTS: Final = (
    # A group of requests, in the order of what happens to it.
    "group.taken",
    "group.read",
    "group.run",
    "group.planned",
    "commit.begun",
    "commit.compared",
    "commit.gathered",
    "write.filled",
    "write.synced",
    "write.named",
    "commit.ended",
    "group.written",
    "group.counted",
    "group.taken_over",
    "group.answered",
    "reply.made",
    # A large value.
    "upload.asked",
    "upload.made",
    "upload.appended",
    "upload.checked",
    "upload.synced",
    "upload.renamed",
    "upload.ended",
    # The start.
    "start.opened",
    "start.written",
    "start.loaded",
    # The end.
    "end.drained",
    "end.stored",
    "end.closed",
)


def _off(name: str) -> None:
    """Do nothing."""


def _armed(setting: str) -> Callable[[str], None]:
    wanted, _, text = setting.partition(":")
    if wanted not in POINTS or not text.isdecimal():
        raise ValueError(f"{VARIABLE}={setting!r} names no failpoint and number")
    counter, last = itertools.count(1), int(text)

    def crash(name: str) -> None:
        if name == wanted and next(counter) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return crash


_setting = os.environ.get(VARIABLE)
reach: Callable[[str], None] = _armed(_setting) if _setting else _off
"""Come to a place, by its name."""
