"""Records as bytes: what is read is what was written, or an error."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distlock_proto import legacy_pb2
from distlock_server import codec, codec_batch
from distlock_server.codec import CodecError, Kind, Opened, decode, encode, kind_of
from distlock_server.engines.base import SYSTEM_PREFIX
from distlock_server.state import (
    CLAIM_ID_BYTES,
    NO_CLAIM_ID,
    Done,
    Failed,
    Held,
    Record,
    Result,
    Storage,
)

SECOND_NS = 10**9
OPENED = Opened(now_ns=10**15, wall_ns=1_700_000_000 * SECOND_NS)

# No deadline: CI machines are busy. Function-scoped fixtures are not used.
BUSY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

tokens = st.integers(0, 2**64 - 1)
walls = st.integers(-(2**63), 2**63 - 1)
durations = st.integers(0, 2**63 - 1)
counts = st.integers(1, 2**32 - 1)
claim_ids = st.just(NO_CLAIM_ID) | st.binary(min_size=CLAIM_ID_BYTES, max_size=CLAIM_ID_BYTES)
blobs = st.binary(max_size=200)
# What protobuf strings can hold: no lone surrogates.
texts = st.text(st.characters(codec="utf-8"), max_size=60)
results = st.builds(
    Result,
    storage=st.sampled_from(Storage),
    payload=blobs,
    size_bytes=tokens,
    sha256=st.just(b"") | st.binary(min_size=32, max_size=32),
)
held_records = st.builds(
    Held,
    claim_id=claim_ids,
    token=tokens,
    deadline_ns=walls,
    ttl_ns=durations,
    owner=texts,
    since_wall_ns=walls,
    attempts=counts,
    ahead=st.booleans(),
    last_error=texts,
    data=blobs,
    revision=tokens,
)
failed_records = st.builds(
    Failed,
    claim_id=claim_ids,
    token=tokens,
    attempts=counts,
    error=texts,
    since_wall_ns=walls,
    released=st.booleans(),
    revision=tokens,
)
done_records = st.builds(
    Done,
    token=tokens,
    owner=texts,
    since_wall_ns=walls,
    result=results | st.just(Result()),
    data=blobs,
    revision=tokens,
)
records = held_records | failed_records | done_records

HELD = Held(b"c" * 16, 7, 0, 60 * SECOND_NS, "host:1", 5, 2, ahead=True, last_error="e", data=b"d")
FAILED = Failed(b"c" * 16, 7, 2, "boom", 5, released=True, revision=9)
DONE = Done(7, "host:1", 5, Result(Storage.SERVER, b"", 9, b"s" * 32), b"d", revision=9)
EXAMPLES = [HELD, FAILED, DONE]


def with_checksum(body: bytes) -> bytes:
    """Give bytes whose checksum is right, whatever else is wrong with them."""
    return body + struct.pack(">I", zlib.crc32(body))


# -- there and back -------------------------------------------------------------------------------


@BUSY_MACHINE
@given(failed_records | done_records)
def test_settled_records_come_back(record: Failed | Done) -> None:
    """A failed or done record is read as it was written, whenever the database is opened."""
    assert decode(encode(record), OPENED) == record
    assert decode(encode(record), Opened(0, 0)) == record


@BUSY_MACHINE
@given(held_records)
def test_lease_runs_anew_from_the_opening(record: Held) -> None:
    """Without a stored deadline a lease has its whole ttl from when the database was opened."""
    expected = record._replace(deadline_ns=OPENED.now_ns + record.ttl_ns)
    assert decode(encode(record), OPENED) == expected


@BUSY_MACHINE
@given(held_records)
def test_lease_stored_as_expired_is_expired(record: Held) -> None:
    """A lease that ran out before a clean shutdown is expired as soon as the database is opened."""
    raw = encode(record, is_expired=True)
    found = decode(raw, OPENED)
    assert found == record._replace(deadline_ns=OPENED.now_ns)
    assert isinstance(found, Held)
    assert found.is_expired(OPENED.now_ns)
    assert codec.is_marked_expired(raw)
    assert not codec.is_marked_expired(encode(record))


@BUSY_MACHINE
@given(held_records, walls)
def test_stored_deadline_comes_back(record: Held, deadline_ns: int) -> None:
    """On a shared engine the deadline is the stored one, whenever the database is opened."""
    raw = encode(record, deadline_ns=deadline_ns)
    assert decode(raw, OPENED) == record._replace(deadline_ns=deadline_ns)
    assert not codec.is_marked_expired(raw)


@BUSY_MACHINE
@given(held_records, walls)
def test_deadline_in_memory_is_not_stored(record: Held, deadline_ns: int) -> None:
    """Renewals that only move the deadline leave the bytes as they are."""
    assert encode(record._replace(deadline_ns=deadline_ns)) == encode(record)


@BUSY_MACHINE
@given(records)
def test_kind_is_told_without_decoding(record: Held | Failed | Done) -> None:
    """`kind_of` agrees with the type of the decoded record."""
    kinds = {Held: Kind.HELD, Failed: Kind.FAILED, Done: Kind.DONE}
    assert kind_of(encode(record)) is kinds[type(record)]


@BUSY_MACHINE
@given(records)
def test_first_byte_is_never_that_of_2021(record: Held | Failed | Done) -> None:
    """No record of ours can be taken for a `Lock`."""
    assert encode(record)[0] != 0x0A


@BUSY_MACHINE
@given(records, records)
def test_different_records_have_different_bytes(
    one: Held | Failed | Done, two: Held | Failed | Done
) -> None:
    """Compare-and-swap compares bytes: equal bytes are equal records, and the other way round."""
    if isinstance(one, Held):
        one = one._replace(deadline_ns=0)
    if isinstance(two, Held):
        two = two._replace(deadline_ns=0)
    assert (encode(one) == encode(two)) is (one == two)


# -- size -----------------------------------------------------------------------------------------


batches = st.one_of(
    st.lists(records | st.none(), max_size=8),
    # As in a batch: alike but for token and revision, with some others between them.
    st.builds(
        lambda first, numbers, other: [
            *(first._replace(token=token, revision=revision) for token, revision in numbers),
            other,
            first,
        ],
        records,
        st.lists(st.tuples(tokens, tokens), max_size=5),
        records,
    ),
)


@BUSY_MACHINE
@given(batch=batches)
def test_batch_has_the_bytes_of_single_records(batch: list[Record]) -> None:
    """What is taken over from the record before is right for the next one."""
    singly = [None if record is None else encode(record) for record in batch]
    assert codec_batch.encode_all(batch) == singly
    with_deadlines = [
        encode(record, deadline_ns=record.deadline_ns) if isinstance(record, Held) else raw
        for record, raw in zip(batch, singly, strict=True)
    ]
    assert codec_batch.encode_all(batch, stores_deadline=True) == with_deadlines


def test_done_key_is_small() -> None:
    """A done key without result and with a label of 24 bytes takes 60 bytes at most."""
    record = Done(2**64 - 1, "x" * 24, OPENED.wall_ns, revision=2**64 - 1)
    assert len(encode(record)) <= 60


def test_too_long_record_is_refused() -> None:
    """A record over the limit is neither written nor read."""
    too_long = DONE._replace(data=b"x" * codec.MAX_RECORD_BYTES)
    with pytest.raises(CodecError, match="at most"):
        encode(too_long)
    with pytest.raises(CodecError, match="more than a record can have"):
        decode(b"\x11" * (codec.MAX_RECORD_BYTES + 1), OPENED)


def test_largest_record_fits() -> None:
    """Exactly the limit is written and read."""
    room = codec.MAX_RECORD_BYTES - len(encode(DONE._replace(data=b"x"))) + 1
    record = DONE._replace(data=b"x" * room)
    raw = encode(record)
    assert len(raw) == codec.MAX_RECORD_BYTES
    assert decode(raw, OPENED) == record


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", EXAMPLES, ids=["held", "failed", "done"])
def test_every_truncation_is_an_error(record: Held | Failed | Done) -> None:
    """A record cut anywhere, its own end apart, is no record."""
    raw = encode(record)
    for length in range(len(raw)):
        with pytest.raises(CodecError):
            decode(raw[:length], OPENED)


@pytest.mark.parametrize("record", EXAMPLES, ids=["held", "failed", "done"])
def test_every_flipped_bit_is_an_error(record: Held | Failed | Done) -> None:
    """One flipped bit anywhere is found, and never gives another record."""
    raw = encode(record)
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            decode(bytes(damaged), OPENED)


@BUSY_MACHINE
@given(records, st.data())
def test_damage_is_an_error(record: Held | Failed | Done, data: st.DataObject) -> None:
    """Whatever the record: cut, flipped, or with something behind it, it is no record."""
    raw = encode(record)
    length = data.draw(st.integers(0, len(raw) - 1))
    damaged = bytearray(raw)
    damaged[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.sampled_from([1, 2, 16, 128]))
    for wrong in (raw[:length], bytes(damaged), raw + data.draw(st.binary(min_size=1))):
        with pytest.raises(CodecError):
            decode(wrong, OPENED)


@BUSY_MACHINE
@given(st.binary(max_size=300))
@example(b"")
@example(b"\x0a")
@example(b"\x0a\x00")
@example(b"\x11")
@example(b"\x11\x01" + bytes(60))
@example(b"\x12\x01" + bytes(60))
def test_random_bytes_give_no_record(raw: bytes) -> None:
    """Random bytes are a `CodecError`; only what is a `Lock` to the last byte is one of 2021."""
    for read in (lambda: decode(raw, OPENED), lambda: kind_of(raw)):
        try:
            found = read()
        except CodecError:
            continue
        if isinstance(found, Kind):
            continue  # the checksum is for `decode` to look at
        assert raw[0] == 0x0A
        assert legacy_pb2.Lock.FromString(raw).ByteSize() == len(raw)


@BUSY_MACHINE
@given(st.binary(min_size=26, max_size=200), st.sampled_from([0x01, 0x02, 0x03]))
def test_right_checksum_does_not_help_nonsense(tail: bytes, kind: int) -> None:
    """Bytes with a right checksum are the encoding of the record that is read, or an error."""
    raw = with_checksum(bytes([0x11, kind | (tail[0] & 0xFC)]) + tail)
    try:
        found = decode(raw, OPENED)
    except CodecError:
        return
    if isinstance(found, Held):
        is_expired = codec.is_marked_expired(raw)
        deadline_ns = found.deadline_ns if raw[1] & 0x10 else None
        again = encode(found, is_expired=is_expired, deadline_ns=deadline_ns)
    else:
        again = encode(found)
    assert again == raw


NO_OWNER = DONE._replace(owner="")


@pytest.mark.parametrize(
    ("record", "at", "value", "message"),
    [
        (HELD, 0, b"\x12", "no record format known here"),
        (HELD, 1, b"\x00", "kind 0 is unknown"),
        (HELD, 1, b"\xfd", "marked as expired"),
        (FAILED, 1, b"\x0a", "unknown for a FAILED record"),
        (DONE, 1, b"\x83", "unknown for a DONE record"),
        (HELD, 26, b"\xff" * 8, "a lease of -1 ns"),
        (HELD, 34, bytes(4), "at least one attempt"),
        (FAILED, 26, bytes(4), "at least one attempt"),
        (NO_OWNER, 30, b"\x09", "storage 9 is unknown"),
        (NO_OWNER, 39, b"\x1f", "a SHA-256 of 31 bytes"),
        (DONE, 26, b"\xff" * 4, "reach over the end"),
        (DONE, 30, b"\xff", "not UTF-8"),
        (DONE, len(encode(DONE)) - 4, b"x", "left over"),
    ],
)
def test_each_field_is_checked(
    record: Held | Failed | Done, at: int, value: bytes, message: str
) -> None:
    """Values that no encoder writes are refused even under a right checksum, and named."""
    body = bytearray(encode(record)[:-4])
    body[at : at + len(value)] = value
    with pytest.raises(CodecError, match=message):
        decode(with_checksum(bytes(body)), OPENED)


# -- the server's own keys ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "namespace"),
    [
        (b"key", b""),
        (b"\x1ens\x1fkey", b"ns"),
        (b"\x1e\x1fkey", b""),
        (b"\x1ens\x1fkey\x1fmore", b"ns"),
        (b"\x1eno separator", b""),
        (b"key\x1ens\x1f", b""),
        ("\x1eäöü\x1fk".encode(), "äöü".encode()),
        (b"", b""),
    ],
)
def test_namespace_of(key: bytes, namespace: bytes) -> None:
    """The namespace stands between the two separators at the start, or there is none."""
    assert codec.namespace_of(key) == namespace


@BUSY_MACHINE
@given(st.text(max_size=30), st.sampled_from([Kind.HELD, Kind.FAILED]), st.sampled_from(Kind))
def test_own_keys_keep_apart(text: str, indexed: Kind, counted: Kind) -> None:
    """Index entries, counters and the fixed keys lie among the server's own and never collide."""
    name = text.encode(errors="ignore")
    own = [
        codec.FORMAT_KEY,
        codec.DATABASE_ID_KEY,
        codec.REVISION_KEY,
        codec.TOKEN_KEY,
        codec.GENERATION_KEY,
        codec.COUNT_CURSOR_KEY,
        codec.index_key(indexed, name),
        codec.counter_key(name, counted),
    ]
    assert len(set(own)) == len(own)
    assert all(key.startswith(SYSTEM_PREFIX) for key in own)


@BUSY_MACHINE
@given(st.lists(st.binary(max_size=12), unique=True))
def test_index_keeps_the_order_of_keys(keys: list[bytes]) -> None:
    """Index entries of one kind sort as their keys do, and give them back."""
    entries = sorted(codec.index_key(Kind.HELD, key) for key in keys)
    skip = len(codec.index_key(Kind.HELD, b""))
    assert [entry[skip:] for entry in entries] == sorted(keys)


def test_done_keys_have_no_index_entry() -> None:
    """Only held and failed keys are indexed."""
    with pytest.raises(KeyError):
        codec.index_key(Kind.DONE, b"key")
