"""The checker of histories finds what is planted, and passes what a correct table did."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from tests.faults.history import Op, ViolationError, check
from tests.faults.traffic import Recorder

A, B = b"a" * 16, b"b" * 16
TTL = 1_000

GOOD = [
    Op(1, b"k", "claim", 10, 20, 1, "GRANTED", A, 1, number=TTL),
    Op(2, b"k", "claim", 15, 25, 1, "BUSY", B, number=TTL),
    Op(3, b"k", "fail", 30, 40, 2, "FAILED", A, 1),
    Op(4, b"k", "claim", 50, 60, 3, "GRANTED", B, 2, number=TTL),
    Op(5, b"k", "renew", 61, 62, 3, "RENEWED", B, 2, number=TTL),
    Op(6, b"k", "complete", 70, 80, 4, "COMPLETED", B, 2, b"v"),
    Op(7, b"k", "complete", 81, 89, 4, "COMPLETED", B, 2, b"v"),
    Op(8, b"k", "complete", 82, 90, 4, "LOST", A, 1),
    Op(9, b"k", "renew", 83, 91, 4, "LOST", A, 1, number=TTL),
    Op(10, b"k", "lookup", 90, 95, 4, "DONE", token=2, value=b"v"),
    Op(11, b"k", "reset", 96, 98, 5, "RESET", number=4),
    Op(12, b"k", "lookup", 99, 100, 5, "ABSENT"),
]


def test_good_history_passes() -> None:
    """A history as a correct table makes it passes."""
    found = check(GOOD)
    assert found.last_revision == 5
    assert found.max_token == 2


def test_unanswered_may_or_may_not_have_happened() -> None:
    """An operation without an answer explains both what follows it and what follows without it."""
    claim = Op(1, b"k", "claim", 10, claim_id=A, number=TTL)
    check([claim, Op(2, b"k", "lookup", 20, 30, 0, "ABSENT")])
    check([claim, Op(2, b"k", "lookup", 20, 30, 1, "BUSY", token=7)])
    check(
        [
            claim,
            Op(2, b"k", "claim", 20, 30, 1, "GRANTED", A, 7, number=TTL),
            Op(3, b"k", "complete", 40, claim_id=A, token=7, value=b"v"),
            Op(4, b"k", "lookup", 50, 60, 2, "DONE", token=7, value=b"v"),
        ]
    )


def test_expired_lease_may_be_taken_over() -> None:
    """A takeover passes once the lease can have run out."""
    first = Op(1, b"k", "claim", 10, 20, 1, "GRANTED", A, 1, number=TTL)
    second = Op(2, b"k", "claim", 900, 10 + TTL, 2, "GRANTED", B, 2, number=TTL)
    assert check([first, second]).n_takeovers == 1


def _change(place: int, **fields: object) -> list[Op]:
    history = list(GOOD)
    history[place] = history[place]._replace(**fields)  # type: ignore[arg-type]  # by name
    return history


CLAIMED = GOOD[:1]
PLANTED: dict[str, list[Op]] = {
    "two leases at once": [
        *CLAIMED,
        Op(2, b"k", "claim", 30, 40, 2, "GRANTED", B, 2, number=TTL),
    ],
    "a takeover of a renewed lease": [
        *CLAIMED,
        Op(2, b"k", "renew", 1_000, 1_001, 1, "RENEWED", A, 1, number=TTL),
        Op(3, b"k", "claim", 1_500, 1_600, 2, "GRANTED", B, 2, number=TTL),
    ],
    "an acknowledged claim is lost": [*CLAIMED, Op(2, b"k", "lookup", 30, 40, 1, "ABSENT")],
    "an acknowledged completion is lost": _change(9, answer="BUSY"),
    "an acknowledged failure is lost": [
        *GOOD[:3],
        Op(4, b"k", "lookup", 50, 60, 2, "BUSY", token=1),
    ],
    "two completions": _change(7, answer="COMPLETED"),
    "a completion after the takeover": [
        *CLAIMED,
        Op(2, b"k", "claim", 900, 2_000, 2, "GRANTED", B, 2, number=TTL),
        Op(3, b"k", "complete", 2_001, 2_002, 3, "COMPLETED", A, 1, b"v"),
    ],
    "another value": _change(9, value=b"w"),
    "another token": _change(9, token=1),
    "a token that goes back": [
        *CLAIMED,
        Op(2, b"l", "claim", 30, 40, 2, "GRANTED", B, 1, number=TTL),
    ],
    "a revision twice": [
        *CLAIMED,
        Op(2, b"l", "claim", 30, 40, 1, "GRANTED", B, 2, number=TTL),
    ],
    "a revision that nobody made": [
        *CLAIMED,
        Op(2, b"l", "claim", 30, 40, 5, "GRANTED", B, 2, number=TTL),
    ],
    "a reply from the past": [
        *GOOD[:4],
        Op(20, b"k", "lookup", 61, 65, 1, "BUSY", token=1),
    ],
    "order of two keys against real time": [
        Op(1, b"k", "claim", 10, 20, 2, "GRANTED", A, 2, number=TTL),
        Op(2, b"l", "claim", 30, 40, 1, "GRANTED", B, 1, number=TTL),
    ],
    "a renewal after the end": _change(8, answer="RENEWED"),
    "a renewal refused to its holder": _change(4, answer="LOST"),
    "a reset that missed": _change(11, answer="DONE", token=2, value=b"v"),
    "a reset of what was newer": _change(10, number=3),
    "busy when nobody holds it": [Op(1, b"k", "claim", 10, 20, 0, "BUSY", A, number=TTL)],
    "a repeated claim with another token": [
        *CLAIMED,
        Op(2, b"k", "claim", 30, 40, 1, "GRANTED", A, 2, number=TTL),
    ],
    "an unanswered operation done twice": [
        Op(1, b"k", "claim", 10, claim_id=A, number=TTL),
        Op(2, b"k", "lookup", 20, 30, 1, "BUSY", token=1),
        Op(3, b"k", "reset", 31, 32, 2, "RESET", number=1),
        Op(4, b"k", "lookup", 40, 50, 3, "BUSY", token=2),
    ],
    "an unanswered operation before it was sent": [
        Op(1, b"k", "lookup", 20, 30, 1, "BUSY", token=1),
        Op(2, b"k", "claim", 40, claim_id=A, number=TTL),
    ],
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_violation_is_found(name: str) -> None:
    """What no correct table can have answered is found."""
    with pytest.raises(ViolationError):
        check(PLANTED[name])


def simulated(rng: random.Random, n_ops: int, n_keys: int) -> list[Op]:
    """Give the history of a correct table with overlapping operations."""
    history: list[Op] = []
    held: dict[bytes, tuple[bytes, int]] = {}
    done: dict[bytes, tuple[int, bytes]] = {}
    revision = token = 0
    for n in range(n_ops):
        key = b"%d" % rng.randrange(n_keys)
        start, end = 10 * n - rng.randrange(30), 10 * n + rng.randrange(1, 30)
        claim_id = rng.randbytes(16)
        if key in done:
            token_done, value = done[key]
            if rng.random() < 0.5:
                del done[key]
                revision += 1
                history.append(Op(n, key, "reset", start, end, revision, "RESET", number=revision))
            else:
                history.append(
                    Op(n, key, "lookup", start, end, revision, "DONE", b"", token_done, value)
                )
        elif key in held:
            holder, its_token = held.pop(key)
            revision += 1
            done[key] = its_token, claim_id
            op = Op(n, key, "complete", start, end, revision, "COMPLETED", holder, its_token)
            history.append(op._replace(value=claim_id))
        else:
            token += 1
            revision += 1
            held[key] = claim_id, token
            op = Op(n, key, "claim", start, end, revision, "GRANTED", claim_id, token)
            history.append(op._replace(number=10**15))
    rng.shuffle(history)
    return history


def test_checks_long_histories(report: Callable[[str], None]) -> None:
    """A history of 100,000 operations passes within seconds."""
    history = simulated(random.Random(1), 100_000, 2_000)
    started_s = time.perf_counter()
    check(history)
    took_s = time.perf_counter() - started_s
    report(f"history checker: {len(history) / took_s:,.0f} operations a second")
    assert took_s < 10


def test_finds_one_wrong_answer_in_many() -> None:
    """One answer made wrong in a long history is found, whichever it is."""
    for seed in range(200):
        rng = random.Random(seed)
        history = simulated(rng, 200, 10)
        check(history)
        place = rng.randrange(len(history))
        op = history[place]
        history[place] = {
            "claim": op._replace(answer="BUSY"),
            "complete": op._replace(answer="LOST"),
            "reset": op._replace(answer="KEPT"),
            "lookup": op._replace(value=b"another"),
        }[op.kind]
        with pytest.raises(ViolationError):
            check(history)


def test_renewal_of_an_earlier_holder_counts_for_nobody_else() -> None:
    """A long lease that was renewed and given back says nothing of a short one after it."""
    check(
        [
            Op(1, b"k", "claim", 10, 20, 1, "GRANTED", A, 1, number=TTL),
            Op(2, b"k", "renew", 21, 22, 1, "RENEWED", A, 1, number=100 * TTL),
            Op(3, b"k", "release", 23, 24, 2, "RELEASED", A, 1),
            Op(4, b"k", "claim", 30, 40, 3, "GRANTED", B, 2, number=10),
            Op(5, b"k", "claim", 50, 60, 4, "GRANTED", A, 3, number=TTL),
        ]
    )


def _too_many_unanswered(n_unanswered: int) -> list[Op]:
    """Give claims without an answer that, in any subset, may have happened before a lookup."""
    unanswered = [
        Op(n, b"many", "claim", n, claim_id=b"%016d" % n, number=1)
        for n in range(1, n_unanswered + 1)
    ]
    return [*unanswered, Op(99, b"many", "lookup", 10_000, 10_010, 5, "EXPIRED", token=5)]


def test_undecided_operations_are_counted() -> None:
    """A key for which more is possible than is followed is told as undecided, not passed.

    The other keys are decided all the same, for better or worse.
    """
    many = _too_many_unanswered(40)
    found = check([*GOOD, *many])
    assert found.n_undecided == len(many)
    recorder = Recorder()
    recorder.note([*GOOD, *many])
    with pytest.raises(AssertionError, match=f"{len(many)} operations are undecided"):
        recorder.check()
    with pytest.raises(ViolationError):
        check([*PLANTED["another value"], *many])
    assert check([*GOOD, *_too_many_unanswered(3)]).n_undecided == 0


def test_settlement_in_one_call_has_one_of_its_revisions() -> None:
    """A reset between the revisions of one call may or may not have seen the key's change."""
    claims = [
        Op(1, key, "claim", 10, 20, 2, "GRANTED", A, token, number=TTL, n_keys=2)
        for token, key in enumerate((b"k", b"l"), 1)
    ]
    settled = [
        Op(2, key, "complete", 30, 40, 4, "COMPLETED", A, token, n_keys=2)
        for token, key in enumerate((b"k", b"l"), 1)
    ]
    for answer in ("KEPT", "RESET"):
        revision = 4 if answer == "KEPT" else 5
        check([*claims, *settled, Op(3, b"k", "reset", 50, 60, revision, answer, number=3)])
    with pytest.raises(ViolationError):
        check([*claims, *settled, Op(3, b"k", "reset", 50, 60, 4, "KEPT", number=4)])


def test_who_saw_a_revision_may_stand_for_who_made_it() -> None:
    """Two resets of one key that saw one revision: either may have done it, with its other key."""
    check(
        [
            Op(1, b"k", "claim", 10, 20, 2, "GRANTED", A, 1, number=TTL, n_keys=2),
            Op(1, b"m", "claim", 10, 20, 2, "GRANTED", A, 2, number=TTL, n_keys=2),
            Op(2, b"m", "reset", 40, 60, 4, "RESET", number=2, n_keys=2),
            Op(2, b"j", "reset", 40, 60, 4, "RESET", number=2, n_keys=2),
            Op(3, b"k", "reset", 45, 55, 4, "RESET", number=2, n_keys=2),
            Op(3, b"m", "reset", 45, 55, 4, "RESET", number=2, n_keys=2),
        ]
    )
