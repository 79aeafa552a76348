"""The options by name, and the check of each: what a good value looks like. Pure."""

from __future__ import annotations

import configparser
import difflib
import math
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from run_once.errors import ConfigError
from run_once.keys import NAMESPACE_END, NAMESPACE_START
from run_once.secret import MIN_SECRET_CHARS

DEFAULT_PORT: Final = 22113
MAX_OWNER_BYTES: Final = 200
MAX_NAMESPACE_BYTES: Final = 500
"""A namespace is part of each stored key, and must leave room for the rest of it."""

MAX_DURATION_S: Final = 365 * 86_400.0
"""No lease and no wait is longer: a year."""

ADDRESS_FILE: Final = "addrfile://"
"""What an address starts with that is the path of a file which tells all that is needed."""

SYSTEM: Final = "system"
"""As tls_ca: trust the CAs that come with gRPC, as for a server with a public certificate."""

_MAX_PORT: Final = 65535
_MIN_LEASE_S: Final = 0.01
_MAX_PLACE_CHARS: Final = 1000  # an object's URL, each character as 3 bytes, fits into its 4,096


class BadValueError(Exception):
    """A check's complaint: how a good value looks."""


def parse_address(text: str) -> str:
    """Bring an address into the one form that is used from here on.

    Args:
        text: `host`, `host:port`, `[ipv6]:port`, `unix:/path`, `unix:///path` or `addrfile://path`.

    Returns:
        `host:port`, `[ipv6]:port`, `unix:/path` or `addrfile:///path`.

    Raises:
        ConfigError: It is none of these.
    """
    try:
        return _address(text)
    except BadValueError as error:
        raise ConfigError(f"address {text!r} cannot be used: {error}") from None


def _address(value: Any) -> str:
    """Check an address."""
    form = "write host:port, [ipv6]:port, unix:/path or addrfile:///path"
    text = value.strip() if isinstance(value, str) else ""
    if text.startswith(ADDRESS_FILE):
        return _address_file(text.removeprefix(ADDRESS_FILE))
    if not text or any(char.isspace() for char in text):
        raise BadValueError(form)
    if text.startswith("unix:"):
        path = "/" + text.removeprefix("unix:").lstrip("/")
        if not text.removeprefix("unix:").startswith("/") or path == "/":
            raise BadValueError("a unix socket needs an absolute path: unix:/path")
        return f"unix:{path}"
    if "/" in text or "@" in text:
        raise BadValueError(f"{form}; there is no scheme such as http://")
    if text.startswith("["):
        host, closing, rest = text.partition("]")
        if not closing or (rest and not rest.startswith(":")) or ":" not in host:
            raise BadValueError(form)
        return f"{host}]:{_port(rest[1:] or str(DEFAULT_PORT))}"
    if text.count(":") > 1:
        raise BadValueError(f"an IPv6 address stands in brackets: [{text}]:{DEFAULT_PORT}")
    host, _, port = text.partition(":")
    if not host:
        raise BadValueError(form)
    return f"{host}:{_port(port or str(DEFAULT_PORT))}"


def _address_file(path: str) -> str:
    """Check the path of an address file."""
    if not path:
        raise BadValueError("the path of an address file is missing: addrfile:///path")
    return f"{ADDRESS_FILE}{_path(path)}"


def _port(text: str) -> int:
    """Check a port."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= _MAX_PORT:
        raise BadValueError(f"a port is a number from 1 to {_MAX_PORT}, not {text!r}")
    return int(text)


def _text(value: Any) -> str:
    """Check a text."""
    if not isinstance(value, str):
        raise BadValueError("a text is expected")
    return value


def _namespace(value: Any) -> str:
    """Check a namespace."""
    text = _text(value)
    if NAMESPACE_START in text or NAMESPACE_END in text:
        raise BadValueError("it must not contain the characters U+001E and U+001F")
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_NAMESPACE_BYTES:
        raise BadValueError(
            f"a namespace has at most {MAX_NAMESPACE_BYTES} bytes, and this one has {size:,}: it "
            "is part of each stored key"
        )
    return text


def _owner(value: Any) -> str:
    """Check an owner's label."""
    text = _text(value)
    if len(text.encode("utf-8", "replace")) > MAX_OWNER_BYTES:
        raise BadValueError(f"at most {MAX_OWNER_BYTES} bytes are allowed")
    return text


def _secret(value: Any) -> str:
    """Check the secret."""
    text = _text(value)
    if len(text) < MIN_SECRET_CHARS:
        raise BadValueError(f"at least {MIN_SECRET_CHARS} characters are needed")
    return text


def _token(value: Any) -> str:
    """Check a token."""
    text = _text(value).strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise BadValueError("a token is ASCII text without blanks")
    return text


def _trusted(value: Any) -> str:
    """Check what is trusted: a file, or what the system trusts."""
    return SYSTEM if value == SYSTEM else _path(value)


def _duration(low_s: float) -> Callable[[Any], float]:
    """Make the check of a length of time in seconds."""

    def parse(value: Any) -> float:
        try:
            seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
        except (TypeError, ValueError):
            seconds = math.nan
        if not low_s <= seconds <= MAX_DURATION_S:
            raise BadValueError(
                f"a number of seconds from {low_s:g} to {MAX_DURATION_S:.0f} (a year) is expected"
            )
        return seconds

    return parse


def _count(value: Any) -> int:
    """Check a number of 0 or more."""
    try:
        count = int(value) if isinstance(value, (int, str)) else -1
    except ValueError:
        count = -1
    if not 0 <= count < 2**31:
        raise BadValueError("a whole number of 0 or more is expected")
    return count


def _flag(value: Any) -> bool:
    """Check a yes or no."""
    states = configparser.ConfigParser.BOOLEAN_STATES
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in states:
        return states[value.strip().lower()]
    raise BadValueError("yes or no is expected")


def _one_of(*choices: str) -> Callable[[Any], str]:
    """Make the check of a choice."""

    def parse(value: Any) -> str:
        if value not in choices:
            raise BadValueError(f"one of these is expected: {', '.join(choices)}")
        return str(value)

    return parse


def _path(value: Any) -> str:
    """Check the path of a file or folder."""
    if not isinstance(value, (str, Path)) or not str(value):
        raise BadValueError("a path is expected")
    try:
        return str(Path(value).expanduser().absolute())
    except (RuntimeError, ValueError):
        raise BadValueError("a path is expected; after ~ a user who has a home folder") from None


def _results(value: Any) -> str:
    """Check a place for values; bring a folder and its file:// URL into one form."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text.strip():
        raise BadValueError("a folder or a URL is expected")
    if len(text) > _MAX_PLACE_CHARS:
        raise BadValueError(f"at most {_MAX_PLACE_CHARS} characters are allowed")
    if text.startswith("file://"):
        try:
            text = unquote(urlsplit(text).path)
        except ValueError as error:
            raise BadValueError(f"a folder or a URL is expected ({error})") from None
    return text.rstrip("/") if "://" in text else _path(text)


CHECKS: Final[dict[str, Callable[[Any], Any]]] = {
    "address": _address,
    "namespace": _namespace,
    "lease_s": _duration(_MIN_LEASE_S),
    "retry_s": _duration(0),
    "owner": _owner,
    "secret": _secret,
    "in_flight": _one_of("wait", "skip"),
    "on_error": _one_of("raise", "return", "retry"),
    "duplicates": _one_of("number", "once"),
    "inner": _text,
    "results": _results,
    "max_attempts": _count,
    "progress": _flag,
    "idle_exit_s": _duration(1),
    "data_dir": _path,
    "runtime_dir": _path,
    "token": _token,
    "tls_ca": _trusted,
    "tls_cert": _path,
    "tls_key": _path,
}
"""Every option and its check, in the order in which messages list them."""

NOT_SHOWN: Final = frozenset({"secret", "token"})
"""Options whose values stand in no message."""

ENV_PREFIX: Final = "RUN_ONCE_"

OTHER_VARIABLES: Final = {
    "RUN_ONCE_CONFIG_DIR": "Folder of the secret's file; else the user's configuration folder.",
    "RUN_ONCE_SECRET_FILE": "The secret's file; else `secret` in that folder, made on first use.",
    "RUN_ONCE_2021_WHEEL": "For the tests: the wheel of 0.4.2, instead of a download.",
}
"""Variables that are read and are no option, and their meaning."""


def variable(option: str) -> str:
    """Give the environment variable of an option."""
    return f"{ENV_PREFIX}{option.upper()}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Guess what a misspelt name was to be: a phrase that ends a message, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
