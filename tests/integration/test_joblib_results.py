"""`results=`: large values of calls in a folder or at a URL, on real servers and real workers."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import joblib
import numpy as np
import pytest

import run_once
from run_once.client import Settlement
from run_once.errors import ConfigError, ResultError
from run_once.results import ResultStore
from run_once.secret import Secret
from tests.other_client import Other
from tests.servers import ServerProcess

SECRET: Final = "a secret of these tests alone"
N: Final = 20_000


@pytest.fixture(autouse=True)
def _configured(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_ONCE_ADDRESS", server.address)
    monkeypatch.setenv("RUN_ONCE_SECRET", SECRET)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Give the path of a folder for values that is not there yet."""
    return tmp_path / "results"


def noise(number: int, runs: Path) -> Any:
    """Make an array that is too large to be inline, for even numbers."""
    (runs / f"{number}-{uuid.uuid4().hex}").touch()
    if number % 2:
        return number
    return np.random.default_rng(number).random(N)


def run(n_jobs: int, runs: Path, count: int = 4, **options: Any) -> list[Any]:
    """Make one call of `Parallel`; check its values."""
    with joblib.parallel_config("run_once", n_jobs=n_jobs, **options):
        values: list[Any] = joblib.Parallel()(joblib.delayed(noise)(x, runs) for x in range(count))
    for number, value in enumerate(values):
        if number % 2:
            assert value == number
        else:
            np.testing.assert_array_equal(value, np.random.default_rng(number).random(N))
            assert value.flags.writeable
    return values


def objects(place: Path) -> list[Path]:
    """List what is in a folder."""
    return sorted(place.iterdir())


def kept_by_server(server: ServerProcess) -> list[Path]:
    """List the large values that the server keeps itself."""
    return list(server.db.with_name(f"{server.db.name}.results").rglob("*.blob"))


@pytest.mark.parametrize("as_url", [False, True], ids=["path", "url"])
@pytest.mark.parametrize(
    ("inner", "n_jobs"), [("loky", 2), ("threading", 2), ("loky", 1)], ids=["loky", "threads", "1"]
)
def test_large_values_are_in_a_folder(
    inner: str, n_jobs: int, as_url: bool, place: Path, runs: Path, server: ServerProcess
) -> None:
    """The second run loads them from there; small ones and the server's own folder have no part."""
    results = place.as_uri() if as_url else place
    for _ in range(2):
        run(n_jobs, runs, inner=inner, results=results)
        assert len(list(runs.iterdir())) == 4
        assert len(objects(place)) == 2
    assert kept_by_server(server) == []


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_large_values_are_at_a_url(n_jobs: int, runs: Path, server: ServerProcess) -> None:
    """Whatever fsspec has a file system for; here one in this process's memory."""
    results = f"memory://{uuid.uuid4().hex}/values"
    for _ in range(2):
        run(n_jobs, runs, inner="threading", results=results)
        assert len(list(runs.iterdir())) == 4
    assert kept_by_server(server) == []


def test_the_place_may_be_configured(
    place: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the environment, as every other option."""
    monkeypatch.setenv("RUN_ONCE_RESULTS", str(place))
    run(2, runs)
    assert len(objects(place)) == 2


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("n_jobs", [1, 2])
@pytest.mark.parametrize("spoil", [Path.unlink, _damage, lambda path: path.write_bytes(b"")])
def test_what_is_gone_or_damaged_is_computed_again(
    spoil: Callable[[Path], Any],
    n_jobs: int,
    place: Path,
    runs: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a warning that says which value it was and where; the others are loaded."""
    run(n_jobs, runs, results=place)
    first, second = objects(place)
    before = second.read_bytes()
    spoil(first)
    with caplog.at_level(logging.WARNING, "run_once"):
        run(n_jobs, runs, results=place)
    assert len(list(runs.iterdir())) == 5
    (warning,) = [each.getMessage() for each in caplog.records if each.name == "run_once"]
    assert "computed again" in warning
    assert first.as_uri() in warning
    assert second.read_bytes() == before
    run(n_jobs, runs, results=place)
    assert len(list(runs.iterdir())) == 5


@pytest.mark.parametrize("n_jobs", [1, 2])
@pytest.mark.parametrize("other", [None, "other"])
def test_another_place_is_an_error_and_nothing_is_computed(
    other: str | None, n_jobs: int, place: Path, runs: Path, tmp_path: Path
) -> None:
    """It says where the value is and what to set, and then all is there."""
    run(n_jobs, runs, results=place)
    options: dict[str, Any] = {} if other is None else {"results": tmp_path / other}
    with pytest.raises(ResultError) as caught:
        run(n_jobs, runs, **options)
    assert f"is at {place.as_uri()}/" in str(caught.value)
    assert f"set results= (or RUN_ONCE_RESULTS) to {place.as_uri()}" in str(caught.value)
    run(n_jobs, runs, results=place)
    assert len(list(runs.iterdir())) == 4


@pytest.mark.parametrize("n_jobs", [1, 2])
@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        ("{}/runs/missing/below", "values cannot be written there"),
        ("nonsense://a", "Protocol not known"),
        (5, "give a folder or a URL"),
        ("", "a folder or a URL is expected"),
    ],
)
def test_a_place_that_cannot_be_used_ends_the_call_at_once(
    results: Any, sentence: str, n_jobs: int, runs: Path, tmp_path: Path
) -> None:
    """Before anything is run, by an error that names the option."""
    results = results.format(tmp_path) if isinstance(results, str) else results
    with pytest.raises(ConfigError, match=rf"results.*{sentence}"):
        run(n_jobs, runs, results=results)
    assert list(runs.iterdir()) == []


def test_a_dry_run_writes_nothing(place: Path, runs: Path) -> None:
    """It does not even make the folder."""
    with joblib.parallel_config("run_once", n_jobs=2, results=place, dry_run=True):
        joblib.Parallel()(joblib.delayed(noise)(x, runs) for x in range(2))
    assert not place.exists()


def overtaken(number: int, address: str, place: str) -> bytes:
    """Make a large value; that of 0 is overtaken by another holder, who completes first."""
    if number == 0:
        other = Other(address)
        held = [info.key for info in other.client.list(only="held")]
        (key,) = [key for key in held if key.endswith(b"/call-0")]
        other.client.reset([key], other.client.server_info().revision)
        (grant,) = other.claim(key.decode())
        store = ResultStore(other.client, secret=Secret(SECRET.encode()), results=place)
        result = store.store(grant, b"theirs".ljust(N) + os.urandom(4 * N))
        other.client.settle([Settlement(grant, "complete", result)])
        other.client.close()
    return b"mine".ljust(N) + os.urandom(4 * N)


@pytest.mark.parametrize(
    ("inner", "n_jobs"), [("loky", 2), ("threading", 2), ("loky", 1)], ids=["loky", "threads", "1"]
)
@pytest.mark.parametrize("is_last", [False, True])
def test_a_result_written_twice_is_one(
    inner: str, n_jobs: int, is_last: bool, place: Path, server: ServerProcess
) -> None:
    """Whoever lost the lease returns the accepted value, and what it wrote is deleted.

    The last call is claimed in the parent, since those before it were short.
    """
    numbers = [*range(1, 40), 0] if is_last else [0]
    with joblib.parallel_config(
        "run_once",
        n_jobs=n_jobs,
        inner=inner,
        results=place,
        key=lambda number, address, place: f"call-{number}",
    ):
        values = joblib.Parallel()(
            joblib.delayed(overtaken)(number, server.address, str(place)) for number in numbers
        )
    assert values[-1].startswith(b"theirs")
    assert all(value.startswith(b"mine") for value in values[:-1])
    assert len(objects(place)) == len(numbers)


def test_forgetting_a_call_deletes_its_value(place: Path, runs: Path) -> None:
    """The folder does not fill up with what no key names."""
    run(2, runs, results=place)
    with joblib.parallel_config("run_once", results=place):
        assert run_once.forget(noise, 0, runs)
        assert not run_once.is_done(noise, 0, runs)
        assert run_once.is_done(noise, 2, runs)
    assert len(objects(place)) == 1
