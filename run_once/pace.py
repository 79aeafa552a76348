"""How many keys to hold before they are started, so that the next one is always there. Pure.

A request for keys takes a round trip; meanwhile bodies use up what is held. So about two round
trips' worth of work and a margin are held ahead, and nothing if bodies take so long that waiting
for a claim costs next to nothing: a key that is held ahead is kept from others who may be idle.
"""

from __future__ import annotations

import math
from typing import Final

MAX_AHEAD_KEYS: Final = 4_000
"""So many keys are held ahead at most, however short their bodies are."""

PLENTY_KEYS: Final = 2_000
"""More are held ahead only where the way to the server is long: what a request costs is shared by
so many keys that it no longer matters, and others are left their part of a list."""

OVERDUE_NS: Final = 200_000_000
"""Keys whose start is so much later than was expected are given back."""

ROUND_TRIPS: Final = 2.5
"""Work held ahead, in round trips: two, and a margin."""

PATIENT_ROUND_TRIPS: Final = 3
MAX_PATIENCE_NS: Final = 200_000_000
"""At the end of a list, others have so long to ask for what they were told to ask for: who looks
sooner finds those keys free, and of two who then ask for them one does so in vain."""

LONG_BODY: Final = 20
"""A body of so many round trips: its key is claimed when it is asked for, which costs 5 %."""

_OVERHEAD_NS: Final = 10_000
"""What handing out a key takes besides its body."""

_LEASE_SHARE: Final = 10
"""Work held ahead takes a tenth of the lease at most."""

_END_SHARE: Final = 8
"""Near the end of the list this part of what is left is held at most, unless it is done soon."""

_SOON_NS: Final = 5_000_000
_BODY_WEIGHT: Final = 0.2
_REQUEST_WEIGHT: Final = 0.3
_LEAST_GROWTH: Final = 1.02


class Pace:
    """How long bodies and requests take, lately.

    Attributes:
        body_ns: A body's length; None: not known yet.
        request_ns: A request's length; None: not known yet.
        least_ns: That of the shortest one, about: what is left of it without the work on keys.
    """

    def __init__(self, *, max_ahead: int, lease_ns: int) -> None:
        """Begin without knowing anything: nothing is held ahead.

        Args:
            max_ahead: Keys held ahead at most.
            lease_ns: Length of a lease.
        """
        self.body_ns: float | None = None
        self.request_ns: float | None = None
        self.least_ns = math.inf
        self._max_ahead = min(max_ahead, MAX_AHEAD_KEYS)
        self._lease_ns = lease_ns

    def note_body(self, body_ns: int) -> None:
        """Take in how long a body took."""
        self.body_ns = _mean(self.body_ns, body_ns, _BODY_WEIGHT)

    def note_request(self, request_ns: int) -> None:
        """Take in how long a request took."""
        self.request_ns = _mean(self.request_ns, request_ns, _REQUEST_WEIGHT)
        self.least_ns = min(self.least_ns * _LEAST_GROWTH, request_ns)

    @property
    def is_short(self) -> bool:
        """Tell whether bodies are so short that keys are held ahead."""
        body_ns, request_ns = self.body_ns, self.request_ns
        if not self._max_ahead or body_ns is None or request_ns is None:
            return False
        return body_ns < LONG_BODY * request_ns

    def wanted(self, *, elapsed_ns: int, n_left: int | None) -> int:
        """Say how many keys should be held ahead now.

        Args:
            elapsed_ns: How long the present body runs.
            n_left: Keys that are neither held nor done; None: not known, very many.
        """
        if not self.is_short:
            return 0
        assert self.body_ns is not None
        assert self.request_ns is not None
        step_ns = self.body_ns + _OVERHEAD_NS
        present_ns = max(0.0, self.body_ns - elapsed_ns)
        work_ns = min(ROUND_TRIPS * self.request_ns - present_ns, self._lease_ns / _LEASE_SHARE)
        n_plenty = max(PLENTY_KEYS, math.ceil(2 * ROUND_TRIPS * self.least_ns / step_ns))
        n_keys = min(math.ceil(work_ns / step_ns), n_plenty, self._max_ahead)
        if n_left is not None and n_keys * step_ns > _SOON_NS:
            n_cover = math.ceil(self.least_ns / step_ns)
            n_keys = min(n_keys, max(n_left // _END_SHARE, n_cover))
        return max(0, n_keys)

    def next_want_ns(self, elapsed_ns: int) -> int | None:
        """Say in how long one more key will be wanted; None: not before the next body."""
        if not self.is_short:
            return None
        assert self.body_ns is not None
        assert self.request_ns is not None
        left_ns = self.body_ns - ROUND_TRIPS * self.request_ns - elapsed_ns
        return round(left_ns) if left_ns > 0 else None

    def patience_ns(self) -> int:
        """Say how long to leave keys to others that they were told to ask for and soon will."""
        return min(round(PATIENT_ROUND_TRIPS * (self.request_ns or 0)), MAX_PATIENCE_NS)

    def overdue_ns(self) -> int | None:
        """Say after how long a body is so late that what is held ahead is given back."""
        return None if self.body_ns is None else round(self.body_ns) + OVERDUE_NS


def _mean(mean: float | None, value: float, weight: float) -> float:
    """Take a value into a mean in which older ones fade."""
    return value if mean is None else mean + weight * (value - mean)
