"""Typed calls, retries and lease arithmetic, against the real rules without a network."""

from __future__ import annotations

import hashlib

import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server.clock import ManualClock
from run_once.client import Grant, LockClient, Settlement
from run_once.errors import (
    LeaseLostError,
    ResultDamagedError,
    ResultMissingError,
    ResultTooLargeError,
    ServerError,
)
from tests.fake_server import FakeServer, FakeTransport, Fault, make_client

_VALUE = pb.Result(storage=pb.Result.STORAGE_INLINE, payload=b"v")


@pytest.fixture
def transport() -> FakeTransport:
    """Give a way to an empty table."""
    return FakeTransport(FakeServer())


@pytest.fixture
def client(transport: FakeTransport) -> LockClient:
    """Give a client whose sleeping moves the clock."""
    return make_client(transport)


@pytest.fixture
def clock(transport: FakeTransport) -> ManualClock:
    """Give the clock of server and client."""
    return transport.server.clock


def _claim_one(client: LockClient, key: bytes = b"a", ttl_s: float = 60) -> Grant:
    answer = client.claim([key], ttl_s=ttl_s)
    assert answer.states == bytes([pb.KEY_STATE_GRANTED])
    return answer.grants[0]


# ---------------------------------------------------------------- claims


def test_claim(client: LockClient, transport: FakeTransport) -> None:
    """States come in the order of the keys, grants with their token, and the owner is sent."""
    other = make_client(FakeTransport(transport.server))
    done = _claim_one(other, b"done")
    other.settle([Settlement(done, "complete", _VALUE)])
    _claim_one(other, b"busy")
    answer = client.claim([b"done", b"free", b"busy"], ttl_s=60, want_results=True)
    assert list(answer.states) == [pb.KEY_STATE_DONE, pb.KEY_STATE_GRANTED, pb.KEY_STATE_BUSY]
    (grant,) = answer.grants
    assert (grant.key, grant.attempt, len(grant.claim_id)) == (b"free", 1, 16)
    assert grant.token > done.token
    assert answer.results[b"done"].payload == b"v"
    assert transport.server.last(pb.ClaimRequest).owner == "tester"


def test_two_claims_have_two_ids(client: LockClient) -> None:
    """Two logical claims of one process are two claimants: the second finds the key busy."""
    first = _claim_one(client)
    assert client.claim([b"a"], ttl_s=60).states == bytes([pb.KEY_STATE_BUSY])
    assert client.claim([b"a"], ttl_s=60, claim_id=first.claim_id).grants[0].token == first.token


def test_lost_reply_of_a_claim(client: LockClient, transport: FakeTransport) -> None:
    """A claim whose reply was lost is sent again with the same id, and learns that it holds."""
    transport.faults.extend([Fault(when="after"), Fault(when="after")])
    grant = _claim_one(client)
    sent = [r for _, r in transport.server.requests if isinstance(r, pb.ClaimRequest)]
    assert len(sent) == 3
    assert {request.claim_id for request in sent} == {grant.claim_id}
    assert grant.token == 1


def test_lease_is_counted_from_the_send_time_of_the_answered_attempt(
    client: LockClient, transport: FakeTransport, clock: ManualClock
) -> None:
    """Neither the time of the way back nor that of earlier attempts lengthens the lease."""
    transport.there_s, transport.back_s = 1.0, 2.0
    sent_ns = clock.now_ns()
    grant = _claim_one(client, ttl_s=60)
    assert grant.expires_ns == sent_ns + 57 * 10**9
    record = transport.server.records[b"a"]
    assert record is not None
    assert grant.expires_ns < getattr(record, "deadline_ns")  # noqa: B009 (a held record)


def test_retried_claim_does_not_start_the_lease_anew(
    client: LockClient, transport: FakeTransport, clock: ManualClock
) -> None:
    """After a lost reply the client believes in what remains of the lease, less the margin."""
    granted_ns = clock.now_ns()
    transport.faults.append(Fault(when="after"))
    transport.back_s = 20.0
    grant = _claim_one(client, ttl_s=60)
    assert grant.expires_ns == granted_ns + 57 * 10**9


def test_late_grant_is_seen_as_expired(
    client: LockClient, transport: FakeTransport, clock: ManualClock
) -> None:
    """A claim answered after its lease ran out gives an expiry in the past."""
    transport.faults.append(Fault(when="after"))
    transport.back_s = 90.0
    assert _claim_one(client, ttl_s=60).expires_ns < clock.now_ns()


def test_margin_of_a_short_lease(client: LockClient, clock: ManualClock) -> None:
    """The margin is never below a millisecond."""
    now_ns = clock.now_ns()
    assert _claim_one(client, ttl_s=0.01).expires_ns == now_ns + 9_000_000


def test_many_keys_are_split(transport: FakeTransport) -> None:
    """More keys than one request takes are claimed in several, with one id and in order."""
    client = make_client(transport, max_keys=3)
    keys = [b"%d" % number for number in range(8)]
    answer = client.claim(keys, ttl_s=60)
    assert answer.states == bytes([pb.KEY_STATE_GRANTED] * 8)
    assert [grant.key for grant in answer.grants] == keys
    assert len({grant.claim_id for grant in answer.grants}) == 1
    assert transport.server.methods() == ["Claim"] * 3


def test_limit_on_grants_over_several_requests(transport: FakeTransport) -> None:
    """The limit holds over all requests of one claim; keys behind it are read, not claimed."""
    client = make_client(transport, max_keys=3)
    _claim_one(client, b"7")
    keys = [b"%d" % number for number in range(8)]
    answer = client.claim(keys, ttl_s=60, max_grants=4)
    assert [grant.key for grant in answer.grants] == keys[:4]
    assert list(answer.states[4:]) == [pb.KEY_STATE_NOT_ASKED] * 3 + [pb.KEY_STATE_BUSY]
    assert client.claim(keys, ttl_s=60, max_grants=4).grants[0].key == b"4"


def test_results_behind_the_limit_on_grants(transport: FakeTransport) -> None:
    """Done keys behind the limit bring their results all the same."""
    client = make_client(transport, max_keys=1)
    done = _claim_one(client, b"z")
    client.settle([Settlement(done, "complete", _VALUE)])
    answer = client.claim([b"a", b"z"], ttl_s=60, max_grants=1, want_results=True)
    assert list(answer.states) == [pb.KEY_STATE_GRANTED, pb.KEY_STATE_DONE]
    assert answer.results[b"z"].payload == b"v"


def test_max_attempts_and_ahead(client: LockClient, transport: FakeTransport) -> None:
    """The limit on attempts and the mark of claiming ahead reach the server."""
    client.settle([Settlement(_claim_one(client), "fail", error="broken")])
    assert client.claim([b"a"], ttl_s=60, max_attempts=1).states[0] == pb.KEY_STATE_EXHAUSTED
    assert client.claim([b"a"], ttl_s=60, ahead=True).grants[0].attempt == 2
    assert client.lookup([b"a"]).states[0] == pb.KEY_STATE_BUSY_AHEAD


# ---------------------------------------------------------------- renew and settle


def test_renew(client: LockClient, transport: FakeTransport, clock: ManualClock) -> None:
    """A renewal counts from its own send time, also after expiry; LOST tells the present state."""
    a, b = _claim_one(client, b"a", 10), _claim_one(client, b"b", 10)
    clock.advance(11)
    thief = _claim_one(client, b"b", 100)
    transport.back_s = 1
    sent_ns = clock.now_ns()
    kept, lost = client.renew([(a, 20, True), (b, 20, True)])
    assert (kept.state, kept.expires_ns) == (pb.KEY_STATE_RENEWED, sent_ns + 19 * 10**9)
    assert (lost.state, lost.lost_state) == (pb.KEY_STATE_LOST, pb.KEY_STATE_BUSY)
    assert lost.expires_ns == b.expires_ns
    assert thief.token > b.token


def test_settle_all_kinds_in_one_request(client: LockClient, transport: FakeTransport) -> None:
    """Complete, fail and release may be mixed, and each LOST has the state behind it."""
    grants = client.claim([b"a", b"b", b"c"], ttl_s=60).grants
    stranger = Grant(b"d", bytes(16), 99, 1, 0)
    answers = client.settle(
        [
            Settlement(grants[0], "complete"),
            Settlement(stranger, "complete"),
            Settlement(grants[1], "fail", error="broken"),
            Settlement(grants[2], "release"),
        ]
    )
    assert [answer.state for answer in answers] == [
        pb.KEY_STATE_COMPLETED,
        pb.KEY_STATE_LOST,
        pb.KEY_STATE_FAILED,
        pb.KEY_STATE_RELEASED,
    ]
    assert [answer.is_lost for answer in answers] == [False, True, False, False]
    assert answers[1].lost_state == pb.KEY_STATE_ABSENT
    assert transport.server.methods().count("Settle") == 1
    repeated = client.settle([Settlement(grants[0], "complete")])
    assert repeated[0].state == pb.KEY_STATE_COMPLETED


def test_lost_reply_of_a_completion(client: LockClient, transport: FakeTransport) -> None:
    """A completion whose reply was lost is accepted once and answered alike."""
    grant = _claim_one(client)
    transport.faults.append(Fault(when="after"))
    assert client.settle([Settlement(grant, "complete")])[0].state == pb.KEY_STATE_COMPLETED


def test_long_error_keeps_its_end(client: LockClient) -> None:
    """Of a text above the server's limit the end is kept, in whole characters."""
    grant = _claim_one(client)
    client.settle([Settlement(grant, "fail", error="\u00e9" * 100 + "x" * 50 + "the end")])
    (info,) = client.lookup([b"a"], want_infos=True).infos
    assert info.error.endswith("x" * 50 + "the end")
    assert set(info.error[:-57]) == {"\u00e9"}
    assert 90 < len(info.error.encode()) <= 100


def test_release_grants(client: LockClient) -> None:
    """Grants without lease objects can be given back."""
    client.release_grants(client.claim([b"a", b"b"], ttl_s=60).grants)
    assert client.lookup([b"a", b"b"]).states == bytes([pb.KEY_STATE_ABSENT] * 2)


# ---------------------------------------------------------------- reads


def test_lookup(transport: FakeTransport) -> None:
    """Any number of keys is read in order, with infos if asked for."""
    client = make_client(transport, max_keys=2)
    _claim_one(client, b"b")
    found = client.lookup([b"a", b"b", b"c"], want_infos=True)
    assert list(found.states) == [pb.KEY_STATE_ABSENT, pb.KEY_STATE_BUSY, pb.KEY_STATE_ABSENT]
    assert [info.key for info in found.infos] == [b"a", b"b", b"c"]
    assert client.lookup([]).states == b""


def test_wait_until_timeout(
    client: LockClient, transport: FakeTransport, clock: ManualClock
) -> None:
    """A wait longer than one poll goes on polling, and ends with the states as they are."""
    _claim_one(client, ttl_s=1000)
    start_ns = clock.now_ns()
    assert client.wait([b"a"], 50).count(pb.KEY_STATE_BUSY) == 1
    assert clock.now_ns() - start_ns == 50 * 10**9
    waits = [r for _, r in transport.server.requests if isinstance(r, pb.WaitRequest)]
    assert [wait.timeout_ns // 10**9 for wait in waits] == [20, 20, 10]
    assert max(transport.timeouts_s) == 30


def test_wait_until_settled(client: LockClient, clock: ManualClock) -> None:
    """A wait ends once enough keys are not busy; a lease that runs out counts."""
    _claim_one(client, b"a", 30)
    _claim_one(client, b"b", 1000)
    states = client.wait([b"a", b"b", b"c"], 500, min_settled=2)
    assert list(states) == [pb.KEY_STATE_EXPIRED, pb.KEY_STATE_BUSY, pb.KEY_STATE_ABSENT]
    assert client.wait([b"c"], 500, min_settled=9) == bytes([pb.KEY_STATE_ABSENT])
    assert client.wait([], 500) == b""


def test_wait_for_more_keys_than_fit(transport: FakeTransport) -> None:
    """Keys beyond one request's limit are reported as well."""
    client = make_client(transport, max_keys=2)
    assert client.wait([b"a", b"b", b"c"], 5) == bytes([pb.KEY_STATE_ABSENT] * 3)


def test_list(client: LockClient, transport: FakeTransport) -> None:
    """All pages come as one iterator, in order and within the range."""
    transport.server.page_keys = 3
    client.claim([b"%d" % number for number in range(8)], ttl_s=60)
    assert [info.key for info in client.list()] == [b"%d" % number for number in range(8)]
    assert [info.key for info in client.list(b"2", b"4")] == [b"2", b"3"]


def test_count_reset_invalidate(client: LockClient) -> None:
    """Counting, resetting what is not newer, and invalidating by token work through the client."""
    grants = client.claim([b"a", b"b", b"c"], ttl_s=60).grants
    client.settle([Settlement(grant, "complete") for grant in grants[:2]])
    counted = client.count(prefix=b"")
    assert (counted.done, counted.held) == (2, 1)
    assert list(client.invalidate([(b"a", grants[0].token), (b"b", 999)])) == [
        pb.KEY_STATE_RESET,
        pb.KEY_STATE_KEPT,
    ]
    revision = client.lookup([]).revision or client.server_info().revision
    assert client.reset([b"b"], 0) == bytes([pb.KEY_STATE_KEPT])
    assert client.reset([b"b"], revision) == bytes([pb.KEY_STATE_RESET])


def test_limits_are_asked_for_once(client: LockClient, transport: FakeTransport) -> None:
    """What a server allows does not change while a client is connected."""
    assert client.limits().max_keys_per_request == client.limits().max_keys_per_request
    assert transport.server.methods() == ["GetServerInfo"]


# ---------------------------------------------------------------- large values


def test_large_value(client: LockClient, transport: FakeTransport) -> None:
    """A value travels in chunks both ways; a lost reply repeats only its chunk."""
    data = bytes(range(256)) * 20
    grant = _claim_one(client)
    client.limits()
    transport.faults.extend([None, Fault(when="after"), None])
    result = client.upload_result(grant, data)
    assert (result.storage, result.size_bytes) == (pb.Result.STORAGE_SERVER, len(data))
    assert result.sha256 == hashlib.sha256(data).digest()
    assert client.download_result(b"a", grant.token, len(data)) == data


def test_large_value_is_sent_anew(client: LockClient, transport: FakeTransport) -> None:
    """A server that lost the beginning, or got damaged bytes, is sent the value from its start."""
    data = bytes(5000)
    grant = _claim_one(client)
    client.limits()
    transport.faults.extend([None, Fault("NOT_FOUND"), None, None, Fault("ABORTED")])
    client.upload_result(grant, data)
    assert transport.server.blobs[b"a", grant.token] == data
    transport.faults.extend([Fault("ABORTED")] * 5)
    with pytest.raises(ServerError):
        client.upload_result(grant, data)


def test_large_value_of_a_lost_lease(client: LockClient, clock: ManualClock) -> None:
    """Uploading under a lease that was lost says so."""
    grant = _claim_one(client, ttl_s=1)
    clock.advance(2)
    _claim_one(client)
    with pytest.raises(LeaseLostError, match="'a'"):
        client.upload_result(grant, bytes(10))


def test_too_large_value(client: LockClient, transport: FakeTransport) -> None:
    """A value above the server's limit is not sent at all."""
    grant = _claim_one(client)
    with pytest.raises(ResultTooLargeError, match="100000 at most"):
        client.upload_result(grant, bytes(100_001))
    assert "UploadResult" not in transport.server.methods()


def test_missing_value(client: LockClient, transport: FakeTransport) -> None:
    """A value that the server does not have, or has damaged or in another size, is an error."""
    with pytest.raises(ResultMissingError, match="'a'"):
        client.download_result(b"a", 1, 10)
    transport.server.blobs[b"a", 1] = bytes(9)
    with pytest.raises(ResultDamagedError, match="9 bytes"):
        client.download_result(b"a", 1, 10)
    transport.faults.append(Fault("DATA_LOSS"))
    with pytest.raises(ResultDamagedError):
        client.download_result(b"a", 1, 9)
    transport.faults.append(Fault("PERMISSION_DENIED"))
    with pytest.raises(ServerError):
        client.download_result(b"a", 1, 9)
