"""What to do with a call that failed: raise, hand the failure back, or try again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from run_once.errors import ExhaustedError
from run_once.joblib_outcomes import (
    Failed,
    Failure,
    RemoteTracebackError,
    Settled,
    Value,
    readable,
)
from run_once.keys import display_key

if TYPE_CHECKING:
    from run_once.task import Session

ON_ERROR_CHOICES: Final = ("raise", "return", "retry")

RETRY_ATTEMPTS: Final = 3
"""Attempts with `on_error="retry"` where `max_attempts` says no number."""

_FIRST_PAUSE_S: Final = 0.2
_MAX_PAUSE_S: Final = 10.0


class Tried(Protocol):
    """What is remembered of a call between its attempts."""

    key: bytes
    tries: int
    """Attempts that failed in this process."""
    last_failure: Failure | None


class Failures:
    """Judges failures, for one `Parallel`."""

    def __init__(self, on_error: str, max_attempts: int) -> None:
        """Prepare.

        Args:
            on_error: "raise", "return" or "retry".
            max_attempts: The user's limit; 0: none given.
        """
        self._on_error = on_error
        is_bounded = max_attempts or on_error != "retry"
        self.max_attempts = max_attempts if is_bounded else RETRY_ATTEMPTS

    def judge(self, call: Tried, failure: Failure) -> Settled | float:
        """Say how a failed call ends, or after how many seconds it is tried again.

        The server counts the attempts, those on other machines included. It refuses one too many;
        then the last error that was seen here ends the call.
        """
        if self._on_error == "return":
            return Value(Failed(readable(call.key), failure.error, failure.traceback_text))
        if self._on_error == "raise":
            return failure
        if isinstance(failure.error, ExhaustedError):
            return call.last_failure or failure
        call.last_failure = failure
        call.tries += 1
        return min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (call.tries - 1))

    def judge_found(self, call: Tried, failure: Failure) -> Settled:
        """Say how a call ends that was not run, since its lookup failed.

        An exhausted call is one that failed. A stored value that cannot be used is not the call's
        failure: it is raised, whatever is done with those.
        """
        if not isinstance(failure.error, ExhaustedError):
            return failure
        verdict = self.judge(call, failure)
        assert not isinstance(verdict, float), "nothing exhausted is tried again"
        return verdict


def exhausted(session: Session, key: bytes, max_attempts: int) -> Failure:
    """Make the failure of a key that is not tried again, with its last attempt's traceback."""
    info = session.client.lookup([key], want_infos=True).infos[0]
    shown = display_key(key)
    limit = f" (max_attempts={max_attempts})" if max_attempts else ""
    error = ExhaustedError(
        f"key {shown.text!r} failed {info.attempts} times and is not tried again{limit}. To have "
        f"it tried again: {shown.reset_command}"
    )
    error.__cause__ = RemoteTracebackError(info.error) if info.error else None
    return Failure(error, info.error)
