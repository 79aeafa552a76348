"""What the benchmarks share: a server of their own, medians, tables, JSON."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@contextmanager
def lock_server() -> Iterator[str]:
    """Run a lock server on a temporary database, and point the environment at it."""
    with tempfile.TemporaryDirectory(prefix="run-once-bench-") as folder:
        port_file = Path(folder) / "port"
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "distlock_server", f"--db={folder}/db"),
                *("--port=0", f"--port_file={port_file}", "--log_level=warning"),
            ]
        )
        try:
            deadline_s = time.monotonic() + 30
            while not port_file.exists():
                if server.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit("the lock server did not start")
                time.sleep(0.02)
            address = f"127.0.0.1:{port_file.read_text().strip()}"
            os.environ |= {"RUN_ONCE_ADDRESS": address, "RUN_ONCE_CONFIG_DIR": f"{folder}/config"}
            yield address
        finally:
            server.terminate()
            server.wait()


def seconds(run: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def medians(runs: int, *measures: Callable[[], float]) -> list[float]:
    """Take turns: A B A B ...; give each one's median."""
    taken = [[measure() for measure in measures] for _ in range(runs)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[object]], name: str) -> None:
    """Print a table and keep it as JSON."""
    print(f"\n{title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    RESULTS.mkdir(exist_ok=True)
    content = {"title": title, "header": list(header), "rows": [list(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1))
