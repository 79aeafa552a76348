"""Type-checked, never run: the public API as a user writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from typing_extensions import assert_type

from run_once import (
    DistributedIterator,
    LeaseHandle,
    LiveItem,
    Status,
    at_most_every,
    count_keys_by_prefix,
    distributed_task,
    lease_of,
    notify_failure,
    notify_success,
    run_once,
    search_keys_by_prefix,
)


@dataclass
class Sample:
    """An item of a user's own type."""

    name: str
    size: int


for text in DistributedIterator(["a", "b"]):
    assert_type(text, str)
    notify_success(text)
    notify_failure(text)

for number in DistributedIterator(range(10), 60, True, 1, 100, 7):
    assert_type(number, int)

for path in DistributedIterator(Path().rglob("*.py"), key=str):
    assert_type(path, Path)

samples = [Sample("a", 1)]
for sample in DistributedIterator(samples, key=lambda sample: sample.name):
    assert_type(sample, Sample)

for pair in DistributedIterator({"a": 1}.items(), key=lambda pair: pair[0], wait=True):
    assert_type(pair, tuple[str, int])


def endless() -> Iterator[int]:
    """Yield without end."""
    number = 0
    while True:
        yield number
        number += 1


loop = iter(DistributedIterator(endless(), timeout=timedelta(minutes=1), settle="explicit"))
assert_type(next(loop), int)
loop.close()

with DistributedIterator(samples, key=lambda sample: sample.name).claim() as lease:
    if lease is not None:
        assert_type(lease, LiveItem[Sample])
        assert_type(lease.item, Sample)
        assert_type(lease.token, int)
        assert_type(lease.held, bool)
        assert_type(lease.handle, LeaseHandle)
assert_type(lease_of("a").handle, LeaseHandle)


@run_once("key", timeout=60, version=0)
def add(a: int, b: int = 2) -> float:
    """Add."""
    return a + b


@distributed_task("key", None)
def nothing() -> None:
    """Do nothing."""


@at_most_every(seconds=3, key="key")
def now_and_then(text: str) -> bytes:
    """Encode."""
    return text.encode()


assert_type(add(1, b=3), tuple[Status, float | None])
assert_type(nothing(), tuple[Status, None])
assert_type(now_and_then("a"), bytes | None)
assert_type(at_most_every(len, seconds=1, key="k")([]), int | None)
plain: Callable[[], int] = lambda: 1  # noqa: E731 (a lambda is what is looked at)
assert_type(run_once("key")(plain)(), tuple[Status, int | None])

assert_type(search_keys_by_prefix("a", is_expired=True), list[str])
assert_type(count_keys_by_prefix("a"), dict[str, int])

# What a type checker must refuse; an unused ignore is an error, too.
DistributedIterator(["a"], settle="maybe")  # type: ignore[arg-type]
DistributedIterator(5)  # type: ignore[arg-type]
add("1")  # type: ignore[arg-type]
