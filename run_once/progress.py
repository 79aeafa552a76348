"""How far a loop has come: a bar in a terminal or notebook, one line every 30 s elsewhere.

A thread shows it, so that a line comes while a long item is worked on, too.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from run_once.clock import Clock, SystemClock
from run_once.errors import RunOnceError
from run_once.threads import start_daemon

if TYPE_CHECKING:
    from distlock_proto import lock_table_pb2 as pb
    from run_once.config import Config
    from run_once.pass_options import Counts
    from run_once.task import Session

logger = logging.getLogger(__name__)

LINE_INTERVAL_S: Final = 30.0
BAR_INTERVAL_S: Final = 0.5
COUNT_INTERVAL_S: Final = 5.0
"""The server is asked for its counts at most so often."""

RATE_WINDOW_S: Final = 300.0
"""The rate is that of so long."""

_NS_PER_S: Final = 1_000_000_000


class Snapshot(NamedTuple):
    """How far a loop has come.

    Attributes:
        done_here: Keys completed by this pass.
        done_by_all: Keys of the list that are done, as far as is known.
        total: Keys of the list; None: not known.
        in_flight_elsewhere: Keys of the namespace that others hold.
        failed: Keys of the namespace that failed and were not tried again.
        lost: Leases lost by this pass.
        rate: Keys done per second: lately, by all; of the last one: here, on average.
        left_s: Time left at that rate, in seconds; None: not known.
        busy: Keys that this pass left to others.
        is_last: The pass has ended.
    """

    done_here: int
    done_by_all: int
    total: int | None
    in_flight_elsewhere: int
    failed: int
    lost: int
    rate: float
    left_s: float | None
    busy: int = 0
    is_last: bool = False

    def describe(self) -> str:
        """Give it as one line."""
        of_total = "" if self.total is None else f" of {self.total:,}"
        parts = [
            f"done {self.done_here:,} here, {self.done_by_all:,}{of_total} by all",
            *self.details(),
            f"{self.rate:.3g} keys/s{' here on average' if self.is_last else ''}",
        ]
        if self.left_s is not None:
            parts.append(f"about {duration(self.left_s)} left")
        return "; ".join(parts)

    def details(self) -> list[str]:
        """Give what a bar does not show by itself."""
        parts = [f"in flight elsewhere {self.in_flight_elsewhere:,}", f"failed {self.failed:,}"]
        if self.lost:
            parts.append(f"lost {self.lost:,}")
        if self.busy:
            parts.append(f"left to others {self.busy:,}")
        return parts


class Running(Protocol):
    """What is shown: a pass of a loop, or the calls of a `Parallel`."""

    @property
    def counts(self) -> Counts:
        """What became of the keys so far."""
        ...

    @property
    def total(self) -> int | None:
        """Number of keys; None: not known."""
        ...

    @property
    def session(self) -> Session:
        """The connection."""
        ...


class Display(Protocol):
    """Where progress is shown."""

    interval_s: float

    def show(self, snapshot: Snapshot) -> None:
        """Show how far the loop has come."""
        ...

    def close(self) -> None:
        """End the display."""
        ...


class Progress:
    """Gathers the numbers of one pass, and shows them now and then."""

    def __init__(self, running: Running, namespace: str, display: Display, clock: Clock) -> None:
        """Watch a pass; nothing is shown yet.

        Args:
            running: The pass.
            namespace: Its namespace, whose counts the server keeps.
            display: Where to show it.
            clock: Tells the time.
        """
        self._pass = running
        self._namespace = namespace
        self._display = display
        self._clock = clock
        self._began_ns = self._shown_ns = clock.now_ns()
        self._counted_ns: int | None = None
        self._count: pb.CountReply | None = None
        self._history: deque[tuple[int, int]] = deque()
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @classmethod
    def start(cls, running: Running, config: Config) -> Progress:
        """Show a pass until it is closed."""
        display: Display = Bar(running.total) if is_interactive() else Lines()
        made = cls(running, config.namespace, display, SystemClock())
        start_daemon(made._run, "run_once progress")
        return made

    def step(self) -> None:
        """Show the progress if it is time to."""
        now_ns = self._clock.now_ns()
        if now_ns - self._shown_ns >= self._display.interval_s * _NS_PER_S:
            self._shown_ns = now_ns
            self._ask(now_ns)
            with self._lock:
                if not self._stop.is_set():
                    self._display.show(self.snapshot())

    def snapshot(self, *, is_last: bool = False) -> Snapshot:
        """Put the numbers together."""
        counts, total, count = self._pass.counts, self._pass.total, self._count
        done_by_all = counts.known_done
        # A namespace of its own holds this list's keys and no others.
        if count is not None and self._namespace:
            done_by_all = max(done_by_all, count.done)
        if total is not None:
            done_by_all = min(done_by_all, total)
        held_here = counts.handed_out - counts.completed - counts.failed - counts.lost
        rate = self._mean_rate() if is_last else self._rate()
        knows_end = total is not None and rate > 0 and not is_last
        return Snapshot(
            done_here=counts.completed,
            done_by_all=done_by_all,
            total=total,
            in_flight_elsewhere=max(0, count.held - max(0, held_here)) if count else 0,
            failed=count.failed if count else counts.failed,
            lost=counts.lost,
            rate=rate,
            left_s=((total or 0) - done_by_all) / rate if knows_end else None,
            busy=counts.busy,
            is_last=is_last,
        )

    def close(self) -> None:
        """Show the last state, and end."""
        self._stop.set()
        with self._lock:
            self._display.show(self.snapshot(is_last=True))
            self._display.close()

    def _run(self) -> None:
        while not self._stop.wait(min(self._display.interval_s, 1.0)):
            self.step()

    def _ask(self, now_ns: int) -> None:
        """Ask the server for the namespace's counts, unless that was a moment ago."""
        if (
            self._counted_ns is not None
            and now_ns - self._counted_ns < COUNT_INTERVAL_S * _NS_PER_S
        ):
            return
        self._counted_ns = now_ns
        try:
            self._count = self._pass.session.client.count(namespace=self._namespace)
        except RunOnceError as error:
            logger.debug("no counts for the progress: %s", error)
            return
        self._history.append((now_ns, self._count.done))
        while now_ns - self._history[0][0] > RATE_WINDOW_S * _NS_PER_S:
            self._history.popleft()

    def _rate(self) -> float:
        """Give the keys done per second, by all, lately."""
        history = list(self._history)
        if len(history) < 2:  # noqa: PLR2004 (two points make a line)
            return 0.0
        (first_ns, first), (last_ns, last) = history[0], history[-1]
        return max(0, last - first) * _NS_PER_S / (last_ns - first_ns)

    def _mean_rate(self) -> float:
        """Give the keys done here per second since the pass began."""
        elapsed_ns = self._clock.now_ns() - self._began_ns
        return self._pass.counts.completed * _NS_PER_S / elapsed_ns if elapsed_ns > 0 else 0.0


class Lines:
    """One line now and then: to the log if it shows such, else to standard error."""

    interval_s = LINE_INTERVAL_S

    def show(self, snapshot: Snapshot) -> None:
        """Write the line."""
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", snapshot.describe())
        else:
            print(f"run_once: {snapshot.describe()}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: the last line stands."""


class Bar:
    """A tqdm bar."""

    interval_s = BAR_INTERVAL_S

    def __init__(self, total: int | None) -> None:
        """Draw the bar.

        Args:
            total: Its end; None: not known.
        """
        from tqdm.auto import tqdm  # noqa: PLC0415 (only where a bar is shown)

        self._bar = tqdm(total=total, unit="key", dynamic_ncols=True)

    def show(self, snapshot: Snapshot) -> None:
        """Move the bar."""
        self._bar.n = snapshot.done_by_all
        self._bar.set_postfix_str(
            ", ".join([f"here {snapshot.done_here:,}", *snapshot.details()]), refresh=False
        )
        self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def is_interactive() -> bool:
    """Tell whether a person looks at a terminal or a notebook."""
    if "ipykernel" in sys.modules:
        return True
    return sys.stderr is not None and sys.stderr.isatty()


def duration(seconds: float) -> str:
    """Give a length of time as people say it."""
    minutes, whole_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole_s:02d} s" if minutes else f"{whole_s} s"
