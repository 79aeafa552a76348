"""Records and answers as messages of `distlock.v1`, and back; pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, cast

from distlock_proto import lock_table_pb2 as pb
from distlock_server.batch import Completions, Item, Items
from distlock_server.limits import (
    MAX_INLINE_RESULT_BYTES,
    MAX_REPLY_BYTES,
    MAX_RESULT_BYTES,
    MAX_URL_BYTES,
    SHA256_BYTES,
    RequestError,
    check_claim_id,
    check_count,
    check_length,
)
from distlock_server.state import (
    NO_RESULT,
    Answer,
    Done,
    Failed,
    Held,
    Record,
    Result,
    Storage,
)

_STATES: Final[dict[Answer, pb.KeyState]] = {
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
"""BUSY is not here: the record says whether its holder has started."""

_STORAGES: Final[dict[Storage, pb.Result.Storage]] = {
    Storage.NONE: pb.Result.STORAGE_NONE,
    Storage.INLINE: pb.Result.STORAGE_INLINE,
    Storage.SERVER: pb.Result.STORAGE_SERVER,
    Storage.URL: pb.Result.STORAGE_URL,
}

_CUT_ERROR_CHARS: Final = 100
"""What is left of a failure's text in a reply that is full."""

_INFO_BYTES: Final = 64
"""About what the numbers of one KeyInfo take."""


class Room:
    """How much more a reply may carry."""

    def __init__(self, n_bytes: int = MAX_REPLY_BYTES) -> None:
        """Start with so many bytes."""
        self.left = n_bytes

    def take(self, n_bytes: int) -> bool:
        """Take some room; False, and nothing is taken, if there is not enough."""
        if n_bytes > self.left:
            return False
        self.left -= n_bytes
        return True


def present_state(record: Record, now_ns: int) -> pb.KeyState:
    """Give the state of a key as a reader sees it."""
    if record is None:
        return pb.KEY_STATE_ABSENT
    if isinstance(record, Done):
        return pb.KEY_STATE_DONE
    if isinstance(record, Failed):
        return pb.KEY_STATE_FAILED
    if record.is_expired(now_ns):
        return pb.KEY_STATE_EXPIRED
    return pb.KEY_STATE_BUSY_AHEAD if record.ahead else pb.KEY_STATE_BUSY


def answer_states(items: Sequence[Item], now_ns: int) -> bytes:
    """Give the state byte of each answer."""
    answers = [answer for answer, _ in items]
    state = _STATES.get(answers[0]) if answers else None
    if state is not None and answers.count(answers[0]) == len(answers):
        return bytes((state,)) * len(answers)
    return bytes(_STATES.get(answer) or present_state(record, now_ns) for answer, record in items)


def lost_states(items: Sequence[Item], now_ns: int) -> bytes:
    """Give the present state of each key whose answer is LOST."""
    if all(answer is Answer.COMPLETED for answer, _ in items):
        return b""
    return bytes(present_state(record, now_ns) for answer, record in items if answer is Answer.LOST)


def result_message(done: Done, room: Room) -> pb.Result:
    """Make the message of a done key's result; without its payload if there is no room for it."""
    result = done.result
    payload = result.payload if room.take(len(result.payload)) else b""
    return pb.Result(
        storage=_STORAGES[result.storage],
        payload=payload,
        size_bytes=result.size_bytes,
        sha256=result.sha256,
        token=done.token,
    )


def result_messages(records: Iterable[Record]) -> list[pb.Result]:
    """Make the results of those records that are done, in order."""
    room = Room()
    return [result_message(record, room) for record in records if isinstance(record, Done)]


def info_message(
    key: bytes, record: Record, now_ns: int, room: Room, *, want_result: bool
) -> pb.KeyInfo:
    """Make a KeyInfo; its texts and payload are cut or left out if there is no room for them."""
    room.take(_INFO_BYTES + len(key))
    info = pb.KeyInfo(key=key, state=present_state(record, now_ns))
    if record is None:
        return info
    info.since_wall_ns = record.since_wall_ns
    info.revision = record.revision
    if isinstance(record, Held):
        info.token = record.token
        info.owner = _fitting(record.owner, room)
        info.remaining_ns = record.deadline_ns - now_ns
        info.attempts = record.attempts
        info.error = _fitting(record.last_error, room)
    elif isinstance(record, Failed):
        info.attempts = record.attempts
        info.error = _fitting(record.error, room)
    else:
        info.token = record.token
        info.owner = _fitting(record.owner, room)
        if want_result:
            info.result.CopyFrom(result_message(record, room))
    return info


def info_size(key: bytes, record: Record, *, want_result: bool) -> int:
    """Tell about how long a KeyInfo is, in bytes."""
    size = _INFO_BYTES + len(key)
    if isinstance(record, Held):
        return size + len(record.owner) + len(record.last_error)
    if isinstance(record, Failed):
        return size + len(record.error)
    if isinstance(record, Done):
        return size + len(record.owner) + (len(record.result.payload) if want_result else 0)
    return size


def parse_result(message: pb.Result, field: str) -> Result:
    """Check the result of a completion and take it out of its message.

    Args:
        message: The message.
        field: What errors call it; it names the key.

    Returns:
        The result.

    Raises:
        RequestError: Its parts do not fit together, or one is too long.
    """
    check_length(message.sha256, SHA256_BYTES, f"{field}.sha256")
    if len(message.sha256) not in (0, SHA256_BYTES):
        raise RequestError(f"{field}.sha256: {len(message.sha256)} bytes, it must have 32 or none")
    size_bytes = _parse_size(message, field)
    if message.storage == pb.Result.STORAGE_NONE:
        return NO_RESULT
    return Result(Storage(message.storage), message.payload, size_bytes, message.sha256)


def _parse_size(message: pb.Result, field: str) -> int:
    """Check a result's payload and length by its kind; return the value's length."""
    payload, size_bytes = message.payload, message.size_bytes
    if message.storage == pb.Result.STORAGE_INLINE:
        check_length(payload, MAX_INLINE_RESULT_BYTES, f"{field}.payload")
        if size_bytes not in (0, len(payload)):
            raise RequestError(
                f"{field}.size_bytes: {size_bytes}, but the payload has {len(payload)} bytes"
            )
        return len(payload)
    if message.storage == pb.Result.STORAGE_URL:
        check_length(payload, MAX_URL_BYTES, f"{field}.payload")
        if not payload:
            raise RequestError(f"{field}.payload: empty, it must be the URL of the value")
        return size_bytes
    if payload:
        raise RequestError(f"{field}.payload: only inline values and URLs have one")
    if message.storage == pb.Result.STORAGE_SERVER:
        if size_bytes > MAX_RESULT_BYTES:
            raise RequestError(
                f"{field}.size_bytes: {size_bytes}, at most {MAX_RESULT_BYTES} are allowed"
            )
        if not message.sha256:
            raise RequestError(f"{field}.sha256: missing, a value kept by the server needs it")
        return size_bytes
    if message.storage != pb.Result.STORAGE_NONE:
        raise RequestError(f"{field}.storage: {message.storage} is unknown to this server")
    return 0


def parse_completions(messages: Iterable[pb.Completions]) -> list[Completions]:
    """Give what completions without values ask for; their keys are not checked yet.

    Raises:
        RequestError: A claim id is none, the tokens do not fit the keys, or there are too many.
    """
    found: list[Completions] = []
    count = 0
    for message in messages:
        check_claim_id(message.claim_id, "completions: claim_id")
        keys, tokens = message.keys, message.tokens
        if len(keys) != len(tokens):
            raise RequestError(
                f"completions: {len(tokens)} tokens for {len(keys)} keys, each key needs one"
            )
        count += len(keys)
        check_count(count, "completions")
        found.append(Completions(list(keys), message.claim_id, list(tokens)))
    return found


def _fitting(text: str, room: Room) -> str:
    return text if room.take(len(text)) else text[:_CUT_ERROR_CHARS]


def claim_reply(answers: Items, *, want_results: bool) -> pb.ClaimReply:
    """Make the reply to a claim."""
    items, now_ns, revision, is_all_done = answers
    if is_all_done:
        return pb.ClaimReply(states=bytes((pb.KEY_STATE_DONE,)) * len(items), revision=revision)
    reply = pb.ClaimReply(states=answer_states(items, now_ns), revision=revision)
    granted = [record for answer, record in items if answer is Answer.GRANTED]
    held = cast("list[Held]", granted)
    reply.tokens.extend([record.token for record in held])
    reply.remaining_ns.extend([record.deadline_ns - now_ns for record in held])
    reply.attempts.extend([record.attempts for record in held])
    if want_results:
        reply.results.extend(result_messages(record for _, record in items))
    return reply
