"""One logical call: attempts with backoff until an answer, an error that stays, or the bound.

What became of an attempt without a reply is unknown; every request may be sent again, since
claim id, token or revision make its repetition harmless.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Final, NamedTuple

from google.protobuf.message import Message

from run_once.channel import FORKED, NO_TLS, ReplyT, Transport, TransportError
from run_once.clock import Clock
from run_once.errors import (
    AccessError,
    LimitError,
    RunOnceError,
    ServerError,
    ServerUnavailableError,
)

logger = logging.getLogger(__name__)

_NS_PER_S: Final = 1_000_000_000
_RETRIED: Final = frozenset(
    {
        "ABORTED",
        "CANCELLED",  # by a server that drains
        "DEADLINE_EXCEEDED",
        "UNAVAILABLE",
    }
)
_TOO_LARGE: Final = ("larger than max", "message too large")
_HOW_TO_GET_IN: Final = {
    "UNAUTHENTICATED": (
        "set RUN_ONCE_ADDRESS=addrfile:///path to a copy of the file that `distlock "
        "--address_file` writes there, or RUN_ONCE_TOKEN to one of the server's tokens"
    ),
    "PERMISSION_DENIED": "ask whoever runs the server for an address file or token of that role",
    NO_TLS: (
        "set RUN_ONCE_ADDRESS=addrfile:///path to a copy of the file that `distlock "
        "--address_file` writes there, or see RUN_ONCE_TLS_CA, RUN_ONCE_TLS_CERT and "
        "RUN_ONCE_TLS_KEY"
    ),
}
_BROKEN_STREAM: Final = ("stream", "goaway", "connection", "transport", "http")


class RetryPolicy(NamedTuple):
    """How long and how often an unreachable server is tried.

    Attributes:
        total_s: Give up after so long.
        attempt_s: Deadline of one attempt.
        first_backoff_s: Upper bound of the pause after the first attempt; it doubles.
        max_backoff_s: Upper bound of any pause.
        warn_after_s: Say once in the log, after so long, which server is tried.
    """

    total_s: float = 120.0
    attempt_s: float = 10.0
    first_backoff_s: float = 0.05
    max_backoff_s: float = 1.0
    warn_after_s: float = 5.0


DEFAULT_RETRY: Final = RetryPolicy()


class Caller:
    """Makes logical calls over a transport."""

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        rng: random.Random,
        sleep: Callable[[float], None],
        policy: RetryPolicy,
        source: str,
        revive: Callable[[], None] | None = None,
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._rng = rng
        self._sleep = sleep
        self._policy = policy
        self._source = source
        self._revive = revive

    def call(
        self,
        method: str,
        request: Message,
        reply_type: type[ReplyT],
        *,
        timeout_s: float | None = None,
        once_s: float | None = None,
        not_again: frozenset[str] = frozenset(),
    ) -> tuple[ReplyT, int]:
        """Make one logical call.

        Args:
            method: Name of the method.
            request: Sent again, as it is, with each attempt.
            reply_type: Class of the reply.
            timeout_s: Deadline of one attempt; None: the policy's.
            once_s: Make one attempt only, with this deadline.
            not_again: Codes that the caller handles, raised as ServerError at once.

        Returns:
            The reply, and the clock's time at which the attempt that was answered was sent.

        Raises:
            ServerUnavailableError: No answer within the bound.
            LimitError: The request is malformed or too large.
            AccessError: The server does not let this client do that.
            ServerError: The server refused for another reason.
        """
        policy = self._policy
        deadline_s = once_s or timeout_s or policy.attempt_s
        tried_s = 0.0
        attempt = 0
        warned = False
        while True:
            sent_ns = self._clock.now_ns()
            try:
                return self._transport.call(method, request, reply_type, deadline_s), sent_ns
            except TransportError as error:
                if error.code == FORKED and FORKED not in not_again:
                    continue  # says nothing about the server
                if error.code in not_again or not is_retried(error):
                    raise self._refusal(method, error) from None
                if once_s is not None:
                    raise self._unavailable(once_s, error) from None
                failure = error
            pause_s = self._rng.uniform(0, policy.first_backoff_s * 2 ** min(attempt, 16))
            pause_s = min(pause_s, self._rng.uniform(0, policy.max_backoff_s))
            attempt += 1
            # A machine that slept through the attempt has not tried for so long.
            spent_s = (self._clock.now_ns() - sent_ns) / _NS_PER_S
            tried_s += min(spent_s, 2 * deadline_s) + pause_s
            if tried_s >= policy.total_s:
                raise self._unavailable(tried_s, failure)
            if self._revive is not None and failure.code == "UNAVAILABLE":
                self._revive()
            if tried_s >= policy.warn_after_s and not warned:
                warned = True
                self._warn(tried_s, failure)
            self._sleep(pause_s)

    def _where(self) -> str:
        """Name the server and where its address was configured."""
        return f"{self._transport.address}{f' (from {self._source})' if self._source else ''}"

    def _warn(self, tried_s: float, error: TransportError) -> None:
        """Say which server is tried."""
        logger.warning(
            "lock server %s has not answered for %.0f s; trying for %.0f s (%s)",
            self._where(),
            tried_s,
            self._policy.total_s,
            error,
        )

    def _unavailable(self, tried_s: float, error: TransportError) -> ServerUnavailableError:
        """Make the error of a server that does not answer."""
        return ServerUnavailableError(
            f"lock server {self._where()} did not answer within {tried_s:.3g} s: "
            f"{_one_line(error)}. Check that `distlock` runs there and that this machine reaches "
            "it (firewall, ssh -L), or set RUN_ONCE_ADDRESS"
        )

    def _refusal(self, method: str, error: TransportError) -> RunOnceError:
        """Make the error of a request that was refused."""
        if error.code in {"INVALID_ARGUMENT", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED"}:
            return LimitError(
                f"{method} was refused by lock server {self._where()}: {error.detail}"
            )
        if error.code in _HOW_TO_GET_IN:
            refused = AccessError(
                f"{method} was refused by lock server {self._where()}: "
                f"{_plain(error.detail)}; {_HOW_TO_GET_IN[error.code]}"
            )
            refused.code = error.code
            return refused
        if error.code == "UNIMPLEMENTED":
            detail = "it is no distlock of version 1 or newer; update it or set RUN_ONCE_ADDRESS"
        else:
            detail = _one_line(error)
        made = ServerError(f"{method} failed at lock server {self._where()}: {detail}")
        made.code = error.code
        return made


def is_retried(error: TransportError) -> bool:
    """Tell whether another attempt may be answered."""
    detail = error.detail.lower()
    if error.code == "RESOURCE_EXHAUSTED":  # backpressure, or a message that is too large
        return not any(text in detail for text in _TOO_LARGE)
    if error.code in {"INTERNAL", "UNKNOWN"}:  # a broken stream, or a bug of the server
        return any(text in detail for text in _BROKEN_STREAM)
    return error.code in _RETRIED


def _one_line(error: TransportError) -> str:
    """Shorten what gRPC says."""
    return f"{error.code}: {_plain(error.detail)}"


def _plain(detail: str) -> str:
    """Bring a text into one line that is not too long."""
    return " ".join(detail.split())[:300]
