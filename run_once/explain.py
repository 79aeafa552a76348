"""Shows what goes into a key, as a tree of lines."""

from __future__ import annotations

import hashlib
from typing import Any, Final

from run_once import identity
from run_once.encode import Encoder

_MAX_DEPTH: Final = 6
_MAX_CHILDREN: Final = 40
_MAX_TEXT: Final = 60
_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes)


class ExplainingEncoder(Encoder):
    """Encodes as `Encoder` does, and writes down each value that it meets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lines: list[str] = []
        self._depth = 0
        self._children = [0]

    def encode(self, value: Any, step: str | int) -> bytes:
        """Encode a value, and keep a line on it with the lines of its parts below."""
        self._children[-1] += 1
        is_shown = self._is_shown(step)
        at = len(self._lines)
        if is_shown:
            self._lines.append("")
        self._depth += 1
        self._children.append(0)
        data = super().encode(value, step)
        hidden = self._children.pop() - _MAX_CHILDREN
        self._depth -= 1
        if is_shown:
            self._lines[at] = self._line(value, step, data)
            if hidden > 0 and self._depth < _MAX_DEPTH:
                self._lines.append(f"{'  ' * (self._depth + 1)}… and {hidden} more")
        else:
            del self._lines[at:]
        return data

    def lines(self) -> list[str]:
        """Return the lines so far."""
        return list(self._lines)

    def _is_shown(self, step: str | int) -> bool:
        # Names inside angle brackets are the encoder's own parts.
        is_own = isinstance(step, str) and (step == "" or step.lstrip(".").startswith("<"))
        is_head = step in ("<function>", "<distribution>", "<sklearn options>")
        is_few = self._depth == 0 or self._children[-1] <= _MAX_CHILDREN
        return (is_head or not is_own) and is_few and self._depth <= _MAX_DEPTH

    def _line(self, value: Any, step: str | int, data: bytes) -> str:
        place = f"[{step}]" if isinstance(step, int) else step.strip("<>")
        short = hashlib.blake2b(data, digest_size=4).hexdigest()
        return f"{'  ' * self._depth}{place}: {_describe(value)}  {short}"


def _describe(value: Any) -> str:
    kind = type(value)
    if kind in _PLAIN:
        text = repr(value if not isinstance(value, (str, bytes)) else value[: _MAX_TEXT + 1])
        return f"{text[:_MAX_TEXT]}…" if len(text) > _MAX_TEXT else text
    if isinstance(getattr(value, "__qualname__", None), str):
        return f"{kind.__name__} {identity.qualified_name(value)}"
    details = [identity.qualified_name(kind).removeprefix("builtins.")]
    for name in ("dtype", "shape"):
        found = getattr(value, name, None)
        if found is not None:
            details.append(str(found)[:_MAX_TEXT])
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        details.append(f"of {len(value)}")
    return " ".join(details)
