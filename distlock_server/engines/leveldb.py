"""The default engine: LevelDB through plyvel. Databases of 2021 are of this kind.

Its traps, all minded here: a later synced write does not cover an earlier unsynced one, so every
write is synced; without `paranoid_checks` a flipped bit in the log silently loses what follows it;
reads check the checksums of blocks only when told to; a write that failed may reappear after the
database is opened again, so nothing follows a failed write (`KeyValueEngine` sees to that). And it
syncs a new log file but not its name, which a power cut may then take with all that is in it. A
damaged length near the end of a log looks to it like a crash (see `log_ends.py`).
"""

from __future__ import annotations

import itertools
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
            bloom_filter_bits=_BLOOM_BITS,
        )
        self._names = FolderWatch(folder)

    def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        get = self._db.get
        return [get(key, verify_checksums=True) for key in keys]

    def _write(self, batch: Batch) -> None:
        with self._db.write_batch(transaction=True, sync=True) as writes:
            for key, value in batch.items():
                if value is None:
                    writes.delete(key)
                else:
                    writes.put(key, value)
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
