"""`distlock check`, `backup` and `restore`, beside a server under load."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from distlock_server.codec import TOKEN_KEY
from distlock_server.engines import open_engine
from distlock_server.engines.base import Meta, encode_counter
from tests.faults.crashes import Load
from tests.faults.history import NEVER, check
from tests.faults.traffic import Profile, Recorder, check_counts, claim_new, read_back
from tests.servers import ServerProcess

PROFILE = Profile(large=0.2, value_bytes=40_000)


def distlock(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "distlock_server", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _done(*arguments: object) -> str:
    done = distlock(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _refused(word: str, *arguments: object) -> None:
    done = distlock(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("distlock: ")
    assert word in done.stderr


def test_backup_under_load(
    server: ServerProcess, tmp_path: Path, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """A backup made under load is the database of one moment, values included.

    A server on the restored copy has just what was acknowledged by then, its counters agree, and
    its tokens are above all that were ever given out. The database passes its check meanwhile.
    """
    recorder = Recorder()
    load = Load(server, recorder, PROFILE, random.Random(1))
    recorder.await_ops(300)
    assert "no damage found" in _done("check", f"--db={server.db}")
    before = max(op.revision for op in recorder.ops)
    _done("backup", f"--db={server.db}", tmp_path / "backup")
    recorder.await_ops(50)
    load.stop()
    about = json.loads((tmp_path / "backup" / "backup.json").read_text())
    assert about["revision"] >= before, "what was acknowledged before the backup is not in it"
    restored = ServerProcess(tmp_path / "restored")
    cleanup.callback(restored.close)
    _done("restore", tmp_path / "backup", f"--db={restored.db}")
    restored.start()
    _check_is_moment(restored, recorder, about["revision"])
    check_counts(restored.address)
    assert claim_new(restored.address, Recorder()) > recorder.max_token
    report(f"backup under load: {len(recorder.ops)} operations, at revision {about['revision']}")


def _check_is_moment(server: ServerProcess, recorder: Recorder, revision: int) -> None:
    """Check that a server has the state of a revision: the history until there, and no more."""
    until = Recorder()
    until.large = recorder.large
    # A call of several keys may have been written by then while its reply came later.
    until.ops = [op for op in recorder.ops if op.end_ns == NEVER or op.revision <= revision]
    n_before = len(until.ops)
    read_back(server.address, until)
    seen = [op._replace(revision=revision) for op in until.ops[n_before:]]
    check([*until.ops[:n_before], *seen])


def test_check_finds_a_wrong_counter(server: ServerProcess) -> None:
    """A database whose numbers do not fit its records does not pass, and the sentence says why."""
    claim_new(server.address, Recorder())
    server.terminate()
    engine = open_engine("leveldb", server.db, 8)
    engine.commit([], Meta(((TOKEN_KEY, encode_counter(0)),)))
    engine.close()
    done = distlock("check", f"--db={server.db}")
    assert done.returncode == 1
    assert "above the last one" in done.stdout


def test_check_finds_a_lost_value(server: ServerProcess) -> None:
    """A value that a record names and nobody has is found, and so is one that was changed."""
    recorder = Recorder()
    load = Load(server, recorder, Profile(large=1.0), random.Random(2))
    recorder.await_ops(150)
    load.stop()
    server.terminate()
    blobs = sorted((server.folder / "db.results").rglob("*.blob"))
    assert "no damage found" in _done("check", f"--db={server.db}")
    for blob in blobs:
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
    done = distlock("check", f"--db={server.db}")
    assert done.returncode == 1
    assert "another than was completed" in done.stdout
    for blob in blobs:
        blob.unlink()
    assert "is missing" in distlock("check", f"--db={server.db}").stdout
    _refused("damaged", "backup", f"--db={server.db}", server.folder / "backup")
    assert not (server.folder / "backup").exists()


def test_refusals(server: ServerProcess, tmp_path: Path) -> None:
    """Nothing is overwritten, and what is no database or no backup is one sentence."""
    (tmp_path / "there").mkdir()
    _refused("no database", "check", f"--db={tmp_path / 'none'}")
    _refused("exists", "backup", f"--db={server.db}", tmp_path / "there")
    _refused("no backup", "restore", tmp_path / "there", f"--db={tmp_path / 'new'}")
    _done("backup", f"--db={server.db}", tmp_path / "backup")
    _refused("not empty", "restore", tmp_path / "backup", f"--db={server.db}")
    assert not list(server.folder.glob(".*")), "something was left behind"


@pytest.mark.parametrize("kind", ["rocksdb"])
def test_backup_of_another_engine(
    kind: str, start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """The tools work on a RocksDB database as well, also under load."""
    pytest.importorskip("rocksdict")
    server = start_server(f"--engine={kind}")
    recorder = Recorder()
    load = Load(server, recorder, PROFILE, random.Random(3))
    recorder.await_ops(100)
    _done("backup", f"--db={server.db}", tmp_path / "backup")
    assert "no damage found" in _done("check", f"--db={server.db}")
    load.stop()
    _done("restore", tmp_path / "backup", f"--db={tmp_path / 'restored'}")
    assert "no damage found" in _done("check", f"--db={tmp_path / 'restored'}")
