"""Another process's client, as far as the server can tell."""

from __future__ import annotations

import time
from collections.abc import Callable

from run_once.answers import Grant, How, Settlement
from run_once.channel import GrpcTransport
from run_once.client import LockClient


class Other:
    """Somebody else, who claims and settles keys of a server by hand."""

    def __init__(self, address: str) -> None:
        """Connect."""
        self.client = LockClient(GrpcTransport(address), owner="other")

    def claim(self, *keys: str, ttl_s: float = 60.0, ahead: bool = False) -> list[Grant]:
        """Claim keys; give the grants."""
        stored = [key.encode() for key in keys]
        return self.client.claim(stored, ttl_s=ttl_s, ahead=ahead).grants

    def settle(self, grants: list[Grant], how: How) -> None:
        """End leases."""
        self.client.settle([Settlement(grant, how) for grant in grants])

    def finish(self, *keys: str) -> None:
        """Make keys done."""
        self.settle(self.claim(*keys), "complete")

    def states(self, *keys: str) -> list[int]:
        """Look keys up."""
        return list(self.client.lookup([key.encode() for key in keys]).states)


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return once a condition holds that others bring about; fail after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)
