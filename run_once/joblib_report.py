"""What became of the calls of a `joblib.Parallel`: counted, told to a callback, shown as a bar."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from run_once.joblib_outcomes import Failed, Failure, Settled, Skipped, Value, readable

if TYPE_CHECKING:
    from run_once.pass_options import Counts
    from run_once.task import Session

logger = logging.getLogger("run_once")

What = Literal["hit", "computed", "waited", "taken_over", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class CallEvent:
    """What became of one call.

    Attributes:
        key: The key, as `run-once list` shows it.
        what: "hit": its stored value was loaded; "waited": so, once another machine was through;
            "computed": it ran here; "taken_over": so, since the holder that it was waited for
            dropped it; "failed"; "skipped": it is in flight elsewhere (`in_flight="skip"`).
        run_s: For how many seconds the call ran, here or when its value was stored; 0: not known.
    """

    key: str
    what: What
    run_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the calls of one `Parallel`; see `CallEvent` for the words.

    Attributes:
        hits: Calls whose values were loaded at once.
        computed: Calls that ran here.
        waited: Calls whose values another machine computed meanwhile.
        taken_over: Calls that ran here after another machine had dropped them.
        failed: Calls that failed.
        skipped: Calls left to other machines.
        other_source: Loaded values whose function had another source when they were computed.
        seconds_saved: For how long the loaded values were computed, in seconds.
        elapsed_s: From the beginning to the end, in seconds.
    """

    hits: int = 0
    computed: int = 0
    waited: int = 0
    taken_over: int = 0
    failed: int = 0
    skipped: int = 0
    other_source: int = 0
    seconds_saved: float = 0.0
    elapsed_s: float = 0.0

    @property
    def calls(self) -> int:
        """Number of calls that were settled."""
        whole = (self.hits, self.computed, self.waited, self.taken_over, self.failed, self.skipped)
        return sum(whole)

    def __str__(self) -> str:
        names = [field.name for field in fields(self) if isinstance(getattr(self, field.name), int)]
        parts = [
            f"{name.replace('_', ' ')} {getattr(self, name):,}"
            for name in names
            if getattr(self, name)
        ]
        saved = f", {self.seconds_saved:.1f} s saved" if self.seconds_saved else ""
        return (
            f"{self.calls:,} calls in {self.elapsed_s:.1f} s: {', '.join(parts) or 'none'}{saved}"
        )


class Tally:
    """Counts the calls of one `Parallel`, in whichever thread they end.

    Attributes:
        first_of_other_source: Key of the first value that other source made than the function has
            now; empty: none.
    """

    def __init__(self, callback: Callable[[CallEvent], object] | None = None) -> None:
        """Begin.

        Args:
            callback: Told of each call; None: nobody is.
        """
        self._callback = callback
        self._lock = threading.Lock()
        self._counts: dict[What, int] = {}
        self._saved_s = 0.0
        self._other_source = 0
        self.first_of_other_source = ""
        self._started_s = time.monotonic()

    def note(self, key: bytes, outcome: Settled, *, was_busy: bool, source_id: bytes = b"") -> None:
        """Count a call's end; `source_id` is the fingerprint of its function's source now."""
        what = _name(outcome, was_busy=was_busy)
        run_s = outcome.run_s if isinstance(outcome, Value) else 0.0
        with self._lock:
            self._counts[what] = self._counts.get(what, 0) + 1
            if what in ("hit", "waited") and isinstance(outcome, Value):
                self._saved_s += run_s
                if source_id and outcome.source_id and source_id != outcome.source_id:
                    self._other_source += 1
                    self.first_of_other_source = self.first_of_other_source or readable(key)
        if self._callback is not None:
            self._tell(CallEvent(readable(key), what, run_s))

    def report(self) -> Report:
        """Give the numbers so far."""
        with self._lock:
            counts, saved_s = dict(self._counts), self._saved_s
            other_source = self._other_source
        return Report(
            hits=counts.get("hit", 0),
            computed=counts.get("computed", 0),
            waited=counts.get("waited", 0),
            taken_over=counts.get("taken_over", 0),
            failed=counts.get("failed", 0),
            skipped=counts.get("skipped", 0),
            other_source=other_source,
            seconds_saved=saved_s,
            elapsed_s=time.monotonic() - self._started_s,
        )

    def _tell(self, event: CallEvent) -> None:
        """Call the callback; its exception is logged once, and the callback is not called again."""
        callback = self._callback
        if callback is None:
            return
        try:
            callback(event)
        except Exception:
            self._callback = None
            logger.exception("callback=... raised, and is not called again in this Parallel")


class RunningCalls:
    """The calls of a `Parallel`, as a progress display asks for them.

    Attributes:
        session: The connection.
        total: Number of calls; None: not known.
    """

    def __init__(self, tally: Tally, session: Session, total: int | None) -> None:
        """Watch a tally."""
        self._tally = tally
        self.session = session
        self.total = total

    @property
    def counts(self) -> Counts:
        """What became of the calls so far, in a loop's words."""
        from run_once.pass_options import Counts  # noqa: PLC0415 - loads protobuf

        report = self._tally.report()
        computed = report.computed + report.taken_over
        return Counts(
            handed_out=computed + report.failed,
            completed=computed,
            found_done=report.hits + report.waited,
            failed=report.failed,
            busy=report.skipped,
        )


def last_report() -> Report | None:
    """Tell what became of the calls of the `Parallel` that ended last in this process.

    Returns:
        The report; None: none has ended yet.
    """
    return _last[0] if _last else None


def keep_report(report: Report) -> None:
    """Make a report the last one."""
    _last[:] = [report]


_last: list[Report] = []


def _name(outcome: Settled, *, was_busy: bool) -> What:
    if isinstance(outcome, Skipped):
        return "skipped"
    if isinstance(outcome, Failure) or isinstance(outcome.value, Failed):
        return "failed"
    if outcome.is_stored:
        return "waited" if was_busy else "hit"
    return "taken_over" if was_busy else "computed"
