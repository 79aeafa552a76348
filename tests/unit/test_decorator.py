"""`@run_once`: four statuses, and what each kind of timeout means."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once import (
    ConfigError,
    ExhaustedError,
    KeyTypeError,
    LeaseLostWarning,
    LimitError,
    Status,
    at_most_every,
    count_keys_by_prefix,
    distributed_task,
    run_once,
    search_keys_by_prefix,
)
from run_once.answers import Grant
from run_once.config import load_config
from run_once.task import Session
from tests.other_client import Other
from tests.servers import InprocServer

pytestmark = pytest.mark.usefixtures("configured_server")


def test_statuses_of_2021() -> None:
    """The four statuses have their numbers of 0.4.2, and there is no fifth."""
    assert {status.name: status.value for status in Status} == {
        "COMPUTE_OK": 1,
        "COMPUTE_ERROR": 2,
        "SKIP_OK": 3,
        "SKIP_IN_PROGRESS": 4,
    }


def test_frozen_signatures() -> None:
    """The arguments of 0.4.2 have their names, order and defaults."""
    assert str(inspect.signature(distributed_task)).startswith(
        "(key: 'str | int', timeout: 'float | timedelta | None', version: 'int' = 0, "
        "suppress_exception: 'bool' = True)"
    )
    assert str(inspect.signature(run_once)).startswith(
        "(key: 'str | int', timeout: 'float | timedelta | None' = 60, version: 'int' = 0, "
        "suppress_exception: 'bool' = True, *"
    )


@pytest.mark.parametrize("timeout", [3, 0.5, None, 0, timedelta(seconds=5)])
def test_runs_once(timeout: Any, other: Other) -> None:
    """It runs and its value comes back; the next call is skipped; arguments and name pass."""

    @run_once("job", timeout=timeout, version=2)
    def work(a: int, *, b: int) -> int:
        """Add."""
        return a + b

    assert work.__name__ == "work"
    assert work(1, b=2) == (Status.COMPUTE_OK, 3)
    assert work(1, b=2) == (Status.SKIP_OK, None)
    assert other.states("job_v002") == [pb.KEY_STATE_DONE]


def test_other_name() -> None:
    """`distributed_task` and an integer key do the same work as `run_once` and its text."""

    @distributed_task(5, 60)
    def one() -> str:
        return "value"

    @run_once("5")
    def two() -> str:
        raise AssertionError("it is done")

    assert one() == (Status.COMPUTE_OK, "value")
    assert two() == (Status.SKIP_OK, None)


def test_in_progress(other: Other) -> None:
    """A key that another holds is skipped."""
    other.claim("job")
    assert run_once("job")(lambda: 1)() == (Status.SKIP_IN_PROGRESS, None)


def test_exception_is_logged(other: Other, caplog: pytest.LogCaptureFixture) -> None:
    """An exception is logged with its traceback, the key is free at once and knows the error."""

    @run_once("job")
    def work() -> int:
        raise ValueError("broken input")

    with caplog.at_level(logging.ERROR, logger="run_once"):
        assert work() == (Status.COMPUTE_ERROR, None)
    assert "broken input" in caplog.text
    info = other.client.lookup([b"job"], want_infos=True).infos[0]
    assert info.state == pb.KEY_STATE_FAILED
    assert "broken input" in info.error
    assert run_once("job")(lambda: 1)() == (Status.COMPUTE_OK, 1)


def test_exception_is_raised(other: Other) -> None:
    """With suppress_exception=False the function's own exception comes out, and the key is free."""

    @run_once("job", suppress_exception=False)
    def work() -> int:
        raise ValueError("broken input")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken input"):
            work()
    assert other.states("job") == [pb.KEY_STATE_FAILED]


def test_interrupt_gives_back(other: Other) -> None:
    """An interrupt is raised, and gives the key back."""

    @run_once("job")
    def work() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert other.states("job") == [pb.KEY_STATE_ABSENT]


def test_timeout_is_not_renewed() -> None:
    """`timeout=T` is exclusive for T seconds and not renewed; None is kept alive."""

    def kept() -> int:
        return len(Session.get(load_config()).keeper.leases())

    assert run_once("a", timeout=30)(kept)() == (Status.COMPUTE_OK, 0)
    assert run_once("b", timeout=None)(kept)() == (Status.COMPUTE_OK, 1)


def test_timeout_zero_is_done_first(other: Other) -> None:
    """`timeout=0` is done before the function runs, and stays so if it raises."""

    @run_once("job", timeout=0)
    def work() -> None:
        assert other.states("job") == [pb.KEY_STATE_DONE]
        raise ValueError

    assert work() == (Status.COMPUTE_ERROR, None)
    assert work() == (Status.SKIP_OK, None)


@pytest.mark.parametrize(
    ("other_ends", "status"),
    [(True, Status.SKIP_OK), (False, Status.SKIP_IN_PROGRESS)],
)
def test_lost(
    configured_server: InprocServer, other: Other, other_ends: bool, status: Status
) -> None:
    """A run whose lease was lost is a warning, and skipped: as done, or as being worked on."""

    @run_once("job", timeout=5)
    def work() -> str:
        configured_server.advance(10)
        grants: list[Grant] = other.claim("job")
        if other_ends:
            other.settle(grants, "complete")
        return "not accepted"

    with pytest.warns(LeaseLostWarning, match="'job'") as caught:
        assert work() == (status, None)
    assert caught[0].filename == __file__


def test_expired_but_not_taken_is_accepted(configured_server: InprocServer) -> None:
    """A run that took longer than its timeout is accepted if nobody else was granted the key."""

    def work() -> int:
        configured_server.advance(10)
        return 1

    assert run_once("job", timeout=5)(work)() == (Status.COMPUTE_OK, 1)


def test_max_attempts() -> None:
    """A key that failed as often as allowed is not run; without suppression that is an error."""

    def fail() -> None:
        raise ValueError

    def never() -> None:
        raise AssertionError("not to be run")

    run_once("job")(fail)()
    assert run_once("job", max_attempts=1)(never)() == (Status.COMPUTE_ERROR, None)
    with pytest.raises(ExhaustedError, match="max_attempts"):
        run_once("job", max_attempts=1, suppress_exception=False)(never)()


def test_wrong_uses() -> None:
    """Wrong uses are errors where the decorator stands."""

    async def coroutine() -> None: ...

    async def async_generator() -> AsyncIterator[int]:
        yield 1

    def generator() -> Iterator[int]:
        yield 1

    function: Any
    for function in (coroutine, async_generator, generator):
        with pytest.raises(ConfigError, match=function.__name__):
            run_once("key")(function)
    with pytest.raises(ConfigError, match="key is missing"):
        run_once(lambda: 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="timeout"):
        run_once("key", timeout=-1)
    with pytest.raises(LimitError):
        run_once("")
    with pytest.raises(KeyTypeError):
        run_once(1.5)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the rest of 0.4.2


def test_at_most_every(configured_server: InprocServer) -> None:
    """It runs, then not until the time is over; a call that raises counts, too."""

    @at_most_every(seconds=10, key="tick")
    def tick(value: int) -> int:
        if value == 3:
            raise ValueError("three")
        return value

    assert tick(1) == 1
    assert tick(2) is None
    configured_server.advance(11)
    with pytest.raises(ValueError, match="three"):
        tick(3)
    assert tick(4) is None
    for seconds in (0, -1, float("inf")):
        with pytest.raises(ConfigError, match=r"^seconds="):
            at_most_every(seconds=seconds, key="tick")


def test_search_and_count(
    configured_server: InprocServer, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search and count see held, expired and done keys of a prefix, and no failed ones."""
    other.claim("p/held", ttl_s=3600)
    other.claim("p/expired", ttl_s=1)
    other.finish("p/done", "q/done", "\x1ens\x1fp/elsewhere")
    other.settle(other.claim("p/failed"), "fail")
    configured_server.advance(2)
    assert count_keys_by_prefix("p/") == {"expired": 1, "in_progress": 1, "success": 1}
    assert search_keys_by_prefix("p/") == ["p/done", "p/expired", "p/held"]
    assert search_keys_by_prefix("p/", is_expired=True) == ["p/expired"]
    assert search_keys_by_prefix("p/", is_expired=False) == ["p/done", "p/held"]
    assert search_keys_by_prefix("") == ["p/done", "p/expired", "p/held", "q/done"]
    assert count_keys_by_prefix("")["success"] == 2
    monkeypatch.setenv("RUN_ONCE_NAMESPACE", "ns")
    assert search_keys_by_prefix("p") == ["p/elsewhere"]
    assert count_keys_by_prefix("p") == {"expired": 0, "in_progress": 0, "success": 1}
