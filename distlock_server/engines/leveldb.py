"""The default engine: LevelDB through plyvel. Databases of 2021 are of this kind.

Its traps, all minded here: a later synced write does not cover an earlier unsynced one, so every
write is synced; without `paranoid_checks` a flipped bit in the log silently loses what follows it;
reads check the checksums of blocks only when told to; a write that failed may reappear after the
database is opened again, so nothing follows a failed write (`KeyValueEngine` sees to that). And it
syncs a new log file but not its name, which a power cut may then take with all that is in it. A
damaged length near the end of a log looks to it like a crash (see `log_ends.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

import plyvel

from distlock_server.engines.keyvalue import Batch, KeyValueEngine
from distlock_server.engines.log_ends import check_logs
from distlock_server.failpoints import reach
from distlock_server.folders import FolderWatch

_BLOOM_BITS: Final = 10
"""Per key: one lookup in a hundred of an absent key reads a block for nothing."""

_WRITE_BUFFER_BYTES: Final = 8 * 2**20
"""Changes that are kept in memory, and in the log, before they become a table: with few large ones
half as much time goes into merging tables. A start reads the log anew, in 0.1 s."""

_MIN_WALKED: Final = 100
"""Fewer keys are asked for one by one."""

_STRETCH: Final = 250
"""Of so many keys it is looked at whether they lie close together: a group's requests may be for
different parts of a list."""

_MAX_WALKED_BYTES: Final = 200
"""Per key: with more in the tables between the first and the last, each is asked for by itself."""

_MAX_WALKED: Final = 2
"""Entries per key that are looked at before each is asked for by itself after all."""

_SAMPLE: Final = 32
"""Entries that are looked at first: one in four must be wanted."""
_MIN_WANTED: Final = 8


class LevelDBEngine(KeyValueEngine):
    """An engine over one LevelDB folder."""

    kind: str = "leveldb"
    _errors: ClassVar[tuple[type[Exception], ...]] = (plyvel.Error, OSError)

    def __init__(self, folder: Path, cache_mb: int) -> None:
        """Open or make the database.

        Args:
            folder: The database's folder.
            cache_mb: Memory for blocks, in MiB.

        Raises:
            plyvel.Error: It cannot be opened; `open_engine` says why in words.
            DamagedLogError: The end of a log is damaged.
        """
        super().__init__(str(folder))
        check_logs(folder)
        self._db = plyvel.DB(
            str(folder),
            create_if_missing=True,
            paranoid_checks=True,
            lru_cache_size=cache_mb * 2**20,
            write_buffer_size=_WRITE_BUFFER_BYTES,
            bloom_filter_bits=_BLOOM_BITS,
        )
        self._names = FolderWatch(folder)

    def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        size = math.ceil(len(keys) / max(1, len(keys) // _STRETCH))
        found: list[bytes | None] = []
        for first in range(0, len(keys), size or 1):
            found += self._get_stretch(keys[first : first + size])
        return found

    def _get_stretch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Read some keys, which may lie close together or not."""
        if len(keys) >= _MIN_WALKED:
            # Of damage among the neighbours nothing need be known: each key is then asked for.
            with contextlib.suppress(plyvel.Error):
                found = self._walk(keys)
                if found is not None:
                    return list(map(found.get, keys))
        get = self._db.get
        return [get(key, verify_checksums=True) for key in keys]

    def _walk(self, keys: Sequence[bytes]) -> dict[bytes, bytes] | None:
        """Read keys that lie close together by walking from the first of them to the last.

        That takes a fraction of the time of asking for each by itself, most so in tables.

        Returns:
            What is there; None if the keys lie among too many others.
        """
        first, end = min(keys), max(keys) + b"\x00"
        if self._db.approximate_size(first, end) > _MAX_WALKED_BYTES * len(keys):
            return None
        most = _MAX_WALKED * len(keys)
        with self._db.iterator(start=first, stop=end, verify_checksums=True) as entries:
            found = dict(itertools.islice(entries, _SAMPLE))
            if len(found) == _SAMPLE and sum(map(found.__contains__, keys)) < _MIN_WANTED:
                return None
            found.update(itertools.islice(entries, most))
        return found if len(found) < most else None

    def _write(self, batch: Batch) -> None:
        with self._db.write_batch(transaction=True, sync=True) as writes:
            put, delete = writes.put, writes.delete
            for key, value in batch.items():
                if value is None:
                    delete(key)
                else:
                    put(key, value)
            reach("write.filled")
        reach("write.synced")
        self._names.sync_if_changed()
        reach("write.named")

    def _range(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        with self._db.iterator(
            start=start, stop=end, verify_checksums=True, fill_cache=False
        ) as entries:
            return list(itertools.islice(entries, limit))

    def _close(self) -> None:
        self._db.close()
