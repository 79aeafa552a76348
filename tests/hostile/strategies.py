"""Hypothesis strategies for the messages of any type, from its descriptor."""

from __future__ import annotations

from functools import partial
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from tests.hostile.values import BYTES, INTEGERS, INTEGERS_64, KEYS, PATTERNS, TEXTS, integer_range

_MAX_ITEMS = 5
_TEXTS = tuple(key.decode("utf-8", "replace") for key in KEYS)


def messages(kind: type[Message]) -> st.SearchStrategy[Any]:
    """Give messages of a type: any of its fields, unset or with any value."""
    fields = {field.name: _values(field) for field in kind.DESCRIPTOR.fields}
    return st.fixed_dictionaries({}, optional=fields).map(partial(_build, kind))


def _build(kind: type[Message], fields: dict[str, Any]) -> Message:
    return kind(**fields)


def _values(field: Any) -> st.SearchStrategy[Any]:
    one: st.SearchStrategy[Any]
    if field.message_type is not None:
        one = messages(message_factory.GetMessageClass(field.message_type))
    else:
        one = _scalars(field)
    is_repeated = isinstance(field.default_value, list)
    return st.lists(one, max_size=_MAX_ITEMS) if is_repeated else one


def _scalars(field: Any) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.sampled_from((*KEYS, *BYTES)) | st.binary(max_size=40)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        known = (*TEXTS, *_TEXTS, *(PATTERNS if "regex" in field.name else ()))
        return st.sampled_from(known) | st.text(st.characters(codec="utf-8"), max_size=40)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return st.integers(-(2**31), 2**31 - 1) | st.integers(0, 5)
    low, high = integer_range(field)
    known_numbers = [number for number in (*INTEGERS, *INTEGERS_64) if low <= number <= high]
    return st.sampled_from(known_numbers) | st.integers(low, high)
