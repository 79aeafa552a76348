"""Is what clients saw of a lock table possible? A checker of recorded histories.

Clients write down each operation on a key: when it was sent, when it was answered, and what the
answer was. Keys are independent registers, and every change of the store has a revision that each
reply carries, so the order in which a correct server did it all is known: by revision, the change
itself first, those that saw it behind it. `check` tests that order

- against real time: nothing may stand behind what was sent only after it was answered;
- key by key against the rules, which are written down here a second time, as plainly as possible,
  so that the server's own are not checked against themselves;
- over all keys: each revision belongs to one call, and fencing tokens only grow.

An operation without an answer may have happened, at any time after it was sent, or not at all:
the checker follows every possibility. A lease may be taken over only once it can have run out.

Renewals carry no exact revision; each is tested against every state that its key can have had
while it was under way.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

NEVER: Final = 1 << 62
"""When an operation without an answer ended."""

MAX_BRANCHES: Final = 4_096
"""Possibilities that are followed for one key; with more, its operations are left undecided."""


class Op(NamedTuple):
    """One operation on one key.

    Attributes:
        call: The request it was part of.
        key: The key.
        kind: claim, complete, fail, release, reset, renew or lookup.
        start_ns: When it was sent.
        end_ns: When it was answered; `NEVER`: it was not.
        revision: The store revision in the reply.
        answer: The state in the reply: GRANTED, BUSY, …
        claim_id: Who asks.
        token: Claim: as granted. Settle, renew: as sent. Lookup: as shown.
        value: Complete: the value sent. Lookup: the value shown.
        number: Claim, renew: the ttl in nanoseconds. Reset: the highest revision.
        n_keys: Keys of the call; each that changed took one of the revisions up to the reply's.
        gone_ns: Without an answer: when the server that it was sent to was dead.
    """

    call: int
    key: bytes
    kind: str
    start_ns: int
    end_ns: int = NEVER
    revision: int = 0
    answer: str = ""
    claim_id: bytes = b""
    token: int = 0
    value: bytes = b""
    number: int = 0
    n_keys: int = 1
    gone_ns: int = NEVER


class State(NamedTuple):
    """A key that is not absent.

    Attributes:
        kind: held, failed or done.
        token: The token; -1: of a grant that nobody saw.
        claim_id: The holder, or the last one of a failed key.
        revision: Of the last change, at least; -1: not known.
        slack: So much newer may it be.
        attempts: Attempts that count.
        ends_ns: Held: the lease cannot have run out earlier.
        released: Failed: it was given back.
        value: Done: the value.
    """

    kind: str
    token: int
    claim_id: bytes = b""
    revision: int = -1
    attempts: int = 1
    ends_ns: int = 0
    released: bool = False
    value: bytes = b""
    slack: int = 0


Key: TypeAlias = "State | None"
Stepped: TypeAlias = "tuple[Key, str]"


class ViolationError(Exception):
    """The history is impossible; the message says where."""


class _UndecidedError(Exception):
    """More is possible with a key than is followed."""


class Checked(NamedTuple):
    """What was checked.

    Attributes:
        n_ops: Operations.
        n_unanswered: Those without an answer.
        n_takeovers: Grants of a key whose lease had run out.
        last_revision: The highest revision seen.
        max_token: The highest token seen.
        n_undecided: Operations on keys with so many possibilities that not all were followed.
    """

    n_ops: int
    n_unanswered: int
    n_takeovers: int
    last_revision: int
    max_token: int
    n_undecided: int


# -- the rules, once more -------------------------------------------------------------------------


def _is_holder(state: Key, op: Op) -> bool:
    return (
        state is not None
        and state.kind == "held"
        and state.claim_id == op.claim_id
        and state.token in (op.token, -1)
    )


def _claim(state: Key, op: Op) -> Stepped:
    attempts = 0
    if state is not None:
        if state.kind == "done":
            return state, "DONE"
        if state.kind == "held":
            if state.claim_id == op.claim_id:
                if state.token == -1:
                    return state._replace(token=op.token or -1), "GRANTED"
                if op.token and op.token != state.token:
                    return state, "another token"
                return state, "GRANTED"
            is_free = op.answer == "GRANTED" or (not op.answer and op.number)
            if not is_free or op.end_ns < state.ends_ns:
                return state, "BUSY"
        elif state.claim_id == op.claim_id:
            return state, "LOST"
        attempts = state.attempts
    ends_ns = op.start_ns + op.number
    token, revision, slack = op.token or -1, _oldest(op), op.n_keys - 1
    held = State("held", token, op.claim_id, revision, attempts + 1, ends_ns, slack=slack)
    return held, "GRANTED"


def _oldest(op: Op) -> int:
    """Give the lowest revision that a change of this operation can have; -1: not known."""
    return op.revision - op.n_keys + 1 if op.revision else -1


def _complete(state: Key, op: Op) -> Stepped:
    if _is_holder(state, op):
        done = State("done", op.token, b"", _oldest(op), value=op.value, slack=op.n_keys - 1)
        return done, "COMPLETED"
    if state is not None and state.kind == "done" and state.token == op.token:
        return state, "COMPLETED"
    return state, "LOST"


def _gave_up(state: Key, op: Op) -> Stepped | None:
    if state is None or state.kind != "failed":
        return None
    if state.claim_id != op.claim_id or state.token not in (op.token, -1):
        return state, "LOST"
    return state, "RELEASED" if state.released else "FAILED"


def _fail(state: Key, op: Op) -> Stepped:
    if state is not None and _is_holder(state, op):
        revision, slack = _oldest(op), op.n_keys - 1
        failed = State("failed", op.token, op.claim_id, revision, state.attempts, slack=slack)
        return failed, "FAILED"
    return _gave_up(state, op) or (state, "LOST")


def _release(state: Key, op: Op) -> Stepped:
    if state is None:
        return None, "RELEASED"
    if not _is_holder(state, op):
        return _gave_up(state, op) or (state, "LOST")
    if state.attempts <= 1:
        return None, "RELEASED"
    revision, attempts = _oldest(op), state.attempts - 1
    return (
        State("failed", op.token, op.claim_id, revision, attempts, 0, True, b"", op.n_keys - 1),
        "RELEASED",
    )


def _reset(state: Key, op: Op) -> Stepped:
    if state is None:
        return None, "RESET"
    is_known = state.revision >= 0 and not (0 <= op.number - state.revision < state.slack)
    if (state.revision > op.number) if is_known else (op.answer == "KEPT"):
        return state, "KEPT"
    return None, "RESET"


_LOOKED_UP: Final = {"held": ("BUSY", "BUSY_AHEAD", "EXPIRED"), "failed": ("FAILED",)}


def _lookup(state: Key, op: Op) -> Stepped:
    if state is None:
        return None, "ABSENT"
    if state.kind == "done":
        if state.token != op.token or state.value != op.value:
            return state, f"DONE with token {state.token} and {state.value[:8]!r}…"
        return state, "DONE"
    if op.answer not in _LOOKED_UP[state.kind]:
        return state, state.kind
    if state.kind == "held":
        if state.token == -1:
            state = state._replace(token=op.token)
        elif state.token != op.token:
            return state, f"held with token {state.token}"
        if op.answer == "EXPIRED" and op.end_ns < state.ends_ns:
            return state, "held by a lease that runs"
    return state, op.answer


_STEPS: Final[dict[str, Callable[[Key, Op], Stepped]]] = {
    "claim": _claim,
    "complete": _complete,
    "fail": _fail,
    "release": _release,
    "reset": _reset,
    "lookup": _lookup,
}

_CHANGES: Final = frozenset(("GRANTED", "COMPLETED", "FAILED", "RELEASED", "RESET"))


# -- one key --------------------------------------------------------------------------------------


class _Change(NamedTuple):
    op: Op
    is_grant: bool
    over: int  # the token of a lease that ran out before this grant; 0: none


class _KeyHistory:
    """The operations of one key, in order of revisions, and what became of them."""

    def __init__(self) -> None:
        self.answered: list[Op] = []
        self.unanswered: list[Op] = []
        self.renewals: list[Op] = []
        self.changes: list[_Change] = []
        self.n_unsure = 0
        self.open: dict[int, Op] = {}
        self.timeline: list[tuple[Op | None, list[Key]]] = [(None, [None])]

    def replay(self) -> None:
        """Find an order of the operations that the rules allow.

        It is known but for those that saw the same revision: mostly the one that made it comes
        first, and then a repetition. Where that does not fit, the other ways are tried.

        Raises:
            ViolationError: There is none.
            _UndecidedError: None was found among those that were followed, and there are more.
        """
        try:
            self._replay()
        except ViolationError:
            undecided: _UndecidedError | None = None
            for answered in _other_orders(self.answered):
                again = _KeyHistory()
                again.answered = answered
                again.unanswered, again.renewals = self.unanswered, self.renewals
                try:
                    again._replay()
                except ViolationError:
                    continue
                except _UndecidedError as error:
                    undecided = error
                    continue
                self.changes, self.n_unsure = again.changes, again.n_unsure
                return
            if undecided is not None:
                raise undecided from None
            raise

    def give_up(self) -> int:
        """Take any of its operations for one that may have changed it; count them."""
        self.changes = []
        self.n_unsure = len(self.answered)
        return len(self.answered) + len(self.unanswered) + len(self.renewals)

    def _replay(self) -> None:
        if self.unanswered or self.renewals:
            self._replay_branches()
            self._check_renewals()
            return
        state: Key = None
        steps, changes = _STEPS, self.changes
        for op in self.answered:
            after, answer = steps[op.kind](state, op)
            if answer != op.answer:
                raise _impossible(op, [state], answer)
            if after is not state:
                is_grant = op.kind == "claim"
                is_takeover = is_grant and state is not None and state.kind == "held"
                over = state.token if is_takeover and state is not None else 0
                changes.append(_Change(op, is_grant, over))
                state = after

    def _replay_branches(self) -> None:
        branches: dict[tuple[Key, frozenset[int]], None] = {(None, frozenset()): None}
        self.open = dict(enumerate(self.unanswered))
        for op in self.answered:
            followed = self._follow_unanswered(branches, op)
            # Between this operation and the next, what a dead server was sent cannot happen.
            self.open = {n: o for n, o in self.open.items() if o.gone_ns > op.start_ns}
            left: dict[tuple[Key, frozenset[int]], None] = {}
            changes: set[tuple[bool, int] | None] = set()
            wrong = ""
            for state, used in followed:
                after, answer = _STEPS[op.kind](state, op)
                if answer != op.answer:
                    wrong = answer
                    continue
                left[after, used.intersection(self.open)] = None
                is_fresh = after != state and op.kind != "lookup" and not _is_learned(state, after)
                is_grant = op.kind == "claim"
                is_held = state is not None and state.kind == "held"
                over = state.token if is_grant and is_held and state is not None else 0
                changes.add((is_grant, over) if is_fresh else None)
            if not left:
                raise _impossible(op, [state for state, _ in followed], wrong)
            sure = changes.pop() if len(changes) == 1 else None
            if sure is not None:
                self.changes.append(_Change(op, *sure))
            self.n_unsure += bool(changes)
            branches = left
            states = list(dict.fromkeys(state for state, _ in followed))
            self.timeline[-1][1].extend(states)
            self.timeline.append((op, list(dict.fromkeys(state for state, _ in left))))
        last = self._follow_unanswered(branches, None)
        self.timeline[-1][1].extend(state for state, _ in last)

    def _follow_unanswered(
        self, branches: Iterable[tuple[Key, frozenset[int]]], before: Op | None
    ) -> dict[tuple[Key, frozenset[int]], None]:
        """Add what the operations without an answer may have done before this one."""
        limit_ns = NEVER if before is None else before.end_ns
        possible = [(n, op) for n, op in self.open.items() if op.start_ns < limit_ns]
        found = dict.fromkeys(branches)
        todo = list(found) if possible else []
        while todo:
            state, used = todo.pop()
            for n, op in possible:
                if n in used:
                    continue
                after, _ = _STEPS[op.kind](state, op._replace(end_ns=limit_ns))
                if after == state:
                    continue
                branch = after, used | {n}
                if branch not in found:
                    found[branch] = None
                    todo.append(branch)
            if len(found) > MAX_BRANCHES:
                raise _UndecidedError
        return found

    def _check_renewals(self) -> None:
        for renewal in self.renewals:
            if renewal.end_ns == NEVER:
                continue
            wanted = renewal.answer == "RENEWED"
            possible = self._states_during(renewal)
            if not any(_is_holder(state, renewal) == wanted for state in possible):
                raise _impossible(renewal, possible, "RENEWED" if not wanted else "LOST")
        for change in self.changes:
            if change.over:
                self._check_takeover(change.op, change.over)

    def _states_during(self, renewal: Op) -> list[Key]:
        """Give the states that the key can have had between sending and answer."""
        first = 0
        for place, (op, _) in enumerate(self.timeline):
            if op is not None and op.end_ns < renewal.start_ns:
                first = place
        possible: list[Key] = []
        for op, states in self.timeline[first:]:
            if op is not None and op.start_ns > renewal.end_ns:
                break
            possible += states
        return possible

    def _check_takeover(self, grant: Op, token: int) -> None:
        for renewal in self.renewals:
            if (
                renewal.answer == "RENEWED"
                and renewal.token == token
                and renewal.end_ns < grant.start_ns
                and grant.end_ns < renewal.start_ns + renewal.number
            ):
                raise ViolationError(
                    f"key {grant.key!r}: token {grant.token} was granted while token "
                    f"{renewal.token} held a renewed lease"
                )


def _other_orders(answered: Sequence[Op]) -> Iterator[list[Op]]:
    """Give orders in which another operation of those that saw the same revision comes first."""
    for place in range(1, len(answered)):
        op, before = answered[place], answered[place - 1]
        if op.revision != before.revision or op.kind == "lookup" or op.answer not in _CHANGES:
            continue
        first = place
        while first and answered[first - 1].revision == op.revision:
            first -= 1
            yield [*answered[:first], op, *answered[first:place], *answered[place + 1 :]]


def _is_learned(before: Key, after: Key) -> bool:
    """Tell whether only a token became known."""
    return (
        before is not None
        and after is not None
        and before.token == -1
        and before == after._replace(token=-1)
    )


def _impossible(op: Op, states: Sequence[Key], answer: str) -> ViolationError:
    shown = list(dict.fromkeys(states))[:4]
    return ViolationError(
        f"key {op.key!r}: {op.kind} with token {op.token} was answered {op.answer} at revision "
        f"{op.revision}, and the right answer was {answer}; the key was one of {shown}"
    )


# -- all keys -------------------------------------------------------------------------------------


def check(history: Iterable[Op]) -> Checked:
    """Check a history.

    Args:
        history: All operations that any client sent, in any order, from an empty database on.

    Returns:
        Figures about it.

    Raises:
        ViolationError: No correct server can have answered so.
    """
    ops = list(history)
    exact = [op for op in ops if op.end_ns != NEVER and op.kind != "renew"]
    exact.sort(key=_place)
    _check_real_time(exact)
    keys: defaultdict[bytes, _KeyHistory] = defaultdict(_KeyHistory)
    for op in exact:
        keys[op.key].answered.append(op)
    n_unanswered = 0
    for op in ops:
        if op.kind == "renew":
            keys[op.key].renewals.append(op)
        elif op.end_ns == NEVER:
            n_unanswered += 1
            if op.kind != "lookup":
                keys[op.key].unanswered.append(op)
    n_undecided = 0
    for key_history in keys.values():
        try:
            key_history.replay()
        except _UndecidedError:
            n_undecided += key_history.give_up()
    changes = [change for key_history in keys.values() for change in key_history.changes]
    last_revision = exact[-1].revision if exact else 0
    # A renewal to a longer lease takes a revision as well.
    n_unsure = n_unanswered + sum(len(key_history.renewals) for key_history in keys.values())
    n_unsure += sum(key_history.n_unsure for key_history in keys.values())
    _check_revisions(exact, changes, last_revision, n_unsure)
    _check_tokens(changes)
    return Checked(
        len(ops),
        n_unanswered,
        sum(change.over != 0 for change in changes),
        last_revision,
        max((op.token for op in exact), default=0),
        n_undecided,
    )


def _place(op: Op) -> Any:
    """Give the order in which operations are tried: what changed a key before what saw it."""
    return op.revision, op.kind == "lookup" or op.answer not in _CHANGES, op.start_ns


def _check_real_time(exact: Sequence[Op]) -> None:
    """Check that nothing saw an older revision than what was answered before it was sent.

    Operations that saw the same revision do not change each other; `_check_revisions` looks at the
    one among them that made it.
    """
    if not exact:
        return
    latest = newest = exact[0]  # sent last: of older revisions, and of all so far
    for op in exact:
        if op.revision != newest.revision and newest.start_ns > latest.start_ns:
            latest = newest
        if op.end_ns < latest.start_ns and latest.revision < op.revision:
            raise _backwards(latest, op)
        if op.start_ns > newest.start_ns or op.revision != newest.revision:
            newest = op


def _backwards(late: Op, early: Op) -> ViolationError:
    return ViolationError(
        f"{late.kind} of key {late.key!r} was sent after {early.kind} of key {early.key!r} was "
        f"answered, and saw revision {late.revision} instead of {early.revision} or a newer one"
    )


def _check_revisions(
    exact: Sequence[Op], changes: Sequence[_Change], last_revision: int, n_unsure: int
) -> None:
    """Check that each revision belongs to one change, and none is missing without a reason."""
    earliest: dict[int, Op] = {}
    for op in exact:
        first = earliest.setdefault(op.revision, op)
        if op.end_ns < first.end_ns:
            earliest[op.revision] = op
    for change in changes:
        first = earliest[change.op.revision]
        if first.end_ns < change.op.start_ns:
            raise _backwards(change.op, first)
    # Of calls that saw one revision one made it. Which one is not known, where one found done what
    # the other did; so what both are held to have done must fit in.
    made = Counter(change.op.revision for change in changes)
    before = 0
    for revision, n_changes in sorted(made.items()):
        if revision - n_changes < before:
            raise ViolationError(f"revision {revision} belongs to more than one change")
        before = revision
    n_missing = last_revision - len(changes)
    if n_missing > n_unsure:
        raise ViolationError(
            f"{n_missing} revisions are nobody's, and only {n_unsure} operations may have made them"
        )


def _check_tokens(changes: Sequence[_Change]) -> None:
    grants = sorted(
        (change.op for change in changes if change.is_grant), key=lambda op: (op.revision, op.token)
    )
    before = 0
    for op in grants:
        if op.token <= before:
            raise ViolationError(
                f"key {op.key!r}: token {op.token} was granted at revision {op.revision}, "
                f"after token {before}"
            )
        before = op.token
