"""How a pass claims, and what became of its keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """What became of the keys of one pass, as far as it has come.

    Attributes:
        handed_out: Items given to the caller.
        completed: Done here, and acknowledged.
        found_done: Found done: by others, or in an earlier run.
        busy: Left to others that hold them.
        failed: Failed here.
        lost: Leases lost; the work under them was not accepted.
        exhausted: Left alone, since they were attempted as often as max_attempts allows.
    """

    handed_out: int = 0
    completed: int = 0
    found_done: int = 0
    busy: int = 0
    failed: int = 0
    lost: int = 0
    exhausted: int = 0

    @property
    def known_done(self) -> int:
        """Keys that are done, by whomever, as this pass knows."""
        return self.completed + self.found_done


@dataclass(frozen=True)
class PassOptions:
    """How a pass claims.

    Attributes:
        ttl_s: Length of a lease.
        is_kept: Keep leases alive.
        is_for_good: Complete each key before it is handed out.
        is_explicit: Items outlive the pass.
        chunksize: Keys in one request at first.
        waits: Come back to all that others hold.
        max_attempts: Leave keys alone that were attempted so often; 0: no limit.
        max_ahead: Hold so many keys ahead at most.
    """

    ttl_s: float
    is_kept: bool
    is_for_good: bool
    is_explicit: bool
    chunksize: int
    waits: bool
    max_attempts: int
    max_ahead: int
