"""Claims and settlements of several threads in one request: what may travel, and who gets what.

Nothing of it is seen at the server: claims that travel together are one claim of many keys. They
have one claim id, so their keys must differ: of two threads that claim one key, one is told BUSY.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import ClaimAnswer, SettleAnswer, Settlement
from run_once.errors import RunOnceError
from run_once.gather import MAX_TOGETHER, Gather

logger = logging.getLogger(__name__)

MAX_SMALL: Final = 64
"""A call of more keys travels alone, and holds nobody up."""

MAX_KEY_BYTES: Final = 1_024
"""Longer keys are refused by the server, and with them all that is in the same request."""

_RELEASE_S: Final = 2.0


class Ticket:
    """Identity of a claim that may travel with others.

    Attributes:
        claim_id: The id by which the server knows it; that of another claim once it travels with
            it, and then for good.
    """

    __slots__ = ("claim_id",)

    def __init__(self, claim_id: bytes) -> None:
        self.claim_id = claim_id


class Client(Protocol):
    """What is needed of a client: calls that travel alone."""

    def claim(
        self,
        keys: Sequence[bytes],
        *,
        ttl_s: float,
        claim_id: bytes | Ticket | None,
        max_attempts: int,
        ahead: bool,
    ) -> ClaimAnswer:
        """See `LockClient.claim`."""
        ...

    def settle_alone(
        self, items: Sequence[Settlement], *, timeout_s: float | None = None
    ) -> list[SettleAnswer]:
        """See `LockClient.settle_alone`."""
        ...


class Ask(NamedTuple):
    """What one thread claims.

    The client is here and nowhere else: if this module knew it, only the garbage collector would
    close a connection that was left open.
    """

    client: Client
    ticket: Ticket
    keys: Sequence[bytes]
    ttl_s: float
    max_attempts: int
    ahead: bool


class Ends(NamedTuple):
    """What one thread settles."""

    client: Client
    items: Sequence[Settlement]


class Together:
    """The claims and the settlements of a client's threads."""

    def __init__(self, max_keys: int) -> None:
        most = min(max_keys, MAX_TOGETHER)
        self._claims: Gather[Ask, ClaimAnswer] = Gather(_claim, _give_back, max_names=most)
        self._ends: Gather[Ends, list[SettleAnswer]] = Gather(_settle, max_names=most)

    def claim(self, ask: Ask) -> ClaimAnswer:
        """Claim, with what other threads claim just now if there is any."""
        like = (ask.ttl_s, ask.max_attempts, ask.ahead)
        return self._claims.call(ask, ask.keys, like)

    def settle(self, ends: Ends) -> list[SettleAnswer]:
        """Settle, with what other threads settle just now if there is any."""
        return self._ends.call(ends, [item.grant.key for item in ends.items])


def may_claim_together(
    keys: Sequence[bytes], claim_id: bytes | Ticket | None, max_grants: int
) -> bool:
    """Tell whether a claim may travel with others.

    It must not be known under an id that stays, all of its keys may be granted, and the server
    will not refuse it for them: one that is refused costs the others another request.
    """
    return (
        not isinstance(claim_id, bytes)
        and 0 < len(keys) <= MAX_SMALL
        and (max_grants == 0 or max_grants >= len(keys))
        and _are_sound(keys)
    )


def may_settle_together(items: Sequence[Settlement]) -> bool:
    """Tell whether settlements may travel with others: they carry neither value nor text."""
    return (
        0 < len(items) <= MAX_SMALL
        and all(item.result is None and not item.error for item in items)
        and _are_sound([item.grant.key for item in items])
    )


def _are_sound(keys: Sequence[bytes]) -> bool:
    """Tell whether these are keys, each once."""
    if len(keys) > 1 and len(set(keys)) != len(keys):
        return False
    return all(type(key) is bytes and 0 < len(key) <= MAX_KEY_BYTES for key in keys)


def _parted(answer: ClaimAnswer, counts: Sequence[int]) -> Iterator[ClaimAnswer]:
    """Give each of the claims in one request, which have so many keys, its own answer."""
    at = n_granted = 0
    for count in counts:
        states = answer.states[at : at + count]
        at += count
        first = n_granted
        n_granted += states.count(pb.KEY_STATE_GRANTED)
        yield ClaimAnswer(states, answer.grants[first:n_granted], {}, answer.revision)


def _claim(asks: Sequence[Ask]) -> list[ClaimAnswer]:
    """Claim in one request under the id of the first, which is the same if it is sent again."""
    first = asks[0]
    claim_id = first.ticket.claim_id
    for ask in asks:
        ask.ticket.claim_id = claim_id
    answer = first.client.claim(
        first.keys if len(asks) == 1 else [key for ask in asks for key in ask.keys],
        ttl_s=first.ttl_s,
        claim_id=claim_id,
        max_attempts=first.max_attempts,
        ahead=first.ahead,
    )
    return [answer] if len(asks) == 1 else list(_parted(answer, [len(ask.keys) for ask in asks]))


def _give_back(ask: Ask, answer: ClaimAnswer) -> None:
    """Release what was granted to a thread that was interrupted."""
    releases = [Settlement(grant, "release") for grant in answer.grants]
    try:
        ask.client.settle_alone(releases, timeout_s=_RELEASE_S)
    except RunOnceError as error:
        logger.warning(
            "could not free %d keys of an interrupted call; their leases run out in %g s: %s",
            len(releases),
            ask.ttl_s,
            error,
        )


def _settle(parts: Sequence[Ends]) -> list[list[SettleAnswer]]:
    """Settle in one request."""
    answers = iter(parts[0].client.settle_alone([item for part in parts for item in part.items]))
    return [[next(answers) for _ in part.items] for part in parts]
