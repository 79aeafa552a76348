"""What is known of calls before they run: done, in flight elsewhere, or to be run.

One request asks for many keys, and claims those that are free if the calls are short. A done key's
value is loaded here, in the parent: its arguments are never shipped to a worker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from distlock_proto import lock_table_pb2 as pb
from run_once.errors import ResultDamagedError, ResultMissingError
from run_once.joblib_failures import exhausted
from run_once.joblib_outcomes import Failure, Planned, Skipped, Value, readable
from run_once.results import ResultStore, is_inline

if TYPE_CHECKING:
    from run_once.joblib_worker import TaskOptions
    from run_once.lease import Lease
    from run_once.secret import Secret
    from run_once.task import Session

logger = logging.getLogger("run_once")

MIN_WAIT_S: Final = 0.1
MAX_WAIT_S: Final = 2.0
"""Length of one long poll for keys in flight elsewhere; keys added meanwhile join the next."""


PATIENCE_S: Final = 5.0
"""After waiting so long, say once for whom."""


_FILLED_BYTES: Final = 2 << 20
"""Bytes of values that one reply certainly has room for."""


class Busy(NamedTuple):
    """Another holds the key."""


class Cold(NamedTuple):
    """The key is to be run.

    Attributes:
        lease: It was claimed with the lookup; None: nobody has it yet.
    """

    lease: Lease | None = None


Found = Value | Failure | Skipped | Busy | Cold


class Lookups:
    """Asks the server what it knows of keys, for one `Parallel`."""

    def __init__(
        self, session: Session, *, in_flight: str, secret: Secret, options: TaskOptions
    ) -> None:
        """Ask through a session; values are signed with `secret`."""
        self._session = session
        self._store = ResultStore(session.client, secret=secret, results=options.config.results)
        self._skips = in_flight == "skip"
        self._waits_since_s: float | None = None
        self._has_told = False
        self._options = options

    def find(self, keys: Sequence[bytes], *, max_claims: int = 0) -> dict[bytes, Found]:
        """Ask for keys, in one request where the limits allow.

        Args:
            keys: Stored keys.
            max_claims: Claim so many of those that are free; their leases are kept alive.

        Returns:
            What is known of each key.

        Raises:
            RunOnceError: The server cannot be asked.
        """
        unique = list(dict.fromkeys(keys))
        leases: dict[bytes, Lease] = {}
        if max_claims > 0:
            claimed = self._session.claim(
                unique,
                ttl_s=self._options.lease_s,
                max_grants=max_claims,
                max_attempts=self._options.max_attempts,
                ahead=True,
                want_results=True,
            )
            leases = {lease.key: lease for lease in claimed.leases}
            states, results = claimed.states, claimed.results
        else:
            answer = self._session.client.lookup(unique, want_results=True)
            states, results = answer.states, answer.results
        self._fill(results)
        return {
            key: self._found(key, state, results.get(key), leases.get(key))
            for key, state in zip(unique, states, strict=True)
        }

    def _fill(self, results: dict[bytes, pb.Result]) -> None:
        """Ask again, in as few requests as will do, for values that the reply had no room for."""
        group: list[bytes] = []
        room_bytes = _FILLED_BYTES
        for key, result in list(results.items()):
            if not is_inline(result) or result.payload or not result.size_bytes:
                continue
            if group and result.size_bytes > room_bytes:
                results |= self._session.client.lookup(group, want_results=True).results
                group, room_bytes = [], _FILLED_BYTES
            group.append(key)
            room_bytes -= result.size_bytes
        if group:
            results |= self._session.client.lookup(group, want_results=True).results

    def load(self, key: bytes, token: int, result: pb.Result) -> Value:
        """Give the value of a key that was completed here.

        Raises:
            ResultError: It cannot be loaded here.
        """
        loaded = self._store.load(key, token, result)
        return Value(loaded.value, run_s=loaded.run_s, source_id=loaded.source_id)

    def wait(self, keys: Sequence[bytes], timeout_s: float = MAX_WAIT_S) -> list[bytes]:
        """Wait until at least one of the keys is no longer held by another, or the time is up.

        Returns:
            The keys that are not busy.
        """
        busy = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)
        now_s = time.monotonic()
        if self._waits_since_s is None:
            self._waits_since_s = now_s
        elif now_s - self._waits_since_s >= PATIENCE_S and not self._has_told:
            self._has_told = True
            self._tell(keys)
        states = self._session.client.wait(keys, timeout_s=timeout_s)
        free = [key for key, state in zip(keys, states, strict=True) if state not in busy]
        if free:
            self._waits_since_s = None
        return free

    def _tell(self, keys: Sequence[bytes]) -> None:
        """Say who is waited for: perhaps a process that was killed."""
        (info,) = self._session.client.lookup(keys[:1], want_infos=True).infos
        logger.warning(
            "waiting for %s that other processes run (the first, %r, is held by %s); what a killed "
            'process held is taken over when its lease runs out, in %.0f s here; in_flight="skip" '
            "does not wait",
            "a call" if len(keys) == 1 else f"{len(keys):,} calls",
            readable(keys[0]),
            info.owner or "somebody",
            max(0.0, info.remaining_ns / 1e9),
        )

    def _found(
        self, key: bytes, state: int, result: pb.Result | None, lease: Lease | None
    ) -> Found:
        if result is not None:
            return self._load(key, result)
        if state in (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD):
            return Skipped(key.decode()) if self._skips else Busy()
        if state == pb.KEY_STATE_EXHAUSTED:
            return exhausted(self._session, key, self._options.max_attempts)
        return Cold(lease)

    def _load(self, key: bytes, result: pb.Result) -> Found:
        try:
            loaded = self._store.load(key, result.token, result)
            return Value(
                loaded.value, is_stored=True, run_s=loaded.run_s, source_id=loaded.source_id
            )
        except (ResultMissingError, ResultDamagedError) as error:
            # The rule: a missing or damaged result makes the key not done again.
            logger.warning(
                "the stored value of %r is unusable, so it is computed again: %s", key, error
            )
            self._session.client.invalidate([(key, result.token)])
            return Cold()
        except Exception as error:
            return Failure(error)


class DryLookups(Lookups):
    """Says of each key what would become of it, and nothing more (`dry_run=True`)."""

    def find(self, keys: Sequence[bytes], *, max_claims: int = 0) -> dict[bytes, Found]:
        """Look keys up; what is found stands in the place of the values."""
        del max_claims  # nothing is claimed
        words: dict[int, Literal["done", "failed", "in flight"]] = {
            pb.KEY_STATE_DONE: "done",
            pb.KEY_STATE_FAILED: "failed",
            pb.KEY_STATE_BUSY: "in flight",
            pb.KEY_STATE_BUSY_AHEAD: "in flight",
        }
        unique = list(dict.fromkeys(keys))
        states = self._session.client.lookup(unique).states
        return {
            key: Value(Planned(readable(key), words.get(state, "to run")))
            for key, state in zip(unique, states, strict=True)
        }
