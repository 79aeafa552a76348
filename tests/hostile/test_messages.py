"""Hypothesis on every request of both services, and on stored records."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distlock_server import codec
from distlock_server.clock import ManualClock
from distlock_server.codec import CodecError, Opened
from distlock_server.state import Done, Failed, Held, Result, Storage
from tests.hostile.inside import METHODS, Inside
from tests.hostile.methods import READING, Method
from tests.hostile.strategies import messages
from tests.hostile.values import mutated

STEADY = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
METHOD = pytest.mark.parametrize("method", METHODS, ids=[method.path for method in METHODS])


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Inside]:
    """Give both services over a table in memory."""
    made = Inside(tmp_path / "results")
    yield made
    made.close()


def _send(inside: Inside, method: Method, raw: bytes) -> None:
    """Send a request; it is answered, or refused with a sentence and without a trace."""
    before = inside.table.revision
    answer = inside.call(method, raw)
    assert answer.code not in OURS, answer.text
    is_refused = answer.code is not grpc.StatusCode.OK
    if is_refused:
        assert answer.text
        assert len(answer.text) < 5_000, "a refusal does not send the request back"
    else:
        assert isinstance(answer.reply, method.reply)
        answer.reply.SerializeToString()
    # A batch that is not synchronized does what stands before the step that is refused.
    if (is_refused and method.name != "ProcessBatch") or method.name in READING:
        assert inside.table.revision == before


@METHOD
def test_messages_are_answered_or_refused(method: Method, inside: Inside) -> None:
    """Any message of a request's type is answered, or refused and changes nothing."""

    @STEADY
    @given(st.lists(messages(method.request), min_size=1, max_size=3))
    def send(requests: list[Message]) -> None:
        for request in requests:
            _send(inside, method, request.SerializeToString())

    send()


@METHOD
def test_bytes_are_answered_or_refused(method: Method, inside: Inside) -> None:
    """Any bytes at all are, too: damaged messages, and what was none."""

    @STEADY
    @given(messages(method.request), st.integers(0, 2**32), st.binary(max_size=60))
    def send(request: Message, seed: int, junk: bytes) -> None:
        _send(inside, method, mutated(request.SerializeToString(), random.Random(seed)))
        _send(inside, method, junk)

    send()


# -- records ---------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 2**64 - 1)
TIMES = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
CLAIM_IDS = st.sampled_from((b"", b"i" * 16))
ATTEMPTS = st.integers(1, 2**32 - 1)
DATA = st.binary(max_size=40)
RESULTS = st.builds(
    Result,
    st.sampled_from(Storage),
    DATA,
    NUMBERS,
    st.sampled_from((b"", b"s" * 32)),
)
RECORDS: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        Held,
        claim_id=CLAIM_IDS,
        token=NUMBERS,
        deadline_ns=st.just(0),
        ttl_ns=st.integers(0, 2**62),
        owner=TEXT,
        since_wall_ns=TIMES,
        attempts=ATTEMPTS,
        ahead=st.booleans(),
        last_error=TEXT,
        data=DATA,
        revision=NUMBERS,
    ),
    st.builds(
        Failed,
        claim_id=CLAIM_IDS,
        token=NUMBERS,
        attempts=ATTEMPTS,
        error=TEXT,
        since_wall_ns=TIMES,
        released=st.booleans(),
        revision=NUMBERS,
    ),
    st.builds(
        Done,
        token=NUMBERS,
        owner=TEXT,
        since_wall_ns=TIMES,
        result=RESULTS,
        data=DATA,
        revision=NUMBERS,
    ),
)
OPENED = Opened(ManualClock().now_ns(), 0)


@settings(STEADY, max_examples=300)
@given(RECORDS)
def test_records_come_back_as_they_were(record: Any) -> None:
    """Every record that can be made is read back as it was."""
    found = codec.decode(codec.encode(record), OPENED)
    if isinstance(record, Held) and isinstance(found, Held):
        found = found._replace(deadline_ns=record.deadline_ns)
    assert found == record


@settings(STEADY, max_examples=300)
@given(RECORDS, st.integers(0, 2**32))
def test_damaged_records_are_noticed(record: Any, seed: int) -> None:
    """A damaged record is none, or is read as what it was."""
    raw = codec.encode(record)
    damaged = mutated(raw, random.Random(seed))
    try:
        found = codec.decode(damaged, OPENED)
    except CodecError:
        return
    assert damaged == raw or damaged[:1] == b"\x0a", f"{found} was served"
