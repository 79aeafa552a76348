"""A lock server without a network: the real rules over a dict, under a clock that tests move.

`FakeTransport` stands where `GrpcTransport` stands in a client; tests tell it which of the next
calls fail and how long the way there and back takes. What a key becomes is decided by the
server's own `state.step`, so that this is no second copy of the rules.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeVar, cast

from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from distlock_server.clock import ManualClock
from distlock_server.frontiers import Block, Frontiers
from distlock_server.state import (
    Answer,
    Claim,
    Command,
    Complete,
    Done,
    Fail,
    Failed,
    Held,
    Invalidate,
    Record,
    Release,
    Renew,
    Reset,
    Result,
    Stamp,
    Storage,
    is_stored_change,
    step,
)
from run_once.channel import TransportError
from run_once.client import LockClient
from run_once.lease import LeaseKeeper
from run_once.retrying import RetryPolicy
from run_once.task import Session

ReplyT = TypeVar("ReplyT", bound=Message)

_STATES = {
    Answer.GRANTED: pb.KEY_STATE_GRANTED,
    Answer.DONE: pb.KEY_STATE_DONE,
    Answer.EXHAUSTED: pb.KEY_STATE_EXHAUSTED,
    Answer.NOT_ASKED: pb.KEY_STATE_NOT_ASKED,
    Answer.LOST: pb.KEY_STATE_LOST,
    Answer.RENEWED: pb.KEY_STATE_RENEWED,
    Answer.COMPLETED: pb.KEY_STATE_COMPLETED,
    Answer.FAILED: pb.KEY_STATE_FAILED,
    Answer.RELEASED: pb.KEY_STATE_RELEASED,
    Answer.RESET: pb.KEY_STATE_RESET,
    Answer.KEPT: pb.KEY_STATE_KEPT,
}


class Fault(NamedTuple):
    """How a call fails: with `when` "before" the server saw it, or "after" it did its work."""

    code: str = "UNAVAILABLE"
    when: Literal["before", "after"] = "before"
    detail: str = "planted by the test"


class FakeServer:
    """The table of one server.

    Attributes:
        clock: The server's clock; the client's too, unless it is given another.
        records: What is stored.
        requests: Every request that arrived, with its method's name.
        blobs: Large values by key and token.
        page_keys: Length of a page of a list.
        chunk_bytes: Length of a chunk of a large value.
        n_clients: Clients that `make_client` made; seeds the next one.
    """

    def __init__(self, clock: ManualClock | None = None) -> None:
        self.clock = clock or ManualClock()
        self.records: dict[bytes, Record] = {}
        self.requests: list[tuple[str, Message]] = []
        self.blobs: dict[tuple[bytes, int], bytes] = {}
        self.page_keys = 1000
        self.chunk_bytes = 1000
        self.n_clients = 0
        self._revision = 0
        self._token = 0
        self._frontiers = Frontiers(self.clock)

    def state_of(self, key: bytes) -> int:
        """Give the state of a key, as a lookup shows it."""
        record = self.records.get(key)
        if record is None:
            return pb.KEY_STATE_ABSENT
        if isinstance(record, Done):
            return pb.KEY_STATE_DONE
        if isinstance(record, Failed):
            return pb.KEY_STATE_FAILED
        if record.is_expired(self.clock.now_ns()):
            return pb.KEY_STATE_EXPIRED
        return pb.KEY_STATE_BUSY_AHEAD if record.ahead else pb.KEY_STATE_BUSY

    def methods(self) -> list[str]:
        """Name the methods that were called, in order."""
        return [method for method, _ in self.requests]

    def last(self, request_type: type[ReplyT]) -> ReplyT:
        """Give the last request of a type."""
        return [request for _, request in self.requests if isinstance(request, request_type)][-1]

    def handle(self, method: str, request: Message) -> Message:
        """Answer a request."""
        self.requests.append((method, request))
        handler: Callable[[Message], Message] = getattr(self, f"_{method.lower()}")
        return handler(request)

    def _apply(self, key: bytes, command: Command) -> int:
        """Apply a command; give the state byte of its answer."""
        before = self.records.get(key)
        stamp = Stamp(
            self.clock.now_ns(), self.clock.wall_ns(), self._revision + 1, self._token + 1
        )
        after, outcome = step(before, command, stamp)
        self._token += outcome.is_new_grant
        self._revision += is_stored_change(before, after)
        self.records[key] = after
        if outcome.answer is Answer.BUSY:
            return self.state_of(key)
        return _STATES[outcome.answer]

    def _frontier(self, request: pb.FrontierRequest) -> pb.Slice:
        blocks = [Block(block.digest, block.n_keys) for block in request.blocks]
        found = self._frontiers.next_slice(blocks, request.place, request.n_keys)
        return pb.Slice(block=found.block, place=found.place, n_keys=found.n_keys)

    def _claim(self, request: pb.ClaimRequest) -> pb.ClaimReply:
        if len(set(request.keys)) < len(request.keys):
            raise TransportError("INVALID_ARGUMENT", "keys: a key comes twice in one request")
        reply = pb.ClaimReply()
        states = bytearray()
        mine = [self.records.get(key) for key in request.keys]
        granted = sum(isinstance(r, Held) and r.claim_id == request.claim_id for r in mine)
        for key in request.keys:
            command = Claim(
                request.claim_id,
                request.ttl_ns,
                request.owner,
                request.max_attempts,
                request.ahead,
                may_grant=not request.max_grants or granted < request.max_grants,
            )
            token_before = self._token
            states.append(self._apply(key, command))
            granted += self._token > token_before
            record = self.records[key]
            if states[-1] == pb.KEY_STATE_GRANTED:
                held = cast("Held", record)
                reply.tokens.append(held.token)
                reply.remaining_ns.append(held.deadline_ns - self.clock.now_ns())
                reply.attempts.append(held.attempts)
            if isinstance(record, Done) and request.want_results:
                reply.results.append(_result_message(record))
        reply.states = bytes(states)
        reply.revision = self._revision
        if request.HasField("frontier"):
            reply.next.CopyFrom(self._frontier(request.frontier))
        return reply

    def _renew(self, request: pb.RenewRequest) -> pb.RenewReply:
        states, lost = self._with_lost(
            (r.holder.key, Renew(r.holder.claim_id, r.holder.token, r.ttl_ns, r.started))
            for r in request.renewals
        )
        return pb.RenewReply(states=states, lost_states=lost, revision=self._revision)

    def _settle(self, request: pb.SettleRequest) -> pb.SettleReply:
        commands = [(item.holder.key, _settle_command(item)) for item in request.settlements]
        commands += [
            (key, Complete(part.claim_id, token))
            for part in request.completions
            for key, token in zip(part.keys, part.tokens, strict=True)
        ]
        states, lost = self._with_lost(commands)
        return pb.SettleReply(states=states, lost_states=lost, revision=self._revision)

    def _with_lost(self, items: Iterable[tuple[bytes, Command]]) -> tuple[bytes, bytes]:
        states, lost = bytearray(), bytearray()
        items = list(items)
        if len({key for key, _ in items}) < len(items):
            raise TransportError("INVALID_ARGUMENT", "a key comes twice in one request")
        for key, command in items:
            states.append(self._apply(key, command))
            if states[-1] == pb.KEY_STATE_LOST:
                lost.append(self.state_of(key))
        return bytes(states), bytes(lost)

    def _lookup(self, request: pb.LookupRequest) -> pb.LookupReply:
        infos = [self._info(key) for key in request.keys] if request.want_infos else []
        states = bytes(self.state_of(key) for key in request.keys)
        wants_list = request.want_results and not request.want_infos
        records = [self.records.get(key) for key in request.keys] if wants_list else []
        return pb.LookupReply(
            states=states,
            infos=infos,
            results=[_result_message(record) for record in records if isinstance(record, Done)],
            revision=self._revision,
        )

    def _info(self, key: bytes) -> pb.KeyInfo:
        record = self.records.get(key)
        state = cast("pb.KeyState", self.state_of(key))
        info = pb.KeyInfo(key=key, state=state)
        if record is not None:
            info.token = record.token
            info.revision = record.revision
        if isinstance(record, Done):
            info.result.CopyFrom(_result_message(record))
        if isinstance(record, Failed):
            info.error = record.error
        return info

    def _wait(self, request: pb.WaitRequest) -> pb.WaitReply:
        """Answer at once if enough is settled, else when a lease or the timeout ends."""
        busy = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)
        states = bytes(self.state_of(key) for key in request.keys)
        if sum(state not in busy for state in states) < max(1, request.min_settled):
            self.clock.advance(request.timeout_ns / 1e9)
        states = bytes(self.state_of(key) for key in request.keys)
        return pb.WaitReply(states=states, revision=self._revision)

    def _list(self, request: pb.ListRequest) -> pb.ListReply:
        keys = sorted(
            key
            for key, record in self.records.items()
            if record is not None
            and request.start_key <= key
            and (not request.end_key or key < request.end_key)
        )
        page, rest = keys[: self.page_keys], keys[self.page_keys :]
        return pb.ListReply(
            infos=[self._info(key) for key in page], next_start_key=rest[0] if rest else b""
        )

    def _count(self, request: pb.CountRequest) -> pb.CountReply:
        states = [
            self.state_of(key) for key in list(self.records) if key.startswith(request.prefix)
        ]
        return pb.CountReply(
            done=states.count(pb.KEY_STATE_DONE),
            held=states.count(pb.KEY_STATE_BUSY) + states.count(pb.KEY_STATE_BUSY_AHEAD),
            expired=states.count(pb.KEY_STATE_EXPIRED),
            failed=states.count(pb.KEY_STATE_FAILED),
            is_complete=True,
            revision=self._revision,
        )

    def _reset(self, request: pb.ResetRequest) -> pb.ResetReply:
        states = bytes(self._apply(key, Reset(request.max_revision)) for key in request.keys)
        return pb.ResetReply(states=states, revision=self._revision)

    def _invalidate(self, request: pb.InvalidateRequest) -> pb.InvalidateReply:
        states = bytes(
            self._apply(item.key, Invalidate(item.token)) for item in request.invalidations
        )
        return pb.InvalidateReply(states=states, revision=self._revision)

    def _uploadresult(self, request: pb.UploadResultRequest) -> pb.UploadResultReply:
        holder = request.holder
        record = self.records.get(holder.key)
        if not isinstance(record, Held) or record.token != holder.token:
            raise TransportError("FAILED_PRECONDITION", f"key {holder.key!r} is not held")
        name = (holder.key, holder.token)
        kept = b"" if request.offset_bytes == 0 else self.blobs.get(name, b"")
        if len(kept) < request.offset_bytes:
            raise TransportError("NOT_FOUND", "the beginning is missing")
        self.blobs[name] = kept[: request.offset_bytes] + request.chunk
        return pb.UploadResultReply(received_bytes=len(self.blobs[name]))

    def _downloadresult(self, request: pb.DownloadResultRequest) -> pb.DownloadResultReply:
        data = self.blobs.get((request.key, request.token))
        if data is None:
            raise TransportError("NOT_FOUND", "no such value")
        start = request.offset_bytes
        chunk = data[start : start + self.chunk_bytes]
        return pb.DownloadResultReply(chunk=chunk, size_bytes=len(data))

    def _getserverinfo(self, _request: pb.GetServerInfoRequest) -> pb.GetServerInfoReply:
        return pb.GetServerInfoReply(
            version="fake",
            database_id=bytes(16),
            engine="dict",
            revision=self._revision,
            max_key_bytes=1024,
            max_keys_per_request=10_000,
            max_error_bytes=100,
            max_inline_result_bytes=1000,
            max_result_bytes=100_000,
            max_chunk_bytes=self.chunk_bytes,
        )


class FakeTransport:
    """The way to a `FakeServer`, with faults.

    Attributes:
        server: The server.
        faults: What becomes of the next calls: None lets one pass; empty: all pass.
        is_down: No call passes.
        there_s: Time that a request takes, by the server's clock.
        back_s: Time that a reply takes.
    """

    def __init__(self, server: FakeServer, address: str = "fake:1") -> None:
        self.server = server
        self.address = address
        self.faults: deque[Fault | None] = deque()
        self.is_down = False
        self.is_closed = False
        self.there_s = 0.0
        self.back_s = 0.0
        self.timeouts_s: list[float] = []

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Pass a call on, or let it fail as planned."""
        self.timeouts_s.append(timeout_s)
        fault = self.faults.popleft() if self.faults else None
        if self.is_down:
            fault = Fault()
        if fault is not None and fault.when == "before":
            raise TransportError(fault.code, fault.detail)
        self.server.clock.advance(self.there_s)
        reply = self.server.handle(method, request)
        self.server.clock.advance(self.back_s)
        if fault is not None:
            raise TransportError(fault.code, fault.detail)
        assert isinstance(reply, reply_type)
        return reply

    def close(self) -> None:
        """Note that it was closed."""
        self.is_closed = True


def make_client(
    transport: FakeTransport, *, max_keys: int = 10_000, retry: RetryPolicy | None = None
) -> LockClient:
    """Make a client whose sleeping moves the server's clock."""
    clock = transport.server.clock
    transport.server.n_clients += 1  # two clients must not make the same claim ids
    return LockClient(
        transport,
        clock=clock,
        rng=random.Random(transport.server.n_clients),
        sleep=clock.advance,
        retry=retry or RetryPolicy(),
        owner="tester",
        source="a test",
        max_keys=max_keys,
    )


def make_session(transport: FakeTransport) -> Session:
    """Make a session whose keeper has no thread: the test calls `session.keeper.step()`."""
    client = make_client(transport)
    return Session(client, LeaseKeeper(client, use_thread=False))


def _result_message(done: Done) -> pb.Result:
    result = done.result
    return pb.Result(
        storage=cast("pb.Result.Storage", int(result.storage)),
        payload=result.payload,
        size_bytes=result.size_bytes,
        sha256=result.sha256,
        token=done.token,
    )


def _settle_command(item: pb.Settlement) -> Command:
    holder = item.holder
    how = item.WhichOneof("how")
    if how == "complete":
        sent = item.complete.result
        result = Result(Storage(sent.storage), sent.payload, sent.size_bytes, sent.sha256)
        return Complete(holder.claim_id, holder.token, result)
    if how == "fail":
        return Fail(holder.claim_id, holder.token, item.fail.error)
    assert how == "release"
    return Release(holder.claim_id, holder.token)
