"""`distlock.v1.LockTable`: checks requests, runs them on the table, makes the replies.

A request is checked whole before anything is run; see `limits.py`. The rules stand in `state.py`,
what a request of many keys does in `batch.py`, how records look in replies in `messages.py`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final, TypeVar

from distlock_proto import lock_table_pb2 as pb
from distlock_proto import lock_table_pb2_grpc as pb_grpc
from distlock_server import batch, limits, state
from distlock_server.batch import Item, Items
from distlock_server.calls import Calls
from distlock_server.clock import Clock
from distlock_server.codec import Kind
from distlock_server.frontiers import Block, Frontiers
from distlock_server.group import Group
from distlock_server.limits import RequestError
from distlock_server.messages import (
    Room,
    answer_states,
    claim_reply,
    info_message,
    info_size,
    lost_states,
    parse_completions,
    parse_result,
    present_state,
    result_messages,
)
from distlock_server.pending import Rank, TableRunningError
from distlock_server.results import Results
from distlock_server.state import Complete, Fail, Held, Record, Release, Renew, Storage
from distlock_server.status import Activity, guarded
from distlock_server.store import Counts, Page
from distlock_server.table import Table
from distlock_server.turns import next_turn
from distlock_server.version import version
from distlock_server.waits import SHARED_LOOK_S, Waits

T = TypeVar("T")
MessageT = TypeVar("MessageT")
ChangeT = TypeVar("ChangeT", bound=batch.Change)

_KEYS_PER_TURN: Final = 500
"""Keys handled before other requests get a turn on the event loop."""

_RENEW_PAUSE_S: Final = 0.002
_RENEW_TRIES: Final = 500
"""While a group runs a renewal is tried so often, with this pause, before it is queued."""

_PAGE_PIECE: Final = 500
"""Records read at once for a page: a piece with large values stays small enough to hold."""

_KINDS: Final = {
    pb.LIST_FILTER_ALL: None,
    pb.LIST_FILTER_HELD: Kind.HELD,
    pb.LIST_FILTER_FAILED: Kind.FAILED,
}


class LockTableService(pb_grpc.LockTableServicer):
    """The methods of `distlock.v1.LockTable`."""

    def __init__(
        self,
        table: Table,
        calls: Calls,
        waits: Waits,
        results: Results,
        clock: Clock,
        executor: Executor,
        scanner: Executor,
        activity: Activity,
    ) -> None:
        """Serve a table.

        Args:
            table: The table.
            calls: Carries requests to it.
            waits: Parks waits on it.
            results: Large values.
            clock: The table's clock.
            executor: Runs what reads a little, off the event loop.
            scanner: Runs what may read the whole database.
            activity: Counts requests.
        """
        self._table = table
        self._calls = calls
        self._waits = waits
        self._results = results
        self._clock = clock
        self._executor = executor
        self._scanner = scanner
        self.activity = activity
        self._frontiers = Frontiers(clock)
        self._started_ns = clock.now_ns()

    # -- leases -----------------------------------------------------------------------------------

    @guarded
    async def Claim(self, request: pb.ClaimRequest) -> pb.ClaimReply:
        """Ask for leases."""
        keys = limits.checked_keys(request.keys)
        limits.check_claim_id(request.claim_id)
        limits.check_ttl(request.ttl_ns)
        limits.check_text(request.owner, limits.MAX_OWNER_BYTES, "owner")
        following = self._next_slice(request.frontier) if request.HasField("frontier") else None
        command = state.Claim(
            claim_id=request.claim_id,
            ttl_ns=request.ttl_ns,
            owner=request.owner,
            max_attempts=request.max_attempts,
            ahead=request.ahead,
        )
        run = partial(
            batch.claim,
            keys=keys,
            command=command,
            max_grants=request.max_grants,
            wants_records=request.want_results,
        )
        answers = await self._calls.run(keys, run)
        await _turn_of(keys)
        reply = claim_reply(answers, want_results=request.want_results)
        if following is not None:
            reply.next.CopyFrom(following)
        return reply

    @guarded
    async def Frontier(self, request: pb.FrontierRequest) -> pb.Slice:
        """Tell from where to ask next."""
        return self._next_slice(request)

    def _next_slice(self, request: pb.FrontierRequest) -> pb.Slice:
        """Check a question for the frontier, and answer it."""
        blocks = [Block(block.digest, block.n_keys) for block in request.blocks]
        numbers = (request.place, request.n_keys, *(block.n_keys for block in blocks))
        limits.check_frontier([block.digest for block in blocks], numbers)
        found = self._frontiers.next_slice(blocks, request.place, request.n_keys)
        return pb.Slice(block=found.block, place=found.place, n_keys=found.n_keys)

    @guarded
    async def Renew(self, request: pb.RenewRequest) -> pb.RenewReply:
        """Keep leases alive; those that need no write are renewed without the committer."""
        commands = await _parse_all(request.renewals, _parse_renewal, "renewals")
        items = await self._renew_at_once(commands)
        queued = [place for place, item in enumerate(items) if item is None]
        now_ns, revision = self._clock.now_ns(), self._table.revision
        if queued:
            again = [commands[place] for place in queued]
            answers = await self._apply(again, Rank.RENEWAL)
            for place, item in zip(queued, answers.items, strict=True):
                items[place] = item
            now_ns, revision = answers.now_ns, answers.revision
        answered = [item for item in items if item is not None]
        return pb.RenewReply(
            states=answer_states(answered, now_ns),
            lost_states=lost_states(answered, now_ns),
            revision=revision,
        )

    async def _renew_at_once(
        self, commands: Sequence[tuple[bytes, state.Renew]]
    ) -> list[Item | None]:
        """Renew what needs no write; None for what must be queued."""
        items: list[Item | None] = []
        for key, command in commands:
            done = await self._renew_one(key, command)
            items.append(None if done is None else Item(done[0].answer, done[1]))
            if len(items) % _KEYS_PER_TURN == 0:
                await next_turn()
        return items

    async def _renew_one(
        self, key: bytes, command: state.Renew
    ) -> tuple[state.Outcome, Record] | None:
        """Renew without the committer; wait for the group that it runs, not for one it writes."""
        for _ in range(_RENEW_TRIES):
            try:
                return self._table.try_renew(key, command)
            except TableRunningError:
                await asyncio.sleep(_RENEW_PAUSE_S)
        return None

    @guarded
    async def Settle(self, request: pb.SettleRequest) -> pb.SettleReply:
        """End leases."""
        commands = await _parse_all(request.settlements, _parse_settlement, "settlements")
        completions = parse_completions(request.completions)
        keys = [key for key, _ in commands]
        if completions:
            keys += itertools.chain.from_iterable(run.keys for run in completions)
            limits.check_keys(keys, "settlements and completions")
        for key, command in commands:
            if isinstance(command, Complete) and command.result.storage is Storage.SERVER:
                await self._results.require(key, command)
        run = partial(batch.settle, commands=commands, completions=completions)
        answers = await self._calls.run(keys, run, rank=Rank.ENDING)
        await _turn_of(keys)
        return pb.SettleReply(
            states=answer_states(answers.items, answers.now_ns),
            lost_states=lost_states(answers.items, answers.now_ns),
            revision=answers.revision,
        )

    async def _apply(
        self, commands: Sequence[tuple[bytes, batch.Change]], rank: Rank = Rank.OTHER
    ) -> Items:
        keys = [key for key, _ in commands]
        run = partial(batch.apply_each, commands=commands)
        return await self._calls.run(keys, run, rank=rank)

    # -- reading ----------------------------------------------------------------------------------

    @guarded
    async def Lookup(self, request: pb.LookupRequest) -> pb.LookupReply:
        """Read keys."""
        keys = limits.checked_keys(request.keys)
        blocks = limits.checked_blocks(request.blocks)
        if blocks and not keys:
            known, revision = self._table.blocks_done(blocks)
            return pb.LookupReply(blocks=known, revision=revision)
        wants_records = request.want_infos or request.want_results

        def run(txn: Group) -> tuple[Items, bytes]:
            found = batch.lookup(txn, keys, wants_records=wants_records)
            return found, self._table.store.done_blocks.known(blocks, txn.generation)

        (items, now_ns, revision, is_all_done), known = await self._calls.run(keys, run)
        reply = pb.LookupReply(blocks=known, revision=revision)
        await _turn_of(keys)
        if is_all_done:
            reply.states = bytes((pb.KEY_STATE_DONE,)) * len(keys)
        else:
            reply.states = bytes(present_state(item.record, now_ns) for item in items)
        if request.want_infos:
            records = [(key, item.record) for key, item in zip(keys, items, strict=True)]
            reply.infos.extend(
                await self._infos(records, now_ns, want_results=request.want_results)
            )
        elif request.want_results:
            reply.results.extend(result_messages(item.record for item in items))
        return reply

    async def _infos(
        self, records: Sequence[tuple[bytes, Record]], now_ns: int, *, want_results: bool
    ) -> list[pb.KeyInfo]:
        room = Room()
        infos = []
        for key, record in records:
            infos.append(info_message(key, record, now_ns, room, want_result=want_results))
            if len(infos) % _KEYS_PER_TURN == 0:
                await next_turn()
        return infos

    @guarded
    async def Wait(self, request: pb.WaitRequest) -> pb.WaitReply:
        """Wait for keys held by others."""
        keys = limits.checked_keys(request.keys)
        if not 0 <= request.timeout_ns <= limits.MAX_WAIT_NS:
            raise RequestError(
                f"timeout_ns: {request.timeout_ns} ns, a wait lasts 0 to {limits.MAX_WAIT_NS} ns"
            )
        n_wanted = min(max(request.min_settled, 1), len(keys))
        look = partial(batch.lookup, keys=keys)
        end_ns = self._clock.now_ns() + request.timeout_ns
        with self._waits.park(keys) as parked:
            while True:
                seen = await self._calls.run(keys, look)
                wake_ns = min(_settled_at_ns(seen, n_wanted), end_ns)
                if wake_ns > seen.now_ns and not self._waits.is_closing:
                    pause_s = (wake_ns - seen.now_ns) / 1e9
                    if self._table.is_shared:
                        pause_s = min(pause_s, SHARED_LOOK_S)
                    await parked.sleep(pause_s)
                    # A server that ends answers at once, with what was seen last.
                    if not self._waits.is_closing:
                        continue
                now_ns = max(seen.now_ns, self._clock.now_ns())
                states = bytes(present_state(item.record, now_ns) for item in seen.items)
                return pb.WaitReply(states=states, revision=seen.revision)

    @guarded
    async def List(self, request: pb.ListRequest) -> pb.ListReply:
        """List keys, a page at a time."""
        limits.check_range(request.start_key, request.end_key)
        if request.filter not in _KINDS:
            raise RequestError(f"filter: {request.filter} is unknown to this server")
        revision = self._table.revision
        page = await self._off_loop(partial(self._read_page, request))
        infos = await self._infos(
            page.records, self._clock.now_ns(), want_results=request.want_results
        )
        return pb.ListReply(infos=infos, next_start_key=page.next_start, revision=revision)

    def _read_page(self, request: pb.ListRequest) -> Page:
        """Read a page piece by piece until it has enough keys or bytes."""
        only = _KINDS[request.filter]
        limit = min(request.limit or limits.MAX_PAGE_KEYS, limits.MAX_PAGE_KEYS)
        # Held keys are in memory and carry no values: reading them in pieces would sort them anew.
        piece = limit if only is Kind.HELD else _PAGE_PIECE
        records: list[tuple[bytes, Record]] = []
        start, n_bytes = request.start_key, 0
        while True:
            n_wanted = min(piece, limit - len(records))
            page = self._table.store.list_page(start, request.end_key, n_wanted, only)
            for key, record in page.records:
                n_bytes += info_size(key, record, want_result=request.want_results)
                if records and n_bytes > limits.MAX_REPLY_BYTES:
                    return Page(records, key)
                records.append((key, record))
            start = page.next_start
            if not start or len(records) >= limit:
                return Page(records, start)

    @guarded
    async def Count(self, request: pb.CountRequest) -> pb.CountReply:
        """Count keys, by the kept counters or by reading a prefix."""
        revision = self._table.revision
        limits.check_length(request.prefix, limits.MAX_KEY_BYTES, "prefix")
        limits.check_text(request.namespace, limits.MAX_KEY_BYTES, "namespace")
        if request.prefix:
            end = prefix_end(request.prefix)
            counts, is_complete = await self._count_range(request.prefix, end), True
        else:
            namespace = request.namespace.encode()
            counts, is_complete = await self._off_loop(partial(self._table.store.count, namespace))
        return pb.CountReply(
            done=counts.done,
            held=counts.held,
            expired=counts.expired,
            failed=counts.failed,
            is_complete=is_complete,
            revision=revision,
        )

    async def _count_range(self, start: bytes, end: bytes) -> Counts:
        """Count piece by piece: others that scan get their turns, and nobody's count ends."""
        count_piece = self._table.store.count_piece
        counts, next_start = await self._scan(partial(count_piece, start, end))
        while next_start:
            more, next_start = await self._scan(partial(count_piece, next_start, end))
            counts = counts.plus(more)
        return counts

    # -- undoing ----------------------------------------------------------------------------------

    @guarded
    async def Reset(self, request: pb.ResetRequest) -> pb.ResetReply:
        """Make keys absent."""
        keys = limits.checked_keys(request.keys)
        command = state.Reset(request.max_revision)
        answers = await self._apply([(key, command) for key in keys])
        return pb.ResetReply(
            states=answer_states(answers.items, answers.now_ns), revision=answers.revision
        )

    @guarded
    async def Invalidate(self, request: pb.InvalidateRequest) -> pb.InvalidateReply:
        """Make done keys absent whose result is unusable."""
        commands = await _parse_all(request.invalidations, _parse_invalidation, "invalidations")
        answers = await self._apply(commands)
        return pb.InvalidateReply(
            states=answer_states(answers.items, answers.now_ns), revision=answers.revision
        )

    # -- large values -----------------------------------------------------------------------------

    @guarded
    async def UploadResult(self, request: pb.UploadResultRequest) -> pb.UploadResultReply:
        """Take a chunk of a large value."""
        return await self._results.upload(request)

    @guarded
    async def DownloadResult(self, request: pb.DownloadResultRequest) -> pb.DownloadResultReply:
        """Give a chunk of a large value."""
        return await self._results.download(request)

    # -- the server -------------------------------------------------------------------------------

    @guarded
    async def GetServerInfo(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoReply:
        """Tell the server's version and limits."""
        del request  # has no fields
        return pb.GetServerInfoReply(
            version=version(),
            database_id=self._table.database_id,
            engine=self._table.engine_kind,
            wall_ns=self._clock.wall_ns(),
            revision=self._table.revision,
            reset_generation=self._table.generation,
            max_key_bytes=limits.MAX_KEY_BYTES,
            max_keys_per_request=limits.MAX_KEYS_PER_REQUEST,
            max_owner_bytes=limits.MAX_OWNER_BYTES,
            max_error_bytes=limits.MAX_ERROR_BYTES,
            max_inline_result_bytes=limits.MAX_INLINE_RESULT_BYTES,
            max_result_bytes=limits.MAX_RESULT_BYTES,
            max_chunk_bytes=limits.MAX_CHUNK_BYTES,
            max_ttl_ns=limits.MAX_TTL_NS,
            max_wait_ns=limits.MAX_WAIT_NS,
            uptime_ns=self._clock.now_ns() - self._started_ns,
        )

    async def _scan(self, read: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._scanner, read)

    async def _off_loop(self, read: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, read)


def prefix_end(prefix: bytes) -> bytes:
    """Give the first key after all that start with a prefix; empty if there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b""


def _settled_at_ns(seen: Items, n_wanted: int) -> int:
    """Tell when so many keys are settled if nobody does anything; by now: they are."""
    ends = sorted(
        item.record.deadline_ns if isinstance(item.record, Held) else 0 for item in seen.items
    )
    return ends[n_wanted - 1] if ends else seen.now_ns


async def _turn_of(items: Sequence[object]) -> None:
    """Wait for a turn if what comes next takes long with so many items."""
    if len(items) >= _KEYS_PER_TURN:
        await next_turn()


async def _parse_all(
    messages: Sequence[MessageT], parse: Callable[[MessageT], tuple[bytes, ChangeT]], field: str
) -> list[tuple[bytes, ChangeT]]:
    """Check the items of a request and take them out of their messages, in turns with others.

    Raises:
        RequestError: Names the key of the first that is wrong.
    """
    limits.check_count(len(messages), field)
    commands: list[tuple[bytes, ChangeT]] = []
    for message in messages:
        commands.append(parse(message))
        if len(commands) % _KEYS_PER_TURN == 0:
            await next_turn()
    limits.check_keys([key for key, _ in commands], field)
    return commands


def _parse_renewal(message: pb.Renewal) -> tuple[bytes, Renew]:
    holder = message.holder
    try:
        limits.check_claim_id(holder.claim_id)
        limits.check_ttl(message.ttl_ns)
    except RequestError as error:
        raise _of_key("renewals", holder.key, error) from None
    return holder.key, Renew(holder.claim_id, holder.token, message.ttl_ns, message.started)


def _parse_settlement(message: pb.Settlement) -> tuple[bytes, Complete | Fail | Release]:
    holder = message.holder
    try:
        limits.check_claim_id(holder.claim_id)
        return holder.key, _parse_how(message, holder)
    except RequestError as error:
        raise _of_key("settlements", holder.key, error) from None


def _parse_how(message: pb.Settlement, holder: pb.Holder) -> Complete | Fail | Release:
    how = message.WhichOneof("how")
    if how == "complete":
        result = parse_result(message.complete.result, "result")
        return Complete(holder.claim_id, holder.token, result)
    if how == "fail":
        limits.check_text(message.fail.error, limits.MAX_ERROR_BYTES, "error")
        return Fail(holder.claim_id, holder.token, message.fail.error)
    if how == "release":
        return Release(holder.claim_id, holder.token)
    raise RequestError("neither complete, fail nor release is set")


def _parse_invalidation(message: pb.Invalidation) -> tuple[bytes, state.Invalidate]:
    return message.key, state.Invalidate(message.token)


def _of_key(field: str, key: bytes, error: RequestError) -> RequestError:
    """Name the item that is wrong; its key first, if that is wrong as well."""
    limits.check_key(key, field)
    return RequestError(f"{field} of key {key!r}: {error}")
