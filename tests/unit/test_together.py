"""Claims and settlements of several threads in one request, against the real rules."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import ClaimAnswer, SettleAnswer, Settlement
from run_once.client import LockClient
from run_once.errors import LimitError, ServerError, ServerUnavailableError
from run_once.gather import _Rider
from run_once.retrying import RetryPolicy
from run_once.together import MAX_KEY_BYTES, MAX_SMALL, Ticket
from tests.fake_server import (
    FakeServer,
    FakeTransport,
    Fault,
    ReplyT,
    make_client,
    make_session,
)

LIMIT_S = 20.0


class HeldTransport(FakeTransport):
    """Its first call is held at the server until the test lets it go.

    Attributes:
        interrupts: Numbers of the calls whose answers an interrupt takes away.
    """

    def __init__(self, server: FakeServer) -> None:
        super().__init__(server)
        self.arrived = threading.Event()
        self.go = threading.Event()
        self.interrupts: set[int] = set()
        self._lock = threading.Lock()
        self._n_calls = 0

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Pass a call on."""
        with self._lock:
            number = self._n_calls
            self._n_calls += 1
        if number == 0:
            self.arrived.set()
            assert self.go.wait(LIMIT_S)
        with self._lock:
            reply = super().call(method, request, reply_type, timeout_s)
        if number in self.interrupts:
            raise KeyboardInterrupt
        return reply

    def claims(self) -> list[list[bytes]]:
        """Give the keys of each claim that arrived."""
        requests = [request for method, request in self.server.requests if method == "Claim"]
        return [list(request.keys) for request in requests if isinstance(request, pb.ClaimRequest)]


@pytest.fixture
def transport() -> HeldTransport:
    """Give a way to an empty table."""
    return HeldTransport(FakeServer())


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Give threads."""
    with ThreadPoolExecutor(20) as pool:
        yield pool


class Line:
    """Calls of threads that wait behind a request that is held."""

    def __init__(self, transport: HeldTransport, threads: ThreadPoolExecutor) -> None:
        self._transport = transport
        self._threads = threads
        self._n_waiting = 0
        self._changed = threading.Condition()

    def note(self) -> None:
        """Count one that waits in line."""
        with self._changed:
            self._n_waiting += 1
            self._changed.notify_all()

    def first(self, call: Any, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call in a thread; the request is held when this returns."""
        made = self._threads.submit(call, *args, **kwargs)
        assert self._transport.arrived.wait(LIMIT_S)
        return made

    def add(self, call: Any, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call in a thread; it waits in line when this returns."""
        with self._changed:
            before = self._n_waiting
            made = self._threads.submit(call, *args, **kwargs)
            assert self._changed.wait_for(lambda: self._n_waiting > before, LIMIT_S)
        return made


@pytest.fixture
def line(
    transport: HeldTransport, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> Line:
    """Give a line, in which nobody loses patience."""
    made = Line(transport, threads)
    real = _Rider.wait

    def wait(rider: _Rider[Any], timeout_s: float) -> bool:
        if timeout_s < 1:
            return real(rider, timeout_s)  # for those who came back
        made.note()
        return real(rider, LIMIT_S)

    monkeypatch.setattr(_Rider, "wait", wait)
    return made


def claim_in(line: Line, client: LockClient, *keys: bytes, **options: Any) -> Future[ClaimAnswer]:
    """Claim in a thread, behind the request that is held."""
    return line.add(client.claim, list(keys), ttl_s=60, **options)


def test_claims_travel_together(transport: HeldTransport, line: Line) -> None:
    """They are one claim for the server; each thread gets the states and grants of its own keys."""
    client = make_client(transport)
    first = line.first(client.claim, [b"a"], ttl_s=60)
    second = claim_in(line, client, b"b", b"c")
    third = claim_in(line, client, b"d")
    transport.go.set()
    assert first.result(LIMIT_S).states == bytes([pb.KEY_STATE_GRANTED])
    answers = [second.result(LIMIT_S), third.result(LIMIT_S)]
    assert transport.claims() == [[b"a"], [b"b", b"c", b"d"]]
    assert [[grant.key for grant in answer.grants] for answer in answers] == [[b"b", b"c"], [b"d"]]
    claim_id = transport.server.last(pb.ClaimRequest).claim_id
    for answer in answers:
        assert set(answer.states) == {pb.KEY_STATE_GRANTED}
        assert {grant.claim_id for grant in answer.grants} == {claim_id}
        settled = client.settle([Settlement(grant, "complete") for grant in answer.grants])
        assert {one.state for one in settled} == {pb.KEY_STATE_COMPLETED}


def test_of_one_key_one_thread_is_granted(transport: HeldTransport, line: Line) -> None:
    """The others, who cannot have the same claim id, are told that it is busy."""
    client = make_client(transport)
    calls = [line.first(client.claim, [b"a"], ttl_s=60)]
    calls += [claim_in(line, client, b"a") for _ in range(4)]
    calls.append(claim_in(line, client, b"b"))
    transport.go.set()
    states = [call.result(LIMIT_S).states[0] for call in calls]
    granted, busy = pb.KEY_STATE_GRANTED, pb.KEY_STATE_BUSY
    assert states == [granted, busy, busy, busy, busy, granted]
    assert transport.claims()[:2] == [[b"a"], [b"a", b"b"]]


def test_mixed_answers_are_parted(transport: HeldTransport, line: Line) -> None:
    """Grants stand by their states, whatever is between them."""
    other = make_client(FakeTransport(transport.server))
    other.claim([b"b", b"e"], ttl_s=60)
    client = make_client(transport)
    line.first(client.claim, [b"z"], ttl_s=60)
    calls = [claim_in(line, client, *keys) for keys in ((b"a", b"b"), (b"e",), (b"c", b"d"))]
    transport.go.set()
    answers = [call.result(LIMIT_S) for call in calls]
    granted, busy = pb.KEY_STATE_GRANTED, pb.KEY_STATE_BUSY
    assert [list(one.states) for one in answers] == [[granted, busy], [busy], [granted, granted]]
    assert [[g.key for g in one.grants] for one in answers] == [[b"a"], [], [b"c", b"d"]]


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ([b"k"], {"claim_id": b"i" * 16}),
        ([b"k"], {"want_results": True}),
        ([b"k", b"l"], {"max_grants": 1}),
        ([b"%d" % number for number in range(MAX_SMALL + 1)], {}),
        ([b"x" * (MAX_KEY_BYTES + 1)], {}),
        ([b""], {}),
        ([b"twice", b"twice"], {}),
    ],
)
def test_what_may_not_travel_with_others_is_sent_at_once(
    transport: HeldTransport, line: Line, keys: list[bytes], options: dict[str, Any]
) -> None:
    """An id that stays, values, a limit on grants, many keys, keys that the server may refuse."""
    client = make_client(transport)
    first = line.first(client.claim, [b"a"], ttl_s=60)
    with contextlib.suppress(LimitError):
        client.claim(keys, ttl_s=60, **options)
    assert transport.claims() == [keys]
    transport.go.set()
    first.result(LIMIT_S)


def test_other_parameters_are_another_request(transport: HeldTransport, line: Line) -> None:
    """What is one claim for the server has one length of lease."""
    client = make_client(transport)
    line.first(client.claim, [b"a"], ttl_s=60)
    calls = [line.add(client.claim, [b"b"], ttl_s=60), line.add(client.claim, [b"c"], ttl_s=61)]
    calls += [claim_in(line, client, b"d", ahead=True), claim_in(line, client, b"e")]
    calls += [claim_in(line, client, b"f", max_attempts=2)]
    transport.go.set()
    assert {call.result(LIMIT_S).states[0] for call in calls} == {pb.KEY_STATE_GRANTED}
    assert transport.claims() == [[b"a"], [b"b", b"e"], [b"c"], [b"d"], [b"f"]]


def test_a_refusal_is_its_own_callers(transport: HeldTransport, line: Line) -> None:
    """If the server refuses what travels together, each asks alone, under the same claim id."""
    client = make_client(transport)
    line.first(client.claim, [b"a"], ttl_s=60)
    calls = [claim_in(line, client, key) for key in (b"b", b"c")]
    transport.faults.extend([None, Fault("INTERNAL", "after", "a bug, after it was granted")])
    transport.go.set()
    assert [call.result(LIMIT_S).states[0] for call in calls] == [pb.KEY_STATE_GRANTED] * 2
    assert sorted(transport.claims()) == [[b"a"], [b"b"], [b"b", b"c"], [b"c"]]


def test_all_are_told_that_the_server_is_gone(transport: HeldTransport, line: Line) -> None:
    """After one bound on retries, not after one for each."""
    client = make_client(transport, retry=RetryPolicy(total_s=0))
    line.first(client.claim, [b"a"], ttl_s=60)
    calls = [claim_in(line, client, key) for key in (b"b", b"c", b"d")]
    transport.is_down = True
    transport.go.set()
    errors = [call.exception(LIMIT_S) for call in calls]
    assert {type(error) for error in errors} == {ServerUnavailableError}
    assert len(set(map(id, errors))) == 3
    assert len(transport.timeouts_s) == 2


@pytest.mark.parametrize("how", ["in line", "leads"])
def test_an_interrupt_frees_what_was_claimed_for_it(
    transport: HeldTransport, line: Line, how: str
) -> None:
    """The key of the interrupted thread is free again, and the others hold theirs."""
    session = make_session(transport)
    transport.interrupts = {1} if how == "leads" else set()
    first = line.first(session.claim, [b"a"], ttl_s=60)
    calls = [line.add(session.claim, [key], ttl_s=60) for key in (b"b", b"c", b"d")]
    if how == "in line":
        transport.interrupts = {0}
    transport.go.set()
    if how == "leads":
        gone, key = calls[0], b"b"
        calls = [first, *calls[1:]]
    else:
        gone, key = first, b"a"
    assert isinstance(gone.exception(LIMIT_S), KeyboardInterrupt)
    leases = [lease for call in calls for lease in call.result(LIMIT_S).leases]
    assert transport.server.state_of(key) == pb.KEY_STATE_ABSENT
    assert all(transport.server.state_of(lease.key) == pb.KEY_STATE_BUSY for lease in leases)
    assert len(leases) == len(calls)
    assert sorted(lease.key for lease in session.keeper.leases()) == sorted(
        lease.key for lease in leases
    )


def test_what_travels_under_another_id_is_given_back(transport: HeldTransport, line: Line) -> None:
    """A process that ends gives back what its threads claim just now, under the id it has there."""
    session = make_session(transport)
    line.first(session.claim, [b"a"], ttl_s=60)
    seen: list[bytes] = []
    absent = pb.KEY_STATE_ABSENT
    real = session.client.claim

    def claim(keys: list[bytes], **options: Any) -> ClaimAnswer:
        answer = real(keys, **options)
        if len(keys) == 2:  # granted, and not yet known to its threads
            session.give_back()
            seen.extend(key for key in keys if transport.server.state_of(key) == absent)
        return answer

    session.client.claim = claim  # type: ignore[method-assign,assignment]
    calls = [line.add(session.claim, [key], ttl_s=60) for key in (b"b", b"c")]
    transport.go.set()
    for call in calls:
        call.result(LIMIT_S)
    assert sorted(seen) == [b"b", b"c"]


def test_settlements_travel_together(transport: HeldTransport, line: Line) -> None:
    """Each thread is told of its own leases, lost ones among them."""
    other = make_client(FakeTransport(transport.server))
    grants = other.claim([b"a", b"b", b"c", b"d"], ttl_s=60).grants
    other.release_grants([grants[2]])
    client = make_client(transport)
    first = line.first(client.settle, [Settlement(grants[0], "complete")])
    rest = [
        line.add(client.settle, [Settlement(grants[1], "release")]),
        line.add(client.settle, [Settlement(grants[2], "complete")]),
        line.add(client.settle, [Settlement(grants[3], "complete")]),
    ]
    alone = client.settle([Settlement(grants[3], "complete", pb.Result(token=1))], timeout_s=1)
    transport.go.set()
    assert alone == [SettleAnswer(pb.KEY_STATE_COMPLETED)]
    assert first.result(LIMIT_S) == [SettleAnswer(pb.KEY_STATE_COMPLETED)]
    assert [call.result(LIMIT_S) for call in rest] == [
        [SettleAnswer(pb.KEY_STATE_RELEASED)],
        [SettleAnswer(pb.KEY_STATE_LOST, pb.KEY_STATE_ABSENT)],
        [SettleAnswer(pb.KEY_STATE_COMPLETED)],
    ]
    assert transport.server.methods().count("Settle") == 4


def test_a_ticket_without_company_is_its_own_id(transport: HeldTransport) -> None:
    """A thread alone claims under the id that was made for it."""
    transport.go.set()
    ticket = Ticket(b"i" * 16)
    answer = make_client(transport).claim([b"a"], ttl_s=60, claim_id=ticket)
    assert answer.grants[0].claim_id == ticket.claim_id == b"i" * 16


def test_malformed_answers(
    transport: HeldTransport, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers nonsense is an error for each, never a wrong grant."""
    client = make_client(transport)
    monkeypatch.setattr(FakeServer, "_claim", lambda *_: pb.ClaimReply(states=b"\x02"))
    first = line.first(client.claim, [b"a"], ttl_s=60)
    calls = [first, *(claim_in(line, client, key) for key in (b"b", b"c"))]
    transport.go.set()
    assert [type(call.exception(LIMIT_S)) for call in calls] == [ServerError] * 3
