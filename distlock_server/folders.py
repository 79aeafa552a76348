"""Names in folders that survive a power cut."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Final

_TICK_NS: Final = 50_000_000
"""Well above the step of the clock that a file system stamps its folders with."""


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut, where folders can be synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut.

    A folder that exists is synced into the one above it as well: whoever made it may have been
    killed before that.
    """
    missing = [folder]
    while not missing[-1].exists() and missing[-1] != missing[-1].parent:
        missing.append(missing[-1].parent)
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        try:
            sync_folder(made.parent)
        except PermissionError:
            return  # not ours, and it was there before


class FolderWatch:
    """Syncs a folder in which a library makes files without doing so itself.

    A name that was made is noticed by the folder's time of change, at the cost of one look.
    """

    def __init__(self, folder: Path) -> None:
        """Sync the folder as it is."""
        self._folder = folder
        self._synced_ns = -1
        self.sync_if_changed()

    def sync_if_changed(self) -> None:
        """Make the names that are in the folder now survive a power cut."""
        changed_ns = os.stat(self._folder).st_mtime_ns  # noqa: PTH116 - once for each commit
        if changed_ns == self._synced_ns:
            return
        # What is made within the same tick of the file system's clock would not be noticed.
        is_settled = time.time_ns() - changed_ns > _TICK_NS
        sync_folder(self._folder)
        self._synced_ns = changed_ns if is_settled else -1
