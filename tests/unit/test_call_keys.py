"""Keys of calls: one call, one key, however it is spelled; and what a key looks like."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from run_once import call_keys, explain_key, identity
from run_once.call_keys import MAX_KEY_BYTES, CallKeyer, Numberer
from run_once.calls import unwrap
from run_once.errors import UnkeyableError


def work(x: Any, y: int = 2, *, scale: float = 1.0) -> Any:
    """Have every common kind of parameter."""
    return x, y, scale


def variadic(x: int, /, *rest: int, **more: int) -> Any:
    """Have every other kind."""
    return x, rest, more


class Model:
    """An object with methods of each kind."""

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate

    def fit(self, data: Any, epochs: int = 1) -> Any:
        """Be called on an object."""
        return data, epochs

    @classmethod
    def make(cls, rate: float) -> Any:
        """Be called on the class."""
        return cls(rate)

    @staticmethod
    def help(x: int) -> int:
        """Be called on nothing."""
        return x

    def __call__(self, x: int) -> float:
        """Be called on the object."""
        return x * self.rate


def key(func: Any, *args: Any, **kwargs: Any) -> str:
    """The key of one call, by a keyer of its own."""
    return CallKeyer().key(func, args, kwargs)


SPELLINGS: list[Callable[[], str]] = [
    lambda: key(work, 1, 2, scale=1.0),
    lambda: key(work, 1),
    lambda: key(work, x=1),
    lambda: key(work, y=2, x=1),
    lambda: key(functools.partial(work, 1)),
    lambda: key(functools.partial(work, y=2), 1),
    lambda: key(functools.partial(functools.partial(work, y=9), y=2, scale=1.0), x=1),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_call_has_one_key_however_it_is_spelled(spelling: Callable[[], str]) -> None:
    """Positions, keywords, defaults and partials are ways to write the same call."""
    assert spelling() == key(work, 1)


def test_other_calls_have_other_keys() -> None:
    """Other arguments, functions or objects: other keys."""
    found = [
        key(work, 1), key(work, 2), key(work, 1, 3), key(work, 1, scale=2.0), key(work, 1.0),
        key(work, "1"), key(variadic, 1), key(variadic, 1, 2), key(variadic, 1, 2, 3),
        key(variadic, 1, a=2), key(variadic, 1, 2, a=2), key(variadic, 1, b=2),
        key(Model().fit, 1), key(Model(0.2).fit, 1), key(Model.make, 1), key(Model.help, 1),
        key(Model, 1), key(Model(), 1), key(Model(0.2), 1), key(len, []), key(max, []),
    ]  # fmt: skip
    assert len(set(found)) == len(found)


def test_bound_methods_are_their_function_with_an_object() -> None:
    """A method called on an object, and the function called with it, are one call."""
    assert key(Model(0.3).fit, [1]) == key(Model.fit, Model(0.3), [1], epochs=1)


def test_calls_that_do_not_fit_the_signature_do_not_match_any_that_do() -> None:
    """They will fail when they run; a stored value of another call must not hide that."""
    good = key(work, 1, 2)
    assert len({good, key(work, 1, 2, x=1), key(work, 1, 2, 3), key(work), key(work, 1, z=1)}) == 5


def test_a_key_is_short_readable_ascii() -> None:
    """It starts with the function's name and ends with digest, version and number."""
    found = CallKeyer(version=7).key(work, (1,), {})
    name, _, rest = found.partition("/")
    assert name.endswith("test_call_keys.work")
    digest, _, version = rest.partition("_v")
    assert version == "007"
    assert len(digest) == 40
    assert int(digest, 16)
    names: dict[str, Any] = {"__name__": "пакет " + "m" * 400}
    exec("def f(): pass", names)
    numbered = Numberer()
    for _ in range(3):
        found = numbered.number(CallKeyer(version=10**8).key(names["f"], (), {}))
    assert found.isascii()
    assert found.isprintable()
    assert " " not in found
    assert len(found) <= MAX_KEY_BYTES


def test_versions_are_separate() -> None:
    """Another version is another key; a bad one is refused."""
    found = {CallKeyer(version=version).key(work, (1,), {}) for version in range(3)}
    assert len(found) == 3
    for bad in (-1, True, 10**12, 1.5):
        with pytest.raises(ValueError, match="version="):
            CallKeyer(version=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="code="):
        CallKeyer(code="all")  # type: ignore[arg-type]


def test_ignored_arguments_do_not_count() -> None:
    """Whether named, variadic, or of a kind that cannot be keyed at all."""
    keyer = CallKeyer(ignore=["y", "log"])
    lock = threading.Lock()
    assert keyer.key(work, (1, 2)) == keyer.key(work, (1, 3)) == keyer.key(work, (1,), {"y": lock})
    assert keyer.key(variadic, (1,), {"log": lock}) == keyer.key(variadic, (1,))
    assert keyer.key(work, (1, 2)) != keyer.key(work, (2, 2))


def test_own_keys_stand_for_the_arguments() -> None:
    """key= gets the call's arguments as they were given; its text is used or hashed."""
    keyer = CallKeyer(key=lambda x, **_: f"run-{x}")
    lock = threading.Lock()
    assert keyer.key(work, (5,), {"scale": lock}).endswith("work/run-5")
    assert keyer.key(Model().fit, (5,)).endswith("Model.fit/run-5")
    assert CallKeyer(key=str, version=2).key(work, ("a",)).endswith("/a_v002")
    for text in ("a_v002", "a#2", "й", "a\nb", "x" * 500):
        found = CallKeyer(key=str).key(work, (text,))
        assert len(found.rpartition("/")[2]) == 40
    for bad in ("", 3, None):
        with pytest.raises(UnkeyableError, match="must return a string"):
            CallKeyer(key=lambda _: bad).key(work, (1,))  # type: ignore[arg-type, return-value]


def test_what_cannot_be_keyed_names_the_argument() -> None:
    """By the parameter's name, or its position where it has none."""
    lock = threading.Lock()
    with pytest.raises(UnkeyableError, match=r"`x\.rate` of .*work\(\)"):
        key(work, Model(lock))  # type: ignore[arg-type]
    with pytest.raises(UnkeyableError, match=r"`args\[1\]` of .*variadic\(\)"):
        key(variadic, 1, 2, lock)
    with pytest.raises(UnkeyableError, match=r"`self\.rate` of .*fit\(\)"):
        key(Model(lock).fit, 1)  # type: ignore[arg-type]
    n = lock
    with pytest.raises(UnkeyableError, match=r"`<function>.*\.n`"):
        key(lambda: n)


def test_equal_calls_are_numbered_in_order() -> None:
    """The n-th equal key gets #n; the first is the key of a single call."""
    numberer = Numberer()
    found = [numberer.number(text) for text in ("a", "b", "a", "a", "b")]
    assert found == ["a", "b", "a#2", "a#3", "b#2"]
    assert numberer.duplicates == 3


def test_wrappers_are_taken_off() -> None:
    """joblib.Memory's wrapper and partials in any order leave the function."""
    joblib = pytest.importorskip("joblib")
    memory = joblib.Memory(None)
    assert unwrap(functools.partial(memory.cache(work), 1), (2,), {"scale": 3}) == (
        work, (1, 2), {"scale": 3}, None,
    )  # fmt: skip
    assert key(memory.cache(work), 1) == key(work, 1)


def test_functions_of_a_script_are_known_by_its_file_name(tmp_path: Path) -> None:
    """From any folder and with any hash seed; `python -m` by the module's name."""
    text = (
        "from run_once.call_keys import CallKeyer\n"
        "def f(x, y=frozenset('abc')): pass\n"
        "class C:\n"
        "    def __init__(self): self.parts = {'u', 'v', 'w'}\n"
        "k = CallKeyer()\n"
        "print(k.key(f, (C(),)), k.key(lambda x: x + 1, (2,)))\n"
    )
    found: list[list[str]] = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        script = tmp_path / folder / "script.py"
        script.write_text(text)
        for command in ([str(script)], ["-m", "script"]):
            done = subprocess.run(
                [sys.executable, *command],
                check=True,
                capture_output=True,
                text=True,
                cwd=tmp_path / folder,
                env={**os.environ, "PYTHONHASHSEED": str(len(found) + 1)},
                timeout=60,
            )
            found.append(done.stdout.split())
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[0][0].startswith("script.py.f/")
    assert found[1][0].startswith("script.f/")


def test_installed_functions_carry_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version of a library makes new keys for its functions, not for the user's."""
    click = pytest.importorskip("click")
    found = identity.distribution_of("click")
    assert found == identity.Distribution("click", importlib.metadata.version("click"))
    assert identity.distribution_of("json.decoder") is None
    assert identity.distribution_of("__main__") is None
    assert identity.distribution_of(__name__) is None
    before = key(click.echo, 1), key(work, 1)
    newer = identity.Distribution("click", "99")
    monkeypatch.setattr(identity, "distribution_of", lambda m: newer if m[:5] == "click" else None)
    assert key(click.echo, 1) != before[0]
    assert key(work, 1) == before[1]


def test_a_namesake_of_an_installed_module_has_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own file that happens to be called like a package is the user's own."""
    (tmp_path / "click.py").write_text("def f(): pass\n")
    monkeypatch.delitem(sys.modules, "click", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    identity.distribution_of.cache_clear()
    import click  # the file above

    try:
        assert Path(str(click.__file__)).parent == tmp_path
        assert identity.distribution_of("click") is None
    finally:
        identity.distribution_of.cache_clear()


def test_code_decides_whether_a_mended_function_resumes() -> None:
    """Mode "none" takes its name, "source" its text, defaults and closure."""

    def variant(text: str) -> Any:
        names: dict[str, Any] = {"__name__": "project.steps"}
        exec(text, names)
        return names["f"]

    one, two = variant("def f(x): return x"), variant("def f(x): return x + 1")
    assert CallKeyer().key(one, (1,)) == CallKeyer().key(two, (1,))
    keyer = CallKeyer(code="source")
    assert keyer.key(one, (1,)) != keyer.key(two, (1,))
    assert keyer.key(work, (one,)) != keyer.key(work, (two,))


def test_threads_may_share_a_keyer() -> None:
    """Keys made at once are the keys made one by one."""
    keyer = CallKeyer()
    values = [list(range(at, at + 300)) for at in range(50)]
    expected = [key(work, value) for value in values]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda value: keyer.key(work, (value,)), values)) == expected


def test_keys_do_not_change_unnoticed() -> None:
    """A new key for an old call makes all its users compute again: then FORMAT must change."""
    names: dict[str, Any] = {"__name__": "project.steps"}
    exec("def f(a, b=2.5, *, c='x'): pass", names)
    value = [None, True, 1, "a", b"b", (1, {2}), {"k": frozenset({3})}, range(3), complex(1, 2)]
    assert call_keys.FORMAT == 1
    assert key(names["f"], value) == "project.steps.f/3530bf2c424d97dd8ed63f20d3b027956a60809a"


def test_an_explanation_shows_what_went_in() -> None:
    """The key, the function, each argument with its parts, and what was left out."""
    text = explain_key(work, {"depth": [1, 2]}, scale=0.5)
    assert text.startswith(f"key: {key(work, {'depth': [1, 2]}, scale=0.5)}\n")
    for part in (
        "function",
        "test_call_keys.work",
        "x: dict of 1",
        "['depth']: list of 2",
        "[0]: 1",
        "y: 2",
        "scale: 0.5",
        "left out: nothing",
    ):
        assert part in text, text
    ignoring = CallKeyer(ignore=["y"])
    assert "left out: y" in ignoring.explain(work, (1,))
    assert "key=..." in CallKeyer(key=str).explain(work, (1,))
    assert "… and " in explain_key(work, list(range(1000)))
    assert len(explain_key(work, list(range(1000))).splitlines()) < 60


def test_making_keys_warns_of_nothing() -> None:
    """Ordinary calls give no warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        key(work, [Model(), {1: "a"}])
