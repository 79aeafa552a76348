"""What a request and its reply say, item by item; nothing here knows a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb


class Item(NamedTuple):
    """What was asked of one key, and the answer.

    Attributes:
        what: claim, renew, complete, fail, release, look, reset or invalidate.
        key: The key.
        claim_id: Identity of the claim, where one was sent.
        token: Of the holder, the grant or the completion; 0 if none is known.
        state: The answer.
        number: claim, look: what remains of the lease in ns; renew: its length in ns; reset: the
            highest revision.
    """

    what: str
    key: bytes
    claim_id: bytes
    token: int
    state: int
    number: int = 0


class Operation(NamedTuple):
    """One request that was answered.

    Attributes:
        revision: The store revision that its answer rests on.
        life: How many processes of the server there were before.
        rank: 1 for what may change keys; 2 for what reads them, which comes behind the changes of
            its revision.
        place: Order in which answers left.
        method: The method.
        items: One per key.
        arrived_ns: Real time at which the request reached the server.
        left_ns: Real time at which the reply left it.
        first_revision: The store revision when the request arrived.
    """

    revision: int
    life: int
    rank: int
    place: int
    method: str
    items: tuple[Item, ...]
    arrived_ns: int
    left_ns: int
    first_revision: int


READING: Final = frozenset({"Lookup", "Wait", "List"})
"""Methods that change nothing."""


def describe(item: Item) -> str:
    """Put an item into words."""
    answer = next(n for n, number in pb.KeyState.items() if number == item.state)
    who = f" by token {item.token}" if item.token else ""
    who += f" of claim {item.claim_id[:3].hex()}" if item.claim_id else ""
    return f"{item.what} of key {item.key!r}{who}: {answer.removeprefix('KEY_STATE_')}"


def n_keys(request: Message) -> int:
    """Tell how many keys a request asks something of."""
    name = _KEY_FIELDS.get(type(request))
    if isinstance(request, pb.SettleRequest):
        return len(request.settlements) + sum(len(part.keys) for part in request.completions)
    return 1 if name is None else len(getattr(request, name))


def items_of(
    method: str, request: Message, reply: Message, blocks: Mapping[bytes, Sequence[bytes]]
) -> tuple[Item, ...]:
    """Take a request and its reply apart.

    Args:
        method: Name of the method.
        request: What was asked.
        reply: The answer.
        blocks: The keys of blocks, by digest.
    """
    reader = _READERS.get(method)
    items = () if reader is None else tuple(reader(request, reply))
    found = done_blocks(request, reply)
    keys = [key for digest in found for key in blocks[digest]]
    return (*items, *(Item("look", key, b"", 0, pb.KEY_STATE_DONE) for key in keys))


def done_blocks(request: Message, reply: Message) -> list[bytes]:
    """Give the digests of the blocks of which a reply says that they are done."""
    if not isinstance(request, pb.LookupRequest) or not isinstance(reply, pb.LookupReply):
        return []
    return [digest for digest, is_done in zip(request.blocks, reply.blocks, strict=True) if is_done]


def _claim(request: pb.ClaimRequest, reply: pb.ClaimReply) -> Iterator[Item]:
    granted = zip(reply.tokens, reply.remaining_ns, strict=True)
    for key, state in zip(request.keys, reply.states, strict=True):
        token, remaining_ns = next(granted) if state == pb.KEY_STATE_GRANTED else (0, 0)
        yield Item("claim", key, request.claim_id, token, state, remaining_ns)


def _renew(request: pb.RenewRequest, reply: pb.RenewReply) -> Iterator[Item]:
    for renewal, state in zip(request.renewals, reply.states, strict=True):
        holder = renewal.holder
        yield Item("renew", holder.key, holder.claim_id, holder.token, state, renewal.ttl_ns)


def _settle(request: pb.SettleRequest, reply: pb.SettleReply) -> Iterator[Item]:
    asked = [
        (item.WhichOneof("how") or "", item.holder.key, item.holder.claim_id, item.holder.token)
        for item in request.settlements
    ]
    asked += [
        ("complete", key, part.claim_id, token)
        for part in request.completions
        for key, token in zip(part.keys, part.tokens, strict=True)
    ]
    for (how, key, claim_id, token), state in zip(asked, reply.states, strict=True):
        yield Item(how, key, claim_id, token, state)


def _lookup(request: pb.LookupRequest, reply: pb.LookupReply) -> Iterator[Item]:
    infos = reply.infos or [pb.KeyInfo()] * len(request.keys)
    for key, state, info in zip(request.keys, reply.states, infos, strict=True):
        yield Item("look", key, b"", info.token, state, info.remaining_ns)


def _wait(request: pb.WaitRequest, reply: pb.WaitReply) -> Iterator[Item]:
    for key, state in zip(request.keys, reply.states, strict=True):
        yield Item("look", key, b"", 0, state)


def _list(_request: pb.ListRequest, reply: pb.ListReply) -> Iterator[Item]:
    for info in reply.infos:
        yield Item("look", info.key, b"", info.token, info.state, info.remaining_ns)


def _reset(request: pb.ResetRequest, reply: pb.ResetReply) -> Iterator[Item]:
    for key, state in zip(request.keys, reply.states, strict=True):
        yield Item("reset", key, b"", 0, state, request.max_revision)


def _invalidate(request: pb.InvalidateRequest, reply: pb.InvalidateReply) -> Iterator[Item]:
    for asked, state in zip(request.invalidations, reply.states, strict=True):
        yield Item("invalidate", asked.key, b"", asked.token, state)


_READERS: Final[dict[str, Callable[[Any, Any], Iterator[Item]]]] = {
    "Claim": _claim,
    "Renew": _renew,
    "Settle": _settle,
    "Lookup": _lookup,
    "Wait": _wait,
    "List": _list,
    "Reset": _reset,
    "Invalidate": _invalidate,
}

_KEY_FIELDS: Final[dict[type[Message], str]] = {
    pb.ClaimRequest: "keys",
    pb.RenewRequest: "renewals",
    pb.LookupRequest: "keys",
    pb.WaitRequest: "keys",
    pb.ResetRequest: "keys",
    pb.InvalidateRequest: "invalidations",
}
