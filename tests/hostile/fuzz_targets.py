"""What is fuzzed: each target runs bytes through the code and lets only documented errors out."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_server import codec, wire
from distlock_server.codec import CodecError, Opened
from distlock_server.engines.log_ends import damaged_end
from distlock_server.limits import RequestError
from distlock_server.snapshot import SnapshotError, snapshot
from distlock_server.state import Done, Failed, Held
from distlock_server.tokens import TokenFileError, read_tokens
from run_once import answers, result_frames
from run_once.access import read_address_file
from run_once.errors import ConfigError, ResultError, ServerError
from run_once.options import CHECKS, BadValueError
from tests.hostile.inside import METHODS, Inside
from tests.hostile.methods import LEGACY, LOCK_TABLE, Method
from tests.hostile.values import Maker

Run = Callable[[bytes], None]

_OPENED: Final = Opened(10**12, 10**18)
_KEY, _TOKEN, _SECRET = b"key", 7, b"the secret of the fuzzer"
_HOLDER: Final = pb.Holder(key=b"k", claim_id=b"i" * 16, token=1)
_LOCK: Final = legacy_pb2.Lock(global_id="k", expires_in=Duration(seconds=9), data=b"d")
_ACQUIRE: Final = legacy_pb2.AcquireLockRequest(lock=_LOCK)
_WELL_FORMED: Final[tuple[Message, ...]] = (
    pb.ClaimRequest(keys=[b"k", b"l"], claim_id=b"i" * 16, ttl_ns=10**9, owner="o"),
    pb.RenewRequest(renewals=[pb.Renewal(holder=_HOLDER, ttl_ns=10**10, started=True)]),
    pb.SettleRequest(settlements=[pb.Settlement(holder=_HOLDER, fail=pb.Fail(error="e"))]),
    pb.SettleRequest(settlements=[pb.Settlement(holder=_HOLDER, complete=pb.Complete())]),
    pb.SettleRequest(completions=[pb.Completions(claim_id=b"i" * 16, keys=[b"k"], tokens=[1])]),
    pb.LookupRequest(keys=[b"k"], blocks=[b"d" * 16]),
    pb.LookupRequest(keys=[b"k"], want_infos=True, want_results=True),
    pb.WaitRequest(keys=[b"k"], timeout_ns=10**9),
    pb.ResetRequest(keys=[b"k"], max_revision=9),
    legacy_pb2.AcquireManyRequest(requests=[_ACQUIRE] * 2),
    legacy_pb2.ProcessBatchRequest(
        requests=[legacy_pb2.AnyRequest(acquire_lock_request=_ACQUIRE)], is_synchronized=True
    ),
)
_LONGER_LIFE: Final = 2_000
"""Requests to one table before the next starts empty: what was found is then found again."""


class Target(NamedTuple):
    """What is run, and examples of what is well formed."""

    run: Run
    examples: Sequence[bytes]


# -- the server's files ------------------------------------------------------------------------


def _records(folder: Path) -> Target:
    records = (
        Held(b"i" * 16, 3, 0, 10**9, "owner", 10**18, 2, True, "error", b"data", 9),
        Failed(b"i" * 16, 3, 1, "error", 10**18, False, 9),
        Done(3, "owner", 10**18, revision=9),
    )
    old = b"\x0a\x01k\x12\x02\x08\x05\x1a\x02\x08\x07\x22\x01o\x2a\x01d"

    def run(data: bytes) -> None:
        # The checksum would keep all but the first lines from being reached.
        for raw in (data, data + zlib.crc32(data).to_bytes(4, "big")):
            codec.namespace_of(raw)
            try:
                record = codec.decode(raw, _OPENED)
            except CodecError:
                continue
            codec.kind_of(raw)
            is_marked = codec.is_marked_expired(raw)
            again = codec.decode(codec.encode(record, is_expired=is_marked), _OPENED)
            if isinstance(record, Held) and isinstance(again, Held):
                again = again._replace(deadline_ns=record.deadline_ns)
            assert again == record, "it is stored as another one"

    return Target(run, [*(codec.encode(record) for record in records), old])


def _log_ends(folder: Path) -> Target:
    file = folder / "000001.log"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        place = damaged_end(file)
        assert place is None or 0 <= place < len(data)

    return Target(run, [bytes(4) + b"\x05\x00\x01hello", bytes(7)])


def _snapshots(folder: Path) -> Target:
    db = folder / "db"
    db.mkdir()
    (db / "MANIFEST-000001").write_bytes(b"m")

    def run(data: bytes) -> None:
        (db / "CURRENT").write_bytes(data)
        try:
            with snapshot(db) as copy:
                assert (copy / "MANIFEST-000001").exists()
        except SnapshotError:
            pass

    return Target(run, [b"MANIFEST-000001\n"])


def _tokens(folder: Path) -> Target:
    file = folder / "tokens"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(TokenFileError):
            assert read_tokens(file)

    return Target(run, [b"work 0123456789abcdef\n# none\nadmin fedcba9876543210\n"])


# -- requests ------------------------------------------------------------------------------------


def _requests(methods: list[Method], folder: Path) -> Target:
    inside = Inside(folder / "results")
    n_runs = 0

    def run(data: bytes) -> None:
        nonlocal n_runs
        n_runs += 1
        if n_runs % _LONGER_LIFE == 0:
            inside.renew()
        method = methods[(data[0] if data else 0) % len(methods)]
        answer = inside.call(method, data[1:])
        assert answer.code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), answer.text
        if answer.reply is not None:
            answer.reply.SerializeToString()

    maker = Maker(random.Random(1), max_items=4)
    examples = [
        bytes([number]) + maker.make(method.request).SerializeToString()
        for number, method in enumerate(methods)
        for _ in range(5)
    ]
    for number, method in enumerate(methods):
        examples += [
            bytes([number]) + request.SerializeToString()
            for request in _WELL_FORMED
            if isinstance(request, method.request)
        ]
    return Target(run, examples)


def _wire(folder: Path) -> Target:
    loop = asyncio.new_event_loop()
    kind = next(method.request for method in METHODS if method.name == "ProcessBatch")

    def run(data: bytes) -> None:
        try:
            n_parts = sum(1 for _ in wire.parts(data, kind.DESCRIPTOR))
        except RequestError:
            n_parts = -1
        try:
            message: Any = loop.run_until_complete(wire.parse_request(data, kind))
        except RequestError:
            return
        assert n_parts >= len(message.requests), "it has more parts than were counted"

    return Target(run, [Maker(random.Random(1)).make(kind).SerializeToString()])


# -- what a client reads -------------------------------------------------------------------------


def _answers(folder: Path) -> Target:
    keys = [b"a", b"b", b"c"]
    claim = pb.ClaimRequest(keys=keys, claim_id=b"i" * 16, ttl_ns=10**9, want_results=True)
    grants = [answers.Grant(key, b"i" * 16, 1, 1, 0) for key in keys]
    renew = pb.RenewRequest(renewals=[pb.Renewal(ttl_ns=10**9)] * len(keys))

    def read(number: int, raw: bytes) -> None:
        if number == 0:
            found = answers.read_claim(claim, pb.ClaimReply.FromString(raw), 10**9)
            assert len(found.states) == len(keys)
        elif number == 1:
            answers.read_results(keys, pb.LookupReply.FromString(raw))
        elif number == 2:
            renewed = answers.read_renewals(grants, renew, pb.RenewReply.FromString(raw), 10**9)
            assert len(renewed) == len(keys)
        else:
            settled = pb.SettleReply.FromString(raw)
            list(answers.with_lost(settled, settled.states))

    def run(data: bytes) -> None:
        with contextlib.suppress(ServerError, DecodeError):  # what is no message, gRPC says itself
            read((data[0] if data else 0) % 4, data[1:])

    granted = pb.ClaimReply(
        states=b"\x02\x03\x07",
        tokens=[1],
        remaining_ns=[5],
        attempts=[1],
        results=[pb.Result()],
        revision=3,
    )
    examples = [
        granted,
        pb.LookupReply(states=b"\x07\x01\x07", results=[pb.Result(), pb.Result()]),
        pb.RenewReply(states=b"\x0b\x0a\x0b", lost_states=b"\x07"),
        pb.SettleReply(states=b"\x0c\x0a\x0d", lost_states=b"\x01"),
    ]
    return Target(
        run, [bytes([at]) + reply.SerializeToString() for at, reply in enumerate(examples)]
    )


class UnpickledError(BaseException):
    """Bytes that nobody signed were unpickled; `load` catches whatever else comes from there."""


def _never(*_: object) -> None:
    raise UnpickledError


def _load(data: bytes) -> None:
    with contextlib.suppress(ResultError):
        result_frames.load(data, key=_KEY, token=_TOKEN, secret=_SECRET)


def _frame(value: Any) -> bytes:
    return bytes(result_frames.dump(value, key=_KEY, token=_TOKEN, secret=_SECRET))


def _frames(folder: Path) -> Target:
    """Whatever comes from a server, whole and with fitting sums, is not unpickled unsigned."""
    genuine = {_frame(value) for value in (1, "text" * 3_000)}
    vars(result_frames).update(from_pickle=_never)
    signed_bytes = result_frames.HEADER_BYTES - 4

    def run(data: bytes) -> None:
        if data not in genuine:
            _load(data)
        head, body = data[:signed_bytes], data[result_frames.HEADER_BYTES :]
        head = head[: signed_bytes - 64] + hashlib.sha256(body).digest() + head[signed_bytes - 32 :]
        whole = head + zlib.crc32(head).to_bytes(4, "big") + body
        if whole not in genuine:
            _load(whole)

    of_others = [
        bytes(result_frames.dump(value, key=_KEY, token=_TOKEN + 1, secret=_SECRET))
        for value in (1, "text" * 3_000)
    ]
    return Target(run, of_others)


def _signed_frames(folder: Path) -> Target:
    """A frame that is signed, but by a program that writes nonsense, is a `ResultError` at most."""
    vars(result_frames).update(from_pickle=lambda *_: None)
    header_bytes = result_frames.HEADER_BYTES

    def run(data: bytes) -> None:
        part, body = data[:3].ljust(3, b"\0"), data[3:]
        fields = (part[0] % 4, part[1], part[2], 0.5, b"", hashlib.sha256(body).digest())
        head = result_frames._signed_head(*fields, key=_KEY, token=_TOKEN, secret=_SECRET)
        _load(head + body)

    bodies = [_frame(value)[header_bytes:] for value in (1, "text" * 3_000)]
    table = b"\x00" + (5).to_bytes(8, "big") * 2
    return Target(
        run, [b"\x00\x00\x05" + bodies[0], b"\x01\x00\x09" + bodies[1], b"\x02\x01\x05" + table]
    )


def _address_files(folder: Path) -> Target:
    file = folder / "addr"
    file.touch(0o600)

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(ConfigError):
            read_address_file(file)

    content = {"format": "run-once-address-1", "address": "h:1", "token": "t" * 20, "tls": True}
    return Target(run, [json.dumps(content).encode()])


def _options(folder: Path) -> Target:
    names = sorted(CHECKS)

    def run(data: bytes) -> None:
        with contextlib.suppress(BadValueError):
            CHECKS[names[(data[0] if data else 0) % len(names)]](
                data[1:].decode("utf-8", "replace")
            )

    texts = (b"host:1", b"[::1]:2", b"unix:/s", b"file:///x", b"5", b"yes", b"~/x", b"~nobody/x")
    return Target(run, [bytes([at]) + text for at in range(len(names)) for text in texts])


_MAKERS: Final[dict[str, Callable[[Path], Target]]] = {
    "records": _records,
    "log_ends": _log_ends,
    "snapshots": _snapshots,
    "tokens": _tokens,
    "lock_table": lambda folder: _requests(LOCK_TABLE, folder),
    "legacy": lambda folder: _requests(LEGACY, folder),
    "wire": _wire,
    "answers": _answers,
    "frames": _frames,
    "signed_frames": _signed_frames,
    "address_files": _address_files,
    "options": _options,
}


def make(name: str, folder: Path) -> Target:
    """Give a target; it may use the folder."""
    return _MAKERS[name](folder)
