"""Every inner backend: calls run there, under the wrapper, and a second run computes nothing."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import pytest
from joblib.parallel import BACKENDS
from joblib.pool import PicklingPool

from distlock_proto import lock_table_pb2 as pb
from run_once.errors import ConfigError, RunOnceError
from run_once.joblib_backend import RunOnceBackend
from run_once.joblib_worker import is_inside_task
from tests.other_client import Other
from tests.servers import ServerProcess

COUNT = 12
RAY_SECRET = "a" * 64


@pytest.fixture(scope="module")
def dask_cluster() -> Iterator[Any]:
    """Give a client of a real cluster: a scheduler and two worker processes on loopback."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a ray of two workers on loopback; they keep the environment in which it started."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUN_ONCE_CONFIG_DIR", "RUN_ONCE_DATA_DIR", "HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("ray")))
        patch.setenv("RUN_ONCE_SECRET", RAY_SECRET)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(params=["loky", "threading", "multiprocessing", "dask", "ray"])
def inner(
    request: pytest.FixtureRequest, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Give the name of a backend that is ready."""
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)
    name = str(request.param)
    if name == "dask":
        _configure_dask(request.getfixturevalue("dask_cluster"))
    if name == "ray":
        request.getfixturevalue("ray_cluster")
        monkeypatch.setenv("RUN_ONCE_SECRET", RAY_SECRET)
        monkeypatch.delitem(BACKENDS, "ray", raising=False)
    if name == "multiprocessing" and "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("joblib's multiprocessing backend forks")
    bases = PicklingPool.__bases__
    yield name
    PicklingPool.__bases__ = bases  # ray puts its own pool below that of multiprocessing


def _configure_dask(client: Any) -> None:
    """Give the workers this test's secret, as an administrator would."""
    names = ("RUN_ONCE_CONFIG_DIR", "RUN_ONCE_DATA_DIR", "HOME")
    environment = {name: os.environ[name] for name in names}
    client.run(_update_environment, environment)


def _update_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def where(number: int, folder: Path) -> tuple[int, int, bool]:
    """Tell who ran a call, and whether under the wrapper; leave a file for each run."""
    (folder / f"{number}-{os.getpid()}-{os.urandom(4).hex()}").touch()
    return number, os.getpid(), is_inside_task()


def fail_on_three(number: int) -> int:
    """Fail in one call."""
    if number == 3:
        raise LookupError("three is no number")
    return number


def nested(number: int) -> list[int]:
    """Call Parallel inside of a call."""
    calls = (joblib.delayed(abs)(-x) for x in range(number))
    values: list[int] = joblib.Parallel(n_jobs=2)(calls)
    return values


def test_calls_run_there(inner: str, server: ServerProcess, tmp_path: Path) -> None:
    """Each call runs once, in that backend's processes, is done, and is not run again."""
    runs = tmp_path / "runs"
    runs.mkdir()
    calls = [joblib.delayed(where)(number, runs) for number in range(COUNT)]
    with joblib.parallel_config("run_once", inner=inner, n_jobs=2):
        first = joblib.Parallel()(calls)
        second = joblib.Parallel()(calls)
    assert [number for number, _, _ in first] == list(range(COUNT))
    assert second == first
    assert len(list(runs.iterdir())) == COUNT
    assert {pid == os.getpid() for _, pid, _ in first} == {inner == "threading"}
    assert all(is_wrapped for _, _, is_wrapped in first)
    other = Other(server.address)
    infos = list(other.client.list())
    other.client.close()
    assert [info.state for info in infos] == [pb.KEY_STATE_DONE] * COUNT
    # The owner's label names the process: the first calls are claimed by who runs them, and once
    # they turn out to be short, the others by the parent.
    owners = {int(info.owner.rpartition(":")[2]) for info in infos}
    assert owners <= {os.getpid(), *(pid for _, pid, _ in first)}
    assert owners & {pid for _, pid, _ in first}


def test_an_exception_comes_through(inner: str, server: ServerProcess) -> None:
    """With its own type, and the key can be claimed again at once; the others are done."""
    with (
        joblib.parallel_config("run_once", inner=inner, n_jobs=2),
        pytest.raises(LookupError, match="three is no number"),
    ):
        joblib.Parallel()(joblib.delayed(fail_on_three)(number) for number in range(4))
    other = Other(server.address)
    counted = other.client.count()
    other.client.close()
    assert counted.failed == 1
    assert counted.held == 0


def test_nested_calls_run(inner: str) -> None:
    """They run plainly, inside of the claimed one."""
    with joblib.parallel_config("run_once", inner=inner, n_jobs=2):
        values = joblib.Parallel()(joblib.delayed(nested)(number) for number in range(4))
    assert values == [list(range(number)) for number in range(4)]


@pytest.mark.parametrize("inner", ["dask", "ray"], indirect=True)
def test_a_worker_elsewhere_with_another_secret(
    inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secret does not cross the network: without sharing it the values cannot be trusted."""
    monkeypatch.setenv("RUN_ONCE_SECRET", "f" * 64)
    calls: list[Callable[[], int]] = [joblib.delayed(abs)(-number) for number in range(3)]
    with joblib.parallel_config("run_once", inner=inner, n_jobs=2):
        assert joblib.Parallel()(calls) == [0, 1, 2], "the values themselves come from the workers"
        with pytest.raises(RunOnceError, match="RUN_ONCE_SECRET"):
            joblib.Parallel()(calls)


def test_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then one sentence says so, and what to do."""
    monkeypatch.delitem(BACKENDS, "ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"inner='ray' .*: ray is not installed; pip install"):
        RunOnceBackend(inner="ray")
