"""`distlock.v1.LockTable` over a real connection, under a clock that is moved by hand."""

from __future__ import annotations

import os
from typing import Any, Final

import grpc
import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_server import limits
from tests.servers import InprocServer
from tests.service_calls import (
    TTL_NS,
    Call,
    claim,
    hold,
    lookup,
    refused,
    renew,
    settle,
    states_of,
    stored,
    upload_request,
)

# -- leases --------------------------------------------------------------------------------------


def test_claim_to_done(inproc_server: InprocServer) -> None:
    """A claimed key is completed once; its state, owner, token and result are then shown."""
    reply = claim(inproc_server, [b"a", b"b"], owner="me")
    assert states_of(reply) == ["GRANTED", "GRANTED"]
    assert list(reply.attempts) == [1, 1]
    assert list(reply.remaining_ns) == [TTL_NS, TTL_NS]
    assert reply.tokens[0] < reply.tokens[1]
    holder = hold(inproc_server, b"c", owner="me")
    result = pb.Result(storage=pb.Result.STORAGE_INLINE, payload=b"value")
    assert states_of(settle(inproc_server, holder, complete=pb.Complete(result=result))) == [
        "COMPLETED"
    ]
    answer = lookup(inproc_server, b"a", b"c", b"d", want_infos=True, want_results=True)
    assert states_of(answer) == ["BUSY", "DONE", "ABSENT"]
    done = answer.infos[1]
    assert (done.owner, done.token, done.result.payload) == ("me", holder.token, b"value")
    assert done.result.size_bytes == 5
    again = claim(inproc_server, [b"c"], want_results=True)
    assert states_of(again) == ["DONE"]
    assert again.results[0].payload == b"value"


def test_claim_is_busy_until_it_expires(inproc_server: InprocServer) -> None:
    """Another's lease is busy until its end, and granted with a greater token then."""
    holder = hold(inproc_server, b"a")
    assert states_of(claim(inproc_server, [b"a"])) == ["BUSY"]
    inproc_server.advance(59.9)
    assert states_of(claim(inproc_server, [b"a"])) == ["BUSY"]
    inproc_server.advance(0.1)
    assert states_of(lookup(inproc_server, b"a")) == ["EXPIRED"]
    other = hold(inproc_server, b"a")
    assert other.token > holder.token


def test_ahead_shows_until_started(inproc_server: InprocServer) -> None:
    """A claim ahead is BUSY_AHEAD for others until a renewal says that it started."""
    holder = hold(inproc_server, b"a", ahead=True)
    assert states_of(claim(inproc_server, [b"a"])) == ["BUSY_AHEAD"]
    assert states_of(renew(inproc_server, holder, started=True)) == ["RENEWED"]
    assert states_of(lookup(inproc_server, b"a")) == ["BUSY"]


def test_renew_moves_the_end(inproc_server: InprocServer) -> None:
    """A renewed lease runs from the renewal, with and without a write."""
    holder = hold(inproc_server, b"a")
    for _ in range(3):
        inproc_server.advance(50)
        before = lookup(inproc_server, b"a").revision
        assert states_of(renew(inproc_server, holder)) == ["RENEWED"]
        assert lookup(inproc_server, b"a").revision == before
    longer = renew(inproc_server, holder, ttl_ns=2 * TTL_NS)
    assert states_of(longer) == ["RENEWED"]
    inproc_server.advance(119)
    assert states_of(lookup(inproc_server, b"a")) == ["BUSY"]


def test_limits_on_grants_and_attempts(inproc_server: InprocServer) -> None:
    """max_grants stops granting, its repetition gets the same keys, max_attempts exhausts."""
    keys = [b"a", b"b", b"c"]
    claim_id = os.urandom(16)
    first = claim(inproc_server, keys, claim_id, max_grants=2)
    assert states_of(first) == ["GRANTED", "GRANTED", "NOT_ASKED"]
    again = claim(inproc_server, keys, claim_id, max_grants=2)
    assert again == first
    for token, key in zip(first.tokens, keys, strict=False):
        holder = pb.Holder(key=key, claim_id=claim_id, token=token)
        assert states_of(settle(inproc_server, holder, fail=pb.Fail(error="boom"))) == ["FAILED"]
    assert states_of(claim(inproc_server, keys, max_attempts=1)) == [
        "EXHAUSTED",
        "EXHAUSTED",
        "GRANTED",
    ]
    info = lookup(inproc_server, b"a", want_infos=True).infos[0]
    assert (info.error, info.attempts, info.token) == ("boom", 1, 0)


def test_stale_holder_is_refused(inproc_server: InprocServer) -> None:
    """Once another was granted the key, all that the old holder asks is LOST, without effect."""
    stale = hold(inproc_server, b"a")
    inproc_server.advance(60)
    hold(inproc_server, b"a", owner="new")
    before = lookup(inproc_server, b"a", want_infos=True)
    for reply in (
        renew(inproc_server, stale),
        settle(inproc_server, stale, complete=pb.Complete()),
        settle(inproc_server, stale, fail=pb.Fail(error="x")),
        settle(inproc_server, stale, release=pb.Release()),
    ):
        assert states_of(reply) == ["LOST"]
        assert list(reply.lost_states) == [pb.KEY_STATE_BUSY]
    assert lookup(inproc_server, b"a", want_infos=True) == before


def test_late_holder_goes_on(inproc_server: InprocServer) -> None:
    """A holder whose lease ran out may renew or complete while nobody else was granted the key."""
    holder = hold(inproc_server, b"a")
    inproc_server.advance(1000)
    assert states_of(renew(inproc_server, holder)) == ["RENEWED"]
    assert states_of(claim(inproc_server, [b"a"])) == ["BUSY"]
    inproc_server.advance(1000)
    assert states_of(settle(inproc_server, holder, complete=pb.Complete())) == ["COMPLETED"]


def test_settle_mixes_kinds(inproc_server: InprocServer) -> None:
    """One request completes, fails and releases; the present state stands behind each LOST."""
    holders = {key: hold(inproc_server, key) for key in (b"a", b"b", b"c")}
    wrong = pb.Holder(key=b"d", claim_id=os.urandom(16), token=1)
    reply = inproc_server.table.Settle(
        pb.SettleRequest(
            settlements=[
                pb.Settlement(holder=holders[b"a"], complete=pb.Complete()),
                pb.Settlement(holder=wrong, complete=pb.Complete()),
                pb.Settlement(holder=holders[b"b"], fail=pb.Fail(error="no")),
                pb.Settlement(holder=holders[b"c"], release=pb.Release()),
            ]
        )
    )
    assert states_of(reply) == ["COMPLETED", "LOST", "FAILED", "RELEASED"]
    assert list(reply.lost_states) == [pb.KEY_STATE_ABSENT]
    assert states_of(lookup(inproc_server, b"a", b"b", b"c")) == ["DONE", "FAILED", "ABSENT"]


# -- repeated requests ---------------------------------------------------------------------------


def test_each_rpc_repeated_equals_once(inproc_server: InprocServer) -> None:
    """Every changing request, sent again with the same ids, is answered alike, without effect."""
    claim_id = os.urandom(16)
    keys = [b"a", b"b", b"c"]
    table = inproc_server.table
    request = pb.ClaimRequest(keys=keys, claim_id=claim_id, ttl_ns=TTL_NS, owner="me")
    tokens = _twice(inproc_server, lambda: table.Claim(request)).tokens
    a, b, c = (
        pb.Holder(key=key, claim_id=claim_id, token=token)
        for key, token in zip(keys, tokens, strict=True)
    )
    _twice(inproc_server, lambda: renew(inproc_server, a, started=True, ttl_ns=2 * TTL_NS))
    value = b"x" * 100
    _twice(inproc_server, lambda: table.UploadResult(upload_request(a, value)))
    _twice(inproc_server, lambda: settle(inproc_server, a, complete=stored(value)))
    _twice(inproc_server, lambda: table.UploadResult(upload_request(a, value)))
    _twice(inproc_server, lambda: settle(inproc_server, b, fail=pb.Fail(error="boom")))
    _twice(inproc_server, lambda: settle(inproc_server, c, release=pb.Release()))
    reset = pb.ResetRequest(keys=[b"b"], max_revision=lookup(inproc_server, b"b").revision)
    _twice(inproc_server, lambda: table.Reset(reset))
    invalidate = pb.InvalidateRequest(invalidations=[pb.Invalidation(key=b"a", token=a.token)])
    revision = table.Invalidate(invalidate).revision
    again = table.Invalidate(invalidate)
    assert states_of(again) == ["KEPT"]
    assert again.revision == revision
    assert states_of(lookup(inproc_server, *keys)) == ["ABSENT"] * 3


def _twice(server: InprocServer, call: Call) -> Any:
    """Make a call twice; its answers and all that is stored must be alike. Give the answer."""
    first = call()
    between = server.table.List(pb.ListRequest(want_results=True))
    assert call() == first
    assert server.table.List(pb.ListRequest(want_results=True)) == between
    return first


def test_reset_spares_newer_holders(inproc_server: InprocServer) -> None:
    """A late repetition of a reset does not hit a holder that came after it."""
    hold(inproc_server, b"a")
    request = pb.ResetRequest(keys=[b"a"], max_revision=lookup(inproc_server, b"a").revision)
    assert states_of(inproc_server.table.Reset(request)) == ["RESET"]
    hold(inproc_server, b"a")
    assert states_of(inproc_server.table.Reset(request)) == ["KEPT"]
    assert states_of(lookup(inproc_server, b"a")) == ["BUSY"]


# -- limits --------------------------------------------------------------------------------------

BAD_KEYS: Final = {
    "empty": (b"", "0 bytes"),
    "long": (b"k" * 1025, "1024"),
    "not UTF-8": (b"\xfe\x00", "UTF-8"),
    "surrogate": (b"\xed\xa0\x80", "UTF-8"),
}


def _requests_with(key: bytes, server: InprocServer) -> list[Call]:
    """Give each request that takes keys, made with a good key before this one."""
    table, keys = server.table, [b"good", key]
    holders = [pb.Holder(key=one, claim_id=b"i" * 16, token=1) for one in keys]
    return [
        lambda: claim(server, keys),
        lambda: table.Renew(
            pb.RenewRequest(renewals=[pb.Renewal(holder=one, ttl_ns=1) for one in holders])
        ),
        lambda: table.Settle(
            pb.SettleRequest(
                settlements=[pb.Settlement(holder=one, release=pb.Release()) for one in holders]
            )
        ),
        lambda: lookup(server, *keys),
        lambda: table.Wait(pb.WaitRequest(keys=keys)),
        lambda: table.Reset(pb.ResetRequest(keys=keys)),
        lambda: table.Invalidate(
            pb.InvalidateRequest(invalidations=[pb.Invalidation(key=one) for one in keys])
        ),
    ]


@pytest.mark.parametrize("why", BAD_KEYS)
def test_bad_keys_change_nothing(inproc_server: InprocServer, why: str) -> None:
    """A bad key anywhere is INVALID_ARGUMENT, said why, and the good ones are left alone."""
    key, word = BAD_KEYS[why]
    for call in _requests_with(key, inproc_server):
        refused(call, grpc.StatusCode.INVALID_ARGUMENT, word)
    assert states_of(lookup(inproc_server, b"good")) == ["ABSENT"]


def test_same_key_twice_is_refused(inproc_server: InprocServer) -> None:
    """The same key twice in one request is INVALID_ARGUMENT and named."""
    for call in _requests_with(b"good", inproc_server):
        refused(call, grpc.StatusCode.INVALID_ARGUMENT, "'good'", "twice")


def test_each_limit_is_enforced(inproc_server: InprocServer) -> None:
    """Going over a limit is INVALID_ARGUMENT, names field and limit, and changes nothing."""
    server, bad = inproc_server, grpc.StatusCode.INVALID_ARGUMENT
    holder = hold(server, b"h")
    many = [b"%d" % number for number in range(limits.MAX_KEYS_PER_REQUEST + 1)]
    refused(lambda: claim(server, many), bad, "keys", str(limits.MAX_KEYS_PER_REQUEST))
    refused(lambda: claim(server, [b"a"], b"short"), bad, "claim_id", "16")
    for ttl_ns in (0, -1, limits.MAX_TTL_NS + 1):
        refused(lambda ttl_ns=ttl_ns: claim(server, [b"a"], ttl_ns=ttl_ns), bad, "ttl_ns")  # type: ignore[misc]
        refused(lambda ttl_ns=ttl_ns: renew(server, holder, ttl_ns=ttl_ns), bad, "'h'")  # type: ignore[misc]
    refused(lambda: claim(server, [b"a"], owner="é" * 129), bad, "owner", "256")
    error = pb.Fail(error="x" * (limits.MAX_ERROR_BYTES + 1))
    refused(lambda: settle(server, holder, fail=error), bad, "error", "'h'")
    big = pb.Result(storage=pb.Result.STORAGE_INLINE, payload=b"x" * 65_537)
    refused(lambda: settle(server, holder, complete=pb.Complete(result=big)), bad, "65536", "'h'")
    sha = pb.Result(storage=pb.Result.STORAGE_INLINE, payload=b"x", sha256=b"short")
    refused(lambda: settle(server, holder, complete=pb.Complete(result=sha)), bad, "sha256")
    refused(lambda: settle(server, holder), bad, "neither")
    too_long = pb.WaitRequest(keys=[b"a"], timeout_ns=limits.MAX_WAIT_NS + 1)
    refused(lambda: server.table.Wait(too_long), bad, "timeout_ns")
    assert states_of(lookup(server, b"a", b"h")) == ["ABSENT", "BUSY"]


def test_largest_allowed_request(inproc_server: InprocServer) -> None:
    """10,000 keys in one request are claimed, renewed, looked up with infos and settled."""
    keys = [b"%05d" % number for number in range(limits.MAX_KEYS_PER_REQUEST)]
    claim_id = os.urandom(16)
    tokens = claim(inproc_server, keys, claim_id).tokens
    assert len(set(tokens)) == len(keys)
    holders = [
        pb.Holder(key=key, claim_id=claim_id, token=token)
        for key, token in zip(keys, tokens, strict=True)
    ]
    renewals = [pb.Renewal(holder=holder, ttl_ns=TTL_NS) for holder in holders]
    renewed = inproc_server.table.Renew(pb.RenewRequest(renewals=renewals))
    assert set(states_of(renewed)) == {"RENEWED"}
    assert len(lookup(inproc_server, *keys, want_infos=True).infos) == len(keys)
    settlements = [pb.Settlement(holder=holder, complete=pb.Complete()) for holder in holders]
    settled = inproc_server.table.Settle(pb.SettleRequest(settlements=settlements))
    assert set(states_of(settled)) == {"COMPLETED"}


def test_server_info_reports_the_limits(inproc_server: InprocServer) -> None:
    """Server info has every limit, the engine, the version and a database id."""
    info = inproc_server.table.GetServerInfo(pb.GetServerInfoRequest())
    assert len(info.database_id) == 16
    assert info.engine == "memory"
    assert info.version
    for field in (
        "key_bytes",
        "keys_per_request",
        "owner_bytes",
        "error_bytes",
        "ttl_ns",
        "wait_ns",
    ):
        assert getattr(info, f"max_{field}") == getattr(limits, f"MAX_{field.upper()}")
    assert info.max_inline_result_bytes == limits.MAX_INLINE_RESULT_BYTES
    assert info.max_result_bytes == limits.MAX_RESULT_BYTES
    assert info.max_chunk_bytes == limits.MAX_CHUNK_BYTES
    inproc_server.advance(5)
    later = inproc_server.table.GetServerInfo(pb.GetServerInfoRequest())
    assert later.uptime_ns - info.uptime_ns == 5 * 10**9


def test_generation_grows_when_done_is_undone(inproc_server: InprocServer) -> None:
    """The reset generation grows when a done key is reset, and only then."""

    def generation() -> int:
        info = inproc_server.table.GetServerInfo(pb.GetServerInfoRequest())
        return int(info.reset_generation)

    holder = hold(inproc_server, b"a")
    settle(inproc_server, holder, complete=pb.Complete())
    assert generation() == 0
    inproc_server.table.Reset(pb.ResetRequest(keys=[b"a"], max_revision=2**63))
    assert generation() == 1


# -- lists and counts ----------------------------------------------------------------------------


def test_list_pages_cover_everything_once(inproc_server: InprocServer) -> None:
    """Pages in byte order, followed by next_start_key, give every key once, filtered as asked."""
    keys = sorted(f"ключ-{number}".encode() for number in range(50))
    held = [hold(inproc_server, key) for key in keys]
    for holder in held[::2]:
        settle(inproc_server, holder, fail=pb.Fail(error="e"))

    def listed(**more: Any) -> list[bytes]:
        found: list[bytes] = []
        start = b""
        while True:
            page = inproc_server.table.List(pb.ListRequest(start_key=start, limit=7, **more))
            assert len(page.infos) <= 7
            found += [info.key for info in page.infos]
            start = page.next_start_key
            if not start:
                return found

    assert listed() == keys
    assert listed(end_key=keys[30]) == keys[:30]
    assert listed(filter=pb.LIST_FILTER_HELD) == keys[1::2]
    assert listed(filter=pb.LIST_FILTER_FAILED) == keys[::2]


def test_list_pages_stay_small(inproc_server: InprocServer) -> None:
    """Large values end a page at about 3 MiB, and none is lost."""
    n_keys = 80
    for number in range(n_keys):
        holder = hold(inproc_server, b"%03d" % number)
        result = pb.Result(storage=pb.Result.STORAGE_INLINE, payload=os.urandom(60_000))
        settle(inproc_server, holder, complete=pb.Complete(result=result))
    start, n_found, n_pages = b"", 0, 0
    while start or not n_pages:
        page = inproc_server.table.List(pb.ListRequest(start_key=start, want_results=True))
        assert page.ByteSize() < 3.2 * 2**20
        assert all(len(info.result.payload) == 60_000 for info in page.infos)
        n_found += len(page.infos)
        n_pages += 1
        start = page.next_start_key
    assert (n_found, n_pages) == (n_keys, 2)
    answer = claim(inproc_server, [b"%03d" % number for number in range(n_keys)], want_results=True)
    assert answer.ByteSize() < 3.2 * 2**20
    assert all(result.size_bytes == 60_000 for result in answer.results)


def test_counts(inproc_server: InprocServer) -> None:
    """Counters and a scanned prefix agree; a namespace counts its own keys only."""
    spaced = b"\x1ens\x1f"
    for prefix in (b"", spaced):
        settle(inproc_server, hold(inproc_server, prefix + b"k1"), complete=pb.Complete())
        settle(inproc_server, hold(inproc_server, prefix + b"k2"), fail=pb.Fail())
        hold(inproc_server, prefix + b"k3", ttl_ns=10**9)
        hold(inproc_server, prefix + b"k4")
    inproc_server.advance(2)
    for request in (
        pb.CountRequest(),
        pb.CountRequest(namespace="ns"),
        pb.CountRequest(prefix=b"k"),
        pb.CountRequest(prefix=spaced),
    ):
        reply = inproc_server.table.Count(request)
        assert (reply.done, reply.failed, reply.expired, reply.held) == (1, 1, 1, 1)
        assert reply.is_complete


# -- the server ----------------------------------------------------------------------------------


def test_overload_is_said(inproc_server: InprocServer) -> None:
    """With too much waiting, a request is RESOURCE_EXHAUSTED, said why, and nothing changes."""
    calls: Any = inproc_server.server._calls
    calls._max_requests = 0
    refused(lambda: claim(inproc_server, [b"a"]), grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
    calls._max_requests = 10
    assert states_of(lookup(inproc_server, b"a")) == ["ABSENT"]


def test_a_bug_is_one_requests_trouble(
    inproc_server: InprocServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unforeseen error is INTERNAL for its request and logged; the others go on."""

    def broken(*_arguments: object, **_options: object) -> None:
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patch:
        patch.setattr("distlock_server.batch.claim", broken)
        refused(lambda: claim(inproc_server, [b"a"]), grpc.StatusCode.INTERNAL, "planted")
    assert "Claim failed" in caplog.text
    assert states_of(claim(inproc_server, [b"a"])) == ["GRANTED"]


def test_a_damaged_record_is_data_loss(inproc_server: InprocServer) -> None:
    """A damaged record is DATA_LOSS for requests that name its key, and only for those."""
    hold(inproc_server, b"bad")
    settle(inproc_server, hold(inproc_server, b"bad2"), complete=pb.Complete())
    engine: Any = inproc_server.server._engine
    engine._store.write({b"bad2": b"\x11garbage"})
    refused(lambda: lookup(inproc_server, b"x", b"bad2"), grpc.StatusCode.DATA_LOSS, "bad2")
    assert states_of(lookup(inproc_server, b"x", b"bad")) == ["ABSENT", "BUSY"]
