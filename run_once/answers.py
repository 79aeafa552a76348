"""What calls to the lock table are made of and answered with, on the client's side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, Literal, NamedTuple, TypeAlias, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.errors import ServerError

NS_PER_S: Final = 1_000_000_000

_MARGIN_DIVISOR: Final = 20
_MIN_MARGIN_NS: Final = 1_000_000

How: TypeAlias = Literal["complete", "fail", "release"]

ItemT = TypeVar("ItemT")
AnswerT = TypeVar("AnswerT")


class Grant(NamedTuple):
    """What the server promised with one key.

    Attributes:
        key: The key as stored.
        claim_id: Identity of the claim, 16 bytes.
        token: Fencing token.
        attempt: Number of this attempt; the first is 1.
        expires_ns: When to stop believing in the lease, on the client's clock.
    """

    key: bytes
    claim_id: bytes
    token: int
    attempt: int
    expires_ns: int


_make_grant: Final = partial(tuple.__new__, Grant)
"""Makes a grant of all of its fields in order; a call of the class takes twice as long."""


class ClaimAnswer(NamedTuple):
    """What a claim was answered.

    Attributes:
        states: One state byte per key (`KeyState`).
        grants: What was granted.
        results: Those of done keys, if asked for.
        revision: The store revision.
        following: From where to ask next, if asked for and known.
    """

    states: bytes
    grants: list[Grant]
    results: dict[bytes, pb.Result]
    revision: int
    following: pb.Slice | None = None


class RenewAnswer(NamedTuple):
    """RENEWED with the new expiry, or LOST (or 0 behind it) with the key's present state."""

    state: int
    lost_state: int
    expires_ns: int


class Settlement(NamedTuple):
    """How a lease ends; `result` goes with "complete", `error` with "fail"."""

    grant: Grant
    how: How
    result: pb.Result | None = None
    error: str = ""


class SettleAnswer(NamedTuple):
    """COMPLETED, FAILED or RELEASED; or LOST with the key's present state."""

    state: int
    lost_state: int = 0

    @property
    def is_lost(self) -> bool:
        """Tell whether the settlement was refused."""
        return self.state == pb.KEY_STATE_LOST


class LookupAnswer(NamedTuple):
    """One state byte per key; infos of all keys and results of done ones if asked for."""

    states: bytes
    infos: list[pb.KeyInfo]
    results: dict[bytes, pb.Result]
    revision: int


def in_requests(
    items: Sequence[ItemT],
    key_of: Callable[[ItemT], bytes],
    max_keys: int,
    send: Callable[[Sequence[ItemT]], list[AnswerT]],
) -> list[AnswerT]:
    """Send items in as many requests as it takes, and give the answers in the items' order.

    A request must not name a key twice, but a process may have two leases on one: the newer, and
    one that ran out without word from the server. The refusal would cost it all the others too.

    Args:
        items: What to send.
        key_of: Gives an item's key.
        max_keys: Keys in one request at most.
        send: Makes one request.
    """
    keys = list(map(key_of, items))
    if len(keys) <= max_keys and len(set(keys)) == len(keys):
        return send(items) if items else []
    rounds: list[list[int]] = []
    seen: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        earlier = seen.get(key, 0)
        seen[key] = earlier + 1
        if earlier == len(rounds):
            rounds.append([])
        rounds[earlier].append(place)
    answers: dict[int, AnswerT] = {}
    for places in rounds:
        for start in range(0, len(places), max_keys):
            part = places[start : start + max_keys]
            sent = send([items[place] for place in part])
            answers.update(zip(part, sent, strict=True))
    return [answers[place] for place in range(len(items))]


def to_ns(seconds: float) -> int:
    """Turn seconds into nanoseconds."""
    return round(seconds * NS_PER_S)


def margin_ns(ttl_ns: int) -> int:
    """Give by how much the client's end of a lease lies before the server's."""
    return max(ttl_ns // _MARGIN_DIVISOR, _MIN_MARGIN_NS)


def name_holder(grant: Grant) -> pb.Holder:
    """Name a lease to the server."""
    return pb.Holder(key=grant.key, claim_id=grant.claim_id, token=grant.token)


def with_lost(reply: pb.RenewReply | pb.SettleReply, states: bytes) -> Iterator[tuple[int, int]]:
    """Pair each state with the present state behind a LOST, else 0."""
    check(states.count(pb.KEY_STATE_LOST) == len(reply.lost_states), type(reply).__name__)
    lost = iter(reply.lost_states)
    for state in states:
        yield state, next(lost) if state == pb.KEY_STATE_LOST else 0


def check(is_well_formed: bool, method: str) -> None:
    """Refuse an answer that breaks the contract: it is no table of ours.

    Raises:
        ServerError: It does.
    """
    if not is_well_formed:
        raise ServerError(f"the lock server's answer to {method} is malformed: update it")


def read_claim(request: pb.ClaimRequest, reply: pb.ClaimReply, sent_ns: int) -> ClaimAnswer:
    """Read the answer to a claim that was sent at `sent_ns`.

    Raises:
        ServerError: It does not fit the request.
    """
    states = bytes(reply.states)
    check(len(states) == len(request.keys), "Claim")
    granted = _granted(list(request.keys), states)
    check(
        len(granted) == len(reply.tokens) == len(reply.remaining_ns) == len(reply.attempts), "Claim"
    )
    claim_id, start_ns = request.claim_id, sent_ns - margin_ns(request.ttl_ns)
    expires = [start_ns + remaining_ns for remaining_ns in reply.remaining_ns]
    ids = itertools.repeat(claim_id, len(granted))
    fields = zip(granted, ids, reply.tokens, reply.attempts, expires, strict=True)
    grants = list(map(_make_grant, fields))
    results = read_results(request.keys, reply) if request.want_results else {}
    return ClaimAnswer(states, grants, results, reply.revision)


def read_slice(frontier: pb.FrontierRequest, told: pb.Slice) -> pb.Slice:
    """Read from where to ask next.

    Raises:
        ServerError: There are no such keys in the blocks that were asked about.
    """
    n_keys = [block.n_keys for block in frontier.blocks]
    is_behind = told.block == len(n_keys)
    is_there = told.block < len(n_keys) and 0 < told.n_keys <= n_keys[told.block] - told.place
    check(is_behind or is_there, "Frontier")
    return told


def _granted(keys: list[bytes], states: bytes) -> list[bytes]:
    """Give the keys that were granted; mostly all of them, or none."""
    n_granted = states.count(pb.KEY_STATE_GRANTED)
    if n_granted in (0, len(keys)):
        return keys[:n_granted]
    pairs = zip(keys, states, strict=True)
    return [key for key, state in pairs if state == pb.KEY_STATE_GRANTED]


def read_results(
    keys: Sequence[bytes], reply: pb.ClaimReply | pb.LookupReply
) -> dict[bytes, pb.Result]:
    """Pair the done keys with their results.

    Raises:
        ServerError: The reply does not fit the request.
    """
    check(len(reply.states) == len(keys), type(reply).__name__)
    done = [
        key for key, state in zip(keys, reply.states, strict=True) if state == pb.KEY_STATE_DONE
    ]
    check(len(reply.results) == len(done), type(reply).__name__)
    return dict(zip(done, reply.results, strict=True))


def read_renewals(
    grants: Sequence[Grant], request: pb.RenewRequest, reply: pb.RenewReply, sent_ns: int
) -> list[RenewAnswer]:
    """Read the answer to a renewal that was sent at `sent_ns`.

    Raises:
        ServerError: It does not fit the request.
    """
    check(len(reply.states) == len(grants), "Renew")
    answers = []
    for grant, renewal, (state, lost_state) in zip(
        grants, request.renewals, with_lost(reply, reply.states), strict=True
    ):
        expires_ns = grant.expires_ns
        if state == pb.KEY_STATE_RENEWED:
            expires_ns = sent_ns + renewal.ttl_ns - margin_ns(renewal.ttl_ns)
        answers.append(RenewAnswer(state, lost_state, expires_ns))
    return answers


def settle_request(
    items: Sequence[Settlement], max_error_bytes: Callable[[], int]
) -> tuple[pb.SettleRequest, list[int]]:
    """Make a settle request: completions without values go in their shorter form.

    Args:
        items: What becomes of which lease.
        max_error_bytes: Gives the server's limit on texts, if one is needed.

    Returns:
        The request, and the places of the items in the order in which they are answered.
    """
    request = pb.SettleRequest()
    order: list[int] = []
    short: dict[bytes, list[int]] = {}
    for place, (grant, how, result, error) in enumerate(items):
        if how == "complete" and result is None:
            short.setdefault(grant.claim_id, []).append(place)
        else:
            limit = max_error_bytes() if error else 0
            request.settlements.append(settlement_message(items[place], limit))
            order.append(place)
    for places in short.values():
        add_completions(request, [items[place].grant for place in places])
        order += places
    return request, order


def add_completions(request: pb.SettleRequest, grants: Sequence[Grant]) -> None:
    """Have keys of one claim completed without values."""
    request.completions.add(
        claim_id=grants[0].claim_id,
        keys=[grant.key for grant in grants],
        tokens=[grant.token for grant in grants],
    )


def read_settled(reply: pb.SettleReply, count: int) -> list[SettleAnswer]:
    """Read the answer to so many settlements, in the order of the request.

    Raises:
        ServerError: It does not fit the request.
    """
    states = reply.states
    check(len(states) == count, "Settle")
    if reply.lost_states or pb.KEY_STATE_LOST in states:
        return [SettleAnswer(state, lost) for state, lost in with_lost(reply, states)]
    accepted = {state: SettleAnswer(state) for state in set(states)}
    return list(map(accepted.__getitem__, states))


def settlement_message(item: Settlement, max_error_bytes: int) -> pb.Settlement:
    """Make the message of a settlement; of a text that is too long the end is kept."""
    made = pb.Settlement(holder=name_holder(item.grant))
    if item.how == "complete":
        made.complete.SetInParent()
        if item.result is not None:
            made.complete.result.CopyFrom(item.result)
    elif item.how == "fail":
        made.fail.SetInParent()
        raw = item.error.encode("utf-8", "replace")
        cut = raw[max(0, len(raw) - max_error_bytes) :]
        made.fail.error = cut.decode("utf-8", "ignore")
    else:
        made.release.SetInParent()
    return made
