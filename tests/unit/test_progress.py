"""Progress: the right numbers at the right time, as a bar or as lines."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace
from typing import Any, Final

import pytest

from distlock_server.clock import ManualClock
from run_once import DistributedIterator
from run_once.errors import ServerUnavailableError
from run_once.pass_options import Counts
from run_once.progress import Bar, Lines, Progress, Snapshot, duration
from tests.other_client import Other

SNAPSHOT: Final = Snapshot(
    done_here=1_200,
    done_by_all=4_310,
    total=10_000,
    in_flight_elsewhere=7,
    failed=2,
    lost=0,
    rate=3.1,
    left_s=1835.5,
)


class Recorder:
    """A display that keeps what it is shown."""

    interval_s = 30.0

    def __init__(self) -> None:
        """Start empty."""
        self.shown: list[Snapshot] = []
        self.is_closed = False

    def show(self, snapshot: Snapshot) -> None:
        """Keep a snapshot."""
        self.shown.append(snapshot)

    def close(self) -> None:
        """Note the end."""
        self.is_closed = True


class FakePass:
    """A pass whose numbers a test sets, and a server that answers with given counts."""

    def __init__(self, total: int | None) -> None:
        """Start with nothing done."""
        self.total = total
        self.counts = Counts()
        self.reply = SimpleNamespace(done=0, held=0, failed=0)
        self.is_gone = False
        self.asked = 0
        self.session = SimpleNamespace(client=self)

    def count(self, *, namespace: str) -> Any:
        """Answer as the server's Count does."""
        self.asked += 1
        if self.is_gone:
            raise ServerUnavailableError("gone")
        return SimpleNamespace(**vars(self.reply))


def make(
    clock: ManualClock, total: int | None = 100, namespace: str = "ns"
) -> tuple[Any, Recorder, Progress]:
    """Make a progress that a test steps by hand."""
    running, display = FakePass(total), Recorder()
    fake: Any = running
    return running, display, Progress(fake, namespace, display, clock)


def test_numbers(manual_clock: ManualClock) -> None:
    """Done here and by all, in flight elsewhere, failed, rate and time left are as counted."""
    running, display, progress = make(manual_clock)
    running.counts = Counts(handed_out=6, completed=5, found_done=10)
    running.reply = SimpleNamespace(done=20, held=4, failed=3)
    manual_clock.advance(30)
    progress.step()
    running.reply = SimpleNamespace(done=50, held=4, failed=3)
    manual_clock.advance(30)
    progress.step()
    assert display.shown[0].rate == 0
    assert display.shown[0].left_s is None
    assert display.shown[1] == Snapshot(
        done_here=5,
        done_by_all=50,
        total=100,
        in_flight_elsewhere=3,
        failed=3,
        lost=0,
        rate=1.0,
        left_s=50.0,
    )


def test_without_a_namespace_others_keys_do_not_count(manual_clock: ManualClock) -> None:
    """The namespace without a name holds all sorts of keys: done by all is what this pass knows."""
    running, _display, progress = make(manual_clock, namespace="")
    running.counts = Counts(completed=5, found_done=10)
    running.reply.done = 1_000_000
    manual_clock.advance(30)
    progress.step()
    assert progress.snapshot().done_by_all == 15


def test_last_line_has_the_mean_rate(manual_clock: ManualClock) -> None:
    """The last line gives what was done here per second of the whole pass, and what was left."""
    running, display, progress = make(manual_clock)
    running.counts = Counts(handed_out=12, completed=12, busy=3)
    manual_clock.advance(4)
    progress.close()
    assert "; left to others 3; 3 keys/s here on average" in display.shown[-1].describe()
    assert display.shown[-1].left_s is None


def test_unknown_total(manual_clock: ManualClock) -> None:
    """Of a generator there is no total and no time left."""
    running, display, progress = make(manual_clock, total=None)
    for _ in range(2):
        running.reply.done += 10
        manual_clock.advance(30)
        progress.step()
    assert display.shown[-1].left_s is None
    assert "of" not in display.shown[-1].describe().split(";")[0]


def test_every_30_s(manual_clock: ManualClock) -> None:
    """A line comes each 30 s, not sooner, and one more at the end; the server is asked no more."""
    running, display, progress = make(manual_clock)
    for _ in range(120):
        manual_clock.advance(1)
        progress.step()
    assert len(display.shown) == running.asked == 4
    progress.close()
    assert len(display.shown) == 5
    assert display.is_closed
    manual_clock.advance(60)
    progress.step()
    assert len(display.shown) == 5


def test_server_gone(manual_clock: ManualClock) -> None:
    """A server that does not answer costs its numbers, and nothing else."""
    running, display, progress = make(manual_clock)
    running.is_gone = True
    running.counts.completed = 3
    manual_clock.advance(30)
    progress.step()
    assert display.shown[0].done_by_all == 3


def test_line() -> None:
    """The line names everything in words."""
    assert SNAPSHOT.describe() == (
        "done 1,200 here, 4,310 of 10,000 by all; in flight elsewhere 7; failed 2; 3.1 keys/s; "
        "about 30 min 36 s left"
    )
    assert "lost 4" in SNAPSHOT._replace(lost=4).describe()


def test_line_goes_to_the_log_or_to_stderr(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where INFO is logged the line is logged; else it goes to standard error."""
    with caplog.at_level(logging.INFO, logger="run_once"):
        Lines().show(SNAPSHOT)
    assert "4,310" in caplog.text
    assert capsys.readouterr().err == ""
    with caplog.at_level(logging.WARNING, logger="run_once"):
        Lines().show(SNAPSHOT)
    assert capsys.readouterr().err == f"run_once: {SNAPSHOT.describe()}\n"


def test_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar shows what is done by all of the total, and the rest beside it."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    bar = Bar(10_000)
    bar.show(SNAPSHOT)
    bar.close()
    shown = stream.getvalue()
    for text in ("4310/10000", "here 1,200", "in flight elsewhere 7", "failed 2"):
        assert text in shown


def test_loop_with_progress(other: Other, capsys: pytest.CaptureFixture[str]) -> None:
    """`progress=True` without a terminal writes a last line when the loop ends, by break too."""
    other.finish("a")
    for item in DistributedIterator(["a", "b", "c"], progress=True):
        if item == "c":
            break
    assert "done 1 here, 2 of 3 by all" in capsys.readouterr().err


def test_configured_progress(
    other: Other, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress can be configured; an argument outdoes that."""
    monkeypatch.setenv("RUN_ONCE_PROGRESS", "yes")
    list(DistributedIterator(["a"]))
    assert "done 1 here" in capsys.readouterr().err
    list(DistributedIterator(["b"], progress=False))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3_660, "1 h 01 min"), (90_000, "1 d 1 h")],
)
def test_duration(seconds: float, text: str) -> None:
    """Lengths of time are as people say them."""
    assert duration(seconds) == text
