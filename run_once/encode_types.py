"""How Python's own types are encoded, and which handler a type gets.

A handler takes the encoder and the value and returns self-delimiting bytes. Types that need
their class told apart (subclasses of these, and all others) go through `encode.encode_reduced`.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import pathlib
import re
import sys
import types
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from run_once import identity
from run_once.encode import (
    Encoder,
    Handler,
    encode_buffer,
    encode_reduced,
    encode_sequence,
    record,
)
from run_once.encode_foreign import find_foreign

_CLASS_NOISE: Final = frozenset(
    {
        "__dict__",
        "__weakref__",
        "__doc__",
        "__module__",
        "__qualname__",
        "__firstlineno__",
        "__static_attributes__",
        "__annotate_func__",
        "__annotations_cache__",
        "__classdictcell__",
    }
)
"""Attributes of classes that say nothing of what they do, or differ between Python versions."""


_PICKLING: Final = ("__reduce_ex__", "__reduce__")


def find_handler(kind: type) -> Handler:
    """Return how instances of a type are encoded.

    Args:
        kind: The type.

    Returns:
        Its handler; `encode_reduced` for types nobody knows.
    """
    handler = _HANDLERS.get(kind) or find_foreign(kind)
    if handler is not None:
        return handler
    for base, known in _SUBCLASS_HANDLERS:
        if issubclass(kind, base):
            return known
    if dataclasses.is_dataclass(kind) and _is_plainly_pickled(kind):
        return encode_dataclass
    return encode_reduced


def _is_plainly_pickled(kind: type) -> bool:
    """Tell whether a class leaves it to Python what of it is kept."""
    if any(name in vars(base) for base in kind.__mro__[:-1] for name in _PICKLING):
        return False
    state = getattr(kind, "__getstate__", None)
    # Frozen dataclasses with slots get one of the same content from the decorator.
    is_default = state is getattr(object, "__getstate__", None)
    return is_default or getattr(state, "__module__", None) == "dataclasses"


def encode_dict(encoder: Encoder, value: Mapping[Any, Any]) -> bytes:
    """Encode a mapping, ordered by its encoded keys."""
    pairs = [
        encoder.encode(key, ".<key>") + encoder.encode(item, f"[{_short(key)}]")
        for key, item in value.items()
    ]
    return b"d%d:%b" % (len(pairs), b"".join(sorted(pairs)))


def _short(key: Any) -> str:
    return repr(key)[:60] if isinstance(key, (str, int, float, tuple)) else type(key).__name__


def _ordered_dict(encoder: Encoder, value: OrderedDict[Any, Any]) -> bytes:
    items = [encoder.encode(list(value.items()), ".<items>")]
    if type(value) is not OrderedDict:
        items += [encoder.encode(type(value), ".__class__"), encoder.named(vars(value))]
    return record("ordered", *items)


def _set(encoder: Encoder, value: set[Any] | frozenset[Any]) -> bytes:
    items = sorted(encoder.encode(item, ".<item>") for item in value)
    tag = b"z" if isinstance(value, frozenset) else b"e"
    data = b"%b%d:%b" % (tag, len(items), b"".join(items))
    if type(value) in (set, frozenset):
        return data
    state = getattr(value, "__dict__", {})
    return record("set", encoder.encode(type(value), ".__class__"), data, encoder.named(state))


def encode_dataclass(encoder: Encoder, value: Any) -> bytes:
    """Encode a dataclass by its class and its fields."""
    fields = {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if hasattr(value, field.name)
    }
    fields.update(getattr(value, "__dict__", {}))
    return record("data", encoder.encode(type(value), ".__class__"), encoder.named(fields))


def _enum(encoder: Encoder, value: enum.Enum) -> bytes:
    kind = encoder.encode(type(value), ".__class__")
    if isinstance(value, enum.Flag):
        return record("enum", kind, encoder.encode(value.value, ".value"))
    return record("enum", kind, encoder.encode(value.name, ".name"))


def _complex(encoder: Encoder, value: complex) -> bytes:
    return record("complex", encoder.encode(value.real, ".real"), encoder.encode(value.imag, "."))


def _buffer(_: Encoder, value: bytearray) -> bytes:
    return encode_buffer(b"a", bytes(value))


def _memoryview(encoder: Encoder, value: memoryview) -> bytes:
    shape = encoder.encode((value.format, value.shape), ".shape")
    return record("view", shape, encode_buffer(b"a", value.tobytes()))


def _text(tag: str, *attributes: str) -> Handler:
    """Make a handler for a value that is told by the text of it or of some attributes."""

    def handle(encoder: Encoder, value: Any) -> bytes:
        if not attributes:
            return record(tag, encoder.encode(str(value), ""))
        return record(tag, *(encoder.encode(getattr(value, name), "") for name in attributes))

    return handle


def _time(tag: str) -> Handler:
    def handle(encoder: Encoder, value: Any) -> bytes:
        text = value.replace(tzinfo=None).isoformat()
        parts = [encoder.encode(text, ""), encoder.encode(value.fold, "")]
        if value.tzinfo is not None:
            parts.append(encoder.encode(value.utcoffset(), ".tzinfo"))
            parts.append(encoder.encode(value.tzinfo, ".tzinfo"))
        return record(tag, *parts)

    return handle


def _path(encoder: Encoder, value: pathlib.PurePath) -> bytes:
    flavour = "windows" if isinstance(value, pathlib.PureWindowsPath) else "posix"
    return record("path", encoder.encode(flavour, ""), encoder.encode(str(value), ""))


def encode_class(encoder: Encoder, value: type) -> bytes:
    """Encode a class by its name; one made inside a function by its content too."""
    parts = [encoder.encode(identity.qualified_name(value), ".__qualname__")]
    if identity.is_local(value):
        content = {
            name: item
            for name, item in vars(value).items()
            if name not in _CLASS_NOISE and not name.startswith("_abc_")
        }
        parts += [encoder.encode(value.__bases__, ".__bases__"), encoder.named(content)]
    return record("class", *parts)


def encode_function(encoder: Encoder, value: Any) -> bytes:
    """Encode a function by its name, and the version of what it was installed with.

    Lambdas and functions made inside others have their source, defaults and closure added;
    ``code="source"`` does so for all functions that were not installed.
    """
    module = getattr(value, "__module__", None) or ""
    owner = identity.distribution_of(module)
    name = encoder.encode(identity.qualified_name(value), ".__qualname__")
    parts = [name, encoder.encode(tuple(owner) if owner else None, ".<distribution>")]
    is_asked = encoder.code == "source" and identity.is_users(module)
    if isinstance(value, types.FunctionType) and (is_asked or identity.is_local(value)):
        parts += _function_content(encoder, value)
    return record("function", *parts)


def _function_content(encoder: Encoder, value: types.FunctionType) -> list[bytes]:
    source = identity.source_of(value)
    content = encoder.encode(value.__code__ if source is None else source, ".__code__")
    cells = tuple(value.__closure__ or ())
    names = value.__code__.co_freevars
    # By name: the order of the names is the compiler's.
    closure = encoder.named(dict(zip(names, cells, strict=True)))
    defaults = encoder.encode((value.__defaults__, value.__kwdefaults__), ".__defaults__")
    return [content, closure, defaults]


def _cell(encoder: Encoder, value: types.CellType) -> bytes:
    try:
        content = value.cell_contents
    except ValueError:
        return record("cell")
    return record("cell", encoder.encode(content, ""))


def _code(encoder: Encoder, value: types.CodeType) -> bytes:
    constants = [item for item in value.co_consts if item is not None]
    return record(
        "code",
        encoder.encode(f"{sys.version_info[0]}.{sys.version_info[1]}", ""),
        encoder.encode(value.co_code, ".co_code"),
        encoder.encode(constants, ".co_consts"),
        encoder.encode(value.co_names, ".co_names"),
        encoder.encode((value.co_argcount, value.co_kwonlyargcount, value.co_flags), ""),
        encoder.encode((value.co_varnames, value.co_freevars), ".co_varnames"),
    )


def _method(encoder: Encoder, value: types.MethodType) -> bytes:
    owner = encoder.encode(value.__self__, ".__self__")
    return record("method", owner, encoder.encode(value.__func__, ".__func__"))


def _builtin(encoder: Encoder, value: types.BuiltinFunctionType) -> bytes:
    owner = value.__self__
    if owner is None or isinstance(owner, types.ModuleType):
        return encode_function(encoder, value)
    name = encoder.encode(value.__name__, ".__name__")
    return record("method", encoder.encode(owner, ".__self__"), name)


def _partial(encoder: Encoder, value: functools.partial[Any]) -> bytes:
    return record(
        "partial",
        encoder.encode(type(value), ".__class__"),
        encoder.encode(value.func, ".func"),
        encoder.encode(value.args, ".args"),
        encoder.encode(value.keywords, ".keywords"),
    )


def _wrapped(tag: str, *attributes: str) -> Handler:
    def handle(encoder: Encoder, value: Any) -> bytes:
        parts = [encoder.encode(getattr(value, name), f".{name}") for name in attributes]
        return record(tag, *parts)

    return handle


def _module(encoder: Encoder, value: types.ModuleType) -> bytes:
    return record("module", encoder.encode(identity.module_name(value.__name__), ".__name__"))


_HANDLERS: Final[dict[type, Handler]] = {
    list: encode_sequence,
    tuple: encode_sequence,
    dict: encode_dict,
    types.MappingProxyType: encode_dict,
    bytearray: _buffer,
    memoryview: _memoryview,
    complex: _complex,
    range: _text("range", "start", "stop", "step"),
    slice: _text("slice", "start", "stop", "step"),
    types.EllipsisType: _text("ellipsis"),
    types.NotImplementedType: _text("notimplemented"),
    dt.datetime: _time("datetime"),
    dt.time: _time("time"),
    dt.date: _text("date"),
    dt.timedelta: _text("timedelta", "days", "seconds", "microseconds"),
    decimal.Decimal: _text("decimal"),
    fractions.Fraction: _text("fraction", "numerator", "denominator"),
    uuid.UUID: _text("uuid"),
    re.Pattern: _text("pattern", "pattern", "flags"),
    types.FunctionType: encode_function,
    types.BuiltinFunctionType: _builtin,
    types.MethodType: _method,
    types.CodeType: _code,
    types.CellType: _cell,
    property: _wrapped("property", "fget", "fset", "fdel"),
    staticmethod: _wrapped("staticmethod", "__func__"),
    classmethod: _wrapped("classmethod", "__func__"),
    types.MemberDescriptorType: _text("slot", "__name__"),
    types.GetSetDescriptorType: _text("slot", "__name__"),
}

_SUBCLASS_HANDLERS: Final[tuple[tuple[type, Handler], ...]] = (
    (type, encode_class),
    (enum.Enum, _enum),
    (OrderedDict, _ordered_dict),
    (set, _set),
    (frozenset, _set),
    (pathlib.PurePath, _path),
    (functools.partial, _partial),
    (types.ModuleType, _module),
)
