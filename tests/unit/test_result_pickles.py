"""Pickles: buffers that stay out, and classes that are taken from where they are."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest

from run_once import result_pickles
from run_once.result_pickles import from_pickle, to_pickle

SOURCE = """
from collections import namedtuple
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

@dataclass
class Result:
    number: int
    stored = "when it was stored"

class Color(Enum):
    RED = 1

Pair = namedtuple("Pair", "left right")

class Typed(NamedTuple):
    number: int

class Slotted:
    __slots__ = ("number",)

class Outer:
    class Inner:
        def method(self): pass
    class Bare: pass
    class Result:
        "Has the name of another."

class Other:
    class Twin: pass
    class Deeper:
        class Twin: pass

def make_local():
    class Result:
        "Has the name of another."
    return Result

def function():
    return 1
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Give a function that starts a script anew: a module that cloudpickle pickles by value."""
    monkeypatch.setattr(cloudpickle, "list_registry_pickle_by_value", lambda: {"a_script"})
    if "a_script" not in cloudpickle.cloudpickle._PICKLE_BY_VALUE_MODULES:
        monkeypatch.setattr(cloudpickle.cloudpickle, "_PICKLE_BY_VALUE_MODULES", {"a_script"})

    def start() -> types.ModuleType:
        module = types.ModuleType("a_script")
        monkeypatch.setitem(sys.modules, "a_script", module)
        exec(SOURCE, module.__dict__)
        return module

    return start


VALUES: dict[str, Callable[[Any], Any]] = {
    "dataclass": lambda m: m.Result(1),
    "enum": lambda m: m.Color.RED,
    "namedtuple": lambda m: m.Pair(1, 2),
    "typed namedtuple": lambda m: m.Typed(1),
    "slots": lambda m: m.Slotted(),
    "nested": lambda m: m.Outer.Inner(),
    "nested bare": lambda m: m.Outer.Bare(),
    "nested homonym": lambda m: m.Outer.Result(),
    "nested twin": lambda m: m.Other.Deeper.Twin(),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_are_of_the_classes_that_are_here(kind: str, script: Callable[[], Any]) -> None:
    """Whoever loads has the class of that name, however it is nested."""
    make = VALUES[kind]
    pickled, _ = to_pickle(make(script()))
    now = script()
    back = from_pickle(pickled)
    assert type(back) is type(make(now))
    if kind in {"dataclass", "enum", "namedtuple", "typed namedtuple"}:
        assert back == make(now)


def test_classes_are_left_alone(script: Callable[[], Any]) -> None:
    """Attributes that a class has now are not overwritten, and none comes back."""
    before = script()
    before.Result.more = 1
    pickled, _ = to_pickle([before.Result(1), before.Result])
    now = script()
    now.Result.stored = "now"
    back, cls = from_pickle(pickled)
    assert cls is type(back) is now.Result
    assert cls.stored == "now"
    assert not hasattr(cls, "more")


def test_other_classes_are_as_cloudpickle_has_them(
    script: Callable[[], Any],
) -> None:
    """A class that is gone, or was made in a function, is never taken for one of that name."""
    before = script()
    of_gone, _ = to_pickle(before.Result(1))
    of_local, _ = to_pickle(before.make_local()())
    now = script()
    assert type(from_pickle(of_local)) is not now.Result
    del now.Result
    back = from_pickle(of_gone)
    assert back.number == 1
    assert type(back) is not now.Outer.Result
    assert back.stored == "when it was stored"


def test_names_that_a_worker_lost_are_found_if_there_is_one(
    script: Callable[[], Any],
) -> None:
    """A nested class comes from a worker with its bare name; twins are not mixed up."""
    before = script()
    for outer in (before.Outer.Bare, before.Other.Twin):
        outer.__qualname__ = outer.__name__
    before.Outer.Inner.__qualname__ = "Inner"
    classes = (before.Outer.Bare, before.Outer.Inner, before.Other.Twin)
    pickled, _ = to_pickle(classes)
    now = script()
    bare, inner, twin = from_pickle(pickled)
    assert bare is now.Outer.Bare
    assert inner is now.Outer.Inner
    assert twin not in (now.Other.Twin, now.Other.Deeper.Twin)


def test_functions_stay_as_cloudpickle_does_them(script: Callable[[], Any]) -> None:
    """They are by value, as they were."""
    pickled, _ = to_pickle(script().function)
    now = script()
    back = from_pickle(pickled)
    assert back is not now.function
    assert back() == 1


def test_another_cloudpickle_loads_in_its_own_way(
    script: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles are its own, and where its helpers look otherwise values come back all the same."""
    pickled, _ = to_pickle(script().Result(1))
    script()
    assert pickle.loads(pickled).number == 1
    monkeypatch.setattr(result_pickles, "_CLASS_MAKERS", {"_make_skeleton_class": 99})
    assert from_pickle(pickled).number == 1
    again, _ = to_pickle(script().Result(2))
    assert b"run_once" in pickled
    assert b"run_once" not in again, "nothing is added where its meaning is not known"
    assert from_pickle(again).number == 2


def test_large_buffers_stay_out() -> None:
    """They are the array's own memory; small ones are in the pickle."""
    large, small = np.arange(100_000), np.arange(10)
    pickled, buffers = to_pickle([large, small])
    assert len(pickled) < 1000
    assert [np.shares_memory(large, np.frombuffer(each, "u1")) for each in buffers] == [True]
    back = from_pickle(pickled, buffers)
    np.testing.assert_array_equal(back[0], large)
    np.testing.assert_array_equal(back[1], small)


@pytest.mark.parametrize("value", [None, True, 5, -(2**70), 1.5, 2j, "cloudpickle", b"cloudpickle"])
def test_plain_values_come_back(value: Any) -> None:
    """By the short way, also where they look as if cloudpickle had made them."""
    pickled, buffers = to_pickle(value)
    assert not buffers
    back = from_pickle(pickled)
    assert back == value
    assert type(back) is type(value)


def test_what_derives_from_plain_is_not_plain(script: Callable[[], Any]) -> None:
    """An integer of a class of the script's needs cloudpickle."""
    module = script()
    exec("class Number(int): pass", module.__dict__)
    pickled, _ = to_pickle(module.Number(3))
    del sys.modules["a_script"]
    assert from_pickle(pickled) == 3
