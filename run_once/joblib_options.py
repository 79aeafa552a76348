"""The joblib backend's options, checked, and the configuration that follows from them."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from joblib.parallel import BACKENDS, EXTERNAL_BACKENDS, ParallelBackendBase

from run_once.config import Config, load_config
from run_once.errors import ConfigError
from run_once.joblib_failures import ON_ERROR_CHOICES
from run_once.joblib_report import CallEvent
from run_once.result_places import check_place

IN_FLIGHT_CHOICES: Final = ("wait", "skip")
DUPLICATES_CHOICES: Final = ("number", "once")

_LOOKS_LIKE: Final = 0.75
"""Similarity from which an unknown option is taken for a slip of one of ours."""


@dataclass(frozen=True)
class BackendOptions:
    """The options, by the same names in `parallel_config`, `Parallel` and the constructor.

    Attributes:
        inner: Name or instance of the joblib backend that runs the calls; not given: configured.
        in_flight: "wait" for a call that another holds, or "skip" it: a `Skipped` comes back; not
            given: configured.
        on_error: "raise" the error of a call that fails, "return" a `Failed` in its place, or
            "retry" it, up to `max_attempts` times (3 if that says no limit); not given: configured.
        duplicates: "number" equal calls of one `Parallel`, so that each is computed, or compute
            them "once" and give the value to all; not given: configured.
        dry_run: Run nothing: a `Planned` in each place says what would become of the call.
        callback: Told of each call as it ends (`CallEvent`), in the thread in which it does.
        progress: Show progress; not given: configured.
        results: Where values go that are too large for the lock table: a folder, or a URL of
            fsspec's such as "s3://bucket/prefix"; None: configured, else to the server.
        address: The lock server; None: as `run_once.config` finds it.
        namespace: Prefix that keeps one project's keys apart from another's; None: configured.
        version: Integer that is part of every key: raise it to compute everything again.
        lease_s: Length of a lease in seconds; None: configured. Leases are kept alive.
        max_attempts: Attempts after which a failing key is not tried again; 0: no limit; not
            given: configured.
        key: Function of a call's arguments that gives its key, instead of the computed one.
        ignore: Names of arguments that are no part of the key.
        code: "source" makes the function's source part of the key; "none" does not.
    """

    inner: str | ParallelBackendBase = "loky"
    in_flight: str = "wait"
    on_error: str = "raise"
    duplicates: str = "number"
    dry_run: bool = False
    callback: Callable[[CallEvent], object] | None = None
    progress: bool = False
    results: str | os.PathLike[str] | None = None
    address: str | None = None
    namespace: str | None = None
    version: int = 0
    lease_s: float | None = None
    max_attempts: int = 0
    key: Callable[..., str] | None = None
    ignore: Iterable[str] = ()
    code: Literal["none", "source"] = "none"

    def __post_init__(self) -> None:
        """Check what can be checked without a server.

        Raises:
            ConfigError: A value that cannot be; the message names the option.
        """
        for name, choices in (
            ("in_flight", IN_FLIGHT_CHOICES),
            ("on_error", ON_ERROR_CHOICES),
            ("duplicates", DUPLICATES_CHOICES),
            ("dry_run", (True, False)),
            ("progress", (True, False)),
        ):
            if getattr(self, name) not in choices:
                shown = ", ".join(map(str, choices))
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {shown}")
        if self.results is not None and not isinstance(self.results, (str, os.PathLike)):
            msg = f"results={self.results!r}: give a folder or a URL"
            raise ConfigError(msg)
        if isinstance(self.inner, str) and not _is_known_backend(self.inner):
            known = ", ".join(sorted(set(BACKENDS) - {"run_once"}))
            msg = f"inner={self.inner!r} is no joblib backend; known here: {known}"
            raise ConfigError(msg)
        if self.inner == "run_once" or getattr(self.inner, "is_run_once", False):
            msg = 'inner="run_once": the inner backend must be another one, such as "loky"'
            raise ConfigError(msg)
        self._check_key_options()

    def _check_key_options(self) -> None:
        if type(self.version) is not int or self.version < 0:
            msg = f"version={self.version!r}: give an integer of 0 or more"
            raise ConfigError(msg)
        if self.key is not None and not callable(self.key):
            msg = f"key={self.key!r}: give a function of a call's arguments that returns a string"
            raise ConfigError(msg)
        if self.callback is not None and not callable(self.callback):
            msg = f"callback={self.callback!r}: give a function of one argument, a CallEvent"
            raise ConfigError(msg)
        if isinstance(self.ignore, str):
            msg = f"ignore={self.ignore!r}: give a list of names, as in ignore=[{self.ignore!r}]"
            raise ConfigError(msg)
        if type(self.max_attempts) is not int or self.max_attempts < 0:
            msg = f"max_attempts={self.max_attempts!r}: give an integer, 0 for no limit"
            raise ConfigError(msg)


def _is_known_backend(name: str) -> bool:
    """Look a backend up as joblib does, which loads that of dask by its first use; so is ray's.

    Raises:
        ConfigError: It is one of those, and its library is missing.
    """
    register = None if name in BACKENDS else _EXTERNAL_BACKENDS.get(name)
    if register is not None:
        try:
            register()
        except ImportError as error:
            raise ConfigError(f"inner={name!r} cannot be loaded: {error}") from error
    return name in BACKENDS


def _register_ray() -> None:
    """Do what ray has its users do; joblib does not know of ray."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError('ray is not installed; pip install "run-once[ray]" does that')
    from ray.util.joblib import register_ray  # noqa: PLC0415 - takes a second

    register_ray()


_EXTERNAL_BACKENDS: Final = {"ray": _register_ray, **EXTERNAL_BACKENDS}


OPTION_NAMES: Final = frozenset(field.name for field in fields(BackendOptions))


_CONFIGURED: Final = (
    "inner",
    "in_flight",
    "on_error",
    "duplicates",
    "max_attempts",
    "progress",
)
"""Options that are looked up in the configuration as soon as a backend is made."""


def make_options(given: Mapping[str, Any]) -> BackendOptions:
    """Make the options, those that are not given from the configuration.

    Raises:
        ConfigError: A value that cannot be.
    """
    config = load_config()
    configured = {name: getattr(config, name) for name in _CONFIGURED}
    return BackendOptions(**{**configured, **given})


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part our options from the inner backend's.

    Raises:
        ConfigError: A name is none of ours but looks like one; inner backends swallow such names.
    """
    ours = {name: value for name, value in options.items() if name in OPTION_NAMES}
    inner = {name: value for name, value in options.items() if name not in OPTION_NAMES}
    for name in inner:
        meant = difflib.get_close_matches(name, OPTION_NAMES, n=1, cutoff=_LOOKS_LIKE)
        if meant:
            raise ConfigError(f"no such option: {name}; did you mean {meant[0]}?")
    return ours, inner


def resolve(options: BackendOptions) -> Config:
    """Read the configuration, and find or start the server, so that workers all use that one.

    The place of large values is tried: where it cannot be used, nothing is to be computed first.

    Raises:
        ConfigError: It cannot be.
    """
    overrides: dict[str, Any] = {
        name: value
        for name, value in (
            ("address", options.address),
            ("namespace", options.namespace),
            ("lease_s", options.lease_s),
            ("progress", options.progress),
            ("results", options.results),
        )
        if value is not None
    }
    config = load_config(**overrides)
    if config.results is not None and not options.dry_run:
        check_place(config.results)
    return config.resolved()
