"""Bits that flip on the disk: each is noticed or harmless, none is served.

A database of known records is copied, one bit of one of its files is flipped, and everything is
read again, as the server reads it. What comes back without an error must be what was written.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from distlock_server import batch, codec, state
from distlock_server.blobs import BlobError, BlobStore
from distlock_server.clock import ManualClock
from distlock_server.codec import Opened
from distlock_server.engines import open_engine
from distlock_server.engines.base import Engine, EngineError
from distlock_server.snapshot import results_folder
from distlock_server.state import Result, Storage
from distlock_server.table import Table
from distlock_server.verify import verify
from tests.stepped_table import Told

N_FLIPS: Final = 200
N_KEYS: Final = 500
LARGE_EVERY: Final = 50
OPENED: Final = Opened(0, 0)
FLIPPED: Final = ("*.log", "*.ldb", "*.sst", "MANIFEST-*", "CURRENT", "*.blob")


class Written:
    """A database as a killed server left it, and what it must hold."""

    def __init__(self, folder: Path, kind: str, rng: random.Random) -> None:
        self.kind = kind
        live = folder / "live" / "db"
        self._blobs = BlobStore(results_folder(live))
        self.values: dict[tuple[bytes, int], bytes] = {}
        engine = open_engine(kind, live, 8)
        table = Table(engine, ManualClock(), Told())
        for number in range(N_KEYS):
            if number in (N_KEYS // 3, N_KEYS * 2 // 3):
                engine.close()  # what is there so far goes into tables; the rest stays in the log
                engine = open_engine(kind, live, 8)
                table = Table(engine, ManualClock(), Told())
            self._fill(table, b"key-%04d" % number, number, rng)
        self.records = dict(engine.scan(b"", b"", 10 * N_KEYS))
        self.system = dict(engine.scan(b"\xfe", b"\xfe\xff", 10 * N_KEYS))
        # Copied before it is closed: as a kill would leave it.
        self.folder = folder / "killed"
        shutil.copytree(live.parent, self.folder)
        engine.close()

    def _fill(self, table: Table, key: bytes, number: int, rng: random.Random) -> None:
        claim_id = rng.randbytes(16)
        claim = state.Claim(claim_id, 10**12, owner="somebody")
        pending = table.submit([key], partial(batch.claim, keys=[key], command=claim, max_grants=0))
        table.step_once()
        record = pending.result().items[0].record
        assert record is not None
        if number % 5 == 0:
            return
        command: batch.Change = state.Fail(claim_id, record.token, "planned")
        if number % 5 > 1:
            command = state.Complete(
                claim_id, record.token, self._result(key, record.token, number, rng)
            )
        table.submit([key], partial(batch.apply_each, commands=[(key, command)]))
        table.step_once()

    def _result(self, key: bytes, token: int, number: int, rng: random.Random) -> Result:
        if number % LARGE_EVERY != LARGE_EVERY - 1:
            return Result(Storage.INLINE, rng.randbytes(rng.randint(1, 400)))
        value = rng.randbytes(20_000)
        digest = hashlib.sha256(value).digest()
        self._blobs.write_chunk(key, token, 0, value, len(value), digest)
        self.values[key, token] = value
        return Result(Storage.SERVER, b"", len(value), digest)

    def choose(self, rng: random.Random) -> Path:
        """Give a file whose bits may flip, each kind of file as likely as the others."""
        kinds = [sorted(self.folder.rglob(pattern)) for pattern in FLIPPED]
        return rng.choice(rng.choice([files for files in kinds if files])).relative_to(self.folder)

    def outcome(self, folder: Path) -> str:
        """Read all of a damaged copy; tell what came of it.

        Raises:
            AssertionError: Something was served that was not written, or not served that was.
        """
        try:
            engine = open_engine(self.kind, folder / "db", 8)
        except EngineError:
            return "does not open"
        try:
            outcomes = {self._read_records(engine), self._read_values(folder)}
        finally:
            engine.close()
        return "noticed" if "noticed" in outcomes else "harmless"

    def _read_records(self, engine: Engine) -> str:
        outcome = "harmless"
        for key, raw in (self.records | self.system).items():
            try:
                (found,), _ = engine.read([key])
                if key in self.records and found is not None:
                    codec.decode(found, OPENED)
            except (EngineError, codec.CodecError):
                outcome = "noticed"
                continue
            assert found == raw, f"{key!r} was served wrong"
        for start, end, written in ((b"", b"", self.records), (b"\xfe", b"\xfe\xff", self.system)):
            try:
                found_all = dict(engine.scan(start, end, 10 * N_KEYS))
            except EngineError:
                outcome = "noticed"
                continue
            assert found_all.keys() == written.keys(), "a scan lost or made up a key"
        return outcome

    def _read_values(self, folder: Path) -> str:
        outcome = "harmless"
        blobs = BlobStore(folder / "db.results")
        for (key, token), value in self.values.items():
            try:
                found, size_bytes = blobs.read(key, token, 0, 10**6)
            except BlobError:
                outcome = "noticed"
                continue
            # The reader of the whole checks it against the SHA-256 in the record.
            if found != value or size_bytes != len(value):
                assert hashlib.sha256(found).digest() != hashlib.sha256(value).digest()
                outcome = "noticed"
        return outcome


def flip(file: Path, rng: random.Random) -> str:
    """Flip one bit; the end of a file is as likely as all before it."""
    content = bytearray(file.read_bytes())
    last = len(content) - 1
    place = rng.randint(max(0, last - 300), last) if rng.random() < 0.5 else rng.randint(0, last)
    bit = rng.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)} in {file.name}"


@pytest.mark.parametrize("kind", ["leveldb", "rocksdb"])
def test_flipped_bits_are_noticed_or_harmless(
    kind: str, seed: int, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """Whichever bit flips, nothing is served that was not written, and nothing is missing.

    `distlock check` finds every flip that reading notices.
    """
    pytest.importorskip("plyvel" if kind == "leveldb" else "rocksdict")
    rng = random.Random(seed)
    written = Written(tmp_path, kind, rng)
    n_flips = N_FLIPS if kind == "leveldb" else N_FLIPS // 4
    outcomes = flip_often(written, tmp_path, rng, n_flips)
    report(f"{n_flips} flipped bits in {kind} (seed {seed}): {dict(outcomes)}, 0 silent")
    assert outcomes["does not open"] + outcomes["noticed"] > n_flips // 4, "the run is void"


def flip_often(written: Written, tmp_path: Path, rng: random.Random, n_flips: int) -> Counter[str]:
    """Flip one bit of a fresh copy so many times; count what came of it.

    Raises:
        AssertionError: Something was served that was not written; all such flips are named.
    """
    assert written.outcome(_copy(written, tmp_path)) == "harmless"
    outcomes: Counter[str] = Counter()
    wrong = []
    for number in range(n_flips):
        damaged = _copy(written, tmp_path)
        where = flip(damaged / written.choose(rng), rng)
        try:
            outcome = written.outcome(damaged)
        except AssertionError as error:
            wrong.append(f"flip {number}, {where}: {error}")
            continue
        outcomes[outcome] += 1
    assert not wrong, "\n".join(wrong)
    return outcomes


def _copy(written: Written, tmp_path: Path) -> Path:
    damaged = tmp_path / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(written.folder, damaged)
    return damaged


def test_check_finds_flipped_bits(tmp_path: Path) -> None:
    """`distlock check` finds every flipped bit that changes what is read."""
    pytest.importorskip("plyvel")
    rng = random.Random(1)
    written = Written(tmp_path, "leveldb", rng)
    for _ in range(20):
        damaged = _copy(written, tmp_path)
        flip(damaged / written.choose(rng), rng)
        expected = written.outcome(damaged)
        if expected == "does not open":
            continue
        engine = open_engine("leveldb", damaged / "db", 8)
        findings = verify(engine, damaged / "db.results")
        engine.close()
        assert bool(findings.n_complaints) == (expected == "noticed")
