"""The rest of what 0.4.2 offered, with its names, arguments and answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import ParamSpec, TypeVar, overload

from distlock_proto import lock_table_pb2 as pb
from run_once.config import load_config
from run_once.errors import ConfigError
from run_once.iterator import fixed_seconds
from run_once.keys import NAMESPACE_START, namespace_prefix, stored_key
from run_once.task import Session

P = ParamSpec("P")
T = TypeVar("T")

_AFTER_ALL_UTF8 = b"\xff"


def search_keys_by_prefix(key_prefix: str, is_expired: bool | None = None) -> list[str]:
    """List the stored keys of the configured namespace that start with a prefix.

    Keys that failed or were given back are left out: in 2021 they were not in the database.

    Args:
        key_prefix: The prefix; empty: all.
        is_expired: True: only keys whose lease ran out; False: all but these; None: both.

    Returns:
        The keys in byte order.
    """
    config = load_config()
    space = namespace_prefix(config.namespace)
    start = f"{space}{key_prefix}".encode()
    wanted = {pb.KEY_STATE_EXPIRED} if is_expired else _UNEXPIRED
    if is_expired is None:
        wanted = _UNEXPIRED | {pb.KEY_STATE_EXPIRED}
    infos = Session.get(config).client.list(start, start + _AFTER_ALL_UTF8)
    found = (info.key.decode() for info in infos if info.state in wanted)
    return [key[len(space) :] for key in found if space or not key.startswith(NAMESPACE_START)]


def count_keys_by_prefix(key_prefix: str) -> dict[str, int]:
    """Count the stored keys of the configured namespace that start with a prefix.

    Args:
        key_prefix: The prefix; empty: all.

    Returns:
        "expired": keys whose lease ran out; "in_progress": keys whose lease runs; "success": done
        keys. Keys that failed or were given back are in none of them.
    """
    config = load_config()
    prefix = f"{namespace_prefix(config.namespace)}{key_prefix}".encode() if key_prefix else b""
    reply = Session.get(config).client.count(namespace=config.namespace, prefix=prefix)
    return {"expired": reply.expired, "in_progress": reply.held, "success": reply.done}


@overload
def at_most_every(
    _func: Callable[P, T], *, seconds: float | timedelta, key: str | int
) -> Callable[P, T | None]: ...


@overload
def at_most_every(
    _func: None = None, *, seconds: float | timedelta, key: str | int
) -> Callable[[Callable[P, T]], Callable[P, T | None]]: ...


def at_most_every(
    _func: Callable[P, T] | None = None, *, seconds: float | timedelta, key: str | int
) -> Callable[P, T | None] | Callable[[Callable[P, T]], Callable[P, T | None]]:
    """Make a function run at most every so often, over all processes that call it.

    A call takes the key for the given time, whether the function then succeeds or raises.

    Args:
        _func: The function; given by Python where the decorator is.
        seconds: Length of the time, above 0.
        key: Names the function.

    Returns:
        A decorator. The decorated function returns None where it is not run.

    Raises:
        ConfigError: `seconds` cannot be used.
    """
    ttl_s = fixed_seconds("seconds", seconds)
    if not ttl_s:
        raise ConfigError(f"seconds={seconds!r}: a number above 0 is expected")
    config = load_config()
    stored = stored_key(key, namespace=config.namespace)

    def decorate(function: Callable[P, T]) -> Callable[P, T | None]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
            claimed = Session.get(config).claim([stored], ttl_s=ttl_s, keep_alive=False)
            return function(*args, **kwargs) if claimed.leases else None

        return call

    return decorate if _func is None else decorate(_func)


_UNEXPIRED = {pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD, pb.KEY_STATE_DONE}
