"""Engines and their folders: kinds, locks, permissions, the format of 2021, crashes and damage."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distlock_proto import legacy_pb2
from distlock_server import codec, engines
from distlock_server.codec import Opened
from distlock_server.engines import open_engine
from distlock_server.engines.base import (
    APPLIED,
    EngineError,
    EngineKindError,
    EngineLockedError,
    Meta,
    Swap,
)
from distlock_server.state import Done, Held
from tests.contract.engine_kinds import (
    CACHE_MB,
    DISK_KINDS,
    LIBRARIES,
    NO_META,
    kind_param,
    put,
    read_one,
)

# -- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISK_KINDS)
@pytest.mark.parametrize("other", DISK_KINDS)
def test_database_of_another_kind_is_named(kind: str, other: str, tmp_path: Path) -> None:
    """A folder of another kind is refused by name, and is as it was afterwards."""
    engine = open_engine(kind, tmp_path, CACHE_MB)
    engine.commit([put(b"a", b"1")], NO_META)
    engine.close()
    if kind != other:
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(EngineKindError, match=f"(?i)holds a {kind} database, not {other}"):
            open_engine(other, tmp_path, CACHE_MB)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    engine = open_engine(kind, tmp_path, CACHE_MB)
    assert read_one(engine, b"a") == b"1"
    engine.close()


@pytest.mark.parametrize("kind", DISK_KINDS)
def test_kind_of_a_folder_is_recognised(kind: str, tmp_path: Path) -> None:
    """An empty folder and one without a database are of no kind; a new database is of its own."""
    assert engines.kind_in(tmp_path) is None
    (tmp_path / "notes.txt").write_text("not a database")
    assert engines.kind_in(tmp_path) is None
    open_engine(kind, tmp_path, CACHE_MB).close()
    assert engines.kind_in(tmp_path) == kind


def test_unknown_engine_is_an_error(tmp_path: Path) -> None:
    """The error names what was asked for and what there is; so does a cache of no size."""
    with pytest.raises(EngineError, match=r"'sqlite'.*leveldb, rocksdb, memory"):
        open_engine("sqlite", tmp_path, CACHE_MB)
    with pytest.raises(EngineError, match="cache of 0 MB"):
        open_engine("leveldb", tmp_path, 0)


def test_default_engine_can_be_opened(tmp_path: Path) -> None:
    """The engine for new databases is one that is installed here."""
    open_engine(engines.default_kind(), tmp_path, CACHE_MB).close()


def test_memory_needs_no_folder(tmp_path: Path) -> None:
    """Each memory database starts empty, and leaves no trace on disk."""
    engine = open_engine("memory", tmp_path / "never", CACHE_MB)
    engine.commit([put(b"a", b"1")], NO_META)
    engine.close()
    assert not (tmp_path / "never").exists()
    assert read_one(open_engine("memory", tmp_path / "never", CACHE_MB), b"a") is None


@pytest.mark.parametrize(("kind", "library"), LIBRARIES.items())
def test_missing_library_is_one_sentence(
    kind: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an engine's library is not installed the error names it and the way out."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"distlock_server.engines.{kind}", raising=False)
    with pytest.raises(EngineError, match=library):
        open_engine(kind, tmp_path, CACHE_MB)


HOLD = """
import sys
from distlock_server.engines import open_engine
engine = open_engine(sys.argv[1], sys.argv[2], 8)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", DISK_KINDS)
def test_second_process_is_told_that_the_database_is_in_use(kind: str, tmp_path: Path) -> None:
    """While one process has it open, another gets EngineLockedError; after SIGKILL it opens."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        try:
            with pytest.raises(EngineLockedError, match="in use by another process") as caught:
                open_engine(kind, tmp_path, CACHE_MB)
            assert "\n" not in str(caught.value)
            assert str(tmp_path) in str(caught.value)
        finally:
            holder.send_signal(signal.SIGKILL)
    open_engine(kind, tmp_path, CACHE_MB).close()


@pytest.mark.parametrize("kind", DISK_KINDS)
def test_opening_twice_in_one_process_is_refused(kind: str, tmp_path: Path) -> None:
    """One process cannot open a database twice either, and the first goes on."""
    engine = open_engine(kind, tmp_path, CACHE_MB)
    with pytest.raises(EngineLockedError):
        open_engine(kind, tmp_path, CACHE_MB)
    assert engine.commit([put(b"a", b"1")], NO_META) == [APPLIED]
    engine.close()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's rights for a moment; without them there is nothing to give up."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65_534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("kind", DISK_KINDS)
@pytest.mark.parametrize("name", ["", "new"])
def test_unwritable_folder_is_one_sentence(kind: str, name: str, tmp_path: Path) -> None:
    """A folder that cannot be written to, or be made, is named together with what to do."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with as_nobody():
        assert engines.kind_in(locked / name) is None
        with pytest.raises(EngineError, match="choose another folder") as caught:
            open_engine(kind, locked / name, CACHE_MB)
    assert str(locked) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", DISK_KINDS)
def test_file_in_place_of_a_folder_is_one_sentence(kind: str, tmp_path: Path) -> None:
    """A path to a file, or below a file, is refused, and the file stays as it is."""
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(EngineError, match="is a file: a database needs a folder"):
        open_engine(kind, file, CACHE_MB)
    with pytest.raises(EngineError, match="cannot make the folder"):
        open_engine(kind, file / "db", CACHE_MB)
    assert file.read_text() == "precious"


# -- LevelDB of 2021 ------------------------------------------------------------------------------


def test_database_of_2021_opens_as_it_is(tmp_path: Path) -> None:
    """Keys and serialized locks, written by LevelDB with its defaults, are read and kept."""
    plyvel = pytest.importorskip("plyvel")
    locks = {}
    for number in range(2_000):
        lock = legacy_pb2.Lock(global_id=f"key-{number:04d}-ü", last_owner_name="old")
        lock.acquired_since.seconds = 1_600_000_000
        if number % 2:
            lock.expires_in.seconds = 60
        locks[lock.global_id.encode()] = lock.SerializeToString()
    db = plyvel.DB(str(tmp_path), create_if_missing=True)
    for key, raw in locks.items():
        db.put(key, raw)
    db.close()
    engine = open_engine("leveldb", tmp_path, CACHE_MB)
    found = engine.scan(b"", b"", 10_000)
    assert dict(found) == locks
    assert engine.scan(b"\xfe", b"\xff", 10) == []
    opened = Opened(10**15, 1_700_000_000 * 10**9)
    kinds = [type(codec.decode(raw, opened)) for _, raw in found]
    assert kinds == [Done, Held] * 1_000
    key, raw = found[1]
    done = codec.encode(Done(5, "new", 1))
    assert engine.commit([put(key, done, raw)], NO_META) == [APPLIED]
    engine.close()
    engine = open_engine("leveldb", tmp_path, CACHE_MB)
    assert dict(engine.scan(b"", b"", 10_000)) == {**locks, key: done}
    engine.close()


# -- durability -----------------------------------------------------------------------------------

COMMIT_MANY = """
import sys
from distlock_server.engines import open_engine
from distlock_server.engines.base import Meta, Swap
engine = open_engine(sys.argv[1], sys.argv[2], 8)
for number in range(int(sys.argv[3])):
    engine.commit([Swap.one(b"%d" % number, None, b"x")], Meta())
engine.close()
"""


def count_syncs(kind: str, folder: Path, n_commits: int, report: Path) -> int:
    """Run commits under strace and count the synced writes of the log."""
    command = ["strace", "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o", str(report)]
    command += [sys.executable, "-c", COMMIT_MANY, kind, str(folder), str(n_commits)]
    subprocess.run(command, check=True, timeout=100)
    return sum("sync(" in line for line in report.read_text().splitlines())


def strace_works() -> bool:
    """Tell whether processes can be traced here."""
    command = ["strace", "-o", os.devnull, "true"]
    return bool(shutil.which("strace")) and subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize("kind", DISK_KINDS)
def test_every_commit_is_synced(kind: str, tmp_path: Path) -> None:
    """Each commit asks the system for one more sync than a run without it."""
    if not strace_works():
        pytest.skip("strace cannot trace processes here")
    base = count_syncs(kind, tmp_path / "none", 1, tmp_path / "report")
    n_syncs = count_syncs(kind, tmp_path / "many", 41, tmp_path / "report")
    assert n_syncs - base >= 40


class Recorder:
    """Stands before a library's database and notes how it is written to."""

    def __init__(self, db: Any) -> None:
        self._db = db
        self.writes: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def write_batch(self, **options: bool) -> Any:
        """Note plyvel's option."""
        self.writes.append(options.get("sync", False))
        return self._db.write_batch(**options)

    def write(self, batch: Any, options: Any = None) -> None:
        """Note rocksdict's option."""
        self.writes.append(options is not None and options.sync)
        self._db.write(batch, options)


@pytest.mark.parametrize("kind", DISK_KINDS)
def test_every_commit_is_one_synced_batch(kind: str, tmp_path: Path) -> None:
    """Whatever a commit holds, it reaches the library as one batch with sync asked for."""
    engine: Any = open_engine(kind, tmp_path, CACHE_MB)
    recorder = engine._db = Recorder(engine._db)
    swaps = [Swap.one(b"%d" % i, None, b"x", ((b"\xfeh", b""),)) for i in range(20)]
    engine.commit(swaps, Meta(((b"\xfer", b"1"),), ((b"\xfec", 1),)))
    engine.commit([put(b"0", None, b"x")], NO_META)
    assert recorder.writes == [True, True]
    engine.close()


@pytest.mark.parametrize("kind", [kind_param("leveldb")])
def test_close_keys_are_not_asked_for_one_by_one(kind: str, tmp_path: Path) -> None:
    """LevelDB walks over neighbours, and asks for each key that lies among too many others."""
    engine: Any = open_engine(kind, tmp_path, CACHE_MB)
    value = random.Random(1).randbytes(100)
    keys = [b"%06d" % number for number in range(20_000)]
    engine.commit([put(key, value) for key in keys], NO_META)
    for _ in range(2):
        assert engine._walk(keys[50:1_050]) == dict.fromkeys(keys[50:1_050], value)
        assert set(keys[50:1_050:2]) <= engine._walk(keys[50:1_050:2]).keys()
        assert engine._walk([b"9%06d" % number for number in range(100)]) == {}
        assert engine._walk(keys[::100]) is None
        assert engine._walk(keys[:150] + keys[150::40]) is None
        engine.close()
        engine = open_engine(kind, tmp_path, CACHE_MB)  # what was in memory is a table now
    engine.close()


CORRUPT = r"(?i)corrupt"


def damage(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


KILLED = """
import os, signal, sys
from distlock_server.engines import open_engine
from distlock_server.engines.base import Meta, Swap
engine = open_engine(sys.argv[1], sys.argv[2], 8)
for number in range(50):
    engine.commit([Swap.one(b"%02d" % number, None, b"x" * 100)], Meta())
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """Leave a database whose 50 commits are in the log only; give kind, folder and log."""
    kind: str = request.param
    subprocess.run([sys.executable, "-c", KILLED, kind, str(tmp_path)], check=False, timeout=100)
    log = max(tmp_path.glob("*.log"), key=lambda path: path.stat().st_size)
    return kind, tmp_path, log


@pytest.mark.parametrize("killed", DISK_KINDS, indirect=True)
def test_killed_process_loses_nothing(killed: tuple[str, Path, Path]) -> None:
    """What was committed is there after SIGKILL and an opening."""
    kind, folder, _ = killed
    engine = open_engine(kind, folder, CACHE_MB)
    assert len(engine.scan(b"", b"", 100)) == 50
    engine.close()


@pytest.mark.parametrize("killed", DISK_KINDS, indirect=True)
def test_torn_end_of_the_log_loses_only_the_end(killed: tuple[str, Path, Path]) -> None:
    """A log cut in its last record opens with all records before it: that one was never acked."""
    kind, folder, log = killed
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 30)
    engine = open_engine(kind, folder, CACHE_MB)
    assert [key for key, _ in engine.scan(b"", b"", 100)] == [b"%02d" % i for i in range(49)]
    engine.close()


@pytest.mark.parametrize("killed", DISK_KINDS, indirect=True)
def test_flipped_bit_in_the_log_is_an_error(killed: tuple[str, Path, Path]) -> None:
    """Damage in the middle of the log is reported, never dropped in silence."""
    kind, folder, log = killed
    damage(log, log.stat().st_size // 2)
    with pytest.raises(EngineError, match=CORRUPT):
        open_engine(kind, folder, CACHE_MB)


@pytest.mark.parametrize("kind", DISK_KINDS)
def test_flipped_bit_in_a_table_is_an_error(kind: str, tmp_path: Path) -> None:
    """A damaged block of records is reported by reads and scans, never returned."""
    engine: Any = open_engine(kind, tmp_path, CACHE_MB)
    noise = random.Random(7)
    engine.commit([put(b"%04d" % i, noise.randbytes(100)) for i in range(1_000)], NO_META)
    engine._db.compact_range(*((None, None) if kind == "rocksdb" else ()))
    engine.close()
    open_engine(kind, tmp_path, CACHE_MB).close()  # what is still in the log becomes a table
    tables = [*tmp_path.glob("*.ldb"), *tmp_path.glob("*.sst")]
    table = max(tables, key=lambda path: path.stat().st_size)
    damage(table, table.stat().st_size // 2)
    engine = open_engine(kind, tmp_path, CACHE_MB)
    with pytest.raises(EngineError, match=CORRUPT):
        engine.scan(b"", b"", 2_000)
    with pytest.raises(EngineError, match=CORRUPT):
        engine.read([b"%04d" % i for i in range(1_000)])
    engine.close()
