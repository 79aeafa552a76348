"""Does one slice of a part in a process of its own: `python -m tests.soak.slices PART SEED FOLDER`.

What it did is written to `figures.json` in the folder. A slice that fails says why in the same
file and ends with status 1; one that cannot be done here ends with status 0 and says so.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest

from tests.soak.parts import PARTS, Part

FIGURES: Final = "figures.json"


def run_slice(part: Part, seed: int, folder: Path) -> dict[str, Any]:
    """Do a slice.

    Returns:
        Its `figures`; `skipped`: why it cannot be done here; `wrong`: what went wrong.
    """
    try:
        return {"figures": dict(part.run(folder, seed))}
    except pytest.skip.Exception as error:
        return {"figures": {}, "skipped": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the soak looks for
        where = traceback.format_exc()
        return {"figures": {}, "wrong": f"{type(error).__name__}: {error}", "where": where}


def _leave(number: int, _: object) -> NoReturn:
    """End what was started, too."""
    sys.exit(128 + number)


def main() -> None:
    """Do what the command line names."""
    name, seed, place = sys.argv[1:]
    signal.signal(signal.SIGTERM, _leave)
    folder = Path(place)
    done = run_slice(PARTS[name], int(seed), folder)
    written = folder / f"{FIGURES}.new"
    written.write_text(json.dumps(done), encoding="utf-8")
    written.replace(folder / FIGURES)
    sys.exit("wrong" in done)


if __name__ == "__main__":
    main()
