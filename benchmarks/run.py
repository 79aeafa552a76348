"""All benchmarks, one after another: `make bench`. Tables here, JSON and pictures in results/.

python benchmarks/run.py [--quick] [--results FOLDER]

Each is a process of its own; one that fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bulk
import pictures
from report import RESULTS

HERE = Path(__file__).parent
SCRIPTS = (
    "limits",
    "startup",
    "loop",
    "single_claims",
    "batches",
    "skip",
    "growth",
    "spread",
    "slow_network",
    "makespan",
    "waiters",
    "joblib_calls",
)


def main() -> int:
    """Run them; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke runs, without meaning")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where JSON and pictures go")
    args = parser.parse_args()
    options = [*(["--quick"] * args.quick), f"--results={args.results}"]
    failed = []
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="run-once-bulk-") as databases:
        environment = os.environ | {bulk.CACHE_VARIABLE: databases}
        for script in SCRIPTS:
            start_s = time.monotonic()
            command = [sys.executable, str(HERE / f"{script}.py"), *options]
            if subprocess.run(command, env=environment, check=False).returncode:
                failed.append(script)
            print(f"({script}: {time.monotonic() - start_s:.0f} s)", flush=True)
    print(f"\n{pictures.overview(args.results)}")
    print(f"All in {(time.monotonic() - began_s) / 60:.1f} minutes, in {args.results}.")
    print("The server models are measured by: python benchmarks/server_model.py")
    if failed:
        print(f"Failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
