"""Names of functions and classes that are the same in every process.

A key must not change because a script was started from another folder, by another user or with
another ``PYTHONHASHSEED``. This file says what a function, class or module is called, to which
installed distribution it belongs, and what its source is.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import sys
import textwrap
import types
from pathlib import Path
from typing import Any, Final, NamedTuple

MAIN_MODULES: Final = frozenset({"__main__", "__mp_main__"})
"""Names of the started script's module, in the first process and in spawned ones."""


SOURCE_ID_BYTES: Final = 4


class Distribution(NamedTuple):
    """An installed distribution: what a package index knows it by.

    Attributes:
        name: Its name, in lower case.
        version: Its version.
    """

    name: str
    version: str


def module_name(module: str) -> str:
    """Return a module's name as it is put into keys.

    Args:
        module: ``__module__`` of a function or class.

    Returns:
        The name itself; for the started script the name it was found by (``python -m``), else its
        file's name without the folder. ``__main__`` if it has neither (a prompt, a notebook).
    """
    if module not in MAIN_MODULES:
        return module
    main = sys.modules.get(module) or sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name not in MAIN_MODULES:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    return Path(file).name if file else "__main__"


def qualified_name(obj: Any) -> str:
    """Return the dotted name of a function or class.

    Args:
        obj: A function, a class, or an instance (its class is named then).

    Returns:
        ``module.qualname``, with the started script named as `module_name` says.
    """
    name = getattr(obj, "__qualname__", None)
    if not isinstance(name, str):
        obj = type(obj)
        name = obj.__qualname__
    module = getattr(obj, "__module__", None)
    return f"{module_name(module)}.{name}" if isinstance(module, str) else name


def is_local(obj: Any) -> bool:
    """Tell whether a name is not enough: lambdas, and what is defined inside a function."""
    name = getattr(obj, "__qualname__", "")
    return "<locals>" in name or "<lambda>" in name


@functools.cache
def _distributions_by_package() -> dict[str, list[str]]:
    return {name: list(owners) for name, owners in _packages_distributions().items()}


def _packages_distributions() -> Any:
    return importlib.metadata.packages_distributions()


@functools.lru_cache(maxsize=4096)
def distribution_of(module: str) -> Distribution | None:
    """Return the installed distribution that a module came with.

    Args:
        module: Full name of the module.

    Returns:
        Its name and version; None for the standard library, the user's own files, and editable
        installs, whose code changes under one version.
    """
    package = module.partition(".")[0]
    if package in MAIN_MODULES or package in sys.stdlib_module_names:
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    for name in sorted(set(_distributions_by_package().get(package, ()))):
        found = importlib.metadata.distribution(name)
        if file is None or _is_shipped_by(found, Path(file)):
            return Distribution(name.lower(), found.version)
    return None


def is_users(module: str) -> bool:
    """Tell whether a module is the user's own: neither installed nor of the standard library."""
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names and package not in MAIN_MODULES:
        return False
    return distribution_of(module) is None


def _is_shipped_by(found: importlib.metadata.Distribution, file: Path) -> bool:
    """Tell a module of a distribution from a namesake of the user's, and share namespaces out."""
    root = Path(str(found.locate_file("")))
    try:
        relative = file.resolve().relative_to(root.resolve())
    except ValueError:
        return False
    return str(relative.as_posix()) in _shipped_files(found.metadata["Name"])


@functools.lru_cache(maxsize=64)
def _shipped_files(name: str) -> frozenset[str]:
    files = importlib.metadata.distribution(name).files or ()
    return frozenset(file.as_posix() for file in files)


def source_id(func: Any) -> bytes:
    """Return a fingerprint of the source of a user's function.

    Args:
        func: What is called.

    Returns:
        `SOURCE_ID_BYTES` bytes; none where there is no source, and for what is not the user's
        own: the version of what was installed tells more.
    """
    if not isinstance(func, types.FunctionType) or not is_users(func.__module__ or ""):
        return b""
    source = source_of(func)
    if source is None:
        return b""
    return hashlib.blake2b(source.encode(), digest_size=SOURCE_ID_BYTES).digest()


def source_of(func: types.FunctionType) -> str | None:
    """Return a function's source without comments and layout.

    Args:
        func: A Python function or lambda.

    Returns:
        Its source; None where there is none, or where it cannot be told which of several lambdas
        on the same lines this one is.
    """
    try:
        text = textwrap.dedent(inspect.getsource(func))
    except (OSError, TypeError, IndentationError):
        return None
    if func.__name__ == "<lambda>":
        return _lambda_source(text, func.__code__)
    try:
        return ast.unparse(ast.parse(text))
    except (SyntaxError, ValueError):
        return None


def _lambda_source(text: str, code: types.CodeType) -> str | None:
    """Find the one lambda in `text` that compiles to `code`."""
    tree = _parse_part(text)
    if tree is None:
        return None
    found = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Lambda) and _compiles_to(node, code)
    }
    return found.pop() if len(found) == 1 else None


def _parse_part(text: str) -> ast.AST | None:
    """Parse the lines a lambda stands on; they may be the first part of a statement."""
    stripped = text.strip()
    for candidate in (stripped, f"({stripped})", f"({stripped.rstrip(',')})", f"{stripped}\n    0"):
        try:
            return ast.parse(candidate)
        except (SyntaxError, ValueError):
            continue
    return None


def _compiles_to(node: ast.Lambda, code: types.CodeType) -> bool:
    # Free variables are compiled as such only inside a function that has them.
    names = code.co_freevars
    inner = ast.Expression(body=node)
    text = ast.unparse(inner)
    if names:
        header = ", ".join(names)
        compiled = compile(f"def _outer({header}):\n    return ({text})", "<key>", "exec")
    else:
        compiled = compile(f"({text})", "<key>", "exec")
    return any(_is_same_code(found, code) for found in _code_objects(compiled))


def _code_objects(code: types.CodeType) -> list[types.CodeType]:
    found = [code]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.extend(_code_objects(constant))
    return found


def _is_same_code(one: types.CodeType, other: types.CodeType) -> bool:
    return (
        one.co_name == other.co_name
        and one.co_code == other.co_code
        and one.co_names == other.co_names
        and one.co_varnames == other.co_varnames
        and one.co_freevars == other.co_freevars
        and _plain_constants(one) == _plain_constants(other)
    )


def _plain_constants(code: types.CodeType) -> list[Any]:
    # 1, 1.0 and True are equal to Python and different to a key.
    return [
        (type(constant).__name__, repr(constant))
        if not isinstance(constant, types.CodeType)
        else (constant.co_code, _plain_constants(constant))
        for constant in code.co_consts
        if not _is_qualname(constant)
    ]


def _is_qualname(constant: object) -> bool:
    # Up to Python 3.10 MAKE_FUNCTION takes the qualified name as a constant.
    return isinstance(constant, str) and "<locals>" in constant
