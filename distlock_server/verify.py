"""Everything in a database, looked at: records, counters, indexes, large values."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from distlock_server import codec
from distlock_server.blob_file import is_whole, read_header
from distlock_server.blobs import FINISHED, BlobStore
from distlock_server.codec import Kind, Opened
from distlock_server.engines.base import SYSTEM_PREFIX, Engine, EngineError, decode_counter
from distlock_server.state import Done, Record, Storage

_PAGE: Final = 2_000
_PIECE_BYTES: Final = 1 << 20
_END: Final = SYSTEM_PREFIX + b"\xff"
MAX_COMPLAINTS: Final = 100
"""So many are kept; the others are counted."""

_INDEXED: Final = (Kind.HELD, Kind.FAILED)


@dataclass
class Findings:
    """What was found.

    Attributes:
        n_records: Records by kind.
        n_values: Large values that a record names and that are whole.
        n_unnamed: Files of large values that no record names; a server deletes them in time.
        revision: The store revision.
        token: The last fencing token given out.
        is_counted: Whether the counters are complete; an old database may still be being counted.
        complaints: What is wrong, in sentences.
        n_complaints: How much is wrong.
    """

    n_records: Counter[Kind] = field(default_factory=Counter)
    n_values: int = 0
    n_unnamed: int = 0
    revision: int = 0
    token: int = 0
    is_counted: bool = True
    complaints: list[str] = field(default_factory=list)
    n_complaints: int = 0

    def complain(self, sentence: str) -> None:
        """Note something that is wrong."""
        self.n_complaints += 1
        if len(self.complaints) < MAX_COMPLAINTS:
            self.complaints.append(sentence)


def verify(engine: Engine, results: Path) -> Findings:
    """Read a whole database.

    Args:
        engine: The database, which nobody else changes.
        results: The folder of its large values.

    Returns:
        What was found. An error of the engine is among it and ends the search.
    """
    findings = Findings()
    try:
        _Verifier(engine, results, findings).run()
    except EngineError as error:
        findings.complain(str(error))
    return findings


class _Verifier:
    def __init__(self, engine: Engine, results: Path, findings: Findings) -> None:
        self._engine = engine
        self._results = results
        self._found = findings
        self._counts: Counter[bytes] = Counter()
        self._index: set[bytes] = set()
        self._held_tokens: dict[bytes, int] = {}
        self._named: set[Path] = set()
        self._blobs = BlobStore(results)

    def run(self) -> None:
        self._read_numbers()
        for key, raw in _entries(self._engine, b"", SYSTEM_PREFIX):
            self._check_record(key, raw)
        if self._found.is_counted:
            self._check_counters()
            self._check_index()
        self._check_unnamed()

    def _read_numbers(self) -> None:
        keys = [codec.FORMAT_KEY, codec.REVISION_KEY, codec.TOKEN_KEY, codec.COUNT_CURSOR_KEY]
        (stored_format, revision, token, cursor), _ = self._engine.read(keys)
        if stored_format not in (None, codec.FORMAT):
            raise EngineError(
                f"the database has format {stored_format!r}, this version reads {codec.FORMAT!r}"
            )
        self._found.revision, self._found.token = decode_counter(revision), decode_counter(token)
        # A database of 2021 that no server has opened has no counters at all.
        self._found.is_counted = stored_format is not None and cursor is None

    def _check_record(self, key: bytes, raw: bytes) -> None:
        try:
            key.decode()
            kind = codec.kind_of(raw)
            record = codec.decode(raw, Opened(0, 0))
        except (codec.CodecError, UnicodeDecodeError) as error:
            self._found.complain(f"the record of key {key!r} is damaged: {error}")
            return
        self._found.n_records[kind] += 1
        self._counts[codec.counter_key(codec.namespace_of(key), kind)] += 1
        if kind in _INDEXED:
            self._index.add(codec.index_key(kind, key))
        if kind is Kind.HELD:
            self._held_tokens[key] = record.token
        if record.token > self._found.token:
            self._found.complain(
                f"key {key!r} has token {record.token}, above the last one, {self._found.token}"
            )
        if record.revision > self._found.revision:
            self._found.complain(
                f"key {key!r} has revision {record.revision}, above the last one, "
                f"{self._found.revision}"
            )
        self._check_value(key, record)

    def _check_value(self, key: bytes, record: Record) -> None:
        if not isinstance(record, Done) or record.result.storage is not Storage.SERVER:
            return
        result = record.result
        path = self._blobs.path(key, record.token)
        self._named.add(path)
        where = f"the value of key {key!r} with token {record.token}"
        try:
            with path.open("rb") as file:
                header = read_header(file)
                if header is None or not is_whole(file, header):
                    self._found.complain(f"{where} is damaged: {path}")
                    return
                digest = hashlib.sha256()
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
        except FileNotFoundError:
            self._found.complain(f"{where} is missing: {path}")
            return
        except OSError as error:
            self._found.complain(f"{where} cannot be read: {error}")
            return
        is_right = (header.key, header.token, header.size_bytes) == (
            key,
            record.token,
            result.size_bytes,
        )
        if not is_right or digest.digest() != result.sha256:
            self._found.complain(f"{where} is another than was completed: {path}")
            return
        self._found.n_values += 1

    def _check_counters(self) -> None:
        prefix = SYSTEM_PREFIX + b"c"
        stored = {
            key: decode_counter(raw)
            for key, raw in _entries(self._engine, prefix, SYSTEM_PREFIX + b"d")
        }
        for key in sorted(stored.keys() | self._counts.keys()):
            if stored.get(key, 0) != self._counts[key]:
                kind, namespace = key[len(prefix)], key[len(prefix) + 1 :]
                self._found.complain(
                    f"the counter of {Kind(kind).name.lower()} keys in namespace {namespace!r} "
                    f"says {stored.get(key, 0)}, and there are {self._counts[key]}"
                )

    def _check_index(self) -> None:
        for entry, raw in _entries(self._engine, codec.span_key(0), codec.SPANS_END):
            try:
                first_token, keys = codec.decode_span(entry, raw)
            except codec.CodecError as error:
                self._found.complain(str(error))
                continue
            for token, key in enumerate(keys, first_token):
                if self._held_tokens.get(key) == token:
                    self._index.discard(codec.index_key(Kind.HELD, key))
        for kind in _INDEXED:
            start, end = codec.index_key(kind, b""), codec.index_key(kind, SYSTEM_PREFIX)
            for entry, _ in _entries(self._engine, start, end):
                if entry in self._index:
                    self._index.remove(entry)
                else:
                    self._found.complain(
                        f"the index lists {entry[len(start) :]!r}, which is not {kind.name.lower()}"
                    )
        for entry in sorted(self._index):
            self._found.complain(f"the index lacks the entry {entry!r}")

    def _check_unnamed(self) -> None:
        for file in self._results.glob(f"??/*{FINISHED}"):
            self._found.n_unnamed += file not in self._named


def _entries(engine: Engine, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
    while True:
        page = engine.scan(start, end, _PAGE)
        yield from page
        if len(page) < _PAGE:
            return
        start = page[-1][0] + b"\x00"
