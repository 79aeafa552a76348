"""Canonical bytes of Python values: equal values give equal bytes in every process.

Each value becomes a tag, a length and its content, so that no two different values share their
bytes. Sets and dicts are ordered by their encoded bytes, never by hash or insertion. Numbers keep
their type: 1, 1.0 and True are three values. What is longer than `COLLAPSE_BYTES` is replaced by
its hash, so that nesting costs nothing.

What has no lasting value (locks, sockets, open files, generators) is refused by `UnkeyableError`,
which names the place. Nothing is ever keyed by its id or its default ``repr``.

Other libraries' types are in `encode_foreign.py`. The format has a version,
`call_keys.FORMAT`: a change of a byte here makes every key of every user a new one.
"""

from __future__ import annotations

import copyreg
import hashlib
import math
import os
import struct
import types
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal, TypeAlias

from run_once.errors import UnkeyableError
from run_once.key_context import KeyContext

CodeMode: TypeAlias = Literal["none", "source"]
"""Does the source of functions belong to the key?"""

COLLAPSE_BYTES: Final = 1024
"""Encodings longer than this are replaced by their hash."""

DIGEST_BYTES: Final = 32
"""Length of the hash that stands for a long encoding."""

LEAF_BYTES: Final = 8 << 20
"""Buffers are hashed in leaves of this size, several at a time. Part of the format."""

BIG_BYTES: Final = 64 << 10
"""Buffers and strings from this size on are hashed once and then known by identity."""

BIG_ITEMS: Final = 10_000
"""Lists and tuples from this length on are encoded once and then known by identity."""

MAX_REWALKS: Final = 100_000
"""Bound on walking objects with reference cycles again (each walk of one may double)."""

_PERSON: Final = b"run_once.leaf.1"
_MEMO_BYTES: Final = 64
_STATE_PARTS: Final = 2  # of __dict__ and of __slots__
_MIN_REDUCED: Final = 2  # the callable and its arguments
_SAMPLES: Final = 64

Handler: TypeAlias = "Callable[[Encoder, Any], bytes]"


class Encoder:
    """Encodes the values of one key; made anew for each.

    Attributes:
        context: What is known about big arguments.
        code: Whether the source of functions is encoded.
        unseeded: Names of estimators that were met with ``random_state=None`` and use it.
        subject: What the key is for, as errors name it.
        is_cyclic: Whether a reference to a parent was met in the value that is being encoded.
    """

    def __init__(self, context: KeyContext, *, code: CodeMode = "none", subject: str = "") -> None:
        self.context = context
        self.code = code
        self.subject = subject
        self.unseeded: set[str] = set()
        self._path: list[str | int] = []
        self._open: dict[int, int] = {}
        self._memo: dict[int, tuple[Any, bytes]] = {}
        self.is_cyclic = False
        self._walked_cyclic: set[int] = set()
        self._rewalks = 0

    def encode(self, value: Any, step: str | int) -> bytes:
        """Return the canonical bytes of a value.

        Args:
            value: Anything.
            step: Where it stands in its parent: ``.name``, ``[…]`` or an index.

        Returns:
            Self-delimiting bytes.

        Raises:
            UnkeyableError: It, or something in it, has no lasting value.
        """
        atom = _ATOMS.get(type(value))
        return atom(self, value) if atom is not None else self._walk(value, step)

    def each(self, values: Iterable[Any]) -> list[bytes]:
        """Encode the items of a sequence."""
        encode = self.encode
        return [encode(value, index) for index, value in enumerate(values)]

    def named(self, values: Mapping[Any, Any]) -> bytes:
        """Encode attributes: a dict whose places are written ``.name``."""
        pairs = [
            self.encode(name, ".<name>") + self.encode(value, f".{name}")
            for name, value in values.items()
        ]
        return b"d%d:" % len(pairs) + b"".join(sorted(pairs))

    def remembered(self, value: Any, guard: object, compute: Callable[[], bytes]) -> bytes:
        """Encode a big leaf once for the context.

        Args:
            value: The object it is known by.
            guard: Compared at each recall; differs after (most) changes in place.
            compute: Makes the encoding.

        Returns:
            The encoding.
        """
        known = self.context.recall(value, guard)
        if known is None:
            known = collapse(compute())
            self.context.remember(value, guard, known)
        return known

    def refusal(self, value: Any, reason: str) -> UnkeyableError:
        """Return the error to raise for a value that cannot be keyed.

        Args:
            value: What cannot be keyed.
            reason: Why, as a clause.

        Returns:
            An error that names the place and says what to do.
        """
        kind = type(value)
        return UnkeyableError(
            f"cannot make a key from {self.where()}{self.subject}: {kind.__module__}."
            f"{kind.__qualname__} {reason}. Leave the argument out with ignore=[...], give the "
            f"key yourself with key=..., or pass a plain value instead"
        )

    def where(self) -> str:
        """Return the place that is being encoded, as Python would write it."""
        path = "".join(f"[{step}]" if isinstance(step, int) else step for step in self._path)
        return f"`{path.lstrip('.')}`" if path else "the value"

    def _walk(self, value: Any, step: str | int) -> bytes:
        ident = id(value)
        known = self._memo.get(ident)
        if known is not None:
            return known[1]
        opened = self._open.get(ident)
        if opened is not None:
            self.is_cyclic = True
            return b"^%d:" % (len(self._open) - opened)
        outer_is_cyclic, self.is_cyclic = self.is_cyclic, False
        self._open[ident] = len(self._open)
        self._path.append(step)
        try:
            self._count_rewalk(value)
            data = collapse(self._handler(value)(self, value))
        except RecursionError:
            raise self.refusal(value, "is nested too deeply") from None
        finally:
            self._path.pop()
            del self._open[ident]
        if self.is_cyclic:
            self._walked_cyclic.add(ident)
        else:
            # Only what has no cycle below it is encoded the same wherever it stands.
            if len(data) >= _MEMO_BYTES:
                self._memo[ident] = (value, data)
            self.is_cyclic = outer_is_cyclic
        return data

    def _count_rewalk(self, value: Any) -> None:
        if id(value) not in self._walked_cyclic:
            return
        self._rewalks += 1
        if self._rewalks > MAX_REWALKS:
            raise self.refusal(value, "is part of too many reference cycles")

    def _handler(self, value: Any) -> Handler:
        kind = type(value)
        handler = self.context.handlers.get(kind)
        if handler is None:
            # Here, since those modules import this one.
            from run_once.encode_types import find_handler  # noqa: PLC0415

            handler = self.context.handlers[kind] = find_handler(kind)
        return handler


def record(tag: str, *parts: bytes) -> bytes:
    """Join encoded parts under a tag, self-delimiting."""
    return b"r%d:%s%d:%s" % (len(tag), tag.encode(), len(parts), b"".join(parts))


def collapse(data: bytes) -> bytes:
    """Replace a long encoding by its hash."""
    if len(data) <= COLLAPSE_BYTES:
        return data
    return b"#" + hash_buffer(memoryview(data))


def hash_buffer(buffer: memoryview) -> bytes:
    """Hash a contiguous buffer of bytes.

    Args:
        buffer: One-dimensional, of format ``B``. Read in leaves of `LEAF_BYTES`; several at once,
            since hashing lets other threads run.

    Returns:
        `DIGEST_BYTES` bytes, the same on every machine.
    """
    if len(buffer) <= LEAF_BYTES:
        return _hash_leaf(buffer)
    leaves = [buffer[at : at + LEAF_BYTES] for at in range(0, len(buffer), LEAF_BYTES)]
    threads = min(len(leaves), os.cpu_count() or 1, 8)
    try:
        with ThreadPoolExecutor(threads, "run-once-hash") as pool:
            digests = list(pool.map(_hash_leaf, leaves))
    except RuntimeError:  # no more threads, or the interpreter is ending
        digests = [_hash_leaf(leaf) for leaf in leaves]
    return _hash_leaf(b"leaves%d:" % len(buffer) + b"".join(digests))


def _hash_leaf(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, person=_PERSON).digest()


def encode_buffer(tag: bytes, buffer: memoryview | bytes) -> bytes:
    """Encode raw bytes under a one-byte tag; long ones by length and hash."""
    size = len(buffer)
    if size <= COLLAPSE_BYTES:
        return b"%b%d:%b" % (tag, size, bytes(buffer))
    return b"%b#%d:%b" % (tag, size, hash_buffer(memoryview(buffer)))


def encode_reduced(encoder: Encoder, value: Any) -> bytes:
    """Encode any other object by what pickle would take of it, walked piece by piece.

    Pickle's own bytes would not do: they depend on which parts are the same object, and on the
    order of sets.
    """
    reduced = _reduce(encoder, value)
    kind = encoder.encode(type(value), ".__class__")
    if isinstance(reduced, str):
        module = getattr(value, "__module__", None) or type(value).__module__
        return record("global", kind, encoder.encode(f"{module}.{reduced}", ".<name>"))
    func, args, state, items, pairs = (*reduced, None, None, None)[:5]
    parts = [kind, encoder.encode(func, ".<constructor>"), _encode_args(encoder, args)]
    parts.append(_encode_state(encoder, state))
    parts.append(b"n" if items is None else encoder.encode(list(items), ".<items>"))
    parts.append(b"n" if pairs is None else encoder.encode(dict(pairs), ".<items>"))
    return record("object", *parts)


def _encode_args(encoder: Encoder, args: Any) -> bytes:
    return record("args", *(encoder.encode(arg, ".<state>") for arg in args))


def _encode_state(encoder: Encoder, state: Any) -> bytes:
    if type(state) is dict:
        return encoder.named(state)
    if type(state) is tuple and len(state) == _STATE_PARTS:
        return record("state", *(_encode_state(encoder, part) for part in state))
    return encoder.encode(state, ".<state>")


def _reduce(encoder: Encoder, value: Any) -> Any:
    kind = type(value)
    special = copyreg.dispatch_table.get(kind)
    try:
        reduced = special(value) if special is not None else value.__reduce_ex__(4)
    except RecursionError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:200].rstrip(". ")
        reason = f"has no value that lasts beyond this process ({text})"
        raise encoder.refusal(value, reason) from error
    if isinstance(reduced, str) or (isinstance(reduced, tuple) and len(reduced) >= _MIN_REDUCED):
        return reduced
    raise encoder.refusal(value, "reduces to something that pickle does not know either")


def _none(_: Encoder, __: None) -> bytes:
    return b"n"


def _bool(_: Encoder, value: bool) -> bytes:
    return b"T" if value else b"F"


def _int(_: Encoder, value: int) -> bytes:
    size = (value.bit_length() + 8) // 8
    return b"i%d:%b" % (size, value.to_bytes(size, "big", signed=True))


def _float(_: Encoder, value: float) -> bytes:
    # One NaN for all; 0.0 and -0.0 stay two.
    return b"f" + struct.pack(">d", float("nan") if math.isnan(value) else value)


def _str(encoder: Encoder, value: str) -> bytes:
    if len(value) >= BIG_BYTES:
        return encoder.remembered(value, None, lambda: _utf8(value))
    return _utf8(value)


def _utf8(value: str) -> bytes:
    return encode_buffer(b"s", value.encode("utf-8", "surrogatepass"))


def _bytes(encoder: Encoder, value: bytes) -> bytes:
    if len(value) >= BIG_BYTES:
        return encoder.remembered(value, None, lambda: encode_buffer(b"b", value))
    return encode_buffer(b"b", value)


def encode_sequence(encoder: Encoder, value: list[Any] | tuple[Any, ...]) -> bytes:
    """Encode a list or tuple; a long one is known by identity from then on."""
    if len(value) < BIG_ITEMS:
        return _items(encoder, value)
    step = len(value) // _SAMPLES
    guard = (len(value), tuple(map(id, value[::step])))
    known = encoder.context.recall(value, guard)
    if known is None:
        known = collapse(_items(encoder, value))
        if not encoder.is_cyclic:
            encoder.context.remember(value, guard, known)
    return known


def _items(encoder: Encoder, value: list[Any] | tuple[Any, ...]) -> bytes:
    items = encoder.each(value)
    tag = b"l" if type(value) is list else b"t"
    return b"%b%d:%b" % (tag, len(items), b"".join(items))


_ATOMS: Final[dict[type, Handler]] = {
    types.NoneType: _none,
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    bytes: _bytes,
}
