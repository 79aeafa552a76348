"""Values <-> pickles: large arrays beside the pickle, classes of the user's script as they are.

Large buffers (numpy's arrays, and what is made of them) stay out of the pickle (protocol 5), so
that they are not copied into it.

cloudpickle pickles a class of `__main__` whole, and whoever loads it gets a class of his own: in a
rerun `isinstance(value, Result)` would be False. So the pickle says what the class is called, and
loading takes the class of that name if the module has one. The pickles remain cloudpickle's: it
ignores what is added, and a version of it whose helpers look otherwise loads them in its own way.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any, Final

import cloudpickle

PICKLE_PROTOCOL: Final = 5

MIN_BUFFER_BYTES: Final = 64 << 10
"""Smaller buffers are copied into the pickle."""

MAX_BUFFERS: Final = 60_000
"""More of them go into the pickle, too."""

_PLAIN: Final = frozenset({bool, bytes, complex, float, int, str, type(None)})
"""Their instances hold nothing that cloudpickle is needed for."""

_find_cloudpickle = re.compile(rb"cloudpickle").search

_CLASS_MAKERS: Final = {"_make_skeleton_class": 6, "_make_skeleton_enum": 7}
"""cloudpickle's makers of classes, and how many arguments they take; the last is for extras."""

_SET_STATE: Final = "_class_setstate"
_EXTRA: Final = "run_once_class"
_MAX_NESTING: Final = 8


def to_pickle(value: Any) -> tuple[bytes, list[memoryview]]:
    """Pickle a value.

    Args:
        value: Anything that cloudpickle takes.

    Returns:
        The pickle, and its large buffers: the memory of the value itself, not copies.
    """
    if type(value) in _PLAIN:
        return pickle.dumps(value, PICKLE_PROTOCOL), []
    buffers: list[memoryview] = []

    def keep_out(buffer: pickle.PickleBuffer) -> bool:
        """Take a buffer; tell whether it is to go into the pickle."""
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous; the pickler says so
            return True
        if len(view) < MIN_BUFFER_BYTES or len(buffers) >= MAX_BUFFERS:
            return True
        buffers.append(view)
        return False

    file = io.BytesIO()
    _Pickler(file, protocol=PICKLE_PROTOCOL, buffer_callback=keep_out).dump(value)
    return file.getvalue(), buffers


def from_pickle(pickled: bytes | memoryview, buffers: Iterable[memoryview] = ()) -> Any:
    """Load a value that was checked before.

    Args:
        pickled: What `to_pickle` gave.
        buffers: Its buffers; the value lives in them.

    Returns:
        The value.
    """
    if _find_cloudpickle(pickled) is None:
        return pickle.loads(pickled, buffers=buffers)  # noqa: S301 - the caller checked the signature
    return _Unpickler(io.BytesIO(pickled), buffers=buffers).load()


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # cloudpickle is untyped
    """cloudpickle's, which also notes what classes are called where they were made."""

    def reducer_override(self, obj: Any) -> Any:
        """Add module and qualified name to a class that is pickled whole."""
        reduced = super().reducer_override(obj)
        if not (type(reduced) is tuple and isinstance(obj, type)):
            return reduced
        maker, args, *rest = reduced
        if len(args) != _CLASS_MAKERS.get(getattr(maker, "__name__", "")) or args[-1] is not None:
            return reduced
        return (maker, (*args[:-1], {_EXTRA: _identity(obj)}), *rest)


class _Unpickler(pickle.Unpickler):
    """Takes classes that exist here in the place of those that cloudpickle would make."""

    def __init__(self, file: io.BytesIO, *, buffers: Iterable[memoryview]) -> None:
        super().__init__(file, buffers=buffers)
        self._kept: list[type] = []

    def find_class(self, module: str, name: str) -> Any:
        """Put ourselves between the pickle and cloudpickle's helpers."""
        found = super().find_class(module, name)
        if module.partition(".")[0] != "cloudpickle":
            return found
        if name in _CLASS_MAKERS:
            return self._maker(found, _CLASS_MAKERS[name])
        return self._state_setter(found) if name == _SET_STATE else found

    def _maker(self, make: Callable[..., Any], n_args: int) -> Callable[..., Any]:
        def find_or_make(*args: Any) -> Any:
            existing = _existing_class(args) if len(args) == n_args else None
            if existing is None:
                return make(*args)
            self._kept.append(existing)
            return existing

        return find_or_make

    def _state_setter(self, set_state: Callable[..., Any]) -> Callable[..., Any]:
        def set_unless_kept(*args: Any) -> Any:
            # What the class has here and now counts, not what it had when it was stored.
            if args and any(args[0] is each for each in self._kept):
                return args[0]
            return set_state(*args)

        return set_unless_kept


def _identity(cls: type) -> tuple[str, str, bool]:
    """Give a class's module, its qualified name, and whether that is sure.

    On its way to a worker a class loses its qualified name, which only its functions keep.
    """
    qualified_name = cls.__qualname__
    if "." in qualified_name or vars(sys.modules.get(cls.__module__, sys)).get(cls.__name__) is cls:
        return cls.__module__, qualified_name, True
    for name, each in vars(cls).items():
        suffix = f".{cls.__name__}.{name}"
        if isinstance(each, FunctionType) and each.__qualname__.endswith(suffix):
            return cls.__module__, each.__qualname__.removesuffix(f".{name}"), True
    return cls.__module__, qualified_name, False


def _existing_class(args: Sequence[Any]) -> type | None:
    """Find the class that a maker's arguments are about; None: there is none here."""
    extra = args[-1]
    if not isinstance(extra, dict) or _EXTRA not in extra:
        return None
    module_name, qualified_name, is_sure = extra[_EXTRA]
    module = _module(module_name)
    if module is None:
        return None
    found: Any = module
    for part in qualified_name.split("."):
        found = vars(found).get(part) if isinstance(found, (ModuleType, type)) else None
    if isinstance(found, type) and found.__module__ == module_name:
        return found
    if is_sure:
        return None
    # The worker that stored it may not have known that the class is nested in another.
    nested = _classes_called(qualified_name, module, module_name, _MAX_NESTING)
    return nested[0] if len(nested) == 1 else None


def _module(name: Any) -> ModuleType | None:
    if not isinstance(name, str):
        return None
    if name not in sys.modules:
        try:
            import_module(name)
        except Exception:  # noqa: BLE001 (a module may raise anything; the class is then made anew)
            return None
    return sys.modules.get(name)


def _classes_called(
    name: str, parent: ModuleType | type, module_name: str, depth: int
) -> list[type]:
    """Find the classes of a module, nested ones too, that have this name."""
    found: dict[int, type] = {}
    for label, each in list(vars(parent).items()):
        is_of_module = isinstance(each, type) and each.__module__ == module_name
        if each is parent or not is_of_module:
            continue
        if label == name == each.__name__:
            found[id(each)] = each
        if depth:
            found |= {id(c): c for c in _classes_called(name, each, module_name, depth - 1)}
    return list(found.values())
