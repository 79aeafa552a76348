"""Keys of calls: function + arguments + version -> key.

    keyer = CallKeyer(version=1, ignore={"verbose"})
    keyer.key(fit, (X, y), {"C": 1.0})      # "train.py.fit/3f9c…_v001"

The same call gives the same key in every process and on every machine, however it is spelled. What
goes in is told by `explain_key` and in ``docs/keys.md``. This file puts the parts together; the
bytes of values are made by `encode.py`, names of functions by `identity.py`.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

from run_once import identity
from run_once.calls import Callee, Function, bind, inspect_function, unwrap
from run_once.encode import CodeMode, Encoder, record
from run_once.errors import UnkeyableError
from run_once.key_context import KeyContext
from run_once.warn import warn_user

FORMAT: Final = 1
"""Version of the encoding; part of each key."""

MAX_KEY_BYTES: Final = 300
"""Keys are never longer than this, number and version included."""

_DIGEST_BYTES: Final = 20
_MAX_TEXT_BYTES: Final = 60
_MAX_VERSION: Final = 10**9
_MAX_KNOWN: Final = 1024
_LOOKS_NUMBERED: Final = re.compile(r"#|_v\d+$")
_PERSON: Final = b"run_once.call.%d" % FORMAT


class Keyed(NamedTuple):
    """A call's key.

    Attributes:
        key: The key.
        source_id: Fingerprint of the function's source where that is no part of the key; empty:
            there is none to tell.
    """

    key: str
    source_id: bytes


class CallKeyer:
    """Makes the keys of one ``Parallel`` call, or of single calls. Safe to use from threads.

    Big arguments are hashed once and then known by identity for as long as the keyer lives, so
    make a new one for each ``Parallel`` call, or `clear` it.

    Args:
        version: Number of the user's choice; another version is another key.
        ignore: Names of parameters that do not belong to the key.
        key: Makes the text that stands for the arguments, from the arguments; None encodes them.
        code: "source" makes the source, closure and defaults of the user's functions part of the
            key; with "none" their names are enough, and a mended function resumes.
        warn: Told what the user should know of a key, once for each matter.

    Raises:
        ValueError: `version` or `code` is none of what is allowed.
    """

    def __init__(
        self,
        *,
        version: int = 0,
        ignore: Collection[str] = (),
        key: Callable[..., str] | None = None,
        code: CodeMode = "none",
        warn: Callable[[str], object] = warn_user,
    ) -> None:
        if type(version) is not int or not 0 <= version < _MAX_VERSION:
            raise ValueError(f"version={version!r} must be an integer from 0 to {_MAX_VERSION - 1}")
        if code not in ("none", "source"):
            raise ValueError(f'code={code!r} must be "none" or "source"')
        self._ignore = frozenset((ignore,) if isinstance(ignore, str) else ignore)
        self._key = key
        self._code: CodeMode = code
        self._suffix = f"_v{version:03d}" if version else ""
        self._context = KeyContext()
        self._known: dict[int, Function] = {}
        self._heads: dict[int, bytes] = {}
        self._warn = warn
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def key(
        self,
        func: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the key of one call.

        Args:
            func: What is called: a function, a partial, a bound method, scikit-learn's wrapper.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            ``<module>.<function>/<digest>``, with ``_v<version>`` behind it if there is one. ASCII,
            at most `MAX_KEY_BYTES` long with room for the number of a duplicate.

        Raises:
            UnkeyableError: An argument has no lasting value; the message names it.
        """
        return self.keyed(func, args, kwargs or {}).key

    def keyed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Keyed:
        """Return the key of one call, and what it says nothing of; see `key`."""
        callee = unwrap(func, args, kwargs)
        known = self._know(callee.func)
        source_id = known.source_id if self._code == "none" else b""
        if self._key is not None:
            text = _own_text(self._key(*args, **kwargs), known.name)
            return Keyed(f"{known.name}/{text}{self._suffix}", source_id)
        encoder = Encoder(self._context, code=self._code, subject=f" of {known.name}()")
        data = _encode_call(encoder, callee, known, self._head(encoder, known))
        if encoder.unseeded:
            self._warn_unseeded(known.name, encoder.unseeded)
        return Keyed(f"{known.name}/{_digest(data)}{self._suffix}", source_id)

    def clear(self) -> None:
        """Forget the big arguments seen so far."""
        self._context.clear()

    def explain(
        self, func: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """Return as text what goes into a call's key, and what does not.

        Args:
            func: What is called.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            Lines: the key, the function, then the arguments as a tree.

        Raises:
            UnkeyableError: As `key` does.
        """
        # Here, since few programs explain a key.
        from run_once.explain import ExplainingEncoder  # noqa: PLC0415

        key = self.key(func, args, kwargs)
        callee = unwrap(func, args, kwargs or {})
        known = self._know(callee.func)
        lines = [f"key: {key}"]
        if self._key is not None:
            return "\n".join([*lines, "arguments: the text that key=... returned"])
        encoder = ExplainingEncoder(KeyContext(), code=self._code)
        _encode_call(encoder, callee, known, _encode_function(encoder, known))
        bound, (_, more) = bind(callee, known)
        left_out = sorted(known.ignored & {*bound, *more})
        lines += encoder.lines()
        return "\n".join([*lines, f"left out: {', '.join(left_out) or 'nothing'}"])

    def _head(self, encoder: Encoder, known: Function) -> bytes:
        """Encode the function; one that its name says all of only once."""
        ident = id(known.func)
        head = self._heads.get(ident)
        if head is None:
            head = _encode_function(encoder, known)
            if known.is_named and self._code == "none" and ident in self._known:
                self._heads[ident] = head
        return head

    def _know(self, func: Any) -> Function:
        known = self._known.get(id(func))
        if known is None or known.func is not func:
            known = inspect_function(func, self._ignore)
            if isinstance(func, (types.FunctionType, types.BuiltinFunctionType, type)):
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                    self._heads.clear()
                self._known[id(func)] = known  # holds the function, so that its id stays its own
        return known

    def _warn_unseeded(self, name: str, kinds: set[str]) -> None:
        with self._lock:
            new = sorted(kinds - self._warned) if not self._warned else []
            self._warned |= kinds
        if new:
            self._warn(
                f"{name}: {', '.join(new)} has random_state=None, so that its key stands for "
                "whichever random draw is computed first, here or on another machine. Give it a "
                "random_state to make the result reproducible"
            )


class Numberer:
    """Numbers equal keys within one ``Parallel`` call, in the order of the calls.

    The n-th equal key gets ``#n`` from the second on, so that a thousand equal calls are a
    thousand draws, and the same ones on every run.

    Attributes:
        duplicates: How many keys got a number so far.
    """

    def __init__(self) -> None:
        self.duplicates = 0
        self._seen: dict[str, int] = {}

    def number(self, key: str) -> str:
        """Return `key` itself the first time, ``key#2`` the second, and so on."""
        count = self._seen.get(key, 0) + 1
        self._seen[key] = count
        if count == 1:
            return key
        self.duplicates += 1
        return f"{key}#{count}"


def _own_text(text: object, name: str) -> str:
    """Check what the user's key function returned; make it fit to stand in a key."""
    if not isinstance(text, str) or not text:
        raise UnkeyableError(
            f"key=... returned {text!r} for a call of {name}(): it must return a string that is "
            "not empty"
        )
    is_short = text.isascii() and text.isprintable() and len(text) <= _MAX_TEXT_BYTES
    if is_short and not _LOOKS_NUMBERED.search(text):
        return text
    return _digest(record("text", text.encode("utf-8", "surrogatepass")))


def _encode_function(encoder: Encoder, known: Function) -> bytes:
    owner = identity.distribution_of(getattr(known.func, "__module__", None) or "")
    function = encoder.encode(known.func, "<function>")
    return function + encoder.encode(tuple(owner) if owner else None, "<distribution>")


def _encode_call(encoder: Encoder, callee: Callee, known: Function, head: bytes) -> bytes:
    bound, (args, kwargs) = bind(callee, known)
    return record(
        "call",
        head,
        encoder.encode(callee.options, "<sklearn options>"),
        _named(encoder, bound, known.ignored),
        _rest(encoder, args) if args else _NO_REST,
        _named(encoder, kwargs, known.ignored) if kwargs else _NO_NAMED,
    )


def _rest(encoder: Encoder, args: tuple[Any, ...]) -> bytes:
    return record(
        "rest", *(encoder.encode(value, f"args[{index}]") for index, value in enumerate(args))
    )


def _named(encoder: Encoder, values: Mapping[str, Any], ignored: frozenset[str]) -> bytes:
    encode = encoder.encode
    kept = _kept_names(tuple(values), ignored)
    return record("named", *[name_data + encode(values[name], name) for name, name_data in kept])


@functools.lru_cache(maxsize=1024)
def _kept_names(names: tuple[str, ...], ignored: frozenset[str]) -> tuple[tuple[str, bytes], ...]:
    """Give the names that belong to keys, in the keys' order, each with its encoding."""
    encoder = Encoder(KeyContext())
    return tuple((name, encoder.encode(name, "<name>")) for name in sorted({*names} - ignored))


_NO_REST: Final = record("rest")
_NO_NAMED: Final = record("named")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, person=_PERSON).hexdigest()
