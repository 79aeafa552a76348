"""Bugs to plant: answers that the rules of the table forbid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from distlock_server import batch, group, state
from distlock_server.pending import Watch
from distlock_server.state import Answer, Outcome, Record, Stamp
from distlock_server.table import Table


def claim_id_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that is sent again is granted a second time."""
    real = state._claim

    def claim(record: Record, command: state.Claim, stamp: Stamp) -> Any:
        if isinstance(record, state.Held) and record.claim_id == command.claim_id:
            record = None
        return real(record, command, stamp)

    monkeypatch.setitem(state._STEPS, state.Claim, claim)


def failed_claim_granted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late repetition of a claim that failed is granted anew."""
    real = state._claim

    def claim(record: Record, command: state.Claim, stamp: Stamp) -> Any:
        if isinstance(record, state.Failed):
            record = record._replace(claim_id=b"somebody else's.")
        return real(record, command, stamp)

    monkeypatch.setitem(state._STEPS, state.Claim, claim)


def limit_forgotten_on_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a claim holds already does not count towards its limit on grants."""
    monkeypatch.setattr(batch, "_is_held_by", lambda record, claim_id: False)


def any_completion_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who held a key once may complete it, though it was granted to another since."""
    complete = state._complete

    def lax(record: Record, command: state.Complete, stamp: Stamp) -> Any:
        if isinstance(record, state.Held):
            command = state.Complete(record.claim_id, record.token, command.result)
        return complete(record, command, stamp)

    monkeypatch.setitem(state._STEPS, state.Complete, lax)


def any_release_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who held a key once may release it, though it was granted to another since."""
    release = state._release

    def lax(record: Record, command: state.Release, stamp: Stamp) -> Any:
        if isinstance(record, state.Held):
            command = state.Release(record.claim_id, record.token)
        return release(record, command, stamp)

    monkeypatch.setitem(state._STEPS, state.Release, lax)


def second_completion_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion of a key that another completed is answered COMPLETED."""
    complete = state._complete

    def lax(record: Record, command: state.Complete, stamp: Stamp) -> Any:
        if isinstance(record, state.Done):
            return record, Outcome(Answer.COMPLETED)
        return complete(record, command, stamp)

    monkeypatch.setitem(state._STEPS, state.Complete, lax)


def reset_hits_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reset does not look at the revision: its repetition hits a newer holder."""
    monkeypatch.setitem(state._STEPS, state.Reset, lambda *_: (None, Outcome(Answer.RESET)))


def invalidate_hits_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An invalidation does not look at the token: it undoes a newer completion."""

    def invalidate(record: Record, command: state.Invalidate, stamp: Stamp) -> Any:
        if isinstance(record, state.Done):
            return None, Outcome(Answer.RESET)
        return record, Outcome(Answer.KEPT)

    monkeypatch.setitem(state._STEPS, state.Invalidate, invalidate)


def done_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim with a limit on attempts takes a done key for one that was not tried yet."""
    real = state._claim

    def claim(record: Record, command: state.Claim, stamp: Stamp) -> Any:
        if isinstance(record, state.Done) and command.max_attempts:
            record = None
        return real(record, command, stamp)

    monkeypatch.setitem(state._STEPS, state.Claim, claim)


def run_judged_by_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys that are completed together only the first is looked at."""

    def complete_held(
        records: Sequence[Record], claim_id: bytes, tokens: Sequence[int], stamp: Stamp
    ) -> Any:
        after, outcome = state.step(records[0], state.Complete(claim_id, tokens[0]), stamp)
        if set(map(type, records)) != {state.Held} or not isinstance(after, state.Done):
            return None
        revisions = itertools.count(after.revision)
        numbers = zip(tokens, revisions, strict=False)
        return [after._replace(token=token, revision=last) for token, last in numbers], outcome

    monkeypatch.setattr(group, "complete_held", complete_held)


def nobody_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a key is not told when it is given up."""
    real = Table._take_over

    def take_over(self: Table, *arguments: Any) -> list[Watch]:
        real(self, *arguments)
        return []

    monkeypatch.setattr(Table, "_take_over", take_over)


BUGS = (
    claim_id_ignored,
    failed_claim_granted_again,
    limit_forgotten_on_retry,
    any_completion_taken,
    any_release_taken,
    second_completion_accepted,
    reset_hits_newer,
    invalidate_hits_newer,
    done_granted,
    run_judged_by_its_first,
    nobody_is_woken,
)
"""All of them."""
