"""pytest plugin: puts our backend through the test suites of joblib and scikit-learn.

It rewrites the `parametrize` marks of the tests in place, before pytest expands them, so that our
backend stands in for one of joblib's own; no file of theirs is copied or edited. Environment:

- JOBLIB_SUITE_LIKE: the built-in backend it stands in for, and its inner one: loky or threading.
- JOBLIB_SUITE_MODE: "only" keeps the tests that got our backend as a parameter; "all" keeps every
  test, and makes it joblib's default backend; "baseline" keeps every test and changes nothing.
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path
from typing import Any, Final

import pytest
from joblib import parallel

from run_once.errors import RunOnceWarning
from run_once.joblib_backend import RunOnceBackend

WARNING: Final = f"{RunOnceWarning.__module__}.{RunOnceWarning.__qualname__}"
NAME: Final = "run_once"
LIKE: Final = os.environ["JOBLIB_SUITE_LIKE"]
MODE: Final = os.environ["JOBLIB_SUITE_MODE"]

BACKEND_ARGUMENTS: Final = frozenset(
    {"backend", "parent_backend", "child_backend", "outer_backend", "inner_backend"}
)

ONE_FOLD: Final = "it counts fits, and the second round draws, at times, a fold that is done"

NAME_BOUND: Final = {
    "test_nested_parallelism_limit": "it wants a class named after the backend",
    **(
        {
            "test_thread_bomb_mitigation": 'it takes a crash only `if backend == "loky"`',
            "test_nested_parallel_warnings[threading-run_once-True]": (
                "its threads catch warnings at the same time: some get two, and some get none"
            ),
        }
        if LIKE == "loky"
        else {}
    ),
    **(
        {
            "test_backend_hinting_and_constraints": "it wants joblib's own class as the default",
            "test_warning_about_timeout_not_supported_by_backend": "it wants joblib's class named",
            "test_globals_update_at_each_parallel_call": "a done call stays done, whatever globals",
            "test_search_callbacks_no_propagation[search2-True]": ONE_FOLD,
            "test_search_callbacks_no_propagation[search2-False]": ONE_FOLD,
            "test_search_callbacks_propagation[search2-True]": ONE_FOLD,
            "test_search_callbacks_propagation[search2-False]": ONE_FOLD,
            "test_searchcv_raise_warning_with_non_finite_score": (
                "it counts all warnings, and a key without random_state brings one of ours"
            ),
        }
        if MODE == "all"
        else {}
    ),
}
"""Tests that look at a backend's name, count warnings, or want a finished call to run again.

Those that fail only at times may pass.
"""

WANT_NO_WARNING: Final = frozenset({"test_background_thread_parallelism"})
"""Tests that take any warning for joblib's own, and whose calls are equal: ours is filtered out."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the backend, here and in every process that a test starts."""
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    os.environ["RUN_ONCE_INNER"] = LIKE
    for name in ("thread_unsafe", "no_cover", "timeout"):
        config.addinivalue_line("markers", f"{name}: used by joblib's tests")
    if MODE != "baseline":
        parallel.register_parallel_backend(NAME, RunOnceBackend, make_default=MODE == "all")


def pytest_runtest_setup() -> None:
    """Begin each test with nothing done, else an earlier one's values answer."""
    os.environ["RUN_ONCE_NAMESPACE"] = uuid.uuid4().hex


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our backend where a test is parametrized with the one it stands in for."""
    if MODE == "baseline":
        return
    marks = metafunc.definition.own_markers
    for index, mark in enumerate(marks):
        if mark.name == "parametrize":
            marks[index] = _swapped(mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that are bound to a name, and drop those that are not about us."""
    if MODE == "baseline":
        return
    for item in items:
        name = getattr(item, "originalname", "")
        reason = NAME_BOUND.get(item.name) or NAME_BOUND.get(name)
        if reason and (MODE == "all" or _is_about_us(item)):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
        if name in WANT_NO_WARNING:
            item.add_marker(pytest.mark.filterwarnings(f"ignore::{WARNING}"))
    if MODE == "only":
        config.hook.pytest_deselected(items=[item for item in items if not _is_about_us(item)])
        items[:] = [item for item in items if _is_about_us(item)]


def _swapped(mark: pytest.Mark) -> pytest.Mark:
    """Give a `parametrize` mark with our backend in its values."""
    given = dict(mark.kwargs)
    names = mark.args[0] if mark.args else given.pop("argnames")
    values = mark.args[1] if len(mark.args) > 1 else given.pop("argvalues")
    parts = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
    if not BACKEND_ARGUMENTS.intersection(parts):
        return mark
    rows = sorted(values) if isinstance(values, (set, frozenset)) else list(values)
    if len(parts) == 1:
        swapped: list[Any] = [_stand_in(value) for value in rows]
    else:
        swapped = [_swapped_row(parts, row) for row in rows]
    return pytest.mark.parametrize(names, _without_repeats(swapped), **given).mark


def _swapped_row(names: list[str], row: Any) -> tuple[Any, ...]:
    new = [
        _stand_in(value) if name in BACKEND_ARGUMENTS else value
        for name, value in zip(names, row, strict=True)
    ]
    if "error" in names and any(old is not now for old, now in zip(row, new, strict=True)):
        # A generator that is thrown away kills the workers of loky's shared executor.
        new[names.index("error")] = LIKE == "loky"
    return tuple(new)


def _stand_in(value: Any) -> Any:
    if isinstance(value, str):
        return NAME if value == LIKE else value
    return RunOnceBackend() if type(value) is parallel.BACKENDS.get(LIKE) else value


def _without_repeats(values: list[Any]) -> list[Any]:
    """Drop our second entry: lists made of joblib's BACKENDS hold our backend already."""
    seen: list[Any] = []
    kept = []
    for value in values:
        known = RunOnceBackend if isinstance(value, RunOnceBackend) else value
        is_comparable = known is RunOnceBackend or isinstance(value, (str, tuple))
        if is_comparable and known in seen:
            continue
        if is_comparable:
            seen.append(known)
        kept.append(value)
    return kept


def _is_about_us(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return any(
        value == NAME if isinstance(value, str) else isinstance(value, RunOnceBackend)
        for name, value in parameters.items()
        if name in BACKEND_ARGUMENTS
    )
