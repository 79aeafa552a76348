"""Client processes to stop, cut off and deceive about the time."""

from __future__ import annotations

import json
import os
import shutil
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


class Network:
    """A network namespace whose only way out is to this host."""

    def __init__(self, cleanup: ExitStack) -> None:
        """Make it; skip the test where that cannot be done."""
        if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("iptables")):
            pytest.skip("partitions need root, ip (iproute2) and iptables")
        number = os.getpid() % 16_000
        self._name = f"fault-{os.getpid()}"
        net = f"10.{200 + number // 4_000}.{number // 16 % 250}.{number % 16 * 16}"
        base, last = net.rsplit(".", 1)
        self.host, guest = f"{base}.{int(last) + 1}", f"{base}.{int(last) + 2}"
        outside, inside = f"fo{os.getpid()}", f"fi{os.getpid()}"
        if not self._run("ip", "netns", "add", self._name):
            pytest.skip("network namespaces cannot be made here")
        cleanup.callback(self._run, "ip", "netns", "del", self._name)
        made = self._run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
        if not made:
            pytest.skip("veth pairs cannot be made here")
        cleanup.callback(self._run, "ip", "link", "del", outside)
        self._run("ip", "link", "set", inside, "netns", self._name)
        self._run("ip", "addr", "add", f"{self.host}/28", "dev", outside)
        self._run("ip", "link", "set", outside, "up")
        self._run(*self.prefix, "ip", "addr", "add", f"{guest}/28", "dev", inside)
        self._run(*self.prefix, "ip", "link", "set", inside, "up")
        self._run(*self.prefix, "ip", "link", "set", "lo", "up")
        if not self.rule("-L"):
            pytest.skip("iptables does not work here")

    @property
    def prefix(self) -> list[str]:
        """What a command is wrapped in to run inside."""
        return ["ip", "netns", "exec", self._name]

    def rule(self, *arguments: str) -> bool:
        """Call iptables inside."""
        return self._run(*self.prefix, "iptables", *arguments)

    def lose(self, chain: str, *how: str) -> None:
        """Lose packets: INPUT, what comes to the client; OUTPUT, what it sends."""
        assert self.rule("-A", chain, "-p", "tcp", *how, "-j", "DROP")

    def n_lost(self) -> int:
        """Count the packets lost so far."""
        command = [*self.prefix, "iptables", "-nvxL"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return sum(int(line.split()[0]) for line in done.stdout.splitlines() if " DROP " in line)

    def heal(self) -> None:
        """Lose nothing any more."""
        assert self.rule("-F")

    def _run(self, *command: str) -> bool:
        done = subprocess.run(command, capture_output=True, check=False, timeout=20)
        return done.returncode == 0


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
