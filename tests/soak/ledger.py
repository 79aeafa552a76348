"""What all runs have covered so far: by commit and part, in a file that is kept with the source."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
PLACE: Final = Path(__file__).with_name("covered.json")

MAX_MESSAGE: Final = 500
"""So much of a message of something wrong is kept."""


def commit() -> str:
    """Name the commit that is tested, and say if the tree differs from it.

    The ledger itself does not count: every run changes it.
    """
    name = _git("rev-parse", "--short=12", "HEAD").strip()
    if not name:
        return "unknown"
    ledger = f":(exclude){PLACE.relative_to(ROOT)}"
    return f"{name}-dirty" if _git("status", "--porcelain", "--", ".", ledger).strip() else name


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


class Ledger:
    """The file. Each change is read, made and written under a lock: runs may go side by side."""

    def __init__(self, place: Path = PLACE) -> None:
        """Use a file that need not be there yet."""
        self._place = place

    def read(self) -> dict[str, Any]:
        """Give all of it.

        Returns:
            `covered`: commit -> part -> figure -> number; `seconds`: commit -> length of all runs;
            `wrong`: everything that ever went wrong.
        """
        if self._place.exists():
            found: dict[str, Any] = json.loads(self._place.read_text(encoding="utf-8"))
            return found
        return {"covered": {}, "seconds": {}, "wrong": []}

    def add(self, at: str, part: str, figures: Mapping[str, int]) -> None:
        """Add the figures of a slice."""
        with self._change() as content:
            of_commit = content["covered"].setdefault(at, {})
            of_commit[part] = dict(
                sorted((Counter(of_commit.get(part, {})) + Counter(figures)).items())
            )

    def add_seconds(self, at: str, seconds: int) -> None:
        """Add to the time that all runs took."""
        with self._change() as content:
            content["seconds"][at] = content["seconds"].get(at, 0) + seconds

    def add_wrong(self, at: str, part: str, seed: int, message: str) -> None:
        """Note what went wrong, and the seed that repeats it."""
        with self._change() as content:
            content["wrong"].append(
                {"commit": at, "part": part, "seed": seed, "message": message[-MAX_MESSAGE:]}
            )

    def totals(self) -> tuple[dict[str, Counter[str]], int]:
        """Give the figures of each part over all commits, and the time of all runs in seconds."""
        content = self.read()
        totals: dict[str, Counter[str]] = {}
        for parts in content["covered"].values():
            for part, figures in parts.items():
                totals.setdefault(part, Counter()).update(figures)
        return totals, sum(content["seconds"].values())

    @contextlib.contextmanager
    def _change(self) -> Iterator[dict[str, Any]]:
        self._place.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._place.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            content = self.read()
            yield content
            written = self._place.with_suffix(".new")
            written.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
            written.replace(self._place)
        finally:
            os.close(folder)
