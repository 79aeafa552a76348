"""Hostile values, and messages made of them for any message type, from its descriptor."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTEGERS: Final = (0, 1, -1, 2, 7, 127, 10**9, 2**31 - 1, -(2**31), 2**32 - 1, 2**62)
INTEGERS_64: Final = (
    2**63 - 1,
    -(2**63),
    2**64 - 1,
    10**15,
    -(10**15),
    315_576_000_001,
    10**9 * 60,
)

KEYS: Final = (
    b"",
    b"k",
    b"hostile-1",
    b"hostile-2",
    b"hostile-3",
    b"\x1ehostile\x1fkey",
    b"\x1ehostile",
    b"\x1e\x1f",
    b"\x1f",
    b"\x00",
    b"\xfe",
    b"\xfesformat",
    b"\xfestoken",
    b"\xff\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    "schlüssel".encode(),
    "\U0010ffff".encode(),
    b"a" * 1_024,
    b"a" * 1_025,
    b"a" * 100_000,
)
"""Keys, and what a key must not be: empty, too long, no UTF-8, the server's own prefix."""

PATTERNS: Final = (
    "(a+)+$",
    "(a|a)*b",
    "(.*)*" * 20,
    "a{1000}",
    "((a{1,100}){1,10}){1,10}",
    r"(\pL{1,100}){1,10}",
    "(?:" * 900 + "a" + ")" * 900,
    "(" * 5_000,
    "[" + "a-z" * 3_000 + "]",
    "a?" * 500 + "a" * 500,
    "|".join(f"key-{number}" for number in range(2_000)),
    r"(?i)" + r"\pL" * 1_000,
    r"\C*",
    r"\1",
    "*",
    "x" * 70_000,
)
"""Patterns on which a matcher that goes back would never end, large ones, and what is none."""

TEXTS: Final = ("", "o", "ü" * 300, "\x00", "a" * 5_000, "\U0010ffff" * 100, "%s{}\n\r\t")
BYTES: Final = (b"", b"1" * 16, b"2" * 16, b"i" * 15, b"\xff" * 32, b"d" * 65_537, bytes(1_000))

_UNSIGNED: Final = (
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
)
_WIDE: Final = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
_MAX_DEPTH: Final = 6


class Maker:
    """Makes hostile messages of any type."""

    def __init__(self, rng: random.Random, *, max_items: int = 40) -> None:
        """Make messages by a source of chance, with so many items at most in most of them."""
        self._rng = rng
        self._max_items = max_items

    def make(self, kind: type[Message], depth: int = 0) -> Any:
        """Make a message of a type."""
        message = kind()
        fields: Any = kind.DESCRIPTOR.fields
        for field in fields:
            if self._rng.random() < 0.15:
                continue
            if isinstance(field.default_value, list):
                self._fill(getattr(message, field.name), field, depth)
            elif field.message_type is None:
                setattr(message, field.name, self.scalar(field))
            elif depth < _MAX_DEPTH:
                inner = message_factory.GetMessageClass(field.message_type)
                getattr(message, field.name).CopyFrom(self.make(inner, depth + 1))
        return message

    def _fill(self, items: Any, field: Any, depth: int) -> None:
        n_items = self._rng.randrange(1 + self._max_items // (1 + 3 * depth))
        if field.message_type is None:
            for number in range(n_items):
                valid = b"hostile-%d" % number if self._rng.random() < 0.8 else None
                is_key = field.cpp_type == FieldDescriptor.CPPTYPE_STRING and valid
                items.append(valid if is_key else self.scalar(field))
        elif depth < _MAX_DEPTH:
            inner = message_factory.GetMessageClass(field.message_type)
            items.extend(self.make(inner, depth + 1) for _ in range(n_items))

    def scalar(self, field: Any) -> Any:
        """Make a value for a field that is no message."""
        rng = self._rng
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return (
                self._bytes(field)
                if field.type == FieldDescriptor.TYPE_BYTES
                else self._text(field)
            )
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice((0, 1, 2, 3, 4, 77, -1, 2**31 - 1))
        if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return rng.choice((0.0, float("nan"), float("inf"), -1e300))
        low, high = integer_range(field)
        return min(max(rng.choice((*INTEGERS, *INTEGERS_64)), low), high)

    def _bytes(self, field: Any) -> bytes:
        rng = self._rng
        if "key" in field.name or field.name == "prefix":
            return rng.choice(KEYS)
        if "id" in field.name and rng.random() < 0.8:
            return b"i" * 16
        return rng.choice(BYTES) if rng.random() < 0.8 else rng.randbytes(rng.randrange(300))

    def _text(self, field: Any) -> str:
        rng = self._rng
        if "regex" in field.name:
            return rng.choice(PATTERNS) if rng.random() < 0.5 else f"hostile-{rng.randrange(9)}.*"
        if "key" in field.name or field.name == "global_id":
            return rng.choice(KEYS).decode("utf-8", "replace")
        return rng.choice(TEXTS)


def integer_range(field: Any) -> tuple[int, int]:
    """Give the least and greatest value of an integer field."""
    n_bits = 64 if field.cpp_type in _WIDE else 32
    if field.cpp_type in _UNSIGNED:
        return 0, 2**n_bits - 1
    return -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Damage the bytes of a message: flips, cuts, doublings, foreign bytes."""
    if not raw:
        return rng.randbytes(rng.randrange(1, 9))
    changes: tuple[Callable[[bytes], bytes], ...] = (
        partial(_flipped, rng=rng),
        lambda data: data[: rng.randrange(len(data) + 1)],
        lambda data: data[rng.randrange(len(data) + 1) :],
        lambda data: data * 2,
        lambda data: data + rng.randbytes(rng.randrange(1, 40)),
        lambda data: data[: len(data) // 2] + rng.randbytes(4) + data[len(data) // 2 :],
    )
    for _ in range(rng.randint(1, 3)):
        raw = rng.choice(changes)(raw)
    return raw[:1_000_000]


def _flipped(data: bytes, rng: random.Random) -> bytes:
    copy = bytearray(data)
    for _ in range(min(len(copy), rng.randint(1, 8))):
        copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
    return bytes(copy)
