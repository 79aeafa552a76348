"""Every limit of the server, and the checks that enforce them before anything is changed.

`GetServerInfo` reports the limits that a client has to know. Going over one is a `RequestError`,
which names the field, the offending key where there is one, and the limit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from distlock_server.state import CLAIM_ID_BYTES

MAX_KEY_BYTES: Final = 1_024
"""Length of a key as stored."""

MAX_KEYS_PER_REQUEST: Final = 10_000
"""Keys, renewals, settlements or invalidations in one request."""

BLOCK_DIGEST_BYTES: Final = 16
"""Length of the digest of a block of keys."""

MAX_BLOCKS_PER_REQUEST: Final = 1_000
"""Blocks of keys that one lookup asks about."""

MAX_FRONTIER_BLOCKS: Final = 100
"""Blocks of keys among which the frontier is asked for."""

MAX_OWNER_BYTES: Final = 256
"""Length of an owner label, in UTF-8."""

MAX_ERROR_BYTES: Final = 4_096
"""Length of a failure's text, in UTF-8."""

MAX_INLINE_RESULT_BYTES: Final = 65_536
"""Length of a value that is kept in its record."""

MAX_RESULT_BYTES: Final = 1 << 30
"""Length of a value that the server keeps in its blob folder."""

MAX_CHUNK_BYTES: Final = 1 << 20
"""Length of one chunk of an upload or download."""

MAX_URL_BYTES: Final = 4_096
"""Length of the URL of a value kept elsewhere."""

MAX_TTL_NS: Final = 366 * 24 * 3600 * 10**9
"""Length of a lease."""

MAX_WAIT_NS: Final = 60 * 10**9
"""How long one Wait may be parked; the client asks again."""

MAX_MESSAGE_BYTES: Final = 16 << 20
"""Length of a request; gRPC itself refuses more."""

MAX_PARTS_PER_REQUEST: Final = 200_000
"""Fields and items in a request: what is made of one takes up to some hundred bytes."""

MAX_REPLY_BYTES: Final = 3 << 20
"""About how long a page, or the values and texts in a reply, may be: below gRPC's usual 4 MiB."""

MAX_PAGE_KEYS: Final = 10_000
"""Keys in one page of a list."""

MAX_QUEUED_REQUESTS: Final = 20_000
"""Requests that wait for the committer at once; as many again that renew or end leases."""

MAX_QUEUED_KEYS: Final = 1_000_000
"""Keys of those requests, taken together; as many again likewise."""

MAX_REQUEST_BYTES: Final = 256 << 20
"""Bytes of requests under way at once, but for those of the next three."""

MAX_RENEWAL_BYTES: Final = 128 << 20
"""Bytes of renewals under way."""

MAX_SETTLEMENT_BYTES: Final = 256 << 20
"""Bytes of settlements under way."""

MAX_WAIT_BYTES: Final = 128 << 20
"""Bytes of waits under way."""

MAX_UNREAD_BYTES: Final = 512 << 20
"""Bytes of replies that are made or wait for their readers."""

MAX_WAITS: Final = 10_000
"""Waits that are parked at once."""

MAX_WAITED_KEYS: Final = 1_000_000
"""Keys of those waits, taken together."""

MAX_LEGACY_BYTES: Final = MAX_MESSAGE_BYTES - (1 << 16)
"""Data and owner name of a lock of 2021: what fits into one record of the database."""

MAX_PATTERNS: Final = 1_000
"""Includes and excludes of one list of 2021."""

MAX_PATTERN_BYTES: Final = 65_536
"""Length of those, taken together."""

MAX_SYNCHRONIZED_READS: Final = 20_000
"""Locks that the lists of one synchronized batch may look at, once for each of their patterns."""

SHA256_BYTES: Final = 32
"""Length of a SHA-256."""

_SHOWN: Final = 120
"""About a line of a key in a message."""


class RequestError(ValueError):
    """A request that is malformed or goes over a limit; nothing was changed."""


class OverloadError(Exception):
    """The server has as much waiting as it is willing to keep; try again later."""


def check_count(n_items: int, field: str) -> None:
    """Check how many items a request has.

    Raises:
        RequestError: There are too many.
    """
    if n_items > MAX_KEYS_PER_REQUEST:
        raise RequestError(
            f"{field}: {n_items} in one request, at most {MAX_KEYS_PER_REQUEST} are allowed"
        )


def checked_keys(keys: Sequence[bytes]) -> list[bytes]:
    """Give the keys of a request, checked; they are counted before any is touched.

    Raises:
        RequestError: Names the first that is wrong.
    """
    check_count(len(keys), "keys")
    found = list(keys)
    check_keys(found)
    return found


def check_key(key: bytes, field: str = "keys") -> None:
    """Check one key as stored.

    Raises:
        RequestError: It is empty, too long or not UTF-8.
    """
    if not 0 < len(key) <= MAX_KEY_BYTES:
        raise RequestError(
            f"{field}: key {_shown(key)} has {len(key)} bytes, allowed are 1 to {MAX_KEY_BYTES}"
        )
    try:
        key.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{field}: key {_shown(key)} is not UTF-8: {error.reason}") from error


def check_keys(keys: Sequence[bytes], field: str = "keys") -> None:
    """Check the keys of a request: their number, each one, and that none comes twice.

    Raises:
        RequestError: Names the first that is wrong.
    """
    check_count(len(keys), field)
    if not _are_keys(keys):
        for key in keys:
            check_key(key, field)
    if len(set(keys)) != len(keys):
        twice = _first_repeated(keys)
        raise RequestError(f"{field}: key {_shown(twice)} comes twice in one request")


def checked_blocks(blocks: Sequence[bytes]) -> list[bytes]:
    """Give the digests of a request.

    Raises:
        RequestError: There are too many, or one is none.
    """
    _check_blocks(blocks, MAX_BLOCKS_PER_REQUEST, "blocks")
    return list(blocks)


def check_frontier(digests: Sequence[bytes], numbers: Iterable[int]) -> None:
    """Check a question for the frontier.

    Args:
        digests: The blocks'.
        numbers: All places and numbers of keys in it.

    Raises:
        RequestError: There are too many blocks, a digest is none, or a number is too large.
    """
    _check_blocks(digests, MAX_FRONTIER_BLOCKS, "frontier")
    if max(numbers) > MAX_KEYS_PER_REQUEST:
        raise RequestError(
            f"frontier: {max(numbers)} keys or places, at most {MAX_KEYS_PER_REQUEST} are allowed"
        )


def _check_blocks(digests: Sequence[bytes], limit: int, field: str) -> None:
    if len(digests) > limit:
        raise RequestError(
            f"{field}: {len(digests)} blocks in one request, at most {limit} are allowed"
        )
    for digest in digests:
        if len(digest) != BLOCK_DIGEST_BYTES:
            raise RequestError(f"{field}: {len(digest)} bytes, a digest has {BLOCK_DIGEST_BYTES}")


def check_range(start: bytes, end: bytes) -> None:
    """Check the ends of a key range; they need not be keys.

    Raises:
        RequestError: One is too long.
    """
    for field, key in (("start_key", start), ("end_key", end)):
        check_length(key, MAX_KEY_BYTES + 1, field)


def check_claim_id(claim_id: bytes, field: str = "claim_id") -> None:
    """Check a claim id.

    Raises:
        RequestError: It does not have 16 bytes.
    """
    if len(claim_id) != CLAIM_ID_BYTES:
        raise RequestError(f"{field}: {len(claim_id)} bytes, it must have {CLAIM_ID_BYTES}")


def check_ttl(ttl_ns: int, field: str = "ttl_ns") -> None:
    """Check the length of a lease.

    Raises:
        RequestError: It is zero, negative or too long.
    """
    if not 0 < ttl_ns <= MAX_TTL_NS:
        raise RequestError(f"{field}: {ttl_ns} ns, a lease lasts 1 to {MAX_TTL_NS} ns")


def check_length(value: Collection[int], limit: int, field: str) -> None:
    """Check the length of some bytes.

    Raises:
        RequestError: They are too long.
    """
    if len(value) > limit:
        raise RequestError(f"{field}: {len(value)} bytes, at most {limit} are allowed")


def check_text(text: str, limit: int, field: str) -> None:
    """Check the length of a text in UTF-8.

    Raises:
        RequestError: It is too long.
    """
    # One character takes at most 4 bytes: short texts need no encoding.
    if len(text) * 4 > limit:
        check_length(text.encode(), limit, field)


def _are_keys(keys: Sequence[bytes]) -> bool:
    """Tell whether each is a key, without looking at each by itself."""
    if not keys:
        return True
    lengths = set(map(len, keys))
    if min(lengths) == 0 or max(lengths) > MAX_KEY_BYTES:
        return False
    try:
        # With a character of one byte in between, no key can make up for what another lacks.
        b"\n".join(keys).decode()
    except UnicodeDecodeError:
        return False
    return True


def _first_repeated(keys: Iterable[bytes]) -> bytes:
    seen: set[bytes] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("no key is repeated")


def _shown(key: bytes) -> str:
    """Give a key as messages show it: readable, and cut if it is long."""
    text = repr(key[:_SHOWN].decode(errors="backslashreplace"))
    is_whole = len(key) <= _SHOWN and len(text) <= _SHOWN
    return text if is_whole else text[: _SHOWN - 10] + "...'"
