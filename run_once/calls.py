"""What is called with which arguments: wrappers taken off, arguments given their names."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from run_once import identity
from run_once.encode_sklearn import VOLATILE_ARGUMENTS, is_sklearn, result_options

_MAX_NAME_BYTES: Final = 200
_NOTHING_MORE: Final[tuple[tuple[Any, ...], Mapping[str, Any]]] = ((), types.MappingProxyType({}))


class Callee(NamedTuple):
    """A call with its wrappers taken off.

    Attributes:
        func: What is called in the end.
        args: Positional arguments, those of partials and the bound ``self`` included.
        kwargs: Keyword arguments, those of partials included.
        options: scikit-learn's options for the call that may change its result; None: not said.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any] | None


class Function(NamedTuple):
    """What is known of a function that is called.

    Attributes:
        func: The function itself.
        name: Its name as keys show it.
        signature: Its signature; None: Python knows none.
        simple: Names of its parameters if none is positional-only or variadic; else None.
        positional: Names of those that may be given by position.
        defaults: Default values by name.
        ignored: Names that are left out of keys.
        is_named: Its name says all of it: a Python function that is neither a lambda nor local.
        source_id: Fingerprint of its source, `identity.SOURCE_ID_BYTES` long; empty: there is none,
            or it was installed.
    """

    func: Any
    name: str
    signature: inspect.Signature | None
    simple: frozenset[str] | None
    positional: tuple[str, ...]
    defaults: Mapping[str, Any]
    ignored: frozenset[str]
    is_named: bool
    source_id: bytes


def unwrap(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callee:
    """Take wrappers off a call until the function itself is left.

    Args:
        func: A function in any number of partials, bound methods, scikit-learn's wrappers and
            joblib.Memory's.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The function with all its arguments.
    """
    options: Mapping[str, Any] | None = None
    while True:
        kind = type(func)
        if kind is types.FunctionType:
            return Callee(func, args, kwargs, options)
        if isinstance(func, functools.partial):
            args, kwargs = (*func.args, *args), {**func.keywords, **kwargs}
            func = func.func
        elif kind is types.MethodType:
            args, func = (func.__self__, *args), func.__func__
        elif kind.__name__ == "_FuncWrapper" and is_sklearn(kind.__module__):
            # The warning filters beside them do not change results.
            options = result_options(getattr(func, "config", None))
            func = func.function
        elif kind.__module__ == "joblib.memory" and hasattr(func, "func"):
            func = func.func
        else:
            return Callee(func, args, kwargs, options)


def inspect_function(func: Any, ignore: frozenset[str]) -> Function:
    """Find out what is needed to give a function's arguments their names.

    Args:
        func: A callable without wrappers.
        ignore: Names the user leaves out of keys.

    Returns:
        What is known of it.
    """
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):
        signature = None
    parameters = list(signature.parameters.values()) if signature is not None else []
    kinds = {parameter.kind for parameter in parameters}
    plain = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    is_simple = signature is not None and kinds <= plain
    volatile = VOLATILE_ARGUMENTS if is_sklearn(getattr(func, "__module__", None)) else frozenset()
    return Function(
        func=func,
        name=_readable(identity.qualified_name(func)),
        signature=signature,
        simple=frozenset(p.name for p in parameters) if is_simple else None,
        positional=tuple(
            p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ),
        defaults={p.name: p.default for p in parameters if p.default is not p.empty},
        ignored=ignore | volatile,
        is_named=isinstance(func, types.FunctionType) and not identity.is_local(func),
        source_id=identity.source_id(func),
    )


def _readable(name: str) -> str:
    text = name.encode("ascii", "backslashreplace").decode()
    text = "".join(char if char.isprintable() and char != " " else "_" for char in text)
    # The end tells more than the beginning.
    return text[-_MAX_NAME_BYTES:].lstrip(".")


def bind(
    callee: Callee, known: Function
) -> tuple[Mapping[str, Any], tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Give each argument its parameter's name.

    Args:
        callee: The call.
        known: What is known of its function.

    Returns:
        Arguments by name, and those that have none: the rest of ``*args`` and ``**kwargs``; all of
        them, where there is no signature or the call does not fit it.
    """
    args, kwargs = callee.args, callee.kwargs
    n_args = len(args)
    if (
        not kwargs
        and known.simple is not None
        and n_args == len(known.simple) == len(known.positional)
    ):
        return dict(zip(known.positional, args, strict=True)), _NOTHING_MORE
    if known.simple is not None and len(args) <= len(known.positional):
        given = dict(zip(known.positional, args, strict=False))
        bound = {**known.defaults, **given, **kwargs}
        is_fitting = known.simple.issuperset(kwargs) and given.keys().isdisjoint(kwargs)
        if is_fitting and len(bound) == len(known.simple):
            return bound, _NOTHING_MORE
    if known.signature is None:
        return {}, (args, kwargs)
    try:
        binding = known.signature.bind(*args, **kwargs)
    except TypeError:
        return {}, (args, kwargs)  # the call will fail by itself, and say why
    binding.apply_defaults()
    return _split_variadic(known.signature, binding.arguments)


def _split_variadic(
    signature: inspect.Signature, arguments: Mapping[str, Any]
) -> tuple[Mapping[str, Any], tuple[tuple[Any, ...], Mapping[str, Any]]]:
    bound, rest, more = dict(arguments), (), {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            rest = bound.pop(name, ())
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            more = bound.pop(name, {})
    return bound, (rest, more)
