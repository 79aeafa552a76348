"""A client process that does what a test tells it, line by line.

Each line on stdin is a JSON list, a command and its arguments; each line on stdout is the answer.
It uses the real client: retries, the keeper of leases, the margin that it gives itself.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from distlock_proto import lock_table_pb2 as pb
from run_once.config import load_config
from run_once.lease import Lease
from run_once.session import Session


class Puppet:
    """The commands."""

    def __init__(self, address: str) -> None:
        """Connect."""
        self._config = load_config(address=address)
        self._session = Session.get(self._config)
        self._leases: dict[str, Lease] = {}

    def claim(self, key: str, ttl_s: float, keep_alive: bool) -> Any:
        """Claim a key; give the token, 0: not granted."""
        claimed = self._session.claim([key.encode()], ttl_s=ttl_s, keep_alive=keep_alive)
        for lease in claimed.leases:
            self._leases[key] = lease
            return lease.grant.token
        return 0

    def held(self, key: str) -> Any:
        """Tell whether the client believes that it holds the key."""
        return self._leases[key].held

    def complete(self, key: str) -> Any:
        """Complete a key; give the names of the answer and of the present state."""
        answer = self._session.complete(self._leases[key])
        return [pb.KeyState.Name(answer.state)[10:], pb.KeyState.Name(answer.lost_state)[10:]]

    def fork(self, key: str) -> Any:
        """Fork, try to complete a key in the child, claim another there; give what it said."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with os.fdopen(writing, "w") as file:
                    file.write(self._in_child(key))
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as file:
            said = file.read()
        os.waitpid(child, 0)
        return said

    def _in_child(self, key: str) -> str:
        try:
            Session.get(self._config).complete(self._leases[key])
        except Exception as error:  # noqa: BLE001 - its name is the answer
            said = type(error).__name__
        else:
            said = "completed"
        self._session = Session.get(self._config)
        token = self.claim(f"{key} of the child", 60.0, keep_alive=True)
        return f"{said} {token}"


def main() -> None:
    """Serve the commands of stdin."""
    puppet = Puppet(sys.argv[1])
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = getattr(puppet, name)(*arguments)
        except Exception as error:  # noqa: BLE001 - the test sees it
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
