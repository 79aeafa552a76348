"""`notify_success` and `notify_failure`: settle an item of a loop by name."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from distlock_proto import lock_table_pb2 as pb
from run_once.config import load_config
from run_once.errors import (
    AlreadyDoneError,
    AmbiguousKeyError,
    LeaseLostError,
    LeaseLostWarning,
    NotHeldError,
    RunOnceError,
)
from run_once.lease import LeaseHandle
from run_once.live import LiveItem, Outcome, describe, registry, show
from run_once.task import Session
from run_once.warn import warn_user


def notify_success(key: object, assert_unique: bool = True) -> None:
    """Make a key done; return after the server's acknowledgement.

    Args:
        key: The object that an iterator yielded, its stored key, or a lease's handle.
        assert_unique: Raise if the completion was not accepted; False: warn if another holds the
            key now, and say nothing if another completed it.

    Raises:
        NotHeldError: This process holds no lease on the key, and no handle was given.
        AmbiguousKeyError: It holds several that fit; the message names two.
        AlreadyDoneError: Another run completed the key first, or this one did before.
        LeaseLostError: Another was granted the key meanwhile, or it was reset.
        ServerUnavailableError: The server could not be reached; nothing is known.
    """
    item = _from(key)
    was_done = item.outcome is Outcome.COMPLETED
    outcome = item.complete()
    if outcome is Outcome.COMPLETED and not was_done:
        return
    is_done = outcome is Outcome.COMPLETED or item.present_state == pb.KEY_STATE_DONE
    if outcome in {Outcome.FAILED, Outcome.RELEASED}:
        raise NotHeldError(f"key {show(item.key)} was given up ({outcome.value}) by this process")
    item.is_loss_told = True
    if assert_unique:
        raise _refused(item, is_done=is_done)
    if not is_done:
        warn_user(str(_refused(item, is_done=False)), LeaseLostWarning)


def notify_failure(key: object, error: BaseException | str | None = None) -> None:
    """Give a key up as failed, so that anyone may try it at once.

    Does nothing if the lease was lost or given up before.

    Args:
        key: The object that an iterator yielded, its stored key, or a lease's handle.
        error: What went wrong, shown by `run-once list --failed`; None: the exception that is
            being handled, if there is one.

    Raises:
        NotHeldError: This process holds no lease on the key, and no handle was given.
        AmbiguousKeyError: It holds several that fit; the message names two.
        AlreadyDoneError: This process completed the key before.
        ServerUnavailableError: The server could not be reached.
    """
    item = _from(key)
    if item.fail(describe(error if error is not None else sys.exc_info()[1])) is Outcome.COMPLETED:
        raise AlreadyDoneError(
            f"key {show(item.key)} is done already, so it cannot fail; "
            "to have it done again: run-once reset"
        )


def _from(key: object) -> LiveItem[Any]:
    """Find the item that is meant by an object, a stored key or a handle."""
    if not isinstance(key, LeaseHandle):
        return registry().find(key)
    with contextlib.suppress(NotHeldError, AmbiguousKeyError):
        item = registry().find(key.key)
        if item.token == key.token:
            return item
    config = load_config()
    if config.address != key.address:  # else with the token of the address file
        config = load_config(address=key.address)
    session = Session.get(config)
    return LiveItem(None, key, session, is_kept=False)


def _refused(item: LiveItem[Any], *, is_done: bool) -> RunOnceError:
    """Make the error of a completion that was not accepted."""
    if is_done:
        return AlreadyDoneError(f"key {show(item.key)} was completed before; it counts once")
    state = pb.KeyState.Name(item.present_state).removeprefix("KEY_STATE_").lower()
    return LeaseLostError(
        f"the lease on key {show(item.key)} (token {item.token}) was lost, so this run's "
        f"completion was not accepted; the key is {state} now. If its work takes longer than its "
        "timeout, give a longer one, or none to have the lease kept alive"
    )
