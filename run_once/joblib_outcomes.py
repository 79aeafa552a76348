"""What may become of one call of `joblib.Parallel`, and what stands in its place if not a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from run_once.keys import display_key


class RemoteTracebackError(Exception):
    """The worker's traceback, as text; the cause of the error that is raised here."""

    def __init__(self, text: str) -> None:
        """Keep the text."""
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        """Show the traceback below joblib's."""
        return f'\n"""\n{self.text}"""'


class Value(NamedTuple):
    """The call ran here, and its completion is acknowledged; or its stored value was loaded.

    Attributes:
        value: The value.
        is_stored: It was loaded.
        run_s: For how many seconds the call ran, here or when it was stored.
        source_id: Fingerprint of the function's source then; empty: not known.
    """

    value: Any
    is_stored: bool = False
    run_s: float = 0.0
    source_id: bytes = b""


class Failure(NamedTuple):
    """The call, or something around it, raised."""

    error: BaseException
    traceback_text: str = ""

    def with_cause(self) -> BaseException:
        """Give the error, with the worker's traceback, which shows its own cause, as its cause."""
        if self.traceback_text:
            self.error.__cause__ = RemoteTracebackError(self.traceback_text)
        return self.error


class Elsewhere(NamedTuple):
    """Another holds the key or completed it: look it up again.

    Attributes:
        state: The key's state (`KeyState`) as the server told it.
    """

    state: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """Stands for the value of a call that is in flight on another machine (`in_flight="skip"`).

    Attributes:
        key: The key as stored.
    """

    key: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Stands for the value of a call that failed (`on_error="return"`).

    Attributes:
        key: The key, as `run-once list` shows it.
        error: What the call raised, or `ExhaustedError`.
        traceback: The worker's traceback as text.
    """

    key: str
    error: BaseException
    traceback: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Planned:
    """Stands for the value of a call that was only looked up (`dry_run=True`).

    Attributes:
        key: The key, as `run-once list` shows it.
        state: "done": its value would be loaded; "to run"; "failed": it would be tried again;
            "in flight": another holds it.
    """

    key: str
    state: Literal["done", "to run", "failed", "in flight"]


Outcome: TypeAlias = Value | Failure | Elsewhere
"""What a worker answers."""

Settled: TypeAlias = Value | Failure | Skipped
"""What ends a call."""


def readable(key: bytes) -> str:
    """Give a stored key as `run-once list` shows it."""
    return display_key(key).text
