"""Key, version and namespace -> stored bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from run_once.errors import KeyTypeError, LimitError
from run_once.keys import MAX_KEY_BYTES, namespace_prefix, stored_key, validate


@pytest.mark.parametrize(
    ("key", "version", "namespace", "stored"),
    [
        ("a", 0, "", b"a"),
        ("a/b c", 0, "", b"a/b c"),
        ("\u00e9\u4e2d", 0, "", b"\xc3\xa9\xe4\xb8\xad"),
        (7, 0, "", b"7"),
        (-12, 0, "", b"-12"),
        (10**30, 0, "", b"1" + b"0" * 30),
        ("a", 1, "", b"a_v001"),
        (7, 12, "", b"7_v012"),
        ("a", 1234, "", b"a_v1234"),
        ("a", 0, "ns", b"\x1ens\x1fa"),
        ("a", 2, "n/s", b"\x1en/s\x1fa_v002"),
        (np.int64(5), 0, "", b"5"),
        (np.str_("x"), 0, "", b"x"),
    ],
)
def test_forms(key: Any, version: int, namespace: str, stored: bytes) -> None:
    """A key has the form of 2021, so that keys done then count, and a namespace goes before it."""
    assert stored_key(key, version, namespace) == stored


@pytest.mark.parametrize("key", [True, False, 1.0, None, b"a", ("a",), object()])
def test_other_types_are_refused(key: Any) -> None:
    """A key of another type is an error that names the type, never its repr as a key."""
    with pytest.raises(KeyTypeError, match=type(key).__name__):
        stored_key(key)


def test_length() -> None:
    """1 to 1,024 bytes as stored are taken, version and namespace included; more is refused."""
    assert len(stored_key("x" * MAX_KEY_BYTES)) == MAX_KEY_BYTES
    too_long = [("x" * (MAX_KEY_BYTES + 1), 0), ("x" * MAX_KEY_BYTES, 1), ("\u00e9" * 513, 0)]
    for key, version in too_long:
        with pytest.raises(LimitError, match=r"takes \d+ bytes as stored; 1 to 1024"):
            stored_key(key, version)
    with pytest.raises(LimitError, match="must not be empty"):
        stored_key("")
    with pytest.raises(LimitError, match="must not be empty"):
        stored_key("", 1, "ns")


def test_no_utf8() -> None:
    """A string that has no UTF-8 form is refused with the place of the bad character."""
    with pytest.raises(LimitError, match="position 1"):
        stored_key("a\ud800b")


@pytest.mark.parametrize("version", [-1, -100])
def test_bad_version(version: int) -> None:
    """A negative version is refused, by its name."""
    with pytest.raises(LimitError, match=f"version={version}"):
        stored_key("a", version)


def test_namespaces_do_not_collide() -> None:
    """No key without a namespace looks like one within a namespace."""
    with pytest.raises(LimitError, match="namespace"):
        stored_key("\x1ens\x1fa")
    assert stored_key("\x1eodd", 0, "ns") == b"\x1ens\x1f\x1eodd"
    for namespace in ["a\x1fb", "\x1e"]:
        with pytest.raises(LimitError, match="must not contain"):
            stored_key("a", 0, namespace)
    assert namespace_prefix("") == ""
    assert namespace_prefix("ns") == "\x1ens\x1f"


def test_validate() -> None:
    """Bytes of a stored key come back if they could be one."""
    assert validate(b"a") == b"a"
    for stored in [b"", b"x" * 1025, b"\xff"]:
        with pytest.raises(LimitError):
            validate(stored)
