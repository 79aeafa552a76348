"""Little room on the disk: nothing new is begun, what was begun is ended, and it recovers."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from distlock_proto.lock_table_pb2_grpc import LockTableStub
from distlock_server.space import NoSpaceError, Space
from tests.faults.traffic import LONG_TTL_NS, Caller, Recorder, read_back
from tests.servers import ServerProcess, connect

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 24 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk needs root and mount")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder: Path, leave_bytes: int) -> Path:
    """Leave only so much room."""
    found = os.statvfs(folder)
    ballast = folder / "ballast"
    with ballast.open("ab") as file:
        os.posix_fallocate(
            file.fileno(), 0, ballast.stat().st_size + found.f_bavail * found.f_frsize - leave_bytes
        )
    return ballast


@pytest.mark.needs_root
def test_low_disk_refuses_and_recovers(
    small_disk: Path, start_server: Callable[..., ServerProcess]
) -> None:
    """Below the reserve claims and resets are refused; reading, renewing, completing go on.

    With room again everything goes on by itself, and the history of it all is possible.
    """
    server = start_server("--reserve_mb=8", folder=small_disk / "server")
    recorder = Recorder()
    ids = [os.urandom(16) for _ in range(4)]
    with connect(server.address) as channel:
        caller = Caller(LockTableStub(channel), recorder)
        held = [caller.claim([b"k%d" % n], ids[n], LONG_TTL_NS)[0] for n in range(4)]
        ballast = _fill(small_disk, 5 * MIB)
        for refused in (
            lambda: caller.claim([b"new"], os.urandom(16), LONG_TTL_NS),
            lambda: caller.reset([b"k0"], caller.revision),
            lambda: caller.upload(*held[0], bytes(100_000)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                refused()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "reserve_mb=8" in (caught.value.details() or "")
        assert caller.settle("complete", *held[0], b"value") == "COMPLETED"
        assert caller.settle("fail", *held[1]) == "FAILED"
        assert caller.renew(*held[2], 2 * LONG_TTL_NS) == "RENEWED"
        caller.claim([b"k0", b"k3"], ids[3], LONG_TTL_NS)  # done, and its own: nothing changes
        caller.lookup([b"k0", b"k1", b"new"])
        _fill(small_disk, MIB)
        with pytest.raises(grpc.RpcError) as caught:
            caller.settle("complete", *held[2], b"value")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        caller.lookup([b"k2"])
        ballast.unlink()
        assert caller.settle("complete", *held[2], b"value") == "COMPLETED"
        assert caller.claim([b"new"], os.urandom(16), LONG_TTL_NS)
    read_back(server.address, recorder)
    recorder.check()
    assert "MiB are free at" in server.log
    assert "are free again" in server.log


@pytest.mark.needs_root
def test_full_disk_ends_the_server_safely(
    small_disk: Path, start_server: Callable[..., ServerProcess]
) -> None:
    """Without a reserve a full disk ends the server with a sentence; with room all is there."""
    server = start_server("--reserve_mb=0", folder=small_disk / "server")
    recorder = Recorder()
    with connect(server.address) as channel:
        caller = Caller(LockTableStub(channel), recorder)
        ballast = _fill(small_disk, MIB)
        with pytest.raises(grpc.RpcError):
            _complete_many(caller)
    assert server.wait() == 1
    recorder.server_is_dead()
    assert "distlock: the storage failed, and the server must end" in server.log
    assert "No space left" in server.log
    ballast.unlink()
    server.start()
    read_back(server.address, recorder)
    recorder.check()


def _complete_many(caller: Caller) -> None:
    rng = random.Random(1)
    for n in range(1_000):
        held = caller.claim([b"k%d" % n], os.urandom(16), LONG_TTL_NS)[0]
        caller.settle("complete", *held, rng.randbytes(40_000))


def test_reserve_is_for_what_is_under_way(tmp_path: Path) -> None:
    """The limits: below the reserve nothing new, below its quarter nothing; without one, all."""
    free = [100]
    space = Space(tmp_path, 80, lambda _: free[0])
    space.require(20)
    with pytest.raises(NoSpaceError):
        space.require(21)

    def run(group: object) -> int:
        return 1

    assert space.guarded(run, ends_leases=False) is run
    free[0] = 79
    assert space.guarded(run, ends_leases=False) is not run
    assert space.guarded(run, ends_leases=True) is run
    free[0] = 19
    assert space.guarded(run, ends_leases=True) is not run
    assert Space().guarded(run, ends_leases=False) is run
