"""Commands that look after a database: `distlock check`, `backup` and `restore`."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from distlock_server.engines.base import Engine
    from distlock_server.verify import Findings

MANIFEST: Final = "backup.json"
DATABASE: Final = "db"
RESULTS: Final = "results"

RESTORE_LEAP: Final = 1 << 40
"""So much do tokens, revisions and the generation leap at a restore.

What was given out after the backup is not in it, and must never be given out again.
"""

_CACHE_MB: Final = 64

_FOLDER: Final = click.Path(path_type=Path)
_DB: Final = click.option("--db", type=_FOLDER, required=True, help="Folder of the database.")


class ToolError(click.ClickException):
    """A sentence for a person, and exit status 1."""

    def show(self, file: Any = None) -> None:
        """Write it as the server writes its own."""
        click.echo(f"distlock: {self.message}", file=file, err=file is None)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    from distlock_server.engines.base import EngineError  # noqa: PLC0415 - for a quick --help

    try:
        yield
    except EngineError as error:
        raise ToolError(str(error)) from error
    except OSError as error:
        raise ToolError(f"{error.filename or 'a file'}: {error.strerror or error}") from error


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Engine]:
    from distlock_server import engines  # noqa: PLC0415 - for a quick --help

    kind = engines.kind_in(folder) or engines.default_kind()
    engine = engines.open_engine(kind, folder, _CACHE_MB)
    try:
        yield engine
    finally:
        engine.close()


def _check(db: Path, results: Path) -> Findings:
    """Check a database in which nobody else writes; it is opened, and so written to."""
    from distlock_server.engines.base import EngineError  # noqa: PLC0415 - for a quick --help
    from distlock_server.verify import Findings, verify  # noqa: PLC0415

    try:
        with _opened(db) as engine:
            return verify(engine, results)
    except EngineError as error:
        findings = Findings()
        findings.complain(str(error))
        return findings


def _tell(findings: Findings) -> None:
    from distlock_server.codec import Kind  # noqa: PLC0415 - for a quick --help

    done, held, failed = (findings.n_records[kind] for kind in (Kind.DONE, Kind.HELD, Kind.FAILED))
    click.echo(
        f"{done + held + failed} keys: {done} done, {held} held, {failed} failed; "
        f"{findings.n_values} large values; revision {findings.revision}, token {findings.token}"
    )
    if not findings.is_counted:
        click.echo("counters and indexes were not checked: a server has not completed them yet")
    if findings.n_unnamed:
        click.echo(f"{findings.n_unnamed} large values are named by no record")
    for sentence in findings.complaints:
        click.echo(f"damaged: {sentence}")
    hidden = findings.n_complaints - len(findings.complaints)
    if hidden:
        click.echo(f"damaged: and {hidden} more")
    if not findings.n_complaints:
        click.echo("no damage found")


@click.command()
@_DB
def check(db: Path) -> None:
    """Read a whole database, and say whether all of it is right.

    Reads a copy made in a moment, so a server may be running and nothing is changed. The copy lies
    beside the database and takes little room. Exit status 0: no damage was found; 1: see the list.
    """
    from distlock_server.snapshot import results_folder, snapshot  # noqa: PLC0415

    with _in_words(), snapshot(db) as copy:
        findings = _check(copy, results_folder(db))
    _tell(findings)
    sys.exit(1 if findings.n_complaints else 0)


@click.command()
@_DB
@click.argument("dest", type=_FOLDER)
def backup(db: Path, dest: Path) -> None:
    """Copy a database and its large values into a new folder, DEST.

    The server may be running. The copy is of one moment, and is checked before it is called a
    backup. DEST should lie on another disk.
    """
    from distlock_server.snapshot import (  # noqa: PLC0415
        copy_folder,
        copy_results,
        results_folder,
        snapshot,
    )

    with _in_words():
        if dest.exists():
            raise ToolError(f"{dest} exists: name a folder that does not")
        written = dest.with_name(f"{dest.name}.unfinished")
        shutil.rmtree(written, ignore_errors=True)
        results = results_folder(db)
        n_values = copy_results(results, written / RESULTS)
        with snapshot(db) as copy:
            n_values += copy_results(results, written / RESULTS)
            copy_folder(copy, written / DATABASE)
        _finish_backup(written, dest)


def _finish_backup(written: Path, dest: Path) -> None:
    """Check a copy, and give it its name."""
    from distlock_server.folders import sync_folder  # noqa: PLC0415 - for a quick --help

    findings = _check(written / DATABASE, written / RESULTS)
    _tell(findings)
    if findings.n_complaints:
        raise ToolError(
            f"the copy in {written} is damaged, as the database may be: see `distlock check`"
        )
    about = {
        "format": 1,
        "wall_s": round(time.time()),
        "revision": findings.revision,
        "token": findings.token,
    }
    (written / MANIFEST).write_text(json.dumps(about) + "\n", encoding="ascii")
    sync_folder(written)
    written.rename(dest)
    sync_folder(dest.resolve().parent)
    click.echo(f"backup written to {dest}")


@click.command()
@click.argument("source", type=_FOLDER)
@_DB
def restore(source: Path, db: Path) -> None:
    """Make a database of a backup, SOURCE, in a folder that is missing or empty.

    What happened after the backup is not in it. So that no fencing token is given out twice, tokens
    go on far above all that can have been given out since.
    """
    from distlock_server.folders import make_folder, sync_folder  # noqa: PLC0415
    from distlock_server.snapshot import (  # noqa: PLC0415
        copy_folder,
        copy_results,
        results_folder,
    )

    with _in_words():
        if not (source / MANIFEST).exists():
            raise ToolError(f"{source} is no backup: it has no {MANIFEST}")
        results = results_folder(db)
        for folder in (db, results):
            if folder.exists() and any(folder.iterdir()):
                raise ToolError(f"{folder} is not empty: restore into a new folder")
        copy_results(source / RESULTS, results)
        written = db.resolve().with_name(f".{db.resolve().name}.restored")
        shutil.rmtree(written, ignore_errors=True)
        copy_folder(source / DATABASE, written)
        findings = _check(written, results)
        _tell(findings)
        if findings.n_complaints:
            raise ToolError(f"the backup {source} is damaged; {db} was not made")
        _leap(written)
        make_folder(db.resolve().parent)
        if db.exists():
            db.rmdir()
        written.rename(db)
        sync_folder(db.resolve().parent)
        click.echo(f"restored to {db}")


def _leap(folder: Path) -> None:
    """Move the running numbers above whatever the lost part of the database's life has used."""
    from distlock_server import codec  # noqa: PLC0415 - for a quick --help
    from distlock_server.engines.base import (  # noqa: PLC0415
        Meta,
        decode_counter,
        encode_counter,
    )

    keys = (codec.REVISION_KEY, codec.TOKEN_KEY, codec.GENERATION_KEY)
    with _opened(folder) as engine:
        values, _ = engine.read(keys)
        leapt = [encode_counter(decode_counter(value) + RESTORE_LEAP) for value in values]
        engine.commit([], Meta(tuple(zip(keys, leapt, strict=True))))


COMMANDS: Final = (check, backup, restore)
