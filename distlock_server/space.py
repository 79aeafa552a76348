"""Free space: below a reserve nothing new is begun, so that what was begun can still be ended.

LevelDB does not survive a full disk, and does not open on one. So claims, resets and uploads are
refused while room is left; renewals and the ends of leases go on until a quarter of the reserve.
Reading goes on always. All of it recovers by itself: the disk is asked before each change.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from distlock_server.group import Group
from distlock_server.limits import OverloadError

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_RESERVE_MB: Final = 128

_LAST_SHARE: Final = 4
"""The last quarter of the reserve is for nobody: the database's own upkeep writes there."""


_AMPLE: Final = 4
_AMPLE_NS: Final = 20_000_000
"""With so many times the reserve the system is not asked again for so long."""


class NoSpaceError(OverloadError):
    """The disk is nearly full; nothing was changed."""


class Space:
    """The free space of the database's file system."""

    def __init__(
        self,
        folder: Path | None = None,
        reserve_bytes: int = 0,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        """Watch a file system.

        Args:
            folder: A folder of it. None: there is no limit.
            reserve_bytes: Keep so much free. 0: there is no limit.
            free_bytes: Asks the system; tests bring their own.
        """
        self._folder = folder
        self._reserve_bytes = reserve_bytes if folder is not None else 0
        self._free_bytes = free_bytes or _free_bytes
        self._is_low = False
        self._ample_until_ns = 0

    def guarded(self, run: Callable[[Group], T], *, ends_leases: bool) -> Callable[[Group], T]:
        """Give a request of the table as it is, or one that is refused if it changes something.

        Args:
            run: The request.
            ends_leases: It renews or ends leases, which goes on for longer.

        Returns:
            The request to run.
        """
        free_bytes = self._missing(ends_leases=ends_leases)
        if free_bytes is None:
            return run

        def refuse_changes(group: Group) -> T:
            before = group.counters
            value = run(group)
            if group.counters != before:
                raise self._error(free_bytes)
            return value

        return refuse_changes

    def require(self, n_bytes: int) -> None:
        """Check that there is room for so many bytes of a value.

        Raises:
            NoSpaceError: There is not.
        """
        free_bytes = self._missing(n_bytes)
        if free_bytes is not None:
            raise self._error(free_bytes)

    def _missing(self, n_bytes: int = 0, *, ends_leases: bool = False) -> int | None:
        """Give the free bytes if they are too few."""
        if not self._reserve_bytes or self._folder is None:
            return None
        now_ns = time.monotonic_ns()
        if now_ns < self._ample_until_ns:
            return None
        try:
            free_bytes = self._free_bytes(self._folder)
        except OSError:
            return None  # what is wrong with the folder, the database finds out
        self._tell(free_bytes)
        if free_bytes - n_bytes >= _AMPLE * self._reserve_bytes:
            self._ample_until_ns = now_ns + _AMPLE_NS
            return None
        needed = self._reserve_bytes // _LAST_SHARE if ends_leases else self._reserve_bytes
        return free_bytes if free_bytes - n_bytes < needed else None

    def _tell(self, free_bytes: int) -> None:
        is_low = free_bytes < self._reserve_bytes
        if is_low and not self._is_low:
            logger.warning(
                "%d MiB are free at %s, less than --reserve_mb=%d: no new leases until there is "
                "more room",
                free_bytes >> 20,
                self._folder,
                self._reserve_bytes >> 20,
            )
        elif self._is_low and not is_low:
            logger.info("%d MiB are free again at %s", free_bytes >> 20, self._folder)
        self._is_low = is_low

    def _error(self, free_bytes: int) -> NoSpaceError:
        return NoSpaceError(
            f"the disk of the server is nearly full: {free_bytes >> 20} MiB are free, and "
            f"--reserve_mb={self._reserve_bytes >> 20} are kept for what is under way; make room, "
            "the server then goes on by itself"
        )


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
