"""How many keys are held ahead: for which bodies, over which network, near which end."""

from __future__ import annotations

import pytest

from run_once.pace import MAX_AHEAD_KEYS, MAX_PATIENCE_NS, OVERDUE_NS, Pace

MS = 1_000_000
LEASE_NS = 60_000 * MS


def paced(body_ms: float, request_ms: float, *, max_ahead: int = 10_000) -> Pace:
    """Give a pace that has seen such bodies and requests."""
    pace = Pace(max_ahead=max_ahead, lease_ns=LEASE_NS)
    pace.note_body(round(body_ms * MS))
    pace.note_request(round(request_ms * MS))
    return pace


def test_nothing_ahead_before_anything_is_known() -> None:
    """The first key is claimed by itself: nobody knows how long its body takes."""
    pace = Pace(max_ahead=10, lease_ns=LEASE_NS)
    assert pace.wanted(elapsed_ns=0, n_left=None) == 0
    pace.note_request(MS)
    assert pace.wanted(elapsed_ns=0, n_left=None) == 0
    assert pace.overdue_ns() is None


@pytest.mark.parametrize(
    ("body_ms", "request_ms", "least", "most"),
    [
        (10, 50, 11, 16),  # two round trips and a margin
        (0.0, 10, 1_000, MAX_AHEAD_KEYS),
        (0.0, 1_000, MAX_AHEAD_KEYS, MAX_AHEAD_KEYS),
        (300, 1, 0, 0),  # a claim costs nothing against such a body
        (5_000, 100, 0, 0),
    ],
)
def test_about_two_round_trips_of_work(
    body_ms: float, request_ms: float, least: int, most: int
) -> None:
    """Short bodies have two round trips' worth and a margin held ahead, long ones nothing."""
    wanted = paced(body_ms, request_ms).wanted(elapsed_ns=round(body_ms * MS), n_left=None)
    assert least <= wanted <= most


def test_long_bodies_are_claimed_in_time() -> None:
    """Of bodies that outlast the round trips, one key is wanted shortly before the end."""
    pace = paced(300, 50)
    assert pace.wanted(elapsed_ns=0, n_left=None) == 0
    assert pace.next_want_ns(0) == 175 * MS
    assert pace.wanted(elapsed_ns=176 * MS, n_left=None) == 1
    assert pace.next_want_ns(176 * MS) is None


def test_patience_is_bounded() -> None:
    """Others get three round trips, and never longer than a moment."""
    assert paced(1, 10).patience_ns() == 30 * MS
    assert paced(1, 1_000).patience_ns() == MAX_PATIENCE_NS
    assert Pace(max_ahead=10, lease_ns=LEASE_NS).patience_ns() == 0


def test_bounds() -> None:
    """`prefetch` bounds what is held, and so does a tenth of the lease."""
    assert paced(10, 50, max_ahead=3).wanted(elapsed_ns=0, n_left=None) == 3
    assert paced(10, 50, max_ahead=0).wanted(elapsed_ns=0, n_left=None) == 0
    short = Pace(max_ahead=1_000, lease_ns=1_000 * MS)
    short.note_body(10 * MS)
    short.note_request(1_000 * MS)
    assert short.wanted(elapsed_ns=0, n_left=None) <= 10


def test_nobody_hoards_near_the_end() -> None:
    """With few keys left no more is held than covers one round trip; in the midst it is more."""
    pace = paced(10, 50)
    in_the_midst = pace.wanted(elapsed_ns=10 * MS, n_left=10_000)
    assert in_the_midst == pace.wanted(elapsed_ns=10 * MS, n_left=None)
    assert pace.wanted(elapsed_ns=10 * MS, n_left=8) == 5
    assert paced(60, 50).wanted(elapsed_ns=60 * MS, n_left=3) == 1


def test_means_follow_what_changes() -> None:
    """Bodies that become long end the claiming ahead soon."""
    pace = paced(0.01, 1)
    assert pace.is_short
    for _ in range(3):
        pace.note_body(1_000 * MS)
    assert not pace.is_short
    assert pace.overdue_ns() == round(pace.body_ns or 0) + OVERDUE_NS
