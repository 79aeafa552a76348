"""An interrupt in the midst of a claim left the key held until its lease ran out."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from run_once.channel import GrpcTransport
from run_once.client import LockClient
from tests.fake_server import FakeServer, FakeTransport, ReplyT, make_session
from tests.servers import ServerProcess

SCRIPT = """
import sys
from run_once import DistributedIterator
print("begun", flush=True)
for key in DistributedIterator(range(10**6), address=sys.argv[1], namespace=sys.argv[2]):
    pass
"""


class _InterruptedTransport(FakeTransport):
    """Ctrl-C comes when the first claim is granted, and before its answer is seen."""

    n_claims = 0

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        reply = super().call(method, request, reply_type, timeout_s)
        self.n_claims += method == "Claim"
        if method == "Claim" and self.n_claims == 1:
            raise KeyboardInterrupt
        return reply


def test_an_interrupt_between_the_grant_and_its_answer_frees_the_key() -> None:
    """The claim is repeated under its id, which tells the token, and released."""
    server = FakeServer()
    transport = _InterruptedTransport(server)
    session = make_session(transport)
    with pytest.raises(KeyboardInterrupt):
        session.claim([b"a", b"b"], ttl_s=60, max_grants=1)
    assert transport.n_claims == 2
    assert server.state_of(b"a") == pb.KEY_STATE_ABSENT
    assert server.state_of(b"b") == pb.KEY_STATE_ABSENT
    assert session.keeper.leases() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_held(server: ServerProcess, number: signal.Signals) -> None:
    """Whenever it comes in a loop that does nothing but claim and complete."""
    client = LockClient(GrpcTransport(server.address))
    for run in range(5):
        namespace = f"run-{run}"
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, server.address, namespace],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline_s = time.monotonic() + 30
            while client.count(namespace=namespace).done < 20 + run:
                assert time.monotonic() < deadline_s, "the loop did not begin"
                time.sleep(0.01)
            process.send_signal(number)
            assert process.wait(20) != 0
        finally:
            process.kill()
            process.wait()
        assert client.count(namespace=namespace).held == 0, f"run {run}"
    client.close()
