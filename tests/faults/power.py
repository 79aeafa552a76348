"""Power cuts: what a server has not synced is taken away from its files.

`shim.c` records what was synced. `PowerCut.apply` then makes of the files of a killed process what
a power cut could have left: every file cut back to its synced length (or torn somewhere behind it),
and names that were made, changed or removed since their folder was synced undone from the last one
backwards, as a file system that keeps their order may do. Syncing a file is not taken to make its
name durable.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Final, NamedTuple

import pytest

SHIM_SOURCE: Final = Path(__file__).with_name("shim.c")

_NOT_OURS: Final = ("distlock.log", "port")
"""What the test itself keeps beside the database."""

_NEVER_SYNCED: Final = ("LOG", "LOG.old")
"""LevelDB's notes for people; they do not count as dropped."""


def build_shim(folder: Path) -> Path:
    """Compile the shim; skip the test where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("power cuts need a C compiler (cc), and there is none")
    library = folder / "shim.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SHIM_SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"the shim does not compile here: {done.stderr[-300:]}")
    return library


class Dropped(NamedTuple):
    """What a cut took away.

    Attributes:
        n_bytes: Bytes behind the synced lengths.
        n_names: Names undone.
        n_torn: Files left with a torn tail.
    """

    n_bytes: int
    n_names: int
    n_torn: int


class _Change(NamedTuple):
    number: int
    kind: str
    paths: list[str]


class PowerCut:
    """The recording of one life of a process, and the cut at its end."""

    def __init__(self, root: Path, library: Path, folder: Path) -> None:
        """Prepare a recording.

        Args:
            root: Files below it are recorded.
            library: The compiled shim.
            folder: Where the recording goes; on the same file system as `root`, outside of it.
        """
        self._root = root
        self._library = library
        self._folder = folder
        self._log = folder / "syncs"
        self._keep = folder / "kept"
        self.lie = folder / "lie"
        self.eio = folder / "eio"
        self._slow = folder / "slow"

    def environment(self, die_at_sync: int = 0) -> dict[str, str]:
        """Begin a recording of the files as they are; give the variables for the process."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._keep.mkdir(parents=True)
        self._sizes = {file.stat().st_ino: file.stat().st_size for file in self._files()}
        return {
            "LD_PRELOAD": str(self._library),
            "FAULT_LOG": str(self._log),
            "FAULT_ROOT": str(self._root),
            "FAULT_KEEP": str(self._keep),
            "FAULT_LIE": str(self.lie),
            "FAULT_EIO": str(self.eio),
            "FAULT_SLOW": str(self._slow),
            "FAULT_DIE_AT": str(die_at_sync),
        }

    def slow_down(self, sync_ms: int) -> None:
        """Have each sync from now on take so long."""
        written = self._slow.with_suffix(".new")
        written.write_text(f"{sync_ms}\n", encoding="ascii")
        written.replace(self._slow)

    def apply(self, rng: random.Random, *, undo_names: bool = True) -> Dropped:
        """Take away what was not synced; the process must be gone."""
        sizes, pending = self._read_log()
        n_names = rng.choice([0, len(pending), rng.randint(0, len(pending))]) if undo_names else 0
        for change in reversed(pending[len(pending) - n_names :]):
            _undo(change)
        n_bytes = n_torn = 0
        tears = rng.random() < 0.5
        for file in self._files():
            size, synced = file.stat().st_size, sizes.get(file.stat().st_ino, 0)
            if size <= synced:
                continue
            left = rng.randint(synced, size) if tears else synced
            os.truncate(file, left)
            if file.name not in _NEVER_SYNCED:
                n_bytes += size - left
                n_torn += left > synced
        return Dropped(n_bytes, n_names, n_torn)

    def count_syncs(self) -> int:
        """Tell how many syncs were recorded."""
        return sum(line.startswith("S ") for line in self._log.read_text().splitlines())

    def _files(self) -> list[Path]:
        files = sorted(self._root.rglob("*"))
        return [file for file in files if file.is_file() and file.name not in _NOT_OURS]

    def _read_log(self) -> tuple[dict[int, int], list[_Change]]:
        sizes = dict(self._sizes)
        pending: defaultdict[str, list[_Change]] = defaultdict(list)
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            kind, rest = line.split(" ", 1)
            if kind == "S":
                _, inode, size = map(int, rest.split())
                sizes[inode] = max(sizes.get(inode, 0), size)
                continue
            number, text = rest.split(" ", 1)
            if kind == "D":
                pending[text] = [c for c in pending[text] if c.number >= int(number)]
                continue
            paths = text.split("\t")
            change = _Change(int(number), kind, paths)
            pending[os.path.dirname(paths[0])].append(change)  # noqa: PTH120 - text, often
        changes = [change for of_folder in pending.values() for change in of_folder]
        return sizes, sorted(changes)


def _undo(change: _Change) -> None:
    path = Path(change.paths[0])
    if change.kind == "C":
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    elif change.kind == "U":
        if change.paths[1] != "-" and not path.exists():
            os.link(change.paths[1], path)
    else:
        new = Path(change.paths[1])
        if new.exists():
            new.rename(path)
        if change.paths[2] != "-":
            os.link(change.paths[2], new)
