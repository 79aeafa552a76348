"""A consistent copy of a database, also of one that a server is writing.

Tables of LevelDB and RocksDB never change once written, and logs and manifests only grow. So the
tables are linked into a folder beside the database, the few other files copied, and then it is
looked whether files came or went meanwhile; if so, all of it is done again. A log that was copied
while it grew ends in a record that is cut short, as after a crash, which is no damage.

Large values come before the database and once more behind it: what a record of the copy names was
there when the record was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from distlock_server.blobs import FINISHED
from distlock_server.engines.base import EngineError
from distlock_server.folders import make_folder, sync_folder

_TABLES: Final = (".ldb", ".sst")
_LEFT_OUT: Final = ("LOCK", "LOG", "LOG.old")
MAX_ATTEMPTS: Final = 50


class SnapshotError(EngineError):
    """The database cannot be copied; the message says why and what to do."""


def results_folder(db: Path) -> Path:
    """Give the folder of large values of a database."""
    resolved = db.resolve()
    return resolved.with_name(f"{resolved.name}.results")


@contextlib.contextmanager
def snapshot(db: Path) -> Iterator[Path]:
    """Give a folder beside the database with its files as they were at one moment.

    It is removed at the end. Whoever opens it as a database changes nothing of the original.

    Raises:
        SnapshotError: There is no database, or no consistent copy could be made.
    """
    if not (db / "CURRENT").exists():
        raise SnapshotError(f"{db} holds no database: give --db the folder of one")
    resolved = db.resolve()
    folder = resolved.with_name(f".{resolved.name}.copy-{uuid.uuid4().hex[:12]}")
    try:
        for _ in range(MAX_ATTEMPTS):
            shutil.rmtree(folder, ignore_errors=True)
            if _take(resolved, folder):
                break
        else:
            raise SnapshotError(
                f"the database in {db} was rewritten {MAX_ATTEMPTS} times while it was copied: "
                "try again when its server has less to do"
            )
        yield folder
    except OSError as error:
        raise SnapshotError(
            f"cannot copy the database in {db}: {error.filename or folder}: "
            f"{error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take(db: Path, folder: Path) -> bool:
    """Copy the files once; tell whether they belong together."""
    before = _names(db)
    folder.mkdir(mode=0o700)
    try:
        for name in before:
            if name.endswith(_TABLES):
                _link(db / name, folder / name)
        # The manifest before the logs: what it says of them is then true of their copies.
        for name in sorted(before, key=_is_log):
            if not name.endswith(_TABLES):
                shutil.copyfile(db / name, folder / name)
    except FileNotFoundError:
        return False
    manifest = _manifest(folder)
    return (
        _names(db) == before
        and _manifest(db) == manifest
        and (db / manifest).stat().st_size == (folder / manifest).stat().st_size
    )


def _manifest(db: Path) -> str:
    """Give the name of the manifest that a database says is its own."""
    name = (db / "CURRENT").read_text(encoding="ascii", errors="replace").strip()
    if not name.startswith("MANIFEST-") or not name.isprintable() or "/" in name:
        raise SnapshotError(f"{db / 'CURRENT'} is damaged, it names no manifest: restore a backup")
    return name


def _is_log(name: str) -> bool:
    return name.endswith(".log")


def _names(db: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(db)
        if entry.is_file(follow_symlinks=False)
        and entry.name not in _LEFT_OUT
        and not entry.name.startswith("LOG.old")
        and not entry.name.endswith(".dbtmp")
    )


def _link(source: Path, target: Path) -> None:
    """Give a file that never changes a second name, or a copy where that cannot be."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def copy_folder(source: Path, target: Path) -> int:
    """Copy the files of a folder and sync them; return their bytes."""
    make_folder(target)
    n_bytes = 0
    for file in sorted(source.iterdir()):
        if file.is_file():
            n_bytes += _copy_synced(file, target / file.name)
    sync_folder(target)
    return n_bytes


def copy_results(source: Path, target: Path) -> int:
    """Copy the large values that are not copied yet; return their number."""
    n_copied = 0
    for file in sorted(source.glob(f"??/*{FINISHED}")):
        copy = target / file.parent.name / file.name
        if copy.exists() and copy.stat().st_size == file.stat().st_size:
            continue
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile: no record names it
            make_folder(copy.parent)
            _copy_synced(file, copy)
            sync_folder(copy.parent)
            n_copied += 1
    return n_copied


def _copy_synced(source: Path, target: Path) -> int:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return target.stat().st_size
