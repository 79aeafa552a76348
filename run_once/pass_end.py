"""What is said when a pass came to its natural end and did not do all of its keys."""

from __future__ import annotations

from typing import Any, Final

from distlock_proto import lock_table_pb2 as pb
from run_once.errors import RunOnceError
from run_once.key_pass import KeyPass
from run_once.keys import display_key
from run_once.live import show
from run_once.local import announce
from run_once.progress import duration

_HELD_STATES: Final = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)
_NS_PER_S: Final = 1_000_000_000


def tell_end(ended: KeyPass[Any], namespace: str) -> None:
    """Say that keys were left to others, or that there was nothing to do; else say nothing.

    Args:
        ended: A pass that found nothing more to hand out.
        namespace: Its namespace.
    """
    counts = ended.counts
    if ended.first_exhausted is not None:
        keys = "1 key was" if counts.exhausted == 1 else f"{counts.exhausted:,} keys were"
        announce(
            f"{keys} left alone, attempted as often as max_attempts allows (the first: "
            f"{show(ended.first_exhausted)}): `run-once list` shows them; to have that one tried "
            f"again: {display_key(ended.first_exhausted).reset_command}"
        )
    if counts.busy and ended.first_busy is not None:
        keys = "1 key was" if counts.busy == 1 else f"{counts.busy:,} keys were"
        first, about = _holder(ended, ended.first_busy)
        announce(
            f"{keys} passed over, held by others (the first: {first}): with `wait=True` the loop "
            "stays for them; else run it again later",
            about=f"passed over: {about}",
        )
    elif counts.found_done and not (counts.handed_out or counts.exhausted or counts.lost):
        n_done = counts.found_done
        keys = "the only key was" if n_done == 1 else f"all {n_done:,} keys were"
        announce(
            f"{keys} done before (namespace {namespace or '(none)'}): another `version=` or "
            "`namespace=`, or `run-once reset`, has them done again"
        )


def _holder(ended: KeyPass[Any], key: bytes) -> tuple[str, str]:
    """Say who holds a key and for how long; the second text leaves out what changes by itself."""
    try:
        (info,) = ended.session.client.lookup([key], want_infos=True).infos
    except (RunOnceError, ValueError):  # it matters less than the loop's good end
        return show(key), show(key)
    if info.state not in _HELD_STATES:
        return f"{show(key)}, free or done by now", show(key)
    holder = f"{show(key)}, held by {info.owner or 'somebody unnamed'}"
    left_s = max(0.0, info.remaining_ns / _NS_PER_S)
    return f"{holder} for {duration(left_s)} more unless renewed", holder
