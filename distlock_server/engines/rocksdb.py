"""RocksDB through rocksdict, for Python versions that plyvel has no wheel for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final, cast

from rocksdict import (
    BlockBasedOptions,
    Cache,
    DBRecoveryMode,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from distlock_server.engines.keyvalue import Batch, KeyValueEngine
from distlock_server.engines.log_ends import check_logs

_BLOOM_BITS: Final = 10
_MAX_OPEN_FILES: Final = 1_000
_KEPT_INFO_LOGS: Final = 3


def _options(cache_mb: int) -> Options:
    blocks = BlockBasedOptions()
    blocks.set_block_cache(Cache(cache_mb * 2**20))
    blocks.set_bloom_filter(_BLOOM_BITS, block_based=False)
    options = Options(raw_mode=True)
    options.create_if_missing(create_if_missing=True)
    options.set_paranoid_checks(enabled=True)
    # A record that a crash cut short at the end of the log was never acknowledged. Damage before
    # the end is an error; RocksDB's own default would silently drop all that follows it.
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_block_based_table_factory(blocks)
    options.set_max_open_files(_MAX_OPEN_FILES)
    options.set_keep_log_file_num(_KEPT_INFO_LOGS)
    return options


class RocksDBEngine(KeyValueEngine):
    """An engine over one RocksDB folder."""

    kind: str = "rocksdb"
    # rocksdict raises plain Exception for whatever RocksDB reports.
    _errors: ClassVar[tuple[type[Exception], ...]] = (Exception,)

    def __init__(self, folder: Path, cache_mb: int) -> None:
        """Open or make the database.

        Args:
            folder: The database's folder.
            cache_mb: Memory for blocks, in MiB.

        Raises:
            Exception: It cannot be opened; `open_engine` says why in words.
        """
        super().__init__(str(folder))
        self._write_options = WriteOptions()
        self._write_options.sync = True
        check_logs(folder)
        self._db = Rdict(str(folder), _options(cache_mb))

    def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return cast("list[bytes | None]", self._db.get(list(keys)) if keys else [])

    def _write(self, batch: Batch) -> None:
        writes = WriteBatch(raw_mode=True)
        for key, value in batch.items():
            if value is None:
                writes.delete(key)
            else:
                writes.put(key, value)
        self._db.write(writes, self._write_options)

    def _range(self, start: bytes, end: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        bounds = ReadOptions()
        bounds.set_iterate_upper_bound(end)
        entries = self._db.iter(bounds)
        entries.seek(start)
        found: list[tuple[bytes, bytes]] = []
        while len(found) < limit and entries.valid():
            found.append((entries.key(), entries.value()))
            entries.next()
        entries.status()
        return found

    def _close(self) -> None:
        self._db.close()
