"""A network of a test's own: servers that other machines could reach, and packets that are lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack

import pytest


class Network:
    """A network namespace whose only way out is to this host.

    Attributes:
        host: This host's address, as seen from inside.
        guest: The address inside.
    """

    def __init__(self, cleanup: ExitStack) -> None:
        """Make it; skip the test where that cannot be done."""
        if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("iptables")):
            pytest.skip("partitions need root, ip (iproute2) and iptables")
        number = os.getpid() % 16_000
        self._name = f"fault-{os.getpid()}"
        net = f"10.{200 + number // 4_000}.{number // 16 % 250}.{number % 16 * 16}"
        base, last = net.rsplit(".", 1)
        self.host, self.guest = f"{base}.{int(last) + 1}", f"{base}.{int(last) + 2}"
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
        self._run(*self.prefix, "ip", "addr", "add", f"{self.guest}/28", "dev", inside)
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
