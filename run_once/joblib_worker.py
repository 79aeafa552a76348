"""One call of `joblib.Parallel` as a worker runs it: claim, run, store, complete.

A `RemoteCall` stands where the user's function stood in joblib's batch, so every inner backend
ships it, with the arguments beside it for the backend's own memory mapping. It never raises for the
user's error: each item of a batch is committed by itself, and one that fails keeps the others.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle

from run_once.errors import ExhaustedError
from run_once.joblib_outcomes import Elsewhere, Failure, Outcome, RemoteTracebackError, Value
from run_once.keys import display_key
from run_once.results import ResultStore
from run_once.secret import Secret
from run_once.task import Session, run_task

if TYPE_CHECKING:
    from run_once.config import Config
    from run_once.lease import Lease

_inside = threading.local()


def is_inside_task() -> bool:
    """Tell whether this thread runs the body of a claimed call; calls nested in it are plain."""
    return getattr(_inside, "depth", 0) > 0


@contextmanager
def _inside_task() -> Iterator[None]:
    _inside.depth = getattr(_inside, "depth", 0) + 1
    try:
        yield
    finally:
        _inside.depth -= 1


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What every call of one `Parallel` has in common.

    Attributes:
        config: The resolved server address and the client's options.
        lease_s: Length of a lease in seconds; it is kept alive while the call runs.
        max_attempts: Attempts after which a key is not tried again; 0: no limit.
        secret: What values are signed with, for workers on this machine: those of loky live on
            while the environment changes. None: the worker has its own, since the secret does not
            cross a network.
    """

    config: Config
    lease_s: float
    max_attempts: int
    secret: Secret | None = None


class RemoteCall:
    """A user's function with its key; called with the user's arguments."""

    def __init__(
        self, func: Callable[..., Any], key: bytes, claim_id: bytes, options: TaskOptions
    ) -> None:
        """Make the call.

        Args:
            func: The user's function.
            key: The key as stored.
            claim_id: Chosen by the parent, so that it can free what a killed worker held.
            options: See `TaskOptions`.
        """
        self.func = func
        self.key = key
        self.claim_id = claim_id
        self.options = options
        self._is_remote = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Note the arrival in a worker process, from which values and errors travel as pickles."""
        self.__dict__.update(state)
        self._is_remote = True

    @classmethod
    def new(cls, func: Callable[..., Any], key: bytes, options: TaskOptions) -> RemoteCall:
        """Make a call with a claim id of its own."""
        return cls(func, key, os.urandom(16), options)

    def __call__(self, *args: Any, **kwargs: Any) -> Outcome:
        """Claim the key, run the function, store its value, complete the key.

        Returns:
            What became of it; a lost lease and a key held by another are `Elsewhere`.
        """
        run_s = 0.0

        def body(_lease: Lease) -> Any:
            nonlocal run_s
            started_s = time.perf_counter()
            with _inside_task():
                value = self.func(*args, **kwargs)
            run_s = time.perf_counter() - started_s
            return value

        options = self.options
        try:
            session = Session.get(options.config)
            store = ResultStore(session.client, secret=options.secret)
            outcome = run_task(
                session,
                self.key,
                body,
                ttl_s=options.lease_s,
                keep_alive=True,
                max_attempts=options.max_attempts,
                store=lambda lease, value: store.store(lease, value, run_s),
                claim_id=self.claim_id,
            )
            if outcome.error is not None:
                return self._failure(outcome.error)
            if outcome.is_completed:
                return Value(outcome.value, run_s=run_s)
            if not outcome.did_run and _is_exhausted(outcome.state):
                return _exhausted(session, self.key, options.max_attempts)
        except Exception as error:
            return self._failure(error)
        return Elsewhere(outcome.state)

    def _failure(self, error: Exception) -> Failure:
        """Make an error fit to travel; an unpicklable one becomes a RuntimeError with its text."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        if not self._is_remote:
            return Failure(error, text)
        try:
            cloudpickle.loads(cloudpickle.dumps(error))
        except Exception:
            return Failure(RuntimeError(f"{_line(error)} (the exception cannot be pickled)"), text)
        return Failure(error, text)


def _line(error: Exception) -> str:
    """Give an error in one line, also where its own `__str__` raises."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _is_exhausted(state: int) -> bool:
    from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 - loads protobuf

    return state == pb.KEY_STATE_EXHAUSTED


def _exhausted(session: Session, key: bytes, max_attempts: int) -> Failure:
    """Make the error of a key that is not tried again, with its last attempt's traceback."""
    info = session.client.lookup([key], want_infos=True).infos[0]
    shown = display_key(key)
    limit = f" (max_attempts={max_attempts})" if max_attempts else ""
    error = ExhaustedError(
        f"key {shown.text!r} failed {info.attempts} times and is not tried again{limit}. To have "
        f"it tried again: {shown.reset_command}"
    )
    error.__cause__ = RemoteTracebackError(info.error) if info.error else None
    return Failure(error, info.error)
