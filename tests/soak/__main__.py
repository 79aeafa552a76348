"""`make soak`: tries for an hour, or longer, to break every promise; docs/faults.md says how.

`SOAK_S` bounds the time in seconds (3600), `SOAK_SEED` repeats the seeds of a run, `SOAK_PARTS`
names the parts to be tried, separated by commas (all), `SOAK_LEDGER` the file in which the
figures add up. `--covered` only shows what is there.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.ledger import PLACE, Ledger
from tests.soak.parts import PARTS
from tests.soak.runner import Soak
from tests.soak.tables import covered


def main() -> None:
    """Run, or show what was covered."""
    ledger = Ledger(Path(os.environ.get("SOAK_LEDGER") or PLACE))
    if sys.argv[1:] == ["--covered"]:
        sys.stdout.write(covered(PARTS, ledger) + "\n")
        return
    if sys.argv[1:]:
        sys.exit("usage: python -m tests.soak [--covered]")
    names = [name.strip() for name in os.environ.get("SOAK_PARTS", "").split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"no such part: {unknown}; there are {list(PARTS)}")
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(
        {name: part for name, part in PARTS.items() if not names or name in names},
        ledger,
        int(os.environ.get("SOAK_SEED") or time.time_ns() % 2**32),
        float(os.environ.get("SOAK_S") or 3600),
        folder,
        say=lambda line: print(line, flush=True),
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: soak.stop())
    is_well = soak.run()
    if is_well:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
