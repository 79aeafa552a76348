"""The client's error tree."""

from __future__ import annotations

import inspect
import pickle

import pytest

from run_once import errors

EXCEPTIONS = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, Exception) and found.__module__ == errors.__name__
]


def test_one_tree_of_errors_and_one_of_warnings() -> None:
    """Everything is a RunOnceError or a RunOnceWarning, so that one `except` catches all."""
    for error in EXCEPTIONS:
        assert issubclass(error, (errors.RunOnceError, errors.RunOnceWarning)), error
    assert issubclass(errors.RunOnceWarning, UserWarning)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.LimitError, ValueError),
        (errors.AlreadyDoneError, ValueError),
        (errors.KeyTypeError, TypeError),
        (errors.SignatureError, errors.ResultError),
        (errors.ResultMissingError, errors.ResultError),
        (errors.ResultTooLargeError, errors.ResultError),
        (errors.LeaseLostWarning, UserWarning),
    ],
)
def test_kinds(error: type[Exception], builtin: type[Exception]) -> None:
    """Errors that a caller may know by a wider name have it as a base."""
    assert issubclass(error, builtin)


@pytest.mark.parametrize("error", EXCEPTIONS)
def test_documented_and_picklable(error: type[Exception]) -> None:
    """Each has a one-line summary, and travels between processes with its message."""
    assert error.__doc__
    copy = pickle.loads(pickle.dumps(error("what was wrong")))
    assert type(copy) is error
    assert str(copy) == "what was wrong"


def test_server_error_keeps_its_code() -> None:
    """The status code of a refusal survives pickling, since workers report errors to parents."""
    error = errors.ServerError("refused")
    error.code = "DATA_LOSS"
    assert pickle.loads(pickle.dumps(error)).code == "DATA_LOSS"
