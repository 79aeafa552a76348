"""Two lanes that do slices of all parts, in turn, until the time is over."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.hermetic import hide_user
from tests.soak.ledger import ROOT, Ledger, commit
from tests.soak.parts import Part
from tests.soak.slices import FIGURES
from tests.soak.tables import table

POLL_S: Final = 0.1
REPORT_EVERY_S: Final = 600.0
END_LIMIT_S: Final = 20.0
"""How long a slice may take to end when it is told to."""


class Slice(NamedTuple):
    """A slice under way.

    Attributes:
        began_s: By the monotonic clock.
        commit: What it tests.
    """

    part: str
    seed: int
    folder: Path
    process: subprocess.Popen[bytes]
    began_s: float
    commit: str

    def signal_all(self, number: int) -> None:
        """Send a signal to it and to all that it started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


class Soak:
    """One run.

    Attributes:
        figures: What it has covered so far, by part.
        wrong: What went wrong: where, the seed, and what.
        skipped: Parts that cannot be done here, and why.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        ledger: Ledger,
        seed: int,
        for_s: float,
        folder: Path,
        *,
        n_lanes: int = 2,
        say: Callable[[str], None] = print,
    ) -> None:
        """Prepare a run.

        Args:
            parts: What is to be tried.
            ledger: Where the figures add up.
            seed: Draws the seeds of all slices.
            for_s: How long slices are begun; each ends by itself, or at its limit.
            folder: Takes a folder for each slice; those that went wrong stay.
            n_lanes: Slices at once.
            say: Takes the lines for a person.
        """
        self.figures: dict[str, Counter[str]] = {name: Counter() for name in parts}
        self.wrong: list[str] = []
        self.skipped: dict[str, str] = {}
        self._parts = parts
        self._ledger = ledger
        self._seed = seed
        self._rng = random.Random(seed)
        self._for_s = for_s
        self._n_lanes = n_lanes
        self._say = say
        self._running: list[Slice] = []
        self._used_s = dict.fromkeys(parts, 0.0)
        self._longest_s = {name: part.expected_s for name, part in parts.items()}
        self._n_begun = dict.fromkeys(parts, 0)
        self._is_ending = False
        self._folder = folder
        self._commit = commit()

    def run(self) -> bool:
        """Do it; tell whether nothing went wrong."""
        self._began_s = self._counted_s = self._told_s = time.monotonic()
        self._say(f"soak: seed {self._seed}, commit {self._commit}, {self._for_s:.0f} s")
        try:
            while self._turn():
                time.sleep(POLL_S)
        finally:
            self._end_all()
            self._count_time()
            self.tell()
        return not self.wrong

    def stop(self) -> None:
        """Begin no more slices, and end those that are under way."""
        self._is_ending = True

    def tell(self) -> None:
        """Say what was covered so far, by this run and by all."""
        seconds = time.monotonic() - self._began_s
        totals, total_s = self._ledger.totals()
        self._say(f"\nThis run: seed {self._seed}, commit {self._commit}, {seconds:.0f} s")
        self._say(table(self._parts, self.figures, seconds, self.skipped))
        self._say(f"\nAll runs, {total_s / 3600:.2f} hours")
        self._say(table(self._parts, totals, total_s, {}))
        for line in self.wrong:
            self._say(f"WRONG: {line}")

    # -- turns ------------------------------------------------------------------------------------

    def _turn(self) -> bool:
        """Look after the lanes; tell whether anything is left to be done."""
        if self._is_ending:
            return False
        now_s = time.monotonic()
        for done in [one for one in self._running if one.process.poll() is not None]:
            self._running.remove(done)
            self._take(done, now_s)
        for late in self._running:
            if now_s - late.began_s > self._parts[late.part].limit_s:
                late.signal_all(signal.SIGKILL)
        while len(self._running) < self._n_lanes:
            name = self._choose(now_s)
            if name is None:
                return bool(self._running)
            self._begin(name, now_s)
        if now_s - self._told_s > REPORT_EVERY_S:
            self._told_s = now_s
            self._count_time()
            self.tell()
        return True

    def _choose(self, now_s: float) -> str | None:
        """Give the part that is furthest behind its share of the time, of those that still fit.

        Every part has its first slice before any has its second; what is done only so many times
        in an hour comes behind the first slices of the others.
        """
        left_s = self._began_s + self._for_s - now_s
        if left_s <= 0:
            return None
        behind = [
            (self._turn_of(name), self._lag(name), place, name)
            for place, name in enumerate(self._parts)
            if self._may_begin(name, left_s)
        ]
        return min(behind)[-1] if behind else None

    def _may_begin(self, name: str, left_s: float) -> bool:
        part = self._parts[name]
        if name in self.skipped or self._for_s < part.min_run_s:
            return False
        if not part.share and self._n_begun[name] >= part.times(self._for_s):
            return False
        return self._n_begun[name] == 0 or self._longest_s[name] <= left_s

    def _turn_of(self, name: str) -> int:
        """Put first slices first, then what is done so many times only, then the rest."""
        if not self._parts[name].share:
            return 1
        return 2 if self._n_begun[name] else 0

    def _lag(self, name: str) -> float:
        under_way_s = sum(self._longest_s[name] for one in self._running if one.part == name)
        return (self._used_s[name] + under_way_s) / (self._parts[name].share or 1.0)

    def _begin(self, name: str, now_s: float) -> None:
        seed = self._rng.randrange(2**32)
        self._n_begun[name] += 1
        folder = self._folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
        folder.mkdir()
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                self._command(name, seed, folder),
                cwd=ROOT,
                env=hide_user(folder / "home"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._running.append(Slice(name, seed, folder, process, now_s, commit()))

    def _command(self, name: str, seed: int, folder: Path) -> list[str]:
        return [sys.executable, "-m", "tests.soak.slices", name, str(seed), str(folder)]

    def _take(self, done: Slice, now_s: float) -> None:
        """Count what a slice did."""
        done.signal_all(signal.SIGKILL)  # nothing that it started outlives it
        seconds = now_s - done.began_s
        self._used_s[done.part] += seconds
        self._longest_s[done.part] = max(seconds, self._longest_s[done.part] * 0.8)
        said = self._read(done, seconds)
        figures = Counter({"seconds": round(seconds), "slices": 1})
        figures.update(said["figures"])
        if "skipped" in said:
            self.skipped[done.part] = said["skipped"]
            figures = Counter({"skipped": 1})
        if "wrong" in said:
            figures["wrong"] += 1
            self._ledger.add_wrong(done.commit, done.part, done.seed, said["wrong"])
            self.wrong.append(
                f"{done.part}, seed {done.seed}, kept in {done.folder}: {said['wrong']}"
            )
            self._say(f"WRONG: {self.wrong[-1]}\n{said.get('where', '')}")
        else:
            shutil.rmtree(done.folder, ignore_errors=True)
        self.figures[done.part].update(figures)
        self._ledger.add(done.commit, done.part, figures)

    def _read(self, done: Slice, seconds: float) -> dict[str, Any]:
        place = done.folder / FIGURES
        if place.exists():
            said: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
            return said
        output = (done.folder / "output").read_text(encoding="utf-8", errors="replace")
        status = done.process.returncode
        text = f"ended with status {status} after {seconds:.0f} s: {output[-300:]}"
        return {"figures": {}, "wrong": text}

    def _count_time(self) -> None:
        now_s = time.monotonic()
        self._ledger.add_seconds(self._commit, round(now_s - self._counted_s))
        self._counted_s = now_s

    def _end_all(self) -> None:
        """End the slices that are under way; they count as not begun."""
        for one in self._running:
            one.process.terminate()  # it ends what it started
        deadline_s = time.monotonic() + END_LIMIT_S
        for one in self._running:
            try:
                one.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._say(f"{one.part}, seed {one.seed} did not end when told to")
            one.signal_all(signal.SIGKILL)
            one.process.wait()
            shutil.rmtree(one.folder, ignore_errors=True)
        self._running.clear()
