"""Keys of the calls that scikit-learn really makes, across processes and settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from run_once.call_keys import CallKeyer
from run_once.errors import RunOnceWarning

sklearn = pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")

# Runs in other processes too: prints the keys of each scenario's calls as JSON.
SCENARIOS = '''
import json, sys, warnings
import joblib
import numpy as np
import sklearn
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from run_once.call_keys import CallKeyer

X, y = load_digits(return_X_y=True)
X, y = X[:150], y[:150] % 3


class Recorder:
    """Keeps the keys of all calls that reach joblib meanwhile."""

    def __enter__(self):
        self.keys, self.real = [], joblib.Parallel.__call__
        keyer = CallKeyer()

        def call(parallel, iterable):
            calls = list(iterable)
            # Forests predict into a shared array (require="sharedmem"): such calls have no key.
            self.keys += [
                keyer.key(*one) for one in calls if one[0].__name__ != "_accumulate_prediction"
            ]
            return self.real(parallel, calls)

        joblib.Parallel.__call__ = call
        return self

    def __exit__(self, *_):
        joblib.Parallel.__call__ = self.real


def grid(C=(1, 10), data=X, est=None, **options):
    search = GridSearchCV(est or SVC(), {"C": list(C)}, cv=3, **options)
    return lambda: search.fit(data, y)

def halves(seed=0):
    est = make_pipeline(StandardScaler(), SVC())
    space = {"svc__C": [1, 2, 3, 4], "svc__gamma": [0.1, 0.01]}
    search = RandomizedSearchCV(est, space, n_iter=3, cv=3, random_state=seed)
    return lambda: search.fit(X, y)

def cross():
    est = DecisionTreeClassifier(random_state=0)
    return lambda: cross_val_score(est, X, y, cv=3, scoring="f1_macro")

def permuted(seed=0):
    fitted = RandomForestClassifier(5, random_state=0).fit(X, y)
    return lambda: permutation_importance(fitted, X[:, :3].copy().repeat(22, 1)[:, :64], y,
                                          n_repeats=2, random_state=seed)

def searched():
    fitted = GridSearchCV(SVC(), {"C": [1, 2]}, cv=3).fit(X, y)
    return lambda: permutation_importance(fitted, X, y, n_repeats=1, random_state=0)

def forest(n=5, seed=0, **options):
    return lambda: RandomForestClassifier(n, random_state=seed, **options).fit(X, y)

def ovr():
    return lambda: OneVsRestClassifier(LogisticRegression(max_iter=50)).fit(X, y)

ALL = dict(grid=grid, random=halves, cross=cross, permuted=permuted, searched=searched,
           forest=forest, ovr=ovr)

def keys_of(run):
    with Recorder() as recorder:
        run()
    return recorder.keys

def main():
    warnings.simplefilter("ignore") if "-q" in sys.argv else None
    print(json.dumps({name: keys_of(make()) for name, make in ALL.items()}))

if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def scenarios() -> Iterator[dict[str, Any]]:
    """The scenarios, in this process."""
    names: dict[str, Any] = {"__name__": "scenarios"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(SCENARIOS, "scenarios.py", "exec"), names)
        yield names


@pytest.fixture
def keys_of(scenarios: dict[str, Any]) -> Callable[[Any], list[str]]:
    """Run something and return the keys of the calls it made."""
    found: Callable[[Any], list[str]] = scenarios["keys_of"]
    return found


def _other_process(folder: Path, seed: str, *flags: str) -> dict[str, list[str]]:
    script = folder / "scenarios.py"
    script.write_text(SCENARIOS)
    environ = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, *flags, str(script)],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environ,
        timeout=100,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_keys_are_equal_in_other_processes_with_other_hash_seeds_and_warnings(
    tmp_path: Path, scenarios: dict[str, Any], keys_of: Callable[[Any], list[str]]
) -> None:
    """All scenarios give the same keys here and there, whatever PYTHONHASHSEED and -W."""
    here = {name: keys_of(make()) for name, make in scenarios["ALL"].items()}
    one = _other_process(tmp_path, "1", "-W", "ignore")
    two = _other_process(tmp_path, "20000", "-W", "default", "-W", "ignore::ImportWarning")
    assert one == two
    assert here == one
    assert all(keys for keys in one.values())


def test_keys_within_one_call_are_distinct(
    scenarios: dict[str, Any], keys_of: Callable[[Any], list[str]]
) -> None:
    """Calls that compute different things have different keys."""
    for name, make in scenarios["ALL"].items():
        keys = keys_of(make())
        assert len(set(keys)) == len(keys), name


@pytest.mark.parametrize("name", ["grid", "random", "cross", "permuted", "searched", "forest"])
def test_a_second_fit_gives_the_same_keys(
    name: str, scenarios: dict[str, Any], keys_of: Callable[[Any], list[str]]
) -> None:
    """What a fit leaves on the search object does not reach the keys of the next."""
    run = scenarios["ALL"][name]()
    assert keys_of(run) == keys_of(run)


def test_a_wider_grid_keeps_the_keys_of_the_common_part(
    scenarios: dict[str, Any], keys_of: Callable[[Any], list[str]]
) -> None:
    """Candidates that both grids have are known, wherever they stand in the grid."""
    narrow = set(keys_of(scenarios["grid"](C=(1, 10))))
    wide = set(keys_of(scenarios["grid"](C=(5, 10, 1))))
    assert len(narrow) == 6
    assert narrow < wide
    assert len(wide) == 9


def test_a_larger_forest_keeps_the_keys_of_its_first_trees(
    scenarios: dict[str, Any], keys_of: Callable[[Any], list[str]]
) -> None:
    """A tree is known by its seed, not by its number or how many there are."""
    small = keys_of(scenarios["forest"](5))
    assert keys_of(scenarios["forest"](8))[:5] == small


@pytest.mark.parametrize("setting", ["n_jobs", "verbose", "fortran", "memmap", "volatile option"])
def test_what_does_not_change_results_does_not_change_keys(
    setting: str,
    scenarios: dict[str, Any],
    keys_of: Callable[[Any], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Verbosity, parallelism, memory layout and display options are not part of keys."""
    grid, data = scenarios["grid"], scenarios["X"]
    expected = keys_of(grid())
    if setting == "n_jobs":
        found = keys_of(grid(n_jobs=1))
    elif setting == "verbose":
        found = keys_of(grid(verbose=1))
    elif setting == "fortran":
        found = keys_of(grid(data=np.asfortranarray(data)))
    elif setting == "memmap":
        mapped = np.memmap(tmp_path / "x", dtype=data.dtype, mode="w+", shape=data.shape)
        mapped[:] = data
        found = keys_of(grid(data=mapped))
    else:
        with sklearn.config_context(working_memory=7, display="text"):
            found = keys_of(grid())
    assert found == expected


@pytest.mark.parametrize("setting", ["data", "parameter", "seed", "option", "scoring", "version"])
def test_what_changes_results_changes_keys(
    setting: str,
    scenarios: dict[str, Any],
    keys_of: Callable[[Any], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other data, parameters, random_state, options or versions share no key."""
    grid, data = scenarios["grid"], scenarios["X"]
    expected = set(keys_of(grid()))
    if setting == "data":
        other = data.copy()
        other[3, 3] += 1
        found = keys_of(grid(data=other))
    elif setting == "parameter":
        found = keys_of(grid(est=scenarios["SVC"](gamma=0.5)))
    elif setting == "seed":
        found, expected = keys_of(scenarios["forest"](seed=1)), set(keys_of(scenarios["forest"]()))
    elif setting == "option":
        with sklearn.config_context(enable_metadata_routing=True):
            found = keys_of(grid())
    elif setting == "scoring":
        found = keys_of(grid(scoring="f1_macro"))
    else:
        from run_once import identity

        other_version = identity.Distribution("scikit-learn", "0.0")
        monkeypatch.setattr(identity, "distribution_of", lambda _: other_version)
        found = keys_of(grid())
    assert found
    assert not expected & set(found)


def _fit(estimator: Any) -> Any:
    return estimator


def test_an_estimator_without_a_seed_gives_one_warning() -> None:
    """random_state=None is told once, and only where it matters."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.svm import SVC

    keyer = CallKeyer()
    with pytest.warns(RunOnceWarning, match="RandomForestClassifier has random_state=None"):
        keyer.key(_fit, (RandomForestClassifier(),), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keyer.key(_fit, (RandomForestClassifier(max_depth=3),), {})
        CallKeyer().key(_fit, (SVC(),), {})
        CallKeyer().key(_fit, (RandomForestClassifier(random_state=0),), {})


def test_memory_is_not_kept_for_arrays_that_are_gone() -> None:
    """Big arrays are known weakly: a stream of them does not pile up."""
    import gc
    import weakref

    keyer = CallKeyer()
    array = np.zeros(100_000)
    gone = weakref.ref(array)
    keyer.key(_fit, (array,), {})
    del array
    gc.collect()
    assert gone() is None
