"""The loop: what is handed out, what it is settled as, and what happens when it is left."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once import (
    ConfigError,
    DistributedIterator,
    KeyTypeError,
    LimitError,
    NotHeldError,
    ServerUnavailableError,
    local,
    notify_failure,
    notify_success,
    pass_end,
)
from run_once.key_source import BLOCK_KEYS
from run_once.loop import Loop
from run_once.task import Session
from tests.other_client import Other
from tests.servers import InprocServer

ABSENT, DONE, FAILED = pb.KEY_STATE_ABSENT, pb.KEY_STATE_DONE, pb.KEY_STATE_FAILED
BUSY = pb.KEY_STATE_BUSY
pytestmark = pytest.mark.usefixtures("configured_server")


@pytest.fixture(autouse=True)
def _nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was said before, since a sentence comes once per process."""
    monkeypatch.setattr(local, "_ANNOUNCED", set())


# ---------------------------------------------------------------- what is handed out


def test_each_item_once(other: Other) -> None:
    """The caller's own objects come in order, are done when the loop ends, and never come again."""
    keys = ["a", "b", 3]
    first = DistributedIterator(keys)
    assert list(first) == keys
    assert other.states("a", "b", "3") == [DONE] * 3
    assert list(first) == []
    assert list(DistributedIterator(keys)) == []
    assert first.counts.found_done == 3


def test_stored_keys(other: Other) -> None:
    """Version and namespace are part of the stored key; `key=` makes it from any object."""
    items = [{"name": "a"}, {"name": "b"}]
    loop = DistributedIterator(items, version=7, namespace="ns", key=lambda item: str(item["name"]))
    handed = list(loop)
    assert all(got is given for got, given in zip(handed, items, strict=True))
    assert other.states("\x1ens\x1fa_v007", "\x1ens\x1fb_v007") == [DONE, DONE]


@pytest.mark.parametrize("make", [tuple, dict.fromkeys, iter, lambda keys: (k for k in keys)])
def test_any_iterable(make: Callable[[list[str]], Any]) -> None:
    """Tuples, dictionaries, iterators and generators work alike."""
    assert list(DistributedIterator(make(["a", "b", "c"]))) == ["a", "b", "c"]


def test_no_keys() -> None:
    """No keys at all make an empty loop."""
    assert list(DistributedIterator([])) == []


def test_repeated_keys(other: Other) -> None:
    """A key that the iterable names twice is handed out once, near or far apart, held or failed."""
    far_apart = ["a", "a", *map(str, range(50)), "a"]
    assert list(DistributedIterator(far_apart)) == ["a", *map(str, range(50))]
    seen = []
    for item in DistributedIterator(["x", "y", "x", "z"], chunksize=1, timeout=60, wait=True):
        seen.append(item)
        if item == "y":
            notify_failure(item)
    assert seen == ["x", "y", "z"]
    assert other.states("x", "y") == [BUSY, FAILED]


@pytest.mark.parametrize(("prefetch", "n_ahead"), [(0, 10), (None, 16 * BLOCK_KEYS)])
def test_endless_generator_is_a_stream(prefetch: int | None, n_ahead: int) -> None:
    """An endless generator is read only a little ahead of what is handed out."""
    read = 0

    def keys() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read

    seen = []
    for item in DistributedIterator(keys(), chunksize=10, prefetch=prefetch):
        seen.append(item)
        if item == 25:
            break
    assert seen == list(range(1, 26))
    assert read <= 25 + n_ahead


@pytest.mark.parametrize("chunksize", [1, 2, 10])
def test_an_iterable_that_raises_loses_nothing(other: Other, chunksize: int) -> None:
    """What a generator gave before it raised is handed out and done, then its error comes."""

    def keys() -> Iterator[str]:
        yield from "abc"
        raise OSError("the list of keys is gone")

    seen: list[str] = []
    with pytest.raises(OSError, match="the list of keys is gone"):
        seen.extend(DistributedIterator(keys(), chunksize=chunksize))
    assert seen == ["a", "b", "c"]
    assert other.states("a", "b", "c") == [DONE] * 3


def test_shuffle() -> None:
    """Shuffled keys come in the seed's order, the same in each process; others as given."""
    keys = list(range(40))
    expected = keys.copy()
    random.Random(5).shuffle(expected)
    assert list(DistributedIterator(iter(keys), shuffle=True, random_seed=5)) == expected
    assert list(DistributedIterator(keys, shuffle=False, version=1)) == keys


def test_frozen_signature() -> None:
    """The arguments of 0.4.2 have their names and order; timeout is None by default."""
    import inspect

    parameters = inspect.signature(DistributedIterator).parameters
    frozen = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    assert list(frozen.items()) == [
        ("keys", inspect.Parameter.empty),
        ("timeout", None),
        ("shuffle", False),
        ("version", 0),
        ("chunksize", 10),
        ("random_seed", None),
    ]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"keys": "abc"}, KeyTypeError),
        ({"keys": 5}, KeyTypeError),
        ({"settle": "sometimes"}, ConfigError),
        ({"chunksize": 0}, ConfigError),
        ({"timeout": -1}, ConfigError),
        ({"timeout": float("nan")}, ConfigError),
        ({"timeout": "60"}, ConfigError),
        ({"timeout": 1e12}, ConfigError),
        ({"key": "name"}, ConfigError),
        ({"version": "x"}, LimitError),
        ({"version": -1}, LimitError),
        ({"lease_s": 0}, ConfigError),
        ({"prefetch": -1}, ConfigError),
        ({"namespace": "a\x1fb"}, ConfigError),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception]) -> None:
    """An option that cannot be used is an error when the iterator is made."""
    with pytest.raises(error) as raised:
        DistributedIterator(**{"keys": ["a"], **options})
    (name,) = options
    assert name in str(raised.value)


def test_bad_key_ends_the_loop(other: Other) -> None:
    """An item without a usable key is an error; what came before it is settled or given back."""
    items: list[Any] = ["a", 1.5]
    with pytest.raises(KeyTypeError):
        list(DistributedIterator(items, chunksize=1))
    assert other.states("a") == [DONE]


def test_skipping_takes_few_requests(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks grow over done keys: 30,000 of them take a dozen requests, and no key is missed."""
    keys = [f"k{i}" for i in range(30_000)]
    other.finish(*keys[:20_000], *keys[20_001:])
    sizes: list[int] = []
    claim = Session.claim

    def counted(session: Session, keys: Any, **options: Any) -> Any:
        sizes.append(len(keys))
        return claim(session, keys, **options)

    monkeypatch.setattr(Session, "claim", counted)
    assert list(DistributedIterator(keys)) == [keys[20_000]]
    assert len(sizes) <= 20
    assert max(sizes) <= BLOCK_KEYS


def test_one_key_at_a_time(other: Other) -> None:
    """Only the item that is worked on is held; the rest of its chunk is free for others."""
    loop = iter(DistributedIterator(["a", "b", "c"]))
    assert next(loop) == "a"
    assert other.states("a", "b", "c") == [BUSY, ABSENT, ABSENT]
    loop.close()


# ---------------------------------------------------------------- how a loop is left


def test_break_gives_back(other: Other) -> None:
    """`break` gives the item back at once; the ones before it are done."""
    for item in DistributedIterator(["a", "b", "c"]):
        if item == "b":
            break
    assert other.states("a", "b", "c") == [DONE, ABSENT, ABSENT]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_gives_back(other: Other, kind: type[BaseException]) -> None:
    """An exception or interrupt gives the item back at once, though its traceback is kept."""

    def work() -> None:
        for item in DistributedIterator(["a", "b"]):
            if item == "b":
                raise kind

    with pytest.raises(kind) as raised:
        work()
    assert raised.tb is not None
    assert other.states("a", "b") == [DONE, ABSENT]
    assert list(DistributedIterator(["a", "b"])) == ["b"]


def test_wrapped_loops_are_left_too(other: Other) -> None:
    """Through enumerate, zip and a generator of the caller's, leaving gives back as well."""

    def doubled() -> Iterator[str]:
        for item in DistributedIterator(["a", "b"]):
            yield item * 2

    for number, (item, _) in enumerate(zip(doubled(), itertools.count(), strict=False)):
        assert (number, item) == (0, "aa")
        break
    assert other.states("a", "b") == [ABSENT, ABSENT]


def test_each_for_is_fresh(other: Other) -> None:
    """Each `for` reads the keys from the start; an iterator that is closed stays closed."""
    keys = DistributedIterator(["a", "b"])
    for _item in keys:
        break
    assert list(keys) == ["a", "b"]
    loop = iter(DistributedIterator(["c", "d"]))
    assert isinstance(loop, Loop)
    assert next(loop) == "c"
    loop.close()
    assert list(loop) == []
    assert other.states("c", "d") == [ABSENT, ABSENT]


def test_error_of_the_caller_in_keys(other: Other) -> None:
    """What the caller's generator raises reaches the caller, and the last item is done by then."""

    def keys() -> Iterator[str]:
        yield "a"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(DistributedIterator(keys(), chunksize=1))
    assert other.states("a") == [DONE]


def test_server_gone(configured_server: InprocServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is gone past the bound on retries ends the loop with an error of ours."""
    monkeypatch.setenv("RUN_ONCE_RETRY_S", "0.3")
    loop = iter(DistributedIterator(["a", "b"]))
    assert next(loop) == "a"
    configured_server.server.stop()
    with pytest.raises(ServerUnavailableError):
        next(loop)
    assert list(loop) == []


# ---------------------------------------------------------------- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_leaves_the_parents_lease_alone(other: Other) -> None:
    """A child that leaves the loop, or notifies, neither releases nor settles the parent's item."""
    loop = iter(DistributedIterator(["a", "b"]))
    assert next(loop) == "a"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads, which is the point
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            loop.close()
            with pytest.raises(NotHeldError):
                notify_success("a")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert other.states("a") == [BUSY]
    assert list(loop) == ["b"]
    assert other.states("a", "b") == [DONE, DONE]


FORKING = """
import os
import subprocess
import sys
from run_once import DistributedIterator
loop = iter(DistributedIterator(["a", "b"]))
assert next(loop) == "a"
pid = os.fork()
if pid == 0:
    status = 1
    try:
        status = 0 if list(loop) == ["b"] else 2
    finally:
        os._exit(status)
assert os.waitpid(pid, 0)[1] == 0
print("forked", flush=True)
input()
assert list(loop) == []
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_goes_on_with_claims_of_its_own(other: Other) -> None:
    """A child that goes on with the loop works as another process: the parent's item stays."""
    # A process of its own: this one may have servers of other tests in it, which do not fork.
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        assert other.states("a", "b") == [BUSY, DONE]
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(60) == 0
    assert other.states("a") == [DONE]


# ---------------------------------------------------------------- what is said at the end


def test_passed_over_is_said(other: Other, capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that left keys to others says how many, the first, its holder and for how long."""
    other.claim("\x1ens\x1fb", "\x1ens\x1fc", ttl_s=90)
    loop = DistributedIterator(["a", "b", "c"], namespace="ns")
    for _ in range(2):
        list(loop)
    assert capsys.readouterr().err == (
        "run-once: 2 keys were passed over, held by others (the first: 'b' (namespace 'ns'), held "
        "by other for 1 min 30 s more unless renewed): with `wait=True` the loop stays for them; "
        "else run it again later\n"
    )


def test_nothing_to_do_is_said(other: Other, capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that handed nothing out, as all was done before, says how to do it again."""
    list(DistributedIterator(["a", "b"]))
    assert capsys.readouterr().err == ""
    list(DistributedIterator(["a", "b"]))
    said = capsys.readouterr().err
    assert said.startswith("run-once: all 2 keys were done before (namespace (none)): ")
    assert said.count("\n") == 1
    for name in ("version=", "namespace=", "run-once reset"):
        assert name in said
    list(DistributedIterator(["a"]))
    assert capsys.readouterr().err.startswith("run-once: the only key was done before")


def test_other_ends_say_nothing(other: Other, capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that was left early, had work, had no keys or shows its progress says nothing."""
    other.finish("a", "b")
    other.claim("held")
    list(DistributedIterator([]))
    list(DistributedIterator(["a", "b", "c"]))
    for _item in DistributedIterator(["held", "x", "y"]):
        break
    assert capsys.readouterr().err == ""
    list(DistributedIterator(["held", "z"], progress=True))
    said = capsys.readouterr().err
    assert "passed over" not in said
    assert "left to others 1" in said


def test_the_end_is_good_without_a_server(
    configured_server: InprocServer, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that goes just before the line about its keys costs the holder's name only."""
    monkeypatch.setenv("RUN_ONCE_RETRY_S", "0.1")
    other.claim("held")
    running = DistributedIterator(["held"], chunksize=1)._begin()
    assert running.claim_next() is None
    configured_server.server.stop()
    said: list[str] = []
    monkeypatch.setattr(pass_end, "announce", lambda text, about: said.append(text))
    pass_end.tell_end(running, "")
    assert "(the first: 'held')" in said[0]


def test_left_alone_is_said(other: Other, capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that left keys alone for max_attempts says how many, the first, and what to do."""
    loop = DistributedIterator(["a", "b"], max_attempts=1)
    for _ in range(2):
        for item in loop:
            notify_failure(item, "broken")
    said = capsys.readouterr().err
    assert loop.counts.exhausted == 2
    assert said.startswith("run-once: 2 keys were left alone, attempted as often as max_attempts")
    assert "(the first: 'a')" in said
    assert "run-once reset a" in said
