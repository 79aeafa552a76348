"""What every engine must do, run on each of them; test_engine_files.py has what concerns disks."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from distlock_server import codec
from distlock_server.clock import ManualClock
from distlock_server.engines import open_engine
from distlock_server.engines.base import (
    APPLIED,
    Engine,
    EngineError,
    Meta,
    Swap,
    decode_counter,
    encode_counter,
)
from distlock_server.engines.keyvalue import Batch, KeyValueEngine
from distlock_server.engines.memory import MemoryEngine, MemoryStore
from tests.contract.engine_kinds import ALL_KINDS, CACHE_MB, NO_META, put, read_one

Opener = Callable[[], Engine]


@pytest.fixture(params=ALL_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Name each engine in turn."""
    name: str = request.param
    return name


@pytest.fixture
def reopen(kind: str, tmp_path: Path) -> Iterator[Opener]:
    """Open one and the same database again and again; the one before is closed first."""
    store = MemoryStore()
    current: list[Engine] = []

    def open_again() -> Engine:
        for engine in current:
            engine.close()
        is_memory = kind == "memory"
        engine = MemoryEngine(store) if is_memory else open_engine(kind, tmp_path / "db", CACHE_MB)
        current[:] = [engine]
        return engine

    yield open_again
    for engine in current:
        engine.close()


@pytest.fixture
def engine(reopen: Opener) -> Engine:
    """Open an empty database."""
    return reopen()


# -- read and commit ------------------------------------------------------------------------------


def test_engine_names_itself(engine: Engine, kind: str) -> None:
    """An engine knows its kind; one that is not shared has no time of its own."""
    assert engine.kind == kind
    assert not engine.shared
    assert engine.read([]) == ([], 0)


def test_reads_come_in_the_order_of_the_keys(engine: Engine) -> None:
    """Present and absent keys, in any order and repeated, are answered one by one."""
    engine.commit([put(b"a", b"1"), put(b"b", b"2")], NO_META)
    found, _ = engine.read([b"b", b"none", b"a", b"b"])
    assert found == [b"2", None, b"1", b"2"]


def filled_with(engine: Engine, n_keys: int) -> dict[bytes, bytes]:
    """Commit keys that lie close together, each with its value; give them."""
    entries = {b"key-%05d" % number: b"value %d" % number for number in range(n_keys)}
    engine.commit([put(key, value) for key, value in entries.items()], NO_META)
    return entries


NEIGHBOURS = [b"key-%05d" % number for number in range(1_000)]
WIDE = [b"key-%05d" % number for number in range(0, 20_000, 40)]
BEHIND = [b"key-9%05d" % number for number in range(300)]
READS = {
    "neighbours": NEIGHBOURS,
    "each other one": NEIGHBOURS[::2],
    "a few of many": WIDE,
    "first close, then far": NEIGHBOURS[:150] + WIDE,
    "none there": BEHIND,
    "nearly none there": [*BEHIND, *NEIGHBOURS[:3]],
    "backwards": NEIGHBOURS[::-1],
    "some twice": NEIGHBOURS + NEIGHBOURS[::3],
    "only one, very often": NEIGHBOURS[:1] * 200,
    "with the server's own": [*NEIGHBOURS, b"\xfesum", b"\xfenone"],
}


@pytest.mark.parametrize("reopens", [False, True])
@pytest.mark.parametrize("n_keys", [0, 500, 20_000])
def test_many_keys_are_read_as_each_by_itself(reopen: Opener, n_keys: int, reopens: bool) -> None:
    """However close the keys lie, and however many others between them; from memory and tables."""
    engine = reopen()
    entries = filled_with(engine, n_keys)
    engine.commit([], Meta(puts=((b"\xfesum", b"7"),)))
    entries[b"\xfesum"] = b"7"
    if reopens:
        engine = reopen()
    for name, keys in READS.items():
        assert engine.read(keys)[0] == [entries.get(key) for key in keys], name


def test_many_keys_are_read_in_a_database_with_holes(engine: Engine) -> None:
    """What was deleted is absent, wherever it lies between the keys."""
    entries = filled_with(engine, 2_000)
    gone = list(entries)[300:1_700:3]
    engine.commit([put(key, None, entries.pop(key)) for key in gone], NO_META)
    keys = [b"key-%05d" % number for number in range(2_500)]
    assert engine.read(keys)[0] == [entries.get(key) for key in keys]


def test_empty_value_is_not_absence(engine: Engine) -> None:
    """An entry without bytes exists: it is read, listed and compared as such."""
    engine.commit([put(b"a", b"")], NO_META)
    assert read_one(engine, b"a") == b""
    assert engine.scan(b"", b"", 10) == [(b"a", b"")]
    assert engine.commit([put(b"a", b"1")], NO_META) == [b""]
    assert engine.commit([put(b"a", b"1", b"")], NO_META) == [APPLIED]


def test_swap_applies_only_to_what_it_expects(engine: Engine) -> None:
    """A swap that lost changes nothing and is told what is there; the others apply."""
    engine.commit([put(b"a", b"1"), put(b"b", b"2")], NO_META)
    answers = engine.commit(
        [
            put(b"a", b"new", b"1"),
            put(b"b", b"new", b"other"),
            put(b"c", b"new", b"other"),
            put(b"d", b"new"),
            put(b"b2", None, None),
        ],
        NO_META,
    )
    assert answers == [APPLIED, b"2", None, APPLIED, APPLIED]
    assert engine.scan(b"", b"", 10) == [(b"a", b"new"), (b"b", b"2"), (b"d", b"new")]


def test_swap_may_delete(engine: Engine) -> None:
    """A swap to None removes the record, if it is as expected."""
    engine.commit([put(b"a", b"1"), put(b"b", b"2")], NO_META)
    answers = engine.commit([put(b"a", None, b"1"), put(b"b", None, b"1")], NO_META)
    assert answers == [APPLIED, b"2"]
    assert engine.read([b"a", b"b"])[0] == [None, b"2"]


def test_index_and_counters_follow_their_swap(engine: Engine) -> None:
    """Index entries and counters of a swap are written if it applies, and else not at all."""
    index, counter = codec.index_key(codec.Kind.HELD, b"a"), b"\xfecount"
    prefix = codec.index_key(codec.Kind.HELD, b"")
    with_extras = Swap.one(b"a", None, b"1", marks=((prefix, b""),), adds=((counter, 1),))
    assert engine.commit([with_extras], NO_META) == [APPLIED]
    assert engine.commit([with_extras], NO_META) == [b"1"]
    assert engine.read([index, counter])[0] == [b"", encode_counter(1)]
    without = Swap.one(b"a", b"1", b"2", marks=((prefix, None),), adds=((counter, -1),))
    assert engine.commit([without._replace(expected=[b"0"])], NO_META) == [b"1"]
    assert engine.read([index, counter])[0] == [b"", encode_counter(1)]
    assert engine.commit([without], NO_META) == [APPLIED]
    assert engine.read([index, counter])[0] == [None, encode_counter(0)]


def test_each_key_of_a_swap_is_compared_by_itself(engine: Engine) -> None:
    """Of keys that change alike those that were as expected are written, with what goes along."""
    counter = b"\xfecount"
    engine.commit([put(b"b", b"other")], NO_META)
    swap = Swap(
        (b"a", b"b", b"c"),
        (None, None, None),
        (b"1", b"2", b"3"),
        marks=((b"\xfeh", b""),),
        adds=((counter, 1),),
    )
    assert engine.commit([swap], NO_META) == [APPLIED, b"other", APPLIED]
    assert engine.read([b"a", b"b", b"c"])[0] == [b"1", b"other", b"3"]
    assert engine.read([b"\xfeha", b"\xfehb", b"\xfehc"])[0] == [b"", None, b""]
    assert engine.read([counter])[0] == [encode_counter(2)]


def test_counter_changes_of_one_commit_add_up(engine: Engine) -> None:
    """Many swaps, and the meta, may move one counter: all of it is kept, over commits too."""
    one, two = b"\xfec1", b"\xfec2"
    swaps = [
        Swap.one(b"%d" % i, None, b"x", adds=((one, 1), (two, -i), (one, 1))) for i in range(10)
    ]
    for _ in range(2):
        engine.commit(swaps, Meta(adds=((one, 5), (one, -1))))
    counts = [decode_counter(raw) for raw in engine.read([one, two])[0]]
    assert counts == [20 + 4 + 4, -45]


def test_counter_that_does_not_move_is_not_written(engine: Engine) -> None:
    """Changes that cancel each other leave a missing counter missing."""
    engine.commit([Swap.one(b"a", None, b"1", adds=((b"\xfec", 1),))], Meta(adds=((b"\xfec", -1),)))
    assert read_one(engine, b"\xfec") is None


def test_meta_is_written_though_every_swap_lost(engine: Engine) -> None:
    """The server's own values do not depend on the swaps."""
    meta = Meta(puts=((b"\xfer", b"7"),), adds=((b"\xfen", 3),))
    assert engine.commit([put(b"a", b"1", b"never there")], meta) == [None]
    assert engine.read([b"\xfer", b"\xfen", b"a"])[0] == [b"7", encode_counter(3), None]
    engine.commit([], Meta(puts=((b"\xfer", None),)))
    assert read_one(engine, b"\xfer") is None


def test_commit_of_nothing_is_allowed(engine: Engine) -> None:
    """Without swaps and meta there is nothing to do."""
    assert engine.commit([], NO_META) == []


def test_two_swaps_of_a_key_in_one_commit_are_a_bug(engine: Engine) -> None:
    """The table never does that: it is asserted, nothing is written, and the engine goes on."""
    with pytest.raises(AssertionError):
        engine.commit([put(b"a", b"1"), put(b"a", b"2")], NO_META)
    with pytest.raises(AssertionError):
        engine.commit([put(b"\xfea", b"1")], NO_META)
    with pytest.raises(AssertionError):
        engine.commit([], Meta(puts=((b"\xfea", b"1"),), adds=((b"\xfea", 1),)))
    assert engine.scan(b"", b"", 10) == []
    assert engine.commit([put(b"a", b"1")], NO_META) == [APPLIED]


def test_any_bytes_are_kept(engine: Engine) -> None:
    """Zero bytes, long keys and large values come back as they were."""
    entries = {
        b"\x00": b"\x00",
        b"\x00\x00": b"",
        b"k" * 1_024: b"v" * 100_000,
        "äöü\x1f".encode(): bytes(range(256)),
    }
    engine.commit([put(key, value) for key, value in entries.items()], NO_META)
    assert dict(engine.scan(b"", b"", 10)) == entries
    assert engine.read(list(entries))[0] == list(entries.values())


def test_random_commits_agree_with_a_model(reopen: Opener) -> None:
    """Over random commits and reopenings, an engine and a plain dictionary never differ."""
    random_numbers = random.Random(5)
    engine, model = reopen(), dict[bytes, bytes]()
    keys = [b"%02d" % number for number in range(30)]
    for round_number in range(150):
        swaps = []
        for key in random_numbers.sample(keys, 5):
            is_right = random_numbers.random() < 0.7
            expected = model.get(key) if is_right else b"wrong"
            value = random_numbers.choice([None, b"%d" % round_number])
            swaps.append(Swap.one(key, expected, value, adds=((b"\xfesum", 1),)))
        answers = engine.commit(swaps, NO_META)
        for swap, answer in zip(swaps, answers, strict=True):
            (key,), (expected,), (value,) = swap.keys, swap.expected, swap.values
            now = model.get(key)
            assert answer == (APPLIED if now == expected else now)
            if answer is APPLIED:
                model[b"\xfesum"] = encode_counter(decode_counter(model.get(b"\xfesum")) + 1)
                model.pop(key, None)
                if value is not None:
                    model[key] = value
        if round_number % 40 == 39:
            engine = reopen()
        records = sorted((k, v) for k, v in model.items() if k < b"\xfe")
        assert engine.scan(b"", b"", 1_000) == records
        assert read_one(engine, b"\xfesum") == model.get(b"\xfesum")


# -- scan -----------------------------------------------------------------------------------------


@pytest.fixture
def filled(engine: Engine) -> Engine:
    """Open a database with some keys of users and of the server."""
    keys = [b"b", b"a", b"ab", "é".encode(), b"\xf4\x8f\xbf\xbf", b"\x00"]
    meta = Meta(puts=((b"\xfe", b"0"), (b"\xfea", b"1"), (b"\xfeb", b"2"), (b"\xfec", b"3")))
    engine.commit([put(key, b"v" + key) for key in keys], meta)
    return engine


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (b"", b"", [b"\x00", b"a", b"ab", b"b", b"\xc3\xa9", b"\xf4\x8f\xbf\xbf"]),
        (b"a", b"", [b"a", b"ab", b"b", b"\xc3\xa9", b"\xf4\x8f\xbf\xbf"]),
        (b"a", b"b", [b"a", b"ab"]),
        (b"a\x00", b"b\x00", [b"ab", b"b"]),
        (b"aa", b"ab", []),
        (b"b", b"a", []),
        (b"a", b"a", []),
        (b"b", b"\xff", [b"b", b"\xc3\xa9", b"\xf4\x8f\xbf\xbf"]),
        (b"b", b"\xfeb", [b"b", b"\xc3\xa9", b"\xf4\x8f\xbf\xbf"]),
        (b"\xfe", b"", []),
        (b"\xff", b"", []),
        (b"\xfe", b"\xfeb", [b"\xfe", b"\xfea"]),
        (b"\xfea", b"\xff", [b"\xfea", b"\xfeb", b"\xfec"]),
    ],
)
def test_scan_gives_a_range(
    filled: Engine, start: bytes, end: bytes, expected: list[bytes]
) -> None:
    """A scan is half-open, in byte order, and shows own keys only if both ends lie among them."""
    assert [key for key, _ in filled.scan(start, end, 100)] == expected


def test_scan_pages(filled: Engine) -> None:
    """A limit cuts the range, and the next page begins right behind the last key."""
    everything = filled.scan(b"", b"", 100)
    pages: list[tuple[bytes, bytes]] = []
    start = b""
    while page := filled.scan(start, b"", 2):
        assert len(page) <= 2
        pages += page
        start = page[-1][0] + b"\x00"
    assert pages == everything
    assert all(value == b"v" + key for key, value in everything)
    assert filled.scan(b"", b"", 0) == []
    assert filled.scan(b"", b"", -1) == []


def test_scan_follows_deletes(filled: Engine) -> None:
    """Deleted keys are not listed, and do not count towards the limit."""
    filled.commit([put(b"a", None, b"va"), put(b"ab", None, b"vab")], NO_META)
    assert [key for key, _ in filled.scan(b"a", b"", 1)] == [b"b"]


# -- opening and closing --------------------------------------------------------------------------


def test_database_keeps_what_was_committed(reopen: Opener) -> None:
    """Records, index entries, counters and meta are there after closing and opening."""
    engine = reopen()
    swap = Swap.one(b"a", None, b"1", marks=((b"\xfeh", b""),), adds=((b"\xfec", 2),))
    engine.commit([swap], Meta(puts=((b"\xfer", b"9"),)))
    engine = reopen()
    found, _ = engine.read([b"a", b"\xfeha", b"\xfec", b"\xfer"])
    assert found == [b"1", b"", encode_counter(2), b"9"]


def test_closing_twice_is_no_error(engine: Engine) -> None:
    """After the first close nothing works but closing again."""
    engine.commit([put(b"a", b"1")], NO_META)
    engine.close()
    engine.close()
    for use in (
        lambda: engine.read([b"a"]),
        lambda: engine.scan(b"", b"", 1),
        lambda: engine.commit([put(b"b", b"1")], NO_META),
    ):
        with pytest.raises(EngineError, match="closed"):
            use()


def test_use_from_many_threads_while_closing(engine: Engine) -> None:
    """Readers and writers in other threads get answers or an EngineError, never a crash."""
    engine.commit([put(b"%04d" % i, b"x" * 100) for i in range(500)], NO_META)
    started = threading.Barrier(5)
    wrong: list[BaseException] = []

    def use(number: int) -> None:
        started.wait()
        try:
            with contextlib.suppress(EngineError):
                for turn in range(100_000):
                    assert len(engine.scan(b"", b"", 50)) == 50
                    assert read_one(engine, b"0001") == b"x" * 100
                    engine.commit([put(b"t%d-%d" % (number, turn), b"1")], NO_META)
        except BaseException as error:  # noqa: BLE001 - seen by the main thread
            wrong.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    for _ in range(20):
        engine.read([b"0001"])
    engine.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_close_waits_for_calls_under_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is not taken away under a read that has begun; later calls are refused."""
    assert isinstance(engine, KeyValueEngine)
    engine.commit([put(b"a", b"1")], NO_META)
    is_closed = threading.Event()
    get = engine._get

    def close() -> None:
        engine.close()
        is_closed.set()

    closer = threading.Thread(target=close)

    def get_slowly(keys: Sequence[bytes]) -> list[bytes | None]:
        closer.start()
        assert not is_closed.wait(0.2)
        return get(keys)

    monkeypatch.setattr(engine, "_get", get_slowly)
    assert read_one(engine, b"a") == b"1"
    closer.join(60)
    assert is_closed.is_set()
    with pytest.raises(EngineError, match="closed"):
        engine.read([b"a"])


def test_failed_write_ends_the_engine(
    engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one write error every use is refused, naming the cause, until it is opened anew."""
    assert isinstance(engine, KeyValueEngine)
    engine.commit([put(b"a", b"1")], NO_META)

    class DiskError(Exception):
        pass

    def fail(batch: Batch) -> None:
        raise DiskError("IO error: no disk")

    monkeypatch.setattr(type(engine), "_errors", (DiskError,))
    monkeypatch.setattr(engine, "_write", fail)
    with pytest.raises(EngineError, match=rf"cannot write to the {kind} database .*no disk"):
        engine.commit([put(b"b", b"1")], NO_META)
    monkeypatch.undo()
    for use in (
        lambda: engine.commit([put(b"b", b"1")], NO_META),
        lambda: engine.read([b"a"]),
        lambda: engine.scan(b"", b"", 1),
    ):
        with pytest.raises(EngineError, match=r"not used any more .*no disk.* restart"):
            use()
    engine.close()


# -- shared engines -------------------------------------------------------------------------------


def test_shared_memory_engines_see_each_other() -> None:
    """Two servers over one store: one's swap wins, the other's loses; time is the engine's."""
    clock, store = ManualClock(now_ns=77), MemoryStore()
    one, two = (MemoryEngine(store, shared=True, clock=clock) for _ in range(2))
    assert one.shared
    assert one.read([b"a"]) == ([None], 77)
    assert one.commit([put(b"a", b"1")], NO_META) == [APPLIED]
    assert two.commit([put(b"a", b"2")], NO_META) == [b"1"]
    clock.advance(1)
    assert two.read([b"a"]) == ([b"1"], 77 + 10**9)
    one.close()
    assert two.commit([put(b"a", b"2", b"1")], NO_META) == [APPLIED]


def test_shared_memory_engines_lose_no_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between one engine's comparing and writing no other engine over the store gets in."""
    clock, store = ManualClock(), MemoryStore()
    one, two = (MemoryEngine(store, shared=True, clock=clock) for _ in range(2))
    answers: list[object] = []
    is_over = threading.Event()

    def commit_two() -> None:
        answers.extend(two.commit([put(b"a", b"2")], NO_META))
        is_over.set()

    other = threading.Thread(target=commit_two)
    get = one._get

    def get_slowly(keys: Sequence[bytes]) -> list[bytes | None]:
        found = get(keys)
        if keys:
            other.start()
            assert not is_over.wait(0.2)
        return found

    monkeypatch.setattr(one, "_get", get_slowly)
    assert one.commit([put(b"a", b"1")], NO_META) == [APPLIED]
    other.join(60)
    assert answers == [b"1"]
