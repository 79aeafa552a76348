"""Typed calls to the lock table, with bounded retries.

Each logical call keeps its claim id over its retries, so that a lost reply costs nothing. A
lease is counted from the *send* time of the attempt that was answered, less a margin: the
client must give a lease up before the server gives it to another.

Everything from outside (transport, clock, chance, sleep) is an argument; a simulation steps the
real client in one thread.
"""

from __future__ import annotations

import itertools
import operator
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, Literal

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import (
    NS_PER_S,
    ClaimAnswer,
    Grant,
    LookupAnswer,
    RenewAnswer,
    SettleAnswer,
    Settlement,
    add_completions,
    check,
    in_requests,
    name_holder,
    read_claim,
    read_renewals,
    read_results,
    read_settled,
    read_slice,
    settle_request,
    to_ns,
)
from run_once.buffers import Parts
from run_once.channel import FORKED, Transport
from run_once.clock import Clock, SystemClock
from run_once.errors import ServerError
from run_once.retrying import DEFAULT_RETRY, Caller, RetryPolicy
from run_once.together import (
    MAX_SMALL,
    Ask,
    Ends,
    Ticket,
    Together,
    may_claim_together,
    may_settle_together,
)
from run_once.transfers import download_result, upload_result

__all__ = [
    "ClaimAnswer",
    "Grant",
    "LockClient",
    "LookupAnswer",
    "RenewAnswer",
    "RetryPolicy",
    "SettleAnswer",
    "Settlement",
]

CLAIM_ID_BYTES: Final = 16
MAX_KEYS_PER_REQUEST: Final = 10_000

_SCAN_TIMEOUT_S: Final = 60.0
_WAIT_SLICE_S: Final = 20.0
_WAIT_GRACE_S: Final = 10.0


class LockClient:
    """Typed calls to one lock server; any number of threads may call at once.

    Small claims and settlements of threads that call at the same time travel in one request.

    Every method raises `ServerUnavailableError` once the bound on retries is passed,
    `LimitError` if the server refuses the request as malformed or too large, and `ServerError`
    for any other refusal.

    Attributes:
        transport: The way to the server.
        clock: What leases are counted by.
        owner: Label shown to people as the holder.

    `source` says in messages where the address was configured; `revive` is called after a failed
    attempt to start a server that may have ended.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        sleep: Callable[[float], None] = time.sleep,
        retry: RetryPolicy = DEFAULT_RETRY,
        owner: str = "",
        source: str = "",
        revive: Callable[[], None] | None = None,
        max_keys: int = MAX_KEYS_PER_REQUEST,
    ) -> None:
        self.transport = transport
        self.clock = clock or SystemClock()
        self.owner = owner
        self._rng = rng
        self._sleep = sleep
        self._max_keys = max_keys
        jitter = rng or random.Random()  # noqa: S311 (not for secrets)
        self._caller = Caller(transport, self.clock, jitter, sleep, retry, source, revive)
        self._limits: pb.GetServerInfoReply | None = None
        self._together = Together(max_keys)

    def with_retry(self, retry: RetryPolicy) -> LockClient:
        """Give a client over the same transport, clock and chance with other bounds on retries."""
        return LockClient(
            self.transport,
            clock=self.clock,
            rng=self._rng,
            sleep=self._sleep,
            retry=retry,
            owner=self.owner,
            max_keys=self._max_keys,
        )

    def new_claim_id(self) -> bytes:
        """Make the identity of a logical claim."""
        if self._rng is not None:
            return self._rng.randbytes(CLAIM_ID_BYTES)
        return secrets.token_bytes(CLAIM_ID_BYTES)

    def claim(
        self,
        keys: Sequence[bytes],
        *,
        ttl_s: float,
        claim_id: bytes | Ticket | None = None,
        max_grants: int = 0,
        max_attempts: int = 0,
        ahead: bool = False,
        want_results: bool = False,
        frontier: pb.FrontierRequest | None = None,
    ) -> ClaimAnswer:
        """Ask for leases.

        Args:
            keys: Stored keys, each once; any number.
            ttl_s: Length of the leases.
            claim_id: Identity of the claim; None: a new one. With a ticket, or none, the claim may
                travel with those of other threads.
            max_grants: Grant at most so many; 0: no limit.
            max_attempts: Do not grant a key that was attempted so often; 0: no limit.
            ahead: The holder will not start at once.
            want_results: Ask for the results of done keys.
            frontier: Ask as well from where to ask next; with keys of one request only.

        Returns:
            States in the order of the keys, and the grants among them.
        """
        is_plain = frontier is None and not want_results
        if is_plain and may_claim_together(keys, claim_id, max_grants):
            ticket = claim_id if isinstance(claim_id, Ticket) else Ticket(self.new_claim_id())
            return self._together.claim(Ask(self, ticket, keys, ttl_s, max_attempts, ahead))
        if isinstance(claim_id, Ticket):
            claim_id = claim_id.claim_id
        claim_id = claim_id or self.new_claim_id()
        states = bytearray()
        grants: list[Grant] = []
        results: dict[bytes, pb.Result] = {}
        revision = 0
        following: pb.Slice | None = None
        for part in self._parts(keys):
            if 0 < max_grants <= len(grants):
                answer = self._look_instead(part, want_results=want_results)
            else:
                request = pb.ClaimRequest(
                    keys=part,
                    claim_id=claim_id,
                    ttl_ns=to_ns(ttl_s),
                    owner=self.owner,
                    max_grants=max_grants - len(grants) if max_grants else 0,
                    max_attempts=max_attempts,
                    ahead=ahead,
                    want_results=want_results,
                    frontier=frontier,
                )
                reply, sent_ns = self._caller.call("Claim", request, pb.ClaimReply)
                answer = read_claim(request, reply, sent_ns)
                if frontier is not None and reply.HasField("next"):
                    following = read_slice(frontier, reply.next)
            states += answer.states
            grants += answer.grants
            results |= answer.results
            revision = answer.revision
        return ClaimAnswer(bytes(states), grants, results, revision, following)

    def next_slice(self, frontier: pb.FrontierRequest) -> pb.Slice | None:
        """Ask from where to ask next.

        Returns:
            The keys to ask for; None: this server does not know.
        """
        try:
            told, _ = self._caller.call("Frontier", frontier, pb.Slice, not_again=_UNKNOWN)
            return read_slice(frontier, told)
        except ServerError as error:
            if error.code in _UNKNOWN:
                return None
            raise

    def renew(
        self,
        items: Sequence[tuple[Grant, float, bool]],
        *,
        timeout_s: float | None = None,
    ) -> list[RenewAnswer]:
        """Let leases run on.

        Args:
            items: Grant, length of the lease from now in seconds, and whether the holder has
                started.
            timeout_s: Try once and for so long only; None: with the usual retries.

        Returns:
            An answer for each, in order.
        """
        send = partial(self._renew_part, timeout_s=timeout_s)
        return in_requests(items, lambda item: item[0].key, self._max_keys, send)

    def settle(
        self, items: Sequence[Settlement], *, timeout_s: float | None = None
    ) -> list[SettleAnswer]:
        """End leases: complete, fail and release may be mixed.

        Args:
            items: What becomes of which lease.
            timeout_s: Try once and for so long only; None: with the usual retries.

        Returns:
            One answer per item, in order.
        """
        if timeout_s is None and may_settle_together(items):
            return self._together.settle(Ends(self, items))
        return self.settle_alone(items, timeout_s=timeout_s)

    def complete_all(self, grants: Sequence[Grant]) -> list[SettleAnswer]:
        """Complete keys without values; see `settle`."""
        if len(grants) <= MAX_SMALL:
            return self.settle([Settlement(grant, "complete") for grant in grants])
        key_of = operator.attrgetter("key")
        return in_requests(grants, key_of, self._max_keys, self._complete_part)

    def settle_alone(
        self, items: Sequence[Settlement], *, timeout_s: float | None = None
    ) -> list[SettleAnswer]:
        """Settle in requests of their own; see `settle`."""
        send = partial(self._settle_part, timeout_s=timeout_s)
        return in_requests(items, lambda item: item.grant.key, self._max_keys, send)

    def lookup(
        self, keys: Sequence[bytes], *, want_infos: bool = False, want_results: bool = False
    ) -> LookupAnswer:
        """Read keys.

        Args:
            keys: Stored keys; any number.
            want_infos: Ask for a `KeyInfo` per key.
            want_results: Ask for the results of done keys: in the infos, if those are asked for.
        """
        states = bytearray()
        infos: list[pb.KeyInfo] = []
        results: dict[bytes, pb.Result] = {}
        revision = 0
        for part in self._parts(keys):
            request = pb.LookupRequest(keys=part, want_infos=want_infos, want_results=want_results)
            reply, _ = self._caller.call("Lookup", request, pb.LookupReply)
            check(len(reply.states) == len(part), "Lookup")
            states += reply.states
            infos += reply.infos
            if want_results and not want_infos:
                results |= read_results(part, reply)
            revision = reply.revision
        return LookupAnswer(bytes(states), infos, results, revision)

    def wait(self, keys: Sequence[bytes], timeout_s: float, *, min_settled: int = 1) -> bytes:
        """Wait until keys can no longer be BUSY: done, failed, absent or expired.

        Only the first 10,000 keys wake the call; the others are looked up when it ends.

        Args:
            keys: Stored keys.
            timeout_s: Return after so long at the latest.
            min_settled: Return once so many are not busy.

        Returns:
            One state byte per key.
        """
        watched, others = keys[: self._max_keys], keys[self._max_keys :]
        if not watched:
            return b""
        end_ns = self.clock.now_ns() + to_ns(timeout_s)
        enough = min(max(1, min_settled), len(watched))
        while True:
            remaining_ns = max(0, end_ns - self.clock.now_ns())
            states = self._poll(watched, min(remaining_ns, to_ns(_WAIT_SLICE_S)), enough)
            if states is None:
                continue
            n_busy = sum(states.count(state) for state in _BUSY_STATES)
            if self.clock.now_ns() >= end_ns or len(watched) - n_busy >= enough:
                return states + (self.lookup(others).states if others else b"")

    def count(self, *, namespace: str = "", prefix: bytes = b"") -> pb.CountReply:
        """Count the keys of a namespace, or those that start with `prefix` as stored."""
        request = pb.CountRequest(namespace=namespace, prefix=prefix)
        return self._caller.call("Count", request, pb.CountReply, timeout_s=_SCAN_TIMEOUT_S)[0]

    def reset(self, keys: Sequence[bytes], max_revision: int) -> bytes:
        """Make keys absent that did not change after `max_revision`: RESET or KEPT for each."""
        states = bytearray()
        for part in self._parts(keys):
            request = pb.ResetRequest(keys=part, max_revision=max_revision)
            reply, _ = self._caller.call("Reset", request, pb.ResetReply)
            check(len(reply.states) == len(part), "Reset")
            states += reply.states
        return bytes(states)

    def invalidate(self, items: Sequence[tuple[bytes, int]]) -> bytes:
        """Make done keys absent whose result, stored under the token, cannot be used."""
        states = bytearray()
        for start in range(0, len(items), self._max_keys):
            part = [
                pb.Invalidation(key=key, token=token)
                for key, token in items[start : start + self._max_keys]
            ]
            request = pb.InvalidateRequest(invalidations=part)
            reply, _ = self._caller.call("Invalidate", request, pb.InvalidateReply)
            check(len(reply.states) == len(part), "Invalidate")
            states += reply.states
        return bytes(states)

    def upload_result(
        self, grant: Grant, data: bytes | Parts, sha256: bytes | None = None
    ) -> pb.Result:
        """Send a large value before the settlement that names it; see `run_once.transfers`."""
        return upload_result(self._caller, grant, data, self.limits(), sha256)

    def download_result(self, key: bytes, token: int, size_bytes: int) -> memoryview:
        """Fetch a large value of a done key; see `run_once.transfers`."""
        return download_result(self._caller, key, token, size_bytes)

    def release_grants(
        self, grants: Sequence[Grant], *, timeout_s: float | None = None
    ) -> list[SettleAnswer]:
        """Give keys back that were claimed without a lease object."""
        settlements = [Settlement(grant, "release") for grant in grants]
        return self.settle(settlements, timeout_s=timeout_s)

    def server_info(self, *, timeout_s: float | None = None) -> pb.GetServerInfoReply:
        """Ask which server this is; with `timeout_s` once and for so long only."""
        request = pb.GetServerInfoRequest()
        reply, _ = self._caller.call(
            "GetServerInfo", request, pb.GetServerInfoReply, once_s=timeout_s
        )
        return reply

    def limits(self) -> pb.GetServerInfoReply:
        """Give the server's limits; asked for once."""
        if self._limits is None:
            self._limits = self.server_info()
        return self._limits

    def close(self) -> None:
        """Close the connection."""
        self.transport.close()

    def _parts(self, keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
        """Split keys into requests."""
        for start in range(0, len(keys), self._max_keys):
            yield keys[start : start + self._max_keys]

    def _poll(self, keys: Sequence[bytes], timeout_ns: int, min_settled: int) -> bytes | None:
        """Make one Wait; None if it was cut short by a fork, so that its time is counted anew."""
        request = pb.WaitRequest(keys=keys, timeout_ns=timeout_ns, min_settled=min_settled)
        deadline_s = timeout_ns / NS_PER_S + _WAIT_GRACE_S
        try:
            reply, _ = self._caller.call(
                "Wait", request, pb.WaitReply, timeout_s=deadline_s, not_again=_FORKED
            )
        except ServerError as error:
            if error.code == FORKED:
                return None
            raise
        check(len(reply.states) == len(keys), "Wait")
        return bytes(reply.states)

    def _look_instead(self, keys: Sequence[bytes], *, want_results: bool) -> ClaimAnswer:
        """Answer for keys behind the limit on grants: a request cannot say "none"."""
        found = self.lookup(keys, want_results=want_results)
        free = (pb.KEY_STATE_ABSENT, pb.KEY_STATE_FAILED, pb.KEY_STATE_EXPIRED)
        states = bytes(pb.KEY_STATE_NOT_ASKED if s in free else s for s in found.states)
        return ClaimAnswer(states, [], found.results, found.revision)

    def _renew_part(
        self, items: Sequence[tuple[Grant, float, bool]], timeout_s: float | None
    ) -> list[RenewAnswer]:
        """Make one renew request."""
        renewals = [
            pb.Renewal(holder=name_holder(grant), ttl_ns=to_ns(ttl_s), started=started)
            for grant, ttl_s, started in items
        ]
        request = pb.RenewRequest(renewals=renewals)
        reply, sent_ns = self._caller.call("Renew", request, pb.RenewReply, once_s=timeout_s)
        return read_renewals([grant for grant, _, _ in items], request, reply, sent_ns)

    def _settle_part(
        self, items: Sequence[Settlement], timeout_s: float | None
    ) -> list[SettleAnswer]:
        """Make one settle request; only a text needs the server's limit."""
        request, order = settle_request(items, lambda: self.limits().max_error_bytes)
        reply, _ = self._caller.call("Settle", request, pb.SettleReply, once_s=timeout_s)
        answers = read_settled(reply, len(items))
        if order == list(range(len(items))):
            return answers
        by_place = dict(zip(order, answers, strict=True))
        return [by_place[place] for place in range(len(items))]

    def _complete_part(self, grants: Sequence[Grant]) -> list[SettleAnswer]:
        """Make one settle request of completions without values."""
        request = pb.SettleRequest()
        for _, run in itertools.groupby(grants, operator.attrgetter("claim_id")):
            add_completions(request, list(run))
        reply, _ = self._caller.call("Settle", request, pb.SettleReply)
        return read_settled(reply, len(grants))

    def blocks_done(self, digests: Sequence[bytes]) -> bytes:
        """Ask whether blocks of keys are known to be done as a whole.

        Args:
            digests: The blocks' digests; see `LookupRequest.blocks`.

        Returns:
            One byte per block: 1 if all of its keys are done, 0 if that is not known.
        """
        request = pb.LookupRequest(blocks=digests)
        reply, _ = self._caller.call("Lookup", request, pb.LookupReply)
        # A server that knows no blocks leaves them out.
        return reply.blocks if len(reply.blocks) == len(digests) else bytes(len(digests))

    def list(
        self,
        start_key: bytes = b"",
        end_key: bytes = b"",
        *,
        only: Literal["all", "held", "failed"] = "all",
        want_results: bool = False,
    ) -> Iterator[pb.KeyInfo]:
        """List keys in byte order, page by page.

        Args:
            start_key: First key, inclusive; empty: from the start.
            end_key: Last key, exclusive; empty: to the end.
            only: Which keys.
            want_results: Put results of done keys into the infos.

        Yields:
            One info per key.
        """
        while True:
            request = pb.ListRequest(
                start_key=start_key,
                end_key=end_key,
                filter=_FILTERS[only],
                want_results=want_results,
            )
            reply, _ = self._caller.call("List", request, pb.ListReply, timeout_s=_SCAN_TIMEOUT_S)
            yield from reply.infos
            if not reply.next_start_key:
                return
            check(reply.next_start_key > start_key, "List")
            start_key = reply.next_start_key


_FORKED: Final = frozenset({FORKED})
_UNKNOWN: Final = frozenset({"UNIMPLEMENTED"})
_BUSY_STATES: Final = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)
_FILTERS: Final = {
    "all": pb.LIST_FILTER_ALL,
    "held": pb.LIST_FILTER_HELD,
    "failed": pb.LIST_FILTER_FAILED,
}
