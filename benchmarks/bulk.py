"""Databases with millions of done keys, made through the engine and not over the wire.

Keys are `stored_key(FORM % number, namespace=NAMESPACE)`. What comes out is what a server
would have written: format, running numbers, the counter of the namespace, one record for each key.
The commit's comparison is left out, since the database is new.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distlock_proto import legacy_pb2
from distlock_server import codec
from distlock_server.codec import Kind
from distlock_server.engines import default_kind, open_engine
from distlock_server.engines.base import encode_counter
from distlock_server.engines.keyvalue import KeyValueEngine
from distlock_server.group import Counters
from distlock_server.plan import counters_meta
from distlock_server.state import Done
from run_once.keys import stored_key

NAMESPACE = "bulk"
FORM = "key-%09d"
OWNERS = [f"node-{number:02d}:{4_217 + 331 * number}" for number in range(37)]
STEP_NS = 1_234_567
CACHE_MB = 64
PIECE = 20_000
CACHE_VARIABLE = "BENCH_DATABASES"
"""A folder where databases are kept for the other benchmarks of this run."""


def name(number: int) -> str:
    """Give a key as a user writes it; in the order of their numbers they are in byte order."""
    return FORM % number


def fill(folder: Path, count: int) -> None:
    """Make a database of ours with so many done keys."""
    engine = open_engine(default_kind(), folder, CACHE_MB)
    assert isinstance(engine, KeyValueEngine)
    write = engine._write  # noqa: SLF001 (what a commit ends with, synced; nothing to compare with)
    wall_ns = time.time_ns()
    for piece in _pieces(count):
        # Each key was claimed and completed: one token, two revisions; at times and by workers that
        # differ, since equal ones would take no room on disk.
        write(
            {
                stored_key(name(n), namespace=NAMESPACE): codec.encode(
                    Done(
                        token=n + 1,
                        owner=OWNERS[n % len(OWNERS)],
                        since_wall_ns=wall_ns - STEP_NS * (count - n),
                        revision=2 * n + 2,
                    )
                )
                for n in piece
            }
        )
    meta = counters_meta(Counters(revision=2 * count, token=count, generation=0))
    counter = codec.counter_key(NAMESPACE.encode(), Kind.DONE)
    write(
        {
            **dict(meta.puts),
            codec.FORMAT_KEY: codec.FORMAT,
            codec.DATABASE_ID_KEY: uuid.uuid4().bytes,
            counter: encode_counter(count),
        }
    )
    engine.close()


def fill_2021(folder: Path, count: int) -> None:
    """Make a database as the server of 2021 writes it, with so many done keys."""
    import plyvel  # noqa: PLC0415 - has no wheel for every Python

    folder.mkdir(parents=True, exist_ok=True)
    database = plyvel.DB(str(folder), create_if_missing=True)
    for piece in _pieces(count):
        with database.write_batch() as batch:
            for number in piece:
                lock = legacy_pb2.Lock(global_id=name(number), last_owner_name=OWNERS[0])
                lock.expires_in.SetInParent()
                lock.acquired_since.GetCurrentTime()
                batch.put(name(number).encode(), lock.SerializeToString())
    database.close()


@contextmanager
def database(count: int) -> Iterator[Path]:
    """Give a folder for a server whose `db` has so many done keys.

    It is kept for the other benchmarks of a run, which may add a few keys of other namespaces.
    """
    kept = os.environ.get(CACHE_VARIABLE)
    parent = Path(kept or tempfile.mkdtemp(prefix="run-once-bulk-"))
    folder = parent / str(count)
    try:
        if not folder.exists():
            fill(parent / "made" / "db", count)
            (parent / "made").rename(folder)
        yield folder
    finally:
        if not kept:
            shutil.rmtree(parent)


def _pieces(count: int) -> Iterator[range]:
    for start in itertools.count(0, PIECE):
        if start >= count:
            return
        yield range(start, min(count, start + PIECE))
