"""The main job, live: two processes share a grid search, one is killed, a rerun does the rest.

    make demo

It starts a lock server of its own in a temporary folder, checks everything it claims, and exits 0
only if all of it holds. Nothing is left running, also if it is interrupted or told to end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = Path(__file__).parent
N_JOBS = 2
LEASE_S = 4.0
"""Short, so that what the killed process held is free again soon."""

LIMIT_S = 170.0
"""The demo's own time limit, in seconds."""

SHOW_S = 1.0
"""A line says who fits what so often."""

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Demo:
    """The demo's folder, its processes and what went wrong so far."""

    folder: Path
    deadline_s: float
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def check(self, holds: bool, what: str) -> None:
        """Print a check, and remember it if it does not hold."""
        print(f"  {'ok ' if holds else 'NO '} {what}")
        if not holds:
            self.failures.append(what)

    def start(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        """Start a Python process in a group of its own, as if it were a machine of its own."""
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **self.environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def wait(self, process: subprocess.Popen[bytes], what: str) -> None:
        """Wait for a process to end well; past the demo's limit it is an error."""
        try:
            status = process.wait(max(0.1, self.deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = None
        if status != 0:
            self.failures.append(f"{what} ended with {status}")
            print(f"  NO  {what} ended with {status}; its output:")
            for log in sorted(self.folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}")
            raise SystemExit(1)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a process and its workers with SIGKILL, as a power cut would."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        process.wait()

    def close(self) -> None:
        """End every process that was started, and let nothing interrupt that."""
        for number in END_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        for process in self.processes:
            self.kill(process)


class Events:
    """The file in which the estimator notes its fits, read as it grows."""

    def __init__(self, path: Path, now_s: Callable[[], float] = time.monotonic) -> None:
        """Read from the start."""
        self._folds: dict[str, int] = {}
        self._now_s = now_s
        self._shown_s = now_s()
        self._doing: dict[str, str] = {}
        self.path = path
        self.path.touch()
        self.seen: list[dict[str, Any]] = []
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Give what is new."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        new = [json.loads(line) for line in whole.splitlines()]
        self.seen += new
        return new

    def show(self, total: int) -> None:
        """Print, a line a second, how many fits are done and which each process began last."""
        for event in self.read():
            fold = self._folds.setdefault(event["fold"], len(self._folds) + 1)
            if event["what"] == "start":
                self._doing[event["label"]] = f"{event['fit']} fold {fold}"
        if not self._doing or self._now_s() - self._shown_s < SHOW_S:
            return
        self._shown_s = self._now_s()
        done = len({name_of(event) for event in self.seen if event["what"] == "end"})
        who = " | ".join(f"{label} fits {what}" for label, what in sorted(self._doing.items()))
        print(f"  {done:>3}/{total} done  {who}")

    def forget(self, label: str) -> None:
        """Show a process no more: it has ended."""
        self._doing.pop(label, None)


def name_of(event: dict[str, Any]) -> tuple[str, str]:
    """Name the fit that an event is of."""
    return event["fit"], event["fold"]


def grid_process(demo: Demo, label: str, backend: str = "run_once") -> subprocess.Popen[bytes]:
    """Start the grid search, the same script each time."""
    script = str(EXAMPLES / "demo_grid.py")
    out = str(demo.folder / f"scores_{label}.json")
    arguments = ("--label", label, "--out", out, "--n-jobs", str(N_JOBS), "--backend", backend)
    return demo.start(script, *arguments, log=f"grid_{label}.log")


def scores(demo: Demo, label: str) -> dict[str, Any]:
    """Read the scores that a process wrote."""
    loaded: dict[str, Any] = json.loads((demo.folder / f"scores_{label}.json").read_text())
    return loaded


@contextmanager
def lock_server(demo: Demo) -> Iterator[str]:
    """Run a lock server on a free port and a temporary database; give its address."""
    port_file = demo.folder / "port"
    server = demo.start(
        "-m", "distlock_server",
        f"--db={demo.folder / 'db'}", "--port=0", f"--port_file={port_file}",
        log="server.log",
    )  # fmt: skip
    while not port_file.exists():
        if server.poll() is not None or time.monotonic() > demo.deadline_s:
            print((demo.folder / "server.log").read_text())
            raise SystemExit("the lock server did not start")
        time.sleep(0.05)
    try:
        yield f"127.0.0.1:{port_file.read_text().strip()}"
    finally:
        server.terminate()
        demo.wait(server, "the lock server, told to stop,")


def share_grid(demo: Demo) -> Events:
    """Run the search in two processes, kill one half way, start it again."""
    sys.path.insert(0, str(EXAMPLES))
    from demo_grid import FOLDS, GRID  # noqa: PLC0415 - a script beside this one

    total = FOLDS * math.prod(len(values) for values in GRID.values())
    print(f"\n1. Plain joblib does the search of {total} fits, for comparison.")
    demo.wait(grid_process(demo, "plain", backend="loky"), "the search with plain joblib")
    print(f"   {scores(demo, 'plain')['seconds']:.1f} s")

    events = Events(demo.folder / "events.jsonl")
    demo.environment["DEMO_EVENTS"] = str(events.path)
    print(
        "\n2. Processes A and B share it; B is killed (SIGKILL) half way, and started again as B2."
    )
    process_a, process_b = grid_process(demo, "A"), grid_process(demo, "B")
    while len({name_of(e) for e in events.seen if e["what"] == "end"}) < total // 2:
        events.show(total)
        if time.monotonic() > demo.deadline_s:
            break
        time.sleep(0.05)
    demo.kill(process_b)
    events.read()
    events.forget("B")
    print("  -- B is killed --")
    process_b2 = grid_process(demo, "B2")
    while process_a.poll() is None or process_b2.poll() is None:
        events.show(total)
        if time.monotonic() > demo.deadline_s:
            break
        time.sleep(0.05)
    demo.wait(process_a, "process A")
    demo.wait(process_b2, "process B2")
    events.read()
    report_grid(demo, events, total)
    return events


def report_grid(demo: Demo, events: Events, total: int) -> None:
    """Print the table of fits, and check it."""
    ended = [event for event in events.seen if event["what"] == "end"]
    started = Counter(name_of(event) for event in events.seen if event["what"] == "start")
    last_of_b = {e["pid"]: name_of(e) for e in events.seen if e["label"] == "B"}
    repeated = [name for name, n in started.items() if n > 1]
    begun = sum(started.values())
    rows = [("process", "fits begun", "fits ended", "")]
    for label, note in (("A", ""), ("B", "killed"), ("B2", "")):
        counts = Counter(event["what"] for event in events.seen if event["label"] == label)
        rows.append((label, f"{counts['start']}", f"{counts['end']}", note))
    rows += [
        ("in all", f"{begun}", f"{len(ended)}", f"the kill cut {begun - len(ended)} off"),
        ("wanted", f"{total}", f"{total}", ""),
        ("repeated", f"{begun - total}", "", "begun once more because of the kill"),
    ]
    print()
    for name, began, end, note in rows:
        print(f"  {name:<10} {began:>12} {end:>12}    {note}".rstrip())
    print()
    demo.check(len(started) == total, f"all {total} fits were done")
    demo.check(
        all(name in last_of_b.values() and started[name] == 2 for name in repeated),
        f"repeated: only what B had in flight or unacknowledged at the kill ({len(repeated)})",
    )
    plain = scores(demo, "plain")["scores"]
    for label in ("A", "B2"):
        demo.check(
            scores(demo, label)["scores"] == plain, f"every score of {label} equals plain joblib's"
        )


def rerun_grid(demo: Demo, events: Events) -> None:
    """Run the search a third time: nothing is computed."""
    print("\n3. The same script once more.")
    before = len(events.seen)
    demo.wait(grid_process(demo, "C"), "process C")
    events.read()
    result, plain = scores(demo, "C"), scores(demo, "plain")
    print(f"   {result['seconds']:.2f} s; plain joblib took {plain['seconds']:.1f} s")
    demo.check(len(events.seen) == before, "the third run fitted nothing")
    demo.check(result["scores"] == plain["scores"], "every score of C equals plain joblib's")


def share_loop(demo: Demo) -> None:
    """Hash the standard library's files in three processes."""
    sys.path.insert(0, str(EXAMPLES))
    from demo_loop import library_files  # noqa: PLC0415 - a script beside this one

    wanted = library_files()
    print(
        f"\n4. Three processes share a loop over the {len(wanted)} .py files of Python's library."
    )
    outs = {label: demo.folder / f"hashes_{label}.jsonl" for label in "ABC"}
    processes = [
        demo.start(
            str(EXAMPLES / "demo_loop.py"), "--label", label, "--out", str(out), "--wait",
            log=f"loop_{label}.log",
        )
        for label, out in outs.items()
    ]  # fmt: skip
    for process in processes:
        demo.wait(process, "a process of the loop")
    lines = [json.loads(line) for out in outs.values() for line in out.read_text().splitlines()]
    for label, count in sorted(Counter(line["label"] for line in lines).items()):
        print(f"  {label:<12} {count:>10}")
    done = Counter(line["file"] for line in lines)
    demo.check(set(done) == set(wanted), "the union is complete")
    demo.check(max(done.values()) == 1, "no file was hashed twice")


def end(number: int, _frame: object) -> NoReturn:
    """End on a signal, by way of what ends the processes that were started."""
    print(f"\n{signal.Signals(number).name}: ending all processes", flush=True)
    raise SystemExit(128 + number)


def main() -> int:
    """Run the demo; give its exit status."""
    for number in END_SIGNALS:
        signal.signal(number, end)
    started_s = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="run-once-demo-"))
    demo = Demo(folder, started_s + LIMIT_S)
    try:
        with lock_server(demo) as address:
            print(f"A lock server listens at {address}.")
            demo.environment |= {
                "RUN_ONCE_ADDRESS": address,
                "RUN_ONCE_LEASE_S": str(LEASE_S),
                "RUN_ONCE_CONFIG_DIR": str(folder / "config"),
            }
            events = share_grid(demo)
            rerun_grid(demo, events)
            share_loop(demo)
    finally:
        demo.close()
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - started_s
    print(
        f"\n{'Some checks failed' if demo.failures else 'All checks hold'}; {seconds:.0f} s in all."
    )
    return 1 if demo.failures else 0


if __name__ == "__main__":
    sys.exit(main())
