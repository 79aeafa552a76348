"""The program that the acceptance tests of the joblib backend start several times, as users would.

python tests/joblib_script.py calls --label A --events FILE --out FILE --n-jobs 2 --count 1000
python tests/joblib_script.py search --label A --events FILE --out FILE --n-jobs 2 --width 4

Each body appends a line "label pid name" to the events file as it starts, so that runs are counted
without believing the lock table.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import GridSearchCV

import run_once  # noqa: F401 - registers the backend


def note(name: str) -> None:
    """Append a line; one write to a file opened for appending is never torn apart."""
    line = f"{os.environ['TEST_LABEL']} {os.getpid()} {name}\n".encode()
    descriptor = os.open(os.environ["TEST_EVENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def square(number: int, pause_s: float) -> int:
    """Stand for work."""
    note(str(number))
    time.sleep(pause_s)
    return number * number


class NotedClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Predicts by a threshold on the first feature; notes each fit."""

    def __init__(self, threshold: float = 0.0, pause_s: float = 0.05) -> None:
        self.threshold = threshold
        self.pause_s = pause_s

    def fit(self, X: Any, y: Any) -> NotedClassifier:  # noqa: N803 (scikit-learn's name)
        """Fit nothing, slowly."""
        note(f"{self.threshold}:{int(np.abs(X).sum() * 1e6)}")
        time.sleep(self.pause_s)
        self.classes_ = np.unique(y)
        return self

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Compare with the threshold."""
        return self.classes_[(X[:, 0] > self.threshold).astype(int)]


def run_calls(options: argparse.Namespace) -> list[int]:
    """Compute squares; the values in order."""
    calls = (joblib.delayed(square)(x, options.pause_s) for x in range(options.count))
    values: list[int] = joblib.Parallel(n_jobs=options.n_jobs)(calls)
    return values


def run_search(options: argparse.Namespace) -> list[float]:
    """Search a grid of so many thresholds, with 5 folds; the mean scores."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 3))
    classes = (features[:, 0] > 0.1).astype(int)
    grid = {"threshold": [round(0.1 * step, 1) for step in range(options.width)]}
    search = GridSearchCV(
        NotedClassifier(pause_s=options.pause_s), grid, cv=5, n_jobs=options.n_jobs, refit=False
    )
    search.fit(features, classes)
    scores: list[float] = search.cv_results_["mean_test_score"].tolist()
    return scores


def main() -> None:
    """Run, and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["calls", "search"])
    parser.add_argument("--label", required=True)
    parser.add_argument("--events", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--pause-s", type=float, default=0.05)
    parser.add_argument("--plain", action="store_true", help="without run-once")
    options = parser.parse_args()
    os.environ["TEST_LABEL"] = options.label
    os.environ["TEST_EVENTS"] = options.events
    backend = "loky" if options.plain else "run_once"
    with joblib.parallel_config(backend):
        values = run_calls(options) if options.what == "calls" else run_search(options)
    Path(options.out).write_text(json.dumps(values))


if __name__ == "__main__":
    main()
