"""Starts worker processes of the loop tests, and reads what they wrote."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORKER = Path(__file__).with_name("loop_worker.py")


class Workers:
    """Processes that share a loop; all are ended when the context ends."""

    def __init__(self, folder: Path, address: str, lease_s: float) -> None:
        """Prepare.

        Args:
            folder: Where they write.
            address: Their server.
            lease_s: Length of their leases.
        """
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **os.environ,
            "RUN_ONCE_ADDRESS": address,
            "RUN_ONCE_LEASE_S": str(lease_s),
        }
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one more worker."""
        name = f"worker-{len(self.processes)}"
        with (self.folder / f"{name}.err").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, str(WORKER), f"--log={self.folder / name}.log", *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        self.processes.append(process)
        return process

    def join(self, timeout_s: float) -> None:
        """Wait until all that were not killed have ended well."""
        deadline_s = time.monotonic() + timeout_s
        for process in self.processes:
            status = process.wait(max(0.1, deadline_s - time.monotonic()))
            assert status in {0, -signal.SIGKILL}, self.errors()

    def lines(self, what: str) -> list[list[str]]:
        """Give the words behind a word, of all workers."""
        return [
            words[1:]
            for log in sorted(self.folder.glob("*.log"))
            for words in map(str.split, log.read_text().splitlines())
            if words and words[0] == what
        ]

    def counts(self, what: str) -> Counter[str]:
        """Count by key how often the workers wrote a word."""
        return Counter(words[0] for words in self.lines(what))

    def errors(self) -> str:
        """Give what the workers wrote to standard error."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.err"))
        )

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def workers(folder: Path, address: str, lease_s: float) -> Iterator[Workers]:
    """Give workers that are ended whatever happens."""
    made = Workers(folder, address, lease_s)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Keep so many cores busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
