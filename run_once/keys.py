"""The user's key, version and namespace -> the bytes under which the table keeps it. Pure."""

from __future__ import annotations

import operator
import shlex
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, SupportsIndex

from run_once.errors import KeyTypeError, LimitError

MAX_KEY_BYTES: Final = 1024
"""Length of a stored key at most, in bytes of UTF-8."""

NAMESPACE_START: Final = "\x1e"
NAMESPACE_END: Final = "\x1f"

_NAMESPACE_BYTE: Final = NAMESPACE_START.encode()
_PLAIN_TYPES: Final = frozenset({str, int})


def stored_key(key: str | SupportsIndex, version: int = 0, namespace: str = "") -> bytes:
    """Give the bytes under which a key is stored.

    A string is itself and an integer its decimal form; a version above 0 appends `_v001` and so
    on, as in 2021, so that keys done then still count.

    Args:
        key: A string or an integer (numpy's included).
        version: Version of the work, 0 or more; another version is another key.
        namespace: Separates equal keys of different projects; empty: none.

    Returns:
        1 to 1,024 bytes of UTF-8.

    Raises:
        KeyTypeError: The key is neither a string nor an integer.
        LimitError: The key is empty or too long or no valid Unicode, or version or namespace
            cannot be used.
    """
    text = key if isinstance(key, str) else _decimal(key)
    if not text:
        raise LimitError("a key must not be empty: leave the empty string out of your keys")
    if check_version(version):
        text = f"{text}_v{version:03d}"
    if namespace:
        return validate(_encode(f"{namespace_prefix(namespace)}{text}"))
    if text.startswith(NAMESPACE_START):
        raise LimitError(
            f"key {text!r} starts with the character U+001E, which marks a namespace; "
            "use the option namespace instead"
        )
    return validate(_encode(text))


def stored_keys(keys: Sequence[Any], version: int = 0, namespace: str = "") -> list[bytes]:
    """Give the bytes under which many keys are stored, as `stored_key` would each of them.

    Args:
        keys: Strings and integers.
        version: Version of the work.
        namespace: The namespace.

    Raises:
        KeyTypeError: A key is neither a string nor an integer.
        LimitError: A key is empty or too long or no valid Unicode, or version or namespace cannot
            be used.
    """
    before = namespace_prefix(namespace)
    after = f"_v{version:03d}" if check_version(version) else ""
    if keys and set(map(type, keys)) <= _PLAIN_TYPES and "" not in keys:
        try:
            made = [f"{before}{key}{after}".encode() for key in keys]
        except UnicodeEncodeError:
            made = [b""]
        starts = {key[:1] for key in made} if not before else ()
        if _NAMESPACE_BYTE not in starts and max(map(len, made)) <= MAX_KEY_BYTES and all(made):
            return made
    # One of them is wrong, or of another type: the slow way names it.
    return [stored_key(key, version, namespace) for key in keys]


def check_version(version: int) -> int:
    """Check a version, and give it back.

    Raises:
        LimitError: It is no integer of 0 or more.
    """
    try:
        number = operator.index(version)
    except TypeError:
        number = -1
    if number < 0:
        raise LimitError(f"version={version!r:.100}: an integer of 0 or more is expected")
    return number


class DisplayKey(NamedTuple):
    """A stored key as people see it.

    Attributes:
        text: The key.
        namespace: Its namespace; empty: none.
    """

    text: str
    namespace: str

    @property
    def reset_command(self) -> str:
        """The command that has the key done again."""
        option = f"--namespace {shlex.quote(self.namespace)} " if self.namespace else ""
        return f"run-once reset {option}{shlex.quote(self.text)}"


def display_key(key: bytes) -> DisplayKey:
    """Part a stored key from its namespace."""
    text = key.decode("utf-8", "backslashreplace")
    if text.startswith(NAMESPACE_START) and NAMESPACE_END in text:
        namespace, _, text = text[1:].partition(NAMESPACE_END)
        return DisplayKey(text, namespace)
    return DisplayKey(text, "")


def namespace_prefix(namespace: str) -> str:
    """Give what every stored key of a namespace starts with; "" for the one without a name.

    Raises:
        LimitError: The namespace contains one of the two characters that mark it.
    """
    if NAMESPACE_START in namespace or NAMESPACE_END in namespace:
        raise LimitError(f"namespace {namespace!r} must not contain U+001E or U+001F")
    return f"{NAMESPACE_START}{namespace}{NAMESPACE_END}" if namespace else ""


def validate(stored: bytes) -> bytes:
    """Check the bytes of a stored key, and give them back.

    Raises:
        LimitError: It is empty, longer than 1,024 bytes, or no UTF-8.
    """
    if not 1 <= len(stored) <= MAX_KEY_BYTES:
        raise LimitError(
            f"key {_shorten(stored)} takes {len(stored)} bytes as stored; "
            f"1 to {MAX_KEY_BYTES} are allowed: use a digest of it"
        )
    try:
        stored.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LimitError(f"key {_shorten(stored)} is not valid UTF-8: {error.reason}") from None
    return stored


def _decimal(key: SupportsIndex) -> str:
    """Give an integer's decimal form."""
    if isinstance(key, bool):
        raise KeyTypeError(f"a key is a string or an integer, not a bool: {key!r}")
    try:
        return str(operator.index(key))
    except TypeError:
        raise KeyTypeError(
            f"a key is a string or an integer, not {type(key).__name__}: {key!r:.100}; "
            "where `key=` can be given, give a function that makes one"
        ) from None


def _encode(text: str) -> bytes:
    """Encode a key as UTF-8."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LimitError(
            f"key {text!r:.100} cannot be written as UTF-8: {error.reason} at position "
            f"{error.start}"
        ) from None


def _shorten(stored: bytes) -> str:
    """Show a key in a message without filling the screen."""
    shown_bytes = 60
    shown = repr(stored[:shown_bytes].decode("utf-8", "backslashreplace"))
    return shown if len(stored) <= shown_bytes else f"{shown}..."
