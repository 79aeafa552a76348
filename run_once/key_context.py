"""What is known about big arguments while one ``Parallel`` call runs."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

_KEPT_STRONG: Final = 8


class KeyContext:
    """What was learnt about big arguments while one ``Parallel`` call runs.

    Big arguments are known by identity, so that twenty tasks with one array hash it once. Objects
    that allow it are held weakly; of the others the last few are kept alive, since an id means
    nothing after its object's end. A sample of the content guards against reuse after a change in
    place, but cannot see each one: do not change big arguments while a call runs.
    """

    def __init__(self) -> None:
        self.handlers: dict[type, Callable[[Any, Any], bytes]] = {}
        self._weak: dict[int, tuple[weakref.ref[Any], object, bytes]] = {}
        self._strong: OrderedDict[int, tuple[Any, object, bytes]] = OrderedDict()

    def recall(self, value: Any, guard: object) -> bytes | None:
        """Return what was remembered for this very object, if `guard` is still the same."""
        ident = id(value)
        weak = self._weak.get(ident)
        if weak is not None:
            return weak[2] if weak[0]() is value and weak[1] == guard else None
        strong = self._strong.get(ident)
        if strong is None or strong[0] is not value or strong[1] != guard:
            return None
        return strong[2]

    def remember(self, value: Any, guard: object, data: bytes) -> None:
        """Keep the encoding of an object until it dies or is crowded out."""
        ident = id(value)
        table = self._weak
        try:
            ref = weakref.ref(value, lambda _: table.pop(ident, None))
        except TypeError:
            self._strong[ident] = (value, guard, data)
            while len(self._strong) > _KEPT_STRONG:
                self._strong.popitem(last=False)
        else:
            table[ident] = (ref, guard, data)

    def clear(self) -> None:
        """Forget all arguments."""
        self._weak.clear()
        self._strong.clear()
