"""Canonical bytes of values: equal for equal values, different for all others."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import io
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import types
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from run_once import encode as encode_module
from run_once.encode import COLLAPSE_BYTES, Encoder, hash_buffer
from run_once.errors import UnkeyableError
from run_once.key_context import KeyContext

np = pytest.importorskip("numpy")


def encode(value: Any, context: KeyContext | None = None, **options: Any) -> bytes:
    """Encode one value as the argument `x`."""
    return Encoder(context or KeyContext(), **options).encode(value, "x")


class Color(enum.Enum):
    """An enum."""

    RED = 1
    BLUE = 2


class Access(enum.Flag):
    """A flag."""

    READ = 1
    WRITE = 2


class Point(NamedTuple):
    """A named tuple."""

    x: int
    y: int


@dataclasses.dataclass
class Config:
    """A dataclass."""

    rate: float
    layers: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Slotted:
    """A frozen dataclass with slots."""

    __slots__ = ("a",)
    a: int


class Plain:
    """Any attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def method(self) -> None:
        """Be one method."""

    def other(self) -> None:
        """Be another."""


class MyInt(int):
    """A subclass of a number."""


class MySet(set[Any]):
    """A subclass of a set."""


class MyDict(dict[Any, Any]):
    """A subclass of a dict."""


class Lockable:
    """Drops its lock when pickled, as well-behaved classes do."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, int]:
        return {"value": self.value}


def function(x: int) -> int:
    """A function with a name."""
    return x


def adder(n: Any) -> Callable[[int], Any]:
    """Return a closure."""

    def add(x: int) -> Any:
        return x + n

    return add


DISTINCT: list[Any] = [
    None, True, False, 0, 1, -1, 2**70, -(2**70), 0.0, -0.0, 1.0, math.inf, -math.inf, math.nan,
    1j, complex(0.0, -0.0), "", "1", "a", "ab", "\ud800", b"", b"a", bytearray(b"a"), (), (1,), [],
    [1], ["a"], [["a"]], ["a", "b"], ["ab"], ("a", ("b",)), (("a",), "b"), {}, {"a": 1}, {"a": "1"},
    {1: "a"}, {"a": None}, set(), {1}, {1, 2}, frozenset(), frozenset({1}), MySet({1}), MyDict(),
    range(3), range(4), slice(3), slice(0, 3), ..., NotImplemented, Color.RED, Color.BLUE,
    Access.READ, Access.READ | Access.WRITE, Point(1, 2), Point(2, 1), (1, 2), MyInt(1),
    dt.date(2020, 1, 1), dt.datetime.fromisoformat("2020-01-01"),
    dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc),
    dt.time(1), dt.timedelta(1), dt.timedelta(seconds=1), decimal.Decimal("1.0"),
    decimal.Decimal("1.00"), fractions.Fraction(1, 3), pathlib.PurePosixPath("a"),
    pathlib.PureWindowsPath("a"), uuid.UUID(int=1), re.compile("a"), re.compile("a", re.IGNORECASE),
    re.compile(b"a"), Config(1.0), Config(1.0, [1]), Slotted(1), Slotted(2), Plain(), Plain(a=1),
    Plain(a=2), Lockable(1), Lockable(2), function, adder, adder(1), adder(2), adder("1"),
    lambda x: x, lambda x: x + 1, lambda x: x + 1.0, lambda x, y=1: x, lambda x, y=2: x,
    functools.partial(function), functools.partial(function, 1), Plain(a=1).method,
    Plain(a=2).method, Plain(a=1).other, len, max, "a".upper, "b".upper, str.upper, str.lower, int,
    str, Plain, Color, math, os, collections.OrderedDict(a=1, b=2),
    collections.OrderedDict(b=2, a=1),
    collections.deque([1]), collections.Counter("a"), collections.defaultdict(list),
    collections.defaultdict(int), ValueError("a"), ValueError("b"), KeyError("a"), random.Random(1),
    random.Random(2), types.SimpleNamespace(a=1), types.MappingProxyType({"zz": 1}),
    np.float64(1), np.float32(1), np.int64(1), np.bool_(1), np.datetime64("2020-01-01"),
    np.datetime64("2020-01-01T00"), np.str_("a"), np.array(1), np.array([1]), np.array([[1]]),
    np.array([1], "i4"), np.array([1], ">i4"), np.array([1.0]), np.array([]), np.zeros((0, 2)),
    np.zeros((2, 0)), np.array(["a"]), np.array(["a"], object), np.array([None]),
    np.array([1 + 1j]), np.zeros(2, "i4,f8"), np.zeros(2, [("a", "i4"), ("b", "f8")]),
    np.array([1], "m8[s]"), np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 0]),
    np.asmatrix([[7]]), np.longdouble(1), np.array([1], np.longdouble), np.dtype("f8"),
    np.dtype(">f8"), np.dtype("i4,f8"), np.sin, np.cos, np.random.default_rng(1),
    np.random.default_rng(2), np.random.RandomState(1), np.random.RandomState(2),
    np.random.SeedSequence(1), np.random.SeedSequence(2), np.random.Philox(1), np.float64,
]  # fmt: skip


def test_different_values_never_share_their_bytes() -> None:
    """No two of these have the same encoding, though many are equal to Python or nearly so."""
    seen: dict[bytes, Any] = {}
    for value in DISTINCT:
        data = encode(value)
        assert data not in seen, (value, seen[data])
        seen[data] = value


def test_each_value_gives_the_same_bytes_twice() -> None:
    """Encoding depends on nothing that was encoded before, and changes nothing."""
    context = KeyContext()
    first = [encode(value, context) for value in DISTINCT]
    assert [encode(value, context) for value in reversed(DISTINCT)] == first[::-1]
    assert [encode(value) for value in DISTINCT] == first


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: pathlib.Path) -> None:
    """Sets and dicts of anything have one encoding in processes with different hashes."""
    script = (
        "import sys, enum\n"
        "from run_once.encode import Encoder\n"
        "from run_once.key_context import KeyContext\n"
        "class Node:\n"
        "    def __init__(self, *links): self.links = set(links)\n"
        "class E(enum.Enum):\n"
        "    A = 'a'\n"
        "    B = 'b'\n"
        "a = Node(); b = Node(a, 'b', 'c'); a.links.add(b); a.links.add('d')\n"
        "value = [frozenset('abcdefgh'), {'x': {E.A, E.B, Node('q')}, ('y', None): {1, 'z'}},\n"
        "         a, b, {a, b}, {frozenset({'k', 'l'}), frozenset({'m'})}, {1.5, int, len}]\n"
        "sys.stdout.write(Encoder(KeyContext()).encode(value, 'x').hex())\n"
    )
    path = tmp_path / "script.py"
    path.write_text(script)
    found = {
        subprocess.run(
            [sys.executable, str(path)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            timeout=60,
        ).stdout
        for seed in ("0", "1", "2", "3", "12345")
    }
    assert len(found) == 1
    assert found.pop()


def test_order_counts_where_it_means_something() -> None:
    """Dicts and sets have none; lists, OrderedDicts and tuples have."""
    assert encode({"a": 1, "b": 2}) == encode({"b": 2, "a": 1})
    assert encode({3, 1, 2}) == encode({2, 3, 1})
    assert encode([1, 2]) != encode([2, 1])


def test_equal_contents_are_equal_whether_shared_or_copied() -> None:
    """What is one object here may be two there."""
    part = list(range(600))
    assert encode([part, part]) == encode([part, list(part)])
    assert encode(float("nan")) == encode(-math.nan)


def test_memory_layout_does_not_count() -> None:
    """C order, Fortran order, views, read-only arrays and memmaps are one array."""
    array = np.arange(20_000.0).reshape(100, 200)
    other = np.zeros((200, 400))
    other[::2, ::2] = array
    frozen = array.copy()
    frozen.flags.writeable = False
    expected = encode(array)
    for same in (np.asfortranarray(array), other[::2, ::2], frozen, array[::-1][::-1]):
        assert encode(same) == expected
    assert encode(array.T) != expected


def test_a_memmap_is_the_array_that_it_maps(tmp_path: pathlib.Path) -> None:
    """Joblib maps big arguments into files; keys must not see it."""
    array = np.arange(1000)
    mapped = np.memmap(tmp_path / "m", dtype=array.dtype, mode="w+", shape=array.shape)
    mapped[:] = array
    assert encode(mapped) == encode(array)
    assert encode(mapped[2:]) == encode(array[2:])


def test_gaps_in_structured_arrays_do_not_count() -> None:
    """Padding bytes hold whatever was in memory before."""
    dtype = np.dtype([("a", "i1"), ("b", "f8")], align=True)
    one, two = np.zeros(3, dtype), np.zeros(3, dtype)
    two.view(np.uint8)[1] = 77
    assert one.tobytes() != two.tobytes()
    assert encode(one) == encode(two)


def test_generator_states_count() -> None:
    """A generator that was drawn from is another argument than a fresh one."""
    fresh, used = np.random.default_rng(1), np.random.default_rng(1)
    assert encode(fresh) == encode(used)
    used.random()
    assert encode(fresh) != encode(used)
    spawned = np.random.default_rng(1)
    spawned.spawn(1)
    assert encode(fresh) != encode(spawned)


def test_classes_say_what_of_them_is_kept() -> None:
    """__getstate__ and __reduce__ decide, as they do for pickle."""
    assert encode(Lockable(3)) == encode(Lockable(3))


def test_lambdas_on_one_line_are_told_apart() -> None:
    """Their source line is the same; their own part of it is what counts."""
    one, two = (lambda x: x + 1), (lambda x: x + 2)
    same = lambda x: x + 1  # noqa: E731
    assert encode(one) != encode(two)
    assert encode(one).split(b"<lambda>")[1:] == encode(same).split(b"<lambda>")[1:]


def test_local_classes_count_by_content() -> None:
    """Two classes differ if their attributes do; links to themselves do no harm."""

    def make(size: int) -> type:
        class Base:
            SIZE = size

            def run(self) -> int:
                return self.SIZE

        class Child(Base):
            def run(self) -> int:
                return super().run() + len(Child.__name__)

            @property
            def twice(self) -> int:
                return 2 * self.SIZE

        return Child

    assert encode(make(1)) == encode(make(1))
    assert encode(make(1)) != encode(make(2))
    assert encode(make(1)()) != encode(make(2)())


def test_source_counts_if_it_is_asked_for() -> None:
    """With code="none" a function is its name; with "source" its text without comments."""

    def variant(text: str) -> Any:
        names: dict[str, Any] = {"__name__": "somewhere"}
        exec(compile(text, f"<{text}>", "exec"), names)
        return names["f"]

    one, two = variant("def f(x): return x"), variant("def f(x): return x + 1")
    assert encode(one) == encode(two)
    assert encode(one, code="source") != encode(two, code="source")
    assert encode(one, code="source") == encode(variant("def f(x): return x"), code="source")


def test_cycles_end() -> None:
    """Values that contain themselves are encoded by how far up the link goes."""
    one: list[Any] = []
    one.append(one)
    two: list[Any] = []
    two.append(two)
    assert encode(one) == encode(two)
    node = Plain(name="a")
    vars(node)["self"] = node
    other = Plain(name="a")
    vars(other)["self"] = other
    assert encode(node) == encode(other)
    vars(other)["name"] = "b"
    assert encode(node) != encode(other)


def test_shared_parts_do_not_multiply() -> None:
    """Sixty levels of doubling are sixty steps, not 2**60."""
    value: list[Any] = [0]
    for _ in range(60):
        value = [value, value]
    assert len(encode(value)) <= COLLAPSE_BYTES


def test_too_many_cycles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense graph would be walked along all its paths; it is refused instead."""
    monkeypatch.setattr(encode_module, "MAX_REWALKS", 1000)
    nodes = [Plain(at=at) for at in range(12)]
    for node in nodes:
        vars(node)["links"] = list(nodes)
    with pytest.raises(UnkeyableError, match="too many reference cycles"):
        encode(nodes)


def test_deep_nesting_is_refused() -> None:
    """Beyond Python's recursion limit there is an error that says so."""
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(UnkeyableError, match="nested too deeply"):
        encode(value)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (threading.Lock(), "`x`"),
        ([1, {"a": (threading.Lock(),)}], "`x[1]['a'][0]`"),
        (Plain(callback=Plain(lock=threading.Lock())), "`x.callback.lock`"),
        (Config(1.0, [threading.Lock()]), "`x.layers[0]`"),  # type: ignore[list-item]
        ((n for n in "ab"), "`x`"),
        (io.TextIOWrapper(io.BytesIO()), "`x`"),
        (functools.partial(max, threading.Lock()), "`x.args[0]`"),
        (adder(threading.Lock()), "`x.n`"),
        (np.array([1, threading.Lock()], object), "`x[1]`"),
        (np.frompyfunc(function, 1, 1), "`x`"),
    ],
)
def test_what_has_no_lasting_value_is_refused_by_place(value: Any, place: str) -> None:
    """The error names where it stands and what to do; nothing is keyed by identity."""
    with pytest.raises(UnkeyableError, match=re.escape(place)) as caught:
        encode(value)
    assert "ignore=[...]" in str(caught.value)
    assert "0x" not in str(caught.value).replace("0xffff", "")


def test_big_arrays_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By identity, for as long as the context lives; a change in place is seen."""
    hashed: list[int] = []
    real = encode_module.hash_buffer

    def counting(buffer: memoryview) -> bytes:
        hashed.append(len(buffer))
        return real(buffer)

    monkeypatch.setattr(encode_module, "hash_buffer", counting)
    context, array = KeyContext(), np.arange(1_000_000.0)
    expected = {encode([array, at], context) for at in range(20)}
    assert hashed.count(array.nbytes) == 1
    assert len(expected) == 20
    assert encode([array.copy(), 3], context) == encode([array, 3], context)
    array[:] = 7
    assert encode([array, 3], context) not in expected
    context.clear()
    assert encode([array, 3], context) == encode([array, 3])


@pytest.mark.parametrize("value", ["a" * 200_000, b"a" * 200_000, list(range(20_000))])
def test_other_big_values_are_known_by_identity(value: Any) -> None:
    """Strings, bytes and lists too; the answer is the same as without."""
    context = KeyContext()
    assert encode(value, context) == encode(value, context) == encode(value)


def test_changed_big_lists_are_noticed() -> None:
    """A list that grew is another value."""
    context, value = KeyContext(), list(range(20_000))
    before = encode(value, context)
    value.append(1)
    assert encode(value, context) == encode(list(value)) != before


def test_big_buffers_hash_alike_with_and_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves are part of the format; who hashes them is not."""
    monkeypatch.setattr(encode_module, "LEAF_BYTES", 1000)
    data = memoryview(bytes(range(256)) * 40)
    expected = hash_buffer(data)

    def no_threads(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(encode_module, "ThreadPoolExecutor", no_threads)
    assert hash_buffer(data) == expected
    assert hash_buffer(data[:-1]) != expected


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(VALUES, VALUES)
def test_encoding_is_as_fine_as_repr(one: Any, other: Any) -> None:
    """For plain values the encodings are equal exactly where type and value are."""

    def normal(value: Any) -> str:
        if isinstance(value, dict):
            return f"{{{sorted((k, normal(v)) for k, v in value.items())}}}"
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}{[normal(item) for item in value]}"
        return repr(value)

    assert (encode(one) == encode(other)) == (normal(one) == normal(other))


@given(VALUES)
def test_nothing_is_confused_with_its_list(value: Any) -> None:
    """A value, the list of it and the pair of it are three things."""
    assert len({encode(value), encode([value]), encode([value, value]), encode((value,))}) == 4


def test_sparse_matrices_count_by_format_and_content() -> None:
    """Width of indices does not count; format, shape and values do."""
    sparse = pytest.importorskip("scipy.sparse")
    dense = np.array([[0, 1, 0], [2, 0, 3]])
    kinds = ["csr", "csc", "coo", "lil", "dok", "dia", "bsr"]
    found = {encode(sparse.csr_matrix(dense).asformat(kind)) for kind in kinds}
    assert len(found) == len(kinds)
    wide = sparse.csr_matrix(dense)
    wide.indices, wide.indptr = wide.indices.astype("i8"), wide.indptr.astype("i8")
    assert encode(wide) == encode(sparse.csr_matrix(dense))
    assert encode(sparse.csr_matrix(dense * 2)) not in found
    assert encode(sparse.csr_array(dense)) not in found


def test_pandas_values_count_by_content() -> None:
    """Frames, series and indexes of all kinds of columns: equal for copies, else different."""
    pd = pytest.importorskip("pandas")

    def frame(**changes: Any) -> Any:
        columns = {
            "n": [1, 2, 3],
            "f": [1.0, math.nan, 2.0],
            "s": ["a", "b", None],
            "c": pd.Categorical(["x", "y", "x"]),
            "t": pd.date_range("2020", periods=3, tz="UTC"),
            "i": pd.array([1, None, 3], dtype="Int64"),
        }
        return pd.DataFrame({**columns, **changes})

    base = encode(frame())
    assert base == encode(frame()) == encode(frame().copy())
    others = [
        frame(n=[1, 2, 4]), frame(f=[1.0, 0.0, 2.0]), frame(s=["a", "b", "c"]),
        frame(c=pd.Categorical(["x", "y", "y"])), frame(i=pd.array([1, 2, 3], dtype="Int64")),
        frame(t=pd.date_range("2020", periods=3, tz="Europe/Paris")), frame().iloc[::-1],
        frame().rename(columns={"n": "m"}), frame().set_index("n"), frame().set_index(["n", "s"]),
        frame()["n"], frame()["n"].rename("q"), frame().index, pd.Index([0, 1, 2]), frame().columns,
    ]  # fmt: skip
    assert len({base, *map(encode, others)}) == len(others) + 1


def test_polars_values_count_by_content() -> None:
    """Frames and series: equal for copies and other chunks, else different; queries are refused."""
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame({"a": [1, 2], "b": ["x", None], "c": [[1], [2, 3]]})
    parts = pl.concat([frame[:1], frame[1:]], rechunk=False)
    assert encode(frame) == encode(parts) == encode(frame.clone())
    others = [frame.reverse(), frame.rename({"a": "z"}), frame["a"], frame["b"], frame[:1]]
    others.append(frame.with_columns(pl.col("a").cast(pl.Float64)))
    assert len({encode(frame), *map(encode, others)}) == len(others) + 1
    with pytest.raises(UnkeyableError, match="collect"):
        encode(frame.lazy())
