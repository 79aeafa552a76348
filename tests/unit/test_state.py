"""The rules of the table, cell by cell, as design.md section 2 states them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest

from distlock_server.state import (
    NO_CLAIM_ID,
    Answer,
    Claim,
    Command,
    Complete,
    Done,
    Fail,
    Failed,
    Held,
    Invalidate,
    Lookup,
    Record,
    Release,
    Renew,
    Reset,
    Result,
    Seize,
    Stamp,
    Storage,
    is_stored_change,
    step,
)

SECOND_NS = 10**9
NOW_NS = 1_000 * SECOND_NS
WALL_NS = 5_000 * SECOND_NS
TTL_NS = 60 * SECOND_NS
MINE = b"m" * 16
OTHERS = b"o" * 16
MY_TOKEN = 7
OTHER_TOKEN = 9
STAMP = Stamp(NOW_NS, WALL_NS, revision=100, token=50)
VALUE = Result(Storage.INLINE, b"value", 5, b"s" * 32)

# Who "this" is: claim id MINE with token MY_TOKEN. A lease that is live runs for 20 s more.
HELD_BY_THIS = Held(
    claim_id=MINE,
    token=MY_TOKEN,
    deadline_ns=NOW_NS + 20 * SECOND_NS,
    ttl_ns=TTL_NS,
    owner="holder",
    since_wall_ns=1,
    attempts=3,
    last_error="earlier",
    data=b"opaque",
    revision=40,
)
HELD_BY_OTHER = HELD_BY_THIS._replace(claim_id=OTHERS, token=OTHER_TOKEN)
FAILED_BY_THIS = Failed(MINE, MY_TOKEN, 3, "boom", 1, released=False, revision=40)
DONE_BY_THIS = Done(MY_TOKEN, "holder", 1, VALUE, b"opaque", revision=40)
HELD_2021 = HELD_BY_OTHER._replace(
    claim_id=NO_CLAIM_ID, token=0, attempts=1, last_error="", revision=0
)

RECORDS: dict[str, Record] = {
    "absent": None,
    "failed by this": FAILED_BY_THIS,
    "failed by another": FAILED_BY_THIS._replace(claim_id=OTHERS, token=OTHER_TOKEN),
    "released by this": FAILED_BY_THIS._replace(released=True),
    "held by this": HELD_BY_THIS,
    "held by this, expired": HELD_BY_THIS._replace(deadline_ns=NOW_NS - 1),
    "held by this, ahead": HELD_BY_THIS._replace(ahead=True),
    "held by another": HELD_BY_OTHER,
    "held by another, expired": HELD_BY_OTHER._replace(deadline_ns=NOW_NS),
    "held by another, expired ahead": HELD_BY_OTHER._replace(deadline_ns=NOW_NS, ahead=True),
    "held by this claim id with a newer token": HELD_BY_THIS._replace(token=OTHER_TOKEN),
    "held since 2021": HELD_2021,
    "held since 2021, expired": HELD_2021._replace(deadline_ns=NOW_NS),
    "done by this": DONE_BY_THIS,
    "done by another": DONE_BY_THIS._replace(token=OTHER_TOKEN),
    "done in 2021": Done(0, "old", 1, data=b"opaque"),
}

COMMANDS: dict[str, Command] = {
    "claim": Claim(MINE, TTL_NS, "me", data=b"mine"),
    "renew": Renew(MINE, MY_TOKEN, TTL_NS),
    "complete": Complete(MINE, MY_TOKEN, VALUE),
    "fail": Fail(MINE, MY_TOKEN, "new error"),
    "release": Release(MINE, MY_TOKEN),
    "lookup": Lookup(),
    "reset": Reset(max_revision=40),
    "seize": Seize(MINE, TTL_NS, "me", b"mine"),
    "seize for ever": Seize(MINE, 0, "me", b"mine"),
    "invalidate": Invalidate(MY_TOKEN),
}

# What is stored afterwards: "kept" is the very same record, any other value is the new one.
KEPT = "kept"


def granted(attempts: int, last_error: str = "") -> Held:
    """Give the record of a new grant."""
    return Held(
        claim_id=MINE,
        token=50,
        deadline_ns=NOW_NS + TTL_NS,
        ttl_ns=TTL_NS,
        owner="me",
        since_wall_ns=WALL_NS,
        attempts=attempts,
        last_error=last_error,
        data=b"mine",
        revision=100,
    )


RENEWED = HELD_BY_THIS._replace(deadline_ns=NOW_NS + TTL_NS)
COMPLETED = Done(MY_TOKEN, "holder", WALL_NS, VALUE, b"opaque", revision=100)
FAILED = Failed(MINE, MY_TOKEN, 3, "new error", WALL_NS, revision=100)
RELEASED = Failed(MINE, MY_TOKEN, 2, "earlier", WALL_NS, released=True, revision=100)
SEIZED = granted(1)
SEIZED_FOR_EVER = Done(50, "me", WALL_NS, data=b"mine", revision=100)


class Cell(NamedTuple):
    """What must come of a command."""

    answer: Answer
    after: Record | str = KEPT
    is_new_grant: bool = False


LOST = Cell(Answer.LOST)
FOUND = Cell(Answer.FOUND)
NOT_DONE = Cell(Answer.KEPT)
UNDONE = Cell(Answer.RESET, None)
SEIZE = {
    "seize": Cell(Answer.SEIZED, SEIZED, is_new_grant=True),
    "seize for ever": Cell(Answer.SEIZED, SEIZED_FOR_EVER, is_new_grant=True),
}
SETTLED_BY_THIS = {
    "renew": Cell(Answer.RENEWED, RENEWED),
    "complete": Cell(Answer.COMPLETED, COMPLETED),
    "fail": Cell(Answer.FAILED, FAILED),
    "release": Cell(Answer.RELEASED, RELEASED),
}
ALL_LOST = {"renew": LOST, "complete": LOST, "fail": LOST, "release": LOST}
NEITHER_DONE = {"lookup": FOUND, "reset": UNDONE, **SEIZE, "invalidate": NOT_DONE}
DONE = {**SEIZE, "lookup": FOUND, "reset": UNDONE, "seize for ever": Cell(Answer.DONE)}


def grant(attempts: int, last_error: str = "") -> Cell:
    """Give the cell of a new grant."""
    return Cell(Answer.GRANTED, granted(attempts, last_error), is_new_grant=True)


# One row for each record: what comes of claim, then of the settling commands, then of the others.
TABLE: dict[str, dict[str, Cell]] = {
    "absent": {
        "claim": grant(1),
        **ALL_LOST,
        "release": Cell(Answer.RELEASED),
        **NEITHER_DONE,
    },
    "failed by this": {
        "claim": LOST,
        **ALL_LOST,
        "fail": Cell(Answer.FAILED),
        "release": Cell(Answer.FAILED),
        **NEITHER_DONE,
    },
    "failed by another": {"claim": grant(4, "boom"), **ALL_LOST, **NEITHER_DONE},
    "released by this": {
        "claim": LOST,
        **ALL_LOST,
        "fail": Cell(Answer.RELEASED),
        "release": Cell(Answer.RELEASED),
        **NEITHER_DONE,
    },
    "held by this": {"claim": Cell(Answer.GRANTED), **SETTLED_BY_THIS, **NEITHER_DONE},
    "held by this, expired": {"claim": Cell(Answer.GRANTED), **SETTLED_BY_THIS, **NEITHER_DONE},
    "held by this, ahead": {
        "claim": Cell(Answer.GRANTED),
        **SETTLED_BY_THIS,
        "renew": Cell(Answer.RENEWED, RENEWED._replace(ahead=True)),
        **NEITHER_DONE,
    },
    "held by another": {"claim": Cell(Answer.BUSY), **ALL_LOST, **NEITHER_DONE},
    "held by another, expired": {"claim": grant(4, "earlier"), **ALL_LOST, **NEITHER_DONE},
    "held by another, expired ahead": {"claim": grant(3, "earlier"), **ALL_LOST, **NEITHER_DONE},
    "held by this claim id with a newer token": {
        "claim": Cell(Answer.GRANTED),
        **ALL_LOST,
        **NEITHER_DONE,
    },
    "held since 2021": {"claim": Cell(Answer.BUSY), **ALL_LOST, **NEITHER_DONE},
    "held since 2021, expired": {"claim": grant(2), **ALL_LOST, **NEITHER_DONE},
    "done by this": {
        "claim": Cell(Answer.DONE),
        **ALL_LOST,
        "complete": Cell(Answer.COMPLETED),
        **DONE,
        "invalidate": UNDONE,
    },
    "done by another": {"claim": Cell(Answer.DONE), **ALL_LOST, **DONE, "invalidate": NOT_DONE},
    "done in 2021": {"claim": Cell(Answer.DONE), **ALL_LOST, **DONE, "invalidate": NOT_DONE},
}

CELLS = [(state, command) for state in RECORDS for command in COMMANDS]


@pytest.mark.parametrize(("state", "command"), CELLS, ids=[f"{s}-{c}" for s, c in CELLS])
def test_cell(state: str, command: str) -> None:
    """Every record meets every command: answer, stored record and use of the token are as ruled."""
    cell = TABLE[state][command]
    before = RECORDS[state]
    after, outcome = step(before, COMMANDS[command], STAMP)
    assert outcome.answer is cell.answer
    assert outcome.is_new_grant is cell.is_new_grant
    if cell.after == KEPT:
        assert after is before, "nothing changed, so the very same record comes back"
    else:
        assert after == cell.after


@pytest.mark.parametrize(("state", "command"), CELLS, ids=[f"{s}-{c}" for s, c in CELLS])
def test_revision_moves_with_what_is_stored(state: str, command: str) -> None:
    """A stored record carries the new revision exactly if more than its deadline changed."""
    before = RECORDS[state]
    after, outcome = step(before, COMMANDS[command], STAMP)
    changed = is_stored_change(before, after)
    if after is not None and after is not before:
        assert (after.revision == STAMP.revision) is changed
    if outcome.is_new_grant:
        assert changed
        assert isinstance(after, Held | Done)
        assert after.token == STAMP.token


@pytest.mark.parametrize("token", [MY_TOKEN - 1, OTHER_TOKEN, 0])
@pytest.mark.parametrize("kind", ["renew", "complete", "fail", "release"])
def test_token_of_another_grant_is_refused(kind: str, token: int) -> None:
    """The right claim id with any token but the grant's own changes nothing."""
    command = COMMANDS[kind]
    assert isinstance(command, Renew | Complete | Fail | Release)
    after, outcome = step(HELD_BY_THIS, command._replace(token=token), STAMP)
    assert (after, outcome.answer) == (HELD_BY_THIS, Answer.LOST)


def test_token_of_2021_completes_nothing() -> None:
    """Token 0, which keys done in 2021 have, is nobody's completion."""
    after, outcome = step(RECORDS["done in 2021"], Complete(MINE, 0), STAMP)
    assert after is RECORDS["done in 2021"]
    assert outcome.answer is Answer.LOST


def test_key_done_in_2021_can_be_invalidated() -> None:
    """A key done in 2021 has no value; who needs one may have it computed, named by token 0."""
    after, outcome = step(RECORDS["done in 2021"], Invalidate(0), STAMP)
    assert (after, outcome.answer) == (None, Answer.RESET)


@pytest.mark.parametrize(
    ("left_ns", "answer"), [(1, Answer.BUSY), (0, Answer.GRANTED), (-1, Answer.GRANTED)]
)
def test_lease_ends_at_its_deadline(left_ns: int, answer: Answer) -> None:
    """At the very nanosecond of its deadline a lease is expired."""
    record = HELD_BY_OTHER._replace(deadline_ns=NOW_NS + left_ns)
    assert record.is_expired(NOW_NS) is (left_ns <= 0)
    _, outcome = step(record, COMMANDS["claim"], STAMP)
    assert outcome.answer is answer


# -- attempts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "max_attempts", "answer"),
    [
        ("absent", 1, Answer.GRANTED),
        ("failed by another", 2, Answer.EXHAUSTED),
        ("failed by another", 3, Answer.EXHAUSTED),
        ("failed by another", 4, Answer.GRANTED),
        ("failed by another", 0, Answer.GRANTED),
        ("failed by this", 1, Answer.LOST),
        ("held by another, expired", 3, Answer.EXHAUSTED),
        ("held by another, expired", 4, Answer.GRANTED),
        ("held by another, expired ahead", 2, Answer.EXHAUSTED),
        ("held by another, expired ahead", 3, Answer.GRANTED),
        ("held by another", 1, Answer.BUSY),
        ("held by this", 1, Answer.GRANTED),
        ("held by this, expired", 1, Answer.GRANTED),
        ("done by another", 1, Answer.DONE),
    ],
)
def test_max_attempts(state: str, max_attempts: int, answer: Answer) -> None:
    """At or over the limit a free key is exhausted; what is held by this claim, or done, is not."""
    before = RECORDS[state]
    after, outcome = step(before, Claim(MINE, TTL_NS, max_attempts=max_attempts), STAMP)
    assert outcome.answer is answer
    if not outcome.is_new_grant:
        assert after is before


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        ("absent", Answer.NOT_ASKED),
        ("failed by another", Answer.NOT_ASKED),
        ("failed by this", Answer.LOST),
        ("held by another, expired", Answer.NOT_ASKED),
        ("held by another", Answer.BUSY),
        ("held by this", Answer.GRANTED),
        ("held by this, expired", Answer.GRANTED),
        ("done by another", Answer.DONE),
    ],
)
def test_limit_on_grants(state: str, answer: Answer) -> None:
    """Past the request's limit nothing new is granted, and a repeated claim is answered alike."""
    before = RECORDS[state]
    after, outcome = step(before, Claim(MINE, TTL_NS, may_grant=False), STAMP)
    assert after is before
    assert (outcome.answer, outcome.is_new_grant) == (answer, False)


def test_key_that_kills_its_workers_is_given_up() -> None:
    """Each holder that starts and vanishes costs an attempt, until the key is exhausted."""
    record: Record = None
    answers = []
    for turn in range(4):
        stamp = Stamp(NOW_NS + turn * TTL_NS, WALL_NS, 100 + turn, 50 + turn)
        claim = Claim(bytes([turn]) * 16, TTL_NS, max_attempts=3)
        record, outcome = step(record, claim, stamp)
        answers.append(outcome.answer)
    assert answers == [Answer.GRANTED] * 3 + [Answer.EXHAUSTED]


def test_claims_ahead_that_vanish_cost_nothing() -> None:
    """Holders that claimed only ahead and never started leave the attempts where they were."""
    record: Record = None
    for turn in range(10):
        stamp = Stamp(NOW_NS + turn * TTL_NS, WALL_NS, 100 + turn, 50 + turn)
        record, outcome = step(record, Claim(bytes([turn]) * 16, TTL_NS, "", 1, ahead=True), stamp)
        assert outcome.answer is Answer.GRANTED
    assert isinstance(record, Held)
    assert record.attempts == 1


def test_claim_ahead_that_fails_counts() -> None:
    """Settling as failed means that the holder had started."""
    after, _ = step(RECORDS["held by this, ahead"], COMMANDS["fail"], STAMP)
    assert isinstance(after, Failed)
    assert after.attempts == 3


def test_release_of_the_first_attempt_leaves_nothing() -> None:
    """Given back on its first attempt, a key is as if it had never been claimed."""
    after, outcome = step(HELD_BY_THIS._replace(attempts=1), COMMANDS["release"], STAMP)
    assert (after, outcome.answer) == (None, Answer.RELEASED)


def test_release_keeps_earlier_attempts() -> None:
    """A released key keeps the attempts and the error of those before, and may be claimed."""
    failed, _ = step(HELD_BY_THIS, COMMANDS["fail"], STAMP)
    held, _ = step(failed, Claim(OTHERS, TTL_NS), Stamp(NOW_NS, WALL_NS, 101, 51))
    assert isinstance(held, Held)
    assert (held.attempts, held.last_error) == (4, "new error")
    freed, outcome = step(held, Release(OTHERS, 51), Stamp(NOW_NS, WALL_NS, 102, 52))
    assert outcome.answer is Answer.RELEASED
    assert freed == Failed(OTHERS, 51, 3, "new error", WALL_NS, released=True, revision=102)
    again, outcome = step(freed, Claim(b"n" * 16, TTL_NS), Stamp(NOW_NS, WALL_NS, 103, 53))
    assert outcome.answer is Answer.GRANTED
    assert isinstance(again, Held)
    assert again.attempts == 4


# -- renewing -------------------------------------------------------------------------------------


def test_start_clears_the_ahead_mark_for_good() -> None:
    """A renewal that says "started" is stored; later ones cannot set the mark again."""
    before = RECORDS["held by this, ahead"]
    started, _ = step(before, Renew(MINE, MY_TOKEN, TTL_NS, started=True), STAMP)
    assert isinstance(started, Held)
    assert (started.ahead, started.revision) == (False, STAMP.revision)
    assert is_stored_change(before, started)
    later, _ = step(started, Renew(MINE, MY_TOKEN, TTL_NS), Stamp(NOW_NS + 1, WALL_NS, 101, 51))
    assert isinstance(later, Held)
    assert not later.ahead
    assert not is_stored_change(started, later)


def test_longer_ttl_is_stored_before_it_is_promised() -> None:
    """A restart gives the stored ttl anew, so a longer one is a stored change."""
    after, _ = step(HELD_BY_THIS, Renew(MINE, MY_TOKEN, 2 * TTL_NS), STAMP)
    assert isinstance(after, Held)
    assert (after.ttl_ns, after.deadline_ns) == (2 * TTL_NS, NOW_NS + 2 * TTL_NS)
    assert is_stored_change(HELD_BY_THIS, after)
    assert after.revision == STAMP.revision


def test_shorter_renewal_takes_nothing_back() -> None:
    """Neither the deadline nor the stored ttl gets smaller, and nothing need be stored."""
    after, outcome = step(HELD_BY_THIS, Renew(MINE, MY_TOKEN, SECOND_NS), STAMP)
    assert outcome.answer is Answer.RENEWED
    assert after == HELD_BY_THIS
    assert not is_stored_change(HELD_BY_THIS, after)


def test_expired_holder_goes_on_if_nobody_came() -> None:
    """A holder whose lease ran out long ago may renew and then complete."""
    before = HELD_BY_THIS._replace(deadline_ns=0)
    renewed, outcome = step(before, COMMANDS["renew"], STAMP)
    assert outcome.answer is Answer.RENEWED
    assert isinstance(renewed, Held)
    assert not renewed.is_expired(NOW_NS)
    _, outcome = step(renewed, COMMANDS["complete"], STAMP)
    assert outcome.answer is Answer.COMPLETED


def test_repeated_claim_does_not_start_the_ttl_again() -> None:
    """The repetition gets the same token and what remains, be it less than nothing."""
    for state in ("held by this", "held by this, expired"):
        after, outcome = step(RECORDS[state], Claim(MINE, 9 * TTL_NS, "x", 1, ahead=True), STAMP)
        assert after is RECORDS[state]
        assert (outcome.answer, outcome.is_new_grant) == (Answer.GRANTED, False)


# -- sequences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["complete", "fail", "release"])
@pytest.mark.parametrize("attempts", [1, 3])
def test_settling_twice_is_settling_once(kind: str, attempts: int) -> None:
    """A retry after a lost reply gets the same answer and changes nothing."""
    before = HELD_BY_THIS._replace(attempts=attempts)
    once, first = step(before, COMMANDS[kind], STAMP)
    twice, second = step(once, COMMANDS[kind], Stamp(NOW_NS + 5, WALL_NS + 5, 101, 51))
    assert twice is once
    assert first.answer is second.answer


@pytest.mark.parametrize("taken", ["held by another", "held by another, expired"])
def test_stale_holder_is_refused_everywhere(taken: str) -> None:
    """Once another was granted the key, renew, complete, fail and release of the first are LOST."""
    for kind in ("renew", "complete", "fail", "release"):
        after, outcome = step(RECORDS[taken], COMMANDS[kind], STAMP)
        assert after is RECORDS[taken]
        assert outcome.answer is Answer.LOST


@pytest.mark.parametrize(
    ("revision", "answer"), [(39, Answer.RESET), (40, Answer.RESET), (41, Answer.KEPT)]
)
def test_reset_spares_what_it_has_not_seen(revision: int, answer: Answer) -> None:
    """A record that changed after the revision that the caller saw is left alone."""
    for record in (HELD_BY_OTHER, FAILED_BY_THIS, DONE_BY_THIS):
        before = record._replace(revision=revision)
        after, outcome = step(before, Reset(max_revision=40), STAMP)
        assert outcome.answer is answer
        assert after is (before if answer is Answer.KEPT else None)


def test_reset_twice_is_reset_once() -> None:
    """The retry finds nothing and says so, and spares the holder that came in between."""
    after, outcome = step(None, Reset(40), STAMP)
    assert (after, outcome.answer) == (None, Answer.RESET)
    held, _ = step(None, COMMANDS["claim"], STAMP)
    kept, outcome = step(held, Reset(40), Stamp(NOW_NS, WALL_NS, 101, 51))
    assert kept is held
    assert outcome.answer is Answer.KEPT


def test_seized_lease_is_lost_to_its_holder() -> None:
    """After a seize by the very same claim id the old token is worth nothing."""
    seized, _ = step(HELD_BY_THIS, COMMANDS["seize"], STAMP)
    for kind in ("renew", "complete", "fail", "release"):
        _, outcome = step(seized, COMMANDS[kind], STAMP)
        assert outcome.answer is Answer.LOST


def test_the_rules_look_at_no_wall_time() -> None:
    """Whatever wall time says, answers and leases are the same; only what is displayed differs."""
    for record in RECORDS.values():
        for command in COMMANDS.values():
            one, first = step(record, command, STAMP)
            two, second = step(record, command, dataclasses.replace(STAMP, wall_ns=0))
            assert first == second
            if isinstance(one, Held) and isinstance(two, Held):
                assert one.deadline_ns == two.deadline_ns


@pytest.mark.parametrize("state", RECORDS)
def test_same_input_same_output(state: str) -> None:
    """The rules keep nothing between calls."""
    for command in COMMANDS.values():
        first = step(RECORDS[state], command, STAMP)
        assert step(RECORDS[state], command, STAMP) == first


def test_table_is_complete() -> None:
    """The expected table has every record and every command, and no other."""
    assert TABLE.keys() == RECORDS.keys()
    assert all(row.keys() == COMMANDS.keys() for row in TABLE.values())
