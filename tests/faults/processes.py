"""Client processes to stop, cut off and deceive about the time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

PUPPET: Final = Path(__file__).with_name("puppet.py")


class PuppetProcess:
    """A client process; see `puppet.py`."""

    def __init__(
        self,
        cleanup: ExitStack,
        address: str,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start it; it is ended at the end of the test, also if it is stopped."""
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(PUPPET), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        cleanup.callback(self._close)

    def _close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def tell(self, name: str, *arguments: object) -> None:
        """Give a command without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer of the command given first."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the client has ended"
        return json.loads(line)

    def ask(self, name: str, *arguments: object) -> Any:
        """Give a command and wait for its answer."""
        self.tell(name, *arguments)
        return self.answer()

    def stop(self) -> None:
        """Stop the process where it stands."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let a stopped process go on."""
        self._process.send_signal(signal.SIGCONT)


class FakeTime:
    """A wall clock that can be moved under a running process."""

    def __init__(self, folder: Path) -> None:
        """Start with the true time; skip the test without libfaketime."""
        found = [
            library
            for place in ("/usr/lib", "/usr/local/lib", "/usr/lib64")
            for library in Path(place).glob("**/libfaketimeMT.so.1")
        ]
        if not found:
            pytest.skip("moving a live process's clock needs libfaketime")
        self._file = folder / "faketime"
        self.jump(0)
        self.environment = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, seconds: int) -> None:
        """Move the wall clock to so far from the true time."""
        written = self._file.with_suffix(".new")
        written.write_text(f"{seconds:+d}\n", encoding="ascii")
        written.replace(self._file)
