"""What a loop must keep, checked in one worker's process as it happens; see docs/simulation.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from run_once.key_pass import KeyPass
from run_once.lease import Lease
from run_once.live import LiveItem, Outcome
from run_once.pass_options import PassOptions
from run_once.session import Claimed
from tests.simulation.observed import done_blocks
from tests.simulation.schedule import S

if TYPE_CHECKING:
    from tests.simulation.loop_worker import LoopWorker

FRESH_SHARE: Final = 0.9
"""Left of a fixed time when it is handed out: 95 %, less the client's margin, which is 5 %."""

_LEFT_ALONE: Final = (pb.KEY_STATE_DONE, pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)

_SETTLED: Final = (pb.KEY_STATE_EXHAUSTED, pb.KEY_STATE_DONE)

MARGIN_SHARE: Final = 0.05


def completions_of(request: pb.SettleRequest) -> list[tuple[int, int]]:
    """Give what a request completes: the place of its answer, and the token."""
    found = [
        (place, settlement.holder.token)
        for place, settlement in enumerate(request.settlements)
        if settlement.WhichOneof("how") == "complete"
    ]
    short = [token for part in request.completions for token in part.tokens]
    return found + list(enumerate(short, start=len(request.settlements)))


class PassWatch:
    """What one pass was seen to do.

    Attributes:
        keys: What it was given.
        options: How it claims.
        leases: All that it claimed.
        out: What it handed out, by token.
        seen: The last answer on each key.
        completing: Tokens that were completed since an item was asked for, before it was there.
    """

    def __init__(self, keys: list[bytes], options: PassOptions) -> None:
        self.keys = keys
        self.options = options
        self.leases: list[Lease] = []
        self.out: dict[int, LiveItem[str]] = {}
        self.seen: dict[bytes, int] = {}
        self.completing: list[int] = []

    def __repr__(self) -> str:
        return f"{self.options}, claimed {self.leases}, handed out {list(self.out)}"

    def held_ahead(self) -> list[Lease]:
        """Give what it holds, has not handed out, and did not try to give back."""
        return [
            lease
            for lease in self.leases
            if lease.is_open and not lease.is_settlement_sent and lease.token not in self.out
        ]


class LoopPromises:
    """What the loops of one process did so far.

    Attributes:
        queued: Items that are completed in the background and were not seen answered yet.
    """

    def __init__(self, worker: LoopWorker) -> None:
        self.queued: list[LiveItem[str]] = []
        self._worker = worker
        self._passes: dict[int, PassWatch] = {}
        self._ended: dict[int, int] = {}
        self._sent: dict[int, int] = {}
        self._answers: dict[int, int] = {}

    def broken(self, promise: str, text: str) -> NoReturn:
        """Say that a promise was broken."""
        self._worker.world.broken(promise, text)

    # -- what goes over the network ---------------------------------------------------------------

    def take_request(self, request: Message) -> None:
        """Check what is completed, when it is sent for the first time."""
        if not isinstance(request, pb.SettleRequest):
            return
        for _, token in completions_of(request):
            if token not in self._sent:
                self._sent[token] = len(self._sent)
                self._check_completion(token)

    def _check_completion(self, token: int) -> None:
        worker = self._worker
        place = self._ended.get(token)
        if place is None:
            found = self._passes[token]
            if not found.options.is_for_good or not worker.is_claiming:
                self.broken("L2", f"token {token} is completed, and its work was not done")
            found.completing.append(token)
        elif worker.thread == "settler":
            before = [self._ended[sent] for sent in self._sent if sent in self._ended]
            queued = {live.token for live in self.queued}
            late = [ended for ended in before if ended > place]
            if late and any(self._token_at(ended) in queued for ended in late):
                self.broken("L2", f"token {token} is completed behind what ended after it")

    def _token_at(self, place: int) -> int:
        return next(token for token, ended in self._ended.items() if ended == place)

    def take_reply(self, request: Message, reply: Message) -> None:
        """Note what the server said."""
        seen = self._worker.acting_pass
        if isinstance(request, pb.SettleRequest) and isinstance(reply, pb.SettleReply):
            for place, token in completions_of(request):
                self._answers[token] = reply.states[place]
        elif isinstance(reply, pb.WaitReply) and seen is not None:
            assert isinstance(request, pb.WaitRequest)
            seen.seen.update(zip(request.keys, reply.states, strict=True))
        elif isinstance(reply, pb.LookupReply) and seen is not None:
            assert isinstance(request, pb.LookupRequest)
            # A pass looks at whole blocks, and asks for what it passed over and finds free; what
            # it left to others before stays left. One that waits for them looks at the end.
            settled = _SETTLED if seen.options.waits else (*_SETTLED, pb.KEY_STATE_BUSY)
            for key, state in zip(request.keys, reply.states, strict=True):
                if state in _LEFT_ALONE and seen.seen.get(key) not in settled:
                    seen.seen[key] = state
            for digest in done_blocks(request, reply):
                keys = self._worker.world.blocks[digest]
                seen.seen.update(dict.fromkeys(keys, pb.KEY_STATE_DONE))

    # -- what the loop does -----------------------------------------------------------------------

    def take_claimed(self, seen: PassWatch, keys: Sequence[bytes], claimed: Claimed) -> None:
        """Note what a pass claimed."""
        seen.seen.update(zip(keys, claimed.states, strict=True))
        seen.leases += claimed.leases
        for lease in claimed.leases:
            self._passes[lease.token] = seen

    def take_end(self, live: LiveItem[str]) -> None:
        """Note that the work on an item is done."""
        self._ended[live.token] = len(self._ended)

    def take_item(self, seen: PassWatch, live: LiveItem[str], asked_ns: int) -> None:
        """Check an item that is handed out; it was asked for at this time of the own clock."""
        lease = live.lease
        assert isinstance(lease, Lease)
        if live.token in seen.out:
            self.broken("L1", f"{lease} is handed out a second time")
        seen.out[live.token] = live
        completing, seen.completing = seen.completing, []
        if seen.options.is_for_good:
            if live.outcome is not Outcome.COMPLETED:
                self.broken("L2", f"{lease} is handed out and not completed before")
            self._check_completed_only(live, completing)
            return
        if not lease.held:
            self.broken("L1", f"{lease} is handed out, and is not held")
        if not seen.options.is_kept:
            self._check_fresh(lease, asked_ns)

    def _check_completed_only(self, live: LiveItem[str], completing: list[int]) -> None:
        """Check that nothing else was done on the way to this item."""
        for token in completing:
            is_done = self._answers.get(token) == pb.KEY_STATE_COMPLETED
            if is_done and token != live.token:
                self.broken("L2", f"token {token} was completed, {live.token} is handed out")

    def _check_fresh(self, lease: Lease, asked_ns: int) -> None:
        """Check that nearly all is left of a fixed time, unless it was renewed just now."""
        ttl_s = lease.ttl_s
        renewed_ns = lease.grant.expires_ns - int(ttl_s * (1 - MARGIN_SHARE) * S)
        if lease.remaining_s < FRESH_SHARE * ttl_s and renewed_ns < asked_ns:
            self.broken("L1", f"{lease} is handed out, and was for {ttl_s} s")
        if lease in self._worker.session.keeper.leases():
            self.broken("L1", f"{lease} is handed out for a fixed time, and renewed")

    def check_overdue(self, seen: PassWatch, since_ns: int) -> None:
        """Check that nothing is held ahead behind a body that takes much too long."""
        held = seen.held_ahead()
        if held:
            self.broken("L4", f"{held} are held ahead, overdue since {since_ns / S} s")

    def check_queued(self, when: str) -> None:
        """Check that what was queued has an outcome, and the one that the server said."""
        for live in self.queued:
            if live.outcome is None and live.error is None:
                self.broken("L3", f"token {live.token} has no outcome {when}")
            answer = self._answers.get(live.token)
            is_completed = answer == pb.KEY_STATE_COMPLETED
            if (live.outcome is Outcome.COMPLETED) != (is_completed and live.error is None):
                self.broken("L3", f"token {live.token} is {live.outcome}, the answer {answer}")
        self.queued.clear()

    def check_end(self, seen: PassWatch, running: KeyPass[str]) -> None:
        """Check a pass that says that nothing is left."""
        lives = seen.out.values()
        for live in lives:
            if live.error is not None:
                self.broken("L3", f"the loop ends well, and token {live.token} has {live.error}")
            if live.outcome is None and not seen.options.is_explicit:
                self.broken("L3", f"the loop ends, and token {live.token} has no outcome")
        completed = sum(live.outcome is Outcome.COMPLETED for live in lives)
        if running.counts.completed != completed:
            self.broken("L3", f"{running.counts} are counted, {completed} were completed")
        out = {live.key for live in lives}
        for key in dict.fromkeys(seen.keys):
            if key not in out and not self._is_excused(seen, key):
                state = seen.seen.get(key)
                self.broken("L5", f"a loop ends without key {key!r}, in state {state}: {seen}")

    def _is_excused(self, seen: PassWatch, key: bytes) -> bool:
        """Tell whether a pass may end without having handed out a key."""
        state = seen.seen.get(key)
        if state in {pb.KEY_STATE_DONE, pb.KEY_STATE_EXHAUSTED}:
            return True
        if any(lease.is_lost for lease in seen.leases if lease.key == key):
            return True
        return state == pb.KEY_STATE_BUSY and not seen.options.waits

    def check_told(self, seen: PassWatch, n_told: int) -> None:
        """Check that who leaves a loop is told of completions that could not be sent."""
        n_unsent = sum(live.error is not None for live in seen.out.values())
        if n_told < n_unsent:
            self.broken("L3", f"{n_unsent} completions were not sent, {n_told} told: {seen}")

    def check_closed(self, seen: PassWatch) -> None:
        """Check that a loop that was left holds nothing, but for what outlives it."""
        held = seen.held_ahead()
        if not seen.options.is_explicit:
            held += [
                live.lease
                for live in seen.out.values()
                if isinstance(live.lease, Lease)
                and live.lease.is_open
                and not live.lease.is_settlement_sent
                and live not in self.queued
                and live.error is None
            ]
        if held:
            self.broken("L4", f"the loop was left, and {held} are not given back: {seen}")
