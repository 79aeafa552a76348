"""What is known of calls before they run: done, in flight elsewhere, or to be run.

One request asks for many keys. A done key's value is loaded here, in the parent: its arguments are
never shipped to a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from run_once.errors import ResultDamagedError, ResultMissingError
from run_once.joblib_outcomes import Failure, Planned, Skipped, Value, readable
from run_once.results import ResultStore
from run_once.secret import Secret

if TYPE_CHECKING:
    from distlock_proto import lock_table_pb2 as pb
    from run_once.task import Session

logger = logging.getLogger("run_once")

MIN_WAIT_S: Final = 0.1
MAX_WAIT_S: Final = 2.0
"""Length of one long poll for keys in flight elsewhere; keys added meanwhile join the next."""


class Busy(NamedTuple):
    """Another holds the key."""


class Cold(NamedTuple):
    """Nobody has the key: it is to be run."""


Found = Value | Failure | Skipped | Busy | Cold


class Lookups:
    """Asks the server what it knows of keys, for one `Parallel`."""

    def __init__(self, session: Session, *, in_flight: str, secret: Secret) -> None:
        """Ask through a session; values are signed with `secret`."""
        self._session = session
        self._store = ResultStore(session.client, secret=secret)
        self._skips = in_flight == "skip"

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Found]:
        """Ask for keys, in one request where the limits allow.

        Returns:
            What is known of each key.

        Raises:
            RunOnceError: The server cannot be asked.
        """
        unique = list(dict.fromkeys(keys))
        answer = self._session.client.lookup(unique, want_infos=True, want_results=True)
        return {key: self._found(key, info) for key, info in zip(unique, answer.infos, strict=True)}

    def wait(self, keys: Sequence[bytes], timeout_s: float = MAX_WAIT_S) -> list[bytes]:
        """Wait until at least one of the keys is no longer held by another, or the time is up.

        Returns:
            The keys that are not busy.
        """
        from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 - loads protobuf

        busy = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)
        states = self._session.client.wait(keys, timeout_s=timeout_s)
        return [key for key, state in zip(keys, states, strict=True) if state not in busy]

    def _found(self, key: bytes, info: pb.KeyInfo) -> Found:
        from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 - loads protobuf

        if info.state == pb.KEY_STATE_DONE:
            return self._load(key, info)
        if info.state in (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD):
            return Skipped(key.decode()) if self._skips else Busy()
        return Cold()

    def _load(self, key: bytes, info: pb.KeyInfo) -> Found:
        try:
            loaded = self._store.load(key, info.token, info.result)
            return Value(loaded.value, is_stored=True, run_s=loaded.run_s)
        except (ResultMissingError, ResultDamagedError) as error:
            # The rule: a missing or damaged result makes the key not done again.
            logger.warning(
                "the stored value of %r is unusable, so it is computed again: %s", key, error
            )
            self._session.client.invalidate([(key, info.token)])
            return Cold()
        except Exception as error:
            return Failure(error)


class DryLookups(Lookups):
    """Says of each key what would become of it, and nothing more (`dry_run=True`)."""

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Found]:
        """Look keys up; what is found stands in the place of the values."""
        from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 - loads protobuf

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
