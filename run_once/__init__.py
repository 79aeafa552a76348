"""Run every unit of work, named by a key, once over many machines.

Three ways in, one lock table behind them:

    for key in DistributedIterator(keys): ...           # a loop          (iterator.py)
    @run_once(key, timeout=60)                          # a function      (decorator.py)
    with joblib.parallel_config("run_once"): ...        # a joblib backend (joblib_backend.py)

This page is the table of contents. A name's module is imported when the name is first used, so
that `import run_once` costs next to nothing; joblib learns of its backend as soon as it is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from run_once import _joblib_registration

if TYPE_CHECKING:
    from run_once.call_tools import explain_key, forget, is_done
    from run_once.config import Config, load_config
    from run_once.decorator import Status, distributed_task, run_once
    from run_once.errors import (
        AccessError,
        AlreadyDoneError,
        AmbiguousKeyError,
        ConfigError,
        ExhaustedError,
        KeyTypeError,
        LeaseLostError,
        LeaseLostWarning,
        LimitError,
        NotHeldError,
        ResultError,
        ResultMissingError,
        ResultTooLargeError,
        RunOnceError,
        RunOnceWarning,
        ServerError,
        ServerUnavailableError,
        SignatureError,
        UnkeyableError,
    )
    from run_once.iterator import DistributedIterator
    from run_once.joblib_outcomes import Failed, Planned, Skipped
    from run_once.joblib_report import CallEvent, Report, last_report
    from run_once.lease import Lease, LeaseHandle
    from run_once.legacy_api import at_most_every, count_keys_by_prefix, search_keys_by_prefix
    from run_once.live import LiveItem, lease_of
    from run_once.notify import notify_failure, notify_success

_HOMES: Final = {
    # the loop
    "DistributedIterator": "iterator",
    "notify_success": "notify",
    "notify_failure": "notify",
    "lease_of": "live",
    "LiveItem": "live",
    # the function
    "run_once": "decorator",
    "distributed_task": "decorator",
    "Status": "decorator",
    # the rest of 0.4.2
    "at_most_every": "legacy_api",
    "count_keys_by_prefix": "legacy_api",
    "search_keys_by_prefix": "legacy_api",
    # the joblib backend
    "Skipped": "joblib_outcomes",
    "Failed": "joblib_outcomes",
    "Planned": "joblib_outcomes",
    "is_done": "call_tools",
    "forget": "call_tools",
    "explain_key": "call_tools",
    "last_report": "joblib_report",
    "Report": "joblib_report",
    "CallEvent": "joblib_report",
    # shared by all
    "Config": "config",
    "load_config": "config",
    "Lease": "lease",
    "LeaseHandle": "lease",
    # errors and warnings
    "AccessError": "errors",
    "AlreadyDoneError": "errors",
    "AmbiguousKeyError": "errors",
    "ConfigError": "errors",
    "ExhaustedError": "errors",
    "KeyTypeError": "errors",
    "LeaseLostError": "errors",
    "LeaseLostWarning": "errors",
    "LimitError": "errors",
    "NotHeldError": "errors",
    "ResultError": "errors",
    "ResultMissingError": "errors",
    "ResultTooLargeError": "errors",
    "RunOnceError": "errors",
    "RunOnceWarning": "errors",
    "ServerError": "errors",
    "ServerUnavailableError": "errors",
    "SignatureError": "errors",
    "UnkeyableError": "errors",
}
"""Every public name, and the module it lives in."""

__all__ = [  # noqa: RUF022 (grouped as above; a test keeps the three lists equal)
    "DistributedIterator",
    "notify_success",
    "notify_failure",
    "lease_of",
    "LiveItem",
    "run_once",
    "distributed_task",
    "Status",
    "at_most_every",
    "count_keys_by_prefix",
    "search_keys_by_prefix",
    "Skipped",
    "Failed",
    "Planned",
    "is_done",
    "forget",
    "explain_key",
    "last_report",
    "Report",
    "CallEvent",
    "Config",
    "load_config",
    "Lease",
    "LeaseHandle",
    "AccessError",
    "AlreadyDoneError",
    "AmbiguousKeyError",
    "ConfigError",
    "ExhaustedError",
    "KeyTypeError",
    "LeaseLostError",
    "LeaseLostWarning",
    "LimitError",
    "NotHeldError",
    "ResultError",
    "ResultMissingError",
    "ResultTooLargeError",
    "RunOnceError",
    "RunOnceWarning",
    "ServerError",
    "ServerUnavailableError",
    "SignatureError",
    "UnkeyableError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 (slow, and rarely asked for)

        value: Any = version("run-once")
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_joblib_registration.register()
