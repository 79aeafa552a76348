"""Records as the server of 2021 wrote them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distlock_proto import legacy_pb2
from distlock_server import codec, codec_2021
from distlock_server.codec import CodecError, Kind, Opened, decode, kind_of
from distlock_server.engines.base import Swap
from distlock_server.state import NO_CLAIM_ID, Done, Held

SECOND_NS = 10**9
OPENED = Opened(now_ns=10**15, wall_ns=1_700_000_000 * SECOND_NS)
BUSY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
blobs = st.binary(max_size=200)
texts = st.text(st.characters(codec="utf-8"), max_size=60)


def lock_2021(
    expires_in_ns: int | None, acquired_ns: int, data: bytes = b"opaque", owner: str = "old"
) -> bytes:
    """Give the bytes that the server of 2021 stored for a lock."""
    lock = legacy_pb2.Lock(global_id="key", last_owner_name=owner, data=data)
    lock.acquired_since.seconds, lock.acquired_since.nanos = divmod(acquired_ns, SECOND_NS)
    if expires_in_ns is not None:
        lock.expires_in.seconds, lock.expires_in.nanos = divmod(expires_in_ns, SECOND_NS)
    return lock.SerializeToString()


@pytest.mark.parametrize("expires_in_ns", [None, 0])
def test_permanent_lock_of_2021_is_done(expires_in_ns: int | None) -> None:
    """A lock without expiry marks its key as done; owner, time and data are kept."""
    raw = lock_2021(expires_in_ns, 5 * SECOND_NS)
    assert decode(raw, OPENED) == Done(0, "old", 5 * SECOND_NS, data=b"opaque")
    assert kind_of(raw) is Kind.DONE
    assert not codec.is_marked_expired(raw)


@pytest.mark.parametrize(
    ("age_s", "remaining_s"), [(0, 60), (20, 40), (59, 1), (60, 0), (61, 0), (10**9, 0), (-30, 60)]
)
def test_lease_of_2021_is_judged_by_wall_time(age_s: int, remaining_s: int) -> None:
    """What remains counts from the opening, is never below zero and never over the whole lease."""
    acquired_ns = OPENED.wall_ns - age_s * SECOND_NS
    raw = lock_2021(60 * SECOND_NS, acquired_ns)
    assert kind_of(raw) is Kind.HELD
    assert decode(raw, OPENED) == Held(
        claim_id=NO_CLAIM_ID,
        token=0,
        deadline_ns=OPENED.now_ns + remaining_s * SECOND_NS,
        ttl_ns=60 * SECOND_NS,
        owner="old",
        since_wall_ns=acquired_ns,
        attempts=1,
        data=b"opaque",
        revision=0,
    )


def test_odd_locks_of_2021_are_read() -> None:
    """Fractions, negative and enormous durations, and missing fields are read sensibly."""
    half = decode(lock_2021(SECOND_NS // 2, OPENED.wall_ns), OPENED)
    assert isinstance(half, Held)
    assert half.ttl_ns == SECOND_NS // 2
    negative = decode(lock_2021(-SECOND_NS, OPENED.wall_ns), OPENED)
    assert isinstance(negative, Held)
    assert negative.is_expired(OPENED.now_ns)
    enormous = decode(lock_2021(10**11 * SECOND_NS, OPENED.wall_ns), OPENED)
    assert isinstance(enormous, Held)
    assert not enormous.is_expired(OPENED.now_ns + 100 * 365 * 86_400 * SECOND_NS)
    assert enormous.ttl_ns == codec_2021.MAX_STORED_NS
    bare = legacy_pb2.Lock(global_id="k").SerializeToString()
    assert decode(bare, OPENED) == Done(0, "", 0)


@BUSY_MACHINE
@given(
    st.integers(-(10**11), 10**11).filter(bool), st.integers(-(10**11), 3 * 10**11), blobs, texts
)
def test_lease_of_2021_can_be_stored_anew(
    expires_in_s: int, acquired_s: int, data: bytes, owner: str
) -> None:
    """At a clean shutdown an expired lease of 2021 is stored in our format, all of it."""
    raw = lock_2021(expires_in_s * SECOND_NS, acquired_s * SECOND_NS, data, owner)
    record = decode(raw, OPENED)
    swap = codec.expired_swap(b"key", record, raw)
    (value,) = swap.values
    assert value is not None
    assert swap == Swap.one(b"key", raw, value)
    assert codec.is_marked_expired(value)
    assert isinstance(record, Held)
    assert decode(value, OPENED) == record._replace(deadline_ns=OPENED.now_ns)


def test_lock_of_2021_cut_inside_a_field_is_an_error() -> None:
    """There is no checksum in 2021's format: only a cut between two fields goes unseen."""
    raw = lock_2021(60 * SECOND_NS, OPENED.wall_ns)
    lock = legacy_pb2.Lock.FromString(raw)
    between = set()
    for field in ("data", "last_owner_name", "acquired_since", "expires_in"):
        lock.ClearField(field)
        between.add(lock.ByteSize())
    for length in set(range(1, len(raw))) - between:
        with pytest.raises(CodecError):
            decode(raw[:length], OPENED)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x0a\x03key" + b"\x30\x01",  # a field that Lock has not
        b"\x0a\x03key\x0a\x03key",  # a field twice
        b"\x0a\x03\xff\xfe\xfd",  # not UTF-8
        b"\x0a\x00",  # an empty global_id, which no serializer writes
        b"\x0a\x05key",
    ],
)
def test_what_no_serializer_writes_is_an_error(raw: bytes) -> None:
    """Bytes that begin like a lock and are none are refused by `decode` and by `kind_of`."""
    with pytest.raises(CodecError, match="not a Lock of 2021"):
        decode(raw, OPENED)
    with pytest.raises(CodecError, match="not a Lock of 2021"):
        kind_of(raw)
