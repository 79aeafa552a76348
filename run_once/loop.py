"""One pass of a loop: settle the last item, claim the next, and give all back when it is left.

A `for` holds the only reference to its `Loop`, so that leaving it in any way drops and closes it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from run_once.ahead import ClaimAhead, stop_all
from run_once.config import Config
from run_once.errors import LeaseLostWarning
from run_once.exit_signals import ExitSignals
from run_once.key_pass import KeyPass
from run_once.live import LiveItem, Outcome, registry, release_all, show
from run_once.pass_end import tell_end
from run_once.pass_options import Counts
from run_once.process import THIS
from run_once.progress import Progress
from run_once.readahead import ADVICE, ReadAheadWatch
from run_once.session import give_back_all
from run_once.task import AnyLease, Session
from run_once.warn import warn_user

ItemT = TypeVar("ItemT")

logger = logging.getLogger(__name__)

_ENDING_LOOK_S: Final = 0.05

_CLOSE_TIMEOUT_S: Final = 10.0
"""A loop that is left waits so long for the acknowledgement of what is done."""


class Loop(Iterator[ItemT]):
    """One pass: `next` settles the last item and claims another; closed when it is dropped.

    Asking from several threads is allowed where settling is explicit. A forked child goes on with
    leases of its own.
    """

    def __init__(
        self, begin: Callable[[], KeyPass[ItemT]], config: Config, *, is_explicit: bool
    ) -> None:
        """Prepare a pass; it begins with the first item that is asked for.

        Args:
            begin: Connects and begins to read.
            config: The options.
            is_explicit: Asking for the next item settles nothing.
        """
        self._begin = begin
        self._config = config
        self._is_explicit = is_explicit
        self._pass: KeyPass[ItemT] | None = None
        self._ahead: ClaimAhead | None = None
        self._progress: Progress | None = None
        self._current: LiveItem[ItemT] | None = None
        self._is_closed = False
        self._pid = THIS.pid
        self._lock = threading.RLock()
        self._watch = ReadAheadWatch()
        self._has_warned_ahead = is_explicit
        self._has_warned_lost = False
        self._has_signals = False

    def __next__(self) -> ItemT:
        if not self._has_warned_ahead:
            suspicion = self._watch.suspicion()
            if not suspicion and not self._lock.acquire(blocking=False):
                suspicion = "an item is asked for while another request for one is under way"
            elif not suspicion:
                self._lock.release()
            if suspicion:
                self._has_warned_ahead = True
                warn_user(f"{suspicion}; {ADVICE}")
        live = self.claim_next()
        if live is None:
            raise StopIteration
        return live.item

    def claim_next(self) -> LiveItem[ItemT] | None:
        """Settle the last item, if that is implicit, and claim the next one.

        Returns:
            The item; None if nothing is left.
        """
        self._after_fork()
        while _EXIT_SIGNALS.is_ending and threading.current_thread() is threading.main_thread():
            time.sleep(_ENDING_LOOK_S)  # the signal's handler ends the process
        live = None
        try:
            with self._lock:
                live = self._claim_next()
        except BaseException:
            self.close()
            if live is not None and self._is_explicit:  # interrupted before anybody saw it
                registry().remove(live)
                live.release()
            raise
        return live

    def _claim_next(self) -> LiveItem[ItemT] | None:
        """See `claim_next`; one thread at a time."""
        if self._is_closed:
            return None
        running = self._pass or self._start()
        self._settle_current()
        live = running.claim_next()
        if running.first_lost is not None and not self._has_warned_lost:
            self._warn_lost(running.first_lost, running.counts)
        if live is None:
            self.close()
            if not self._config.progress:  # which has shown the same
                tell_end(running, self._config.namespace)
        else:
            self._current = live
            live.mark_taken()
        return live

    def close(self) -> None:
        """Leave the loop: give the current item back, put signal handlers back, end the bar."""
        if self._is_closed or self._pid != THIS.pid:
            return
        with self._lock:
            self._is_closed = True
            live, self._current = self._current, None
            try:
                self._give_back(None if self._is_explicit else live)
            finally:
                if self._has_signals:
                    self._has_signals = False
                    _EXIT_SIGNALS.leave()
                if self._progress is not None:
                    self._progress.close()

    def _give_back(self, live: LiveItem[ItemT] | None) -> None:
        """Give back what was not done, the items that were held ahead included; settle the rest."""
        if self._ahead is not None:
            self._ahead.close()
        if live is not None:
            registry().remove(live)
        if self._pass is None:
            return
        session = self._pass.session
        mine: list[AnyLease] = [live.lease] if live is not None and live.outcome is None else []
        leases = list(dict.fromkeys([*mine, *self._pass.close()]))
        n_left = 0
        try:
            n_left = session.settler.flush(_CLOSE_TIMEOUT_S)
        finally:  # an interrupted wait must not keep leases alive that nobody works under
            n_left += self._pass.n_unsent
            if n_left:
                self._tell_unacknowledged(n_left)
            session.release(leases)
            if live is not None:
                live.mark_released()

    def _tell_unacknowledged(self, n_items: int) -> None:
        """Say that not all that is done was taken note of; who left the loop hears no error."""
        assert self._pass is not None
        logger.warning(
            "lock server %s did not acknowledge %d finished keys; unless it still does, they are "
            "done again",
            self._pass.session.address,
            n_items,
        )

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # __init__ did not come far
            self.close()

    def _start(self) -> KeyPass[ItemT]:
        """Begin the pass."""
        self._pass = self._begin()
        self._ahead = ClaimAhead(self._pass)
        self._has_signals = _EXIT_SIGNALS.enter()
        if self._config.progress:
            self._progress = Progress.start(self._pass, self._config)
        return self._pass

    def _settle_current(self) -> None:
        """Have the last item settled as done, unless that is for the caller to do."""
        live = self._current
        if live is None:
            return
        live.is_current = False
        if not self._is_explicit:
            live.complete_soon()
            registry().remove(live)
        elif live.outcome is not None and live.outcome is not Outcome.LOST:
            registry().remove(live)
        self._current = None  # from now on `close` gives it back no more

    def _warn_lost(self, live: LiveItem[ItemT], counts: Counts) -> None:
        """Warn of the first lost lease; the others are counted."""
        self._has_warned_lost = True
        if live.is_loss_told or self._is_explicit:
            return
        warn_user(
            f"the lease on key {show(live.key)} was lost, so this run of it was not accepted: this "
            "process was paused or cut off for longer than the lease, and another was granted the "
            f"key. The loop goes on; lost so far: {counts.lost}",
            LeaseLostWarning,
        )

    def _after_fork(self) -> None:
        """In a forked child, leave the parent's item alone and go on with claims of its own."""
        if self._pid == THIS.pid:
            return
        self._pid = THIS.pid
        self._lock = threading.RLock()
        self._current = None
        self._progress = None
        self._ahead = None
        self._has_signals = False
        if self._pass is not None:
            self._pass.after_fork(Session.get(self._config))


def _give_back() -> None:
    stop_all()
    release_all(registry().held(is_kept_only=True))
    give_back_all()


_EXIT_SIGNALS: Final = ExitSignals(_give_back)
"""Shared by all loops of this process."""
