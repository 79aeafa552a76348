"""Open files: the limit is raised, and connections leave enough of them."""

from __future__ import annotations

import logging
import resource

import pytest

from distlock_server import files


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "n_connections", "words"),
    [
        (1_024, 20_000, 20_000, 18_800, ""),
        (256, 1_000, 1_000, 250, "1000 open files (ulimit -n): at most 250 connections"),
        (1_024, resource.RLIM_INFINITY, resource.RLIM_INFINITY, files.MAX_CONNECTIONS, ""),
    ],
)
def test_the_limit_is_raised(
    soft: int,
    hard: int,
    wanted: int,
    n_connections: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As many files as the system lets; few of them are a warning that says what that means."""
    limits = {"now": (soft, hard)}
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, new: limits.update(now=new))
    with caplog.at_level(logging.WARNING):
        files.raise_limit()
    assert limits["now"] == (wanted, hard)
    assert files.max_connections() == n_connections
    said = " ".join(record.getMessage() for record in caplog.records)
    assert words in said
    assert bool(said) == bool(words)


def test_a_limit_that_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that names a higher limit and does not allow it is taken as it is."""

    def refuse(_kind: int, _new: tuple[int, int]) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (5_000, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    files.raise_limit()
    assert files.max_connections() == 3_800
