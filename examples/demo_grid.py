"""The demo's grid search: an SVC over scikit-learn's digits. Run it on several machines at once.

    python examples/demo_grid.py --label A --out scores_a.json

Nothing in it is special to run-once but the `parallel_config` line. The estimator notes who fits
what, so that the demo can count fits without believing run-once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import run_once  # noqa: F401 - registers the joblib backend

GRID: dict[str, list[Any]] = {
    "C": [0.01, 0.1, 1.0, 10.0, 100.0],
    "gamma": [0.0001, 0.0003, 0.001, 0.003, 0.01],
    "kernel": ["rbf", "poly"],
}
"""50 candidates."""

FOLDS = 5


class NotedSVC(SVC):
    """An SVC that appends a line to the file `DEMO_EVENTS` when a fit starts and when it ends."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> NotedSVC:  # noqa: N803
        """Fit, and note it."""
        self._note("start", y)
        super().fit(X, y, sample_weight)
        self._note("end", y)
        return self

    def _note(self, what: str, y: Any) -> None:
        path = os.environ.get("DEMO_EVENTS")
        if path is None:
            return
        params = self.get_params()
        event = {
            "what": what,
            "label": os.environ.get("DEMO_LABEL", "?"),
            "pid": os.getpid(),
            "fit": " ".join(f"{name}={params[name]}" for name in GRID),
            "fold": hashlib.sha256(np.ascontiguousarray(y).tobytes()).hexdigest()[:8],
        }
        line = (json.dumps(event) + "\n").encode()
        # One write to a file opened for appending is never torn apart by another process's.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def search(n_jobs: int) -> dict[str, list[Any]]:
    """Run the grid search under whatever joblib backend is active; return its scores."""
    data = load_digits()
    # It draws no random numbers; the state says so: equal calls have equal values.
    grid = GridSearchCV(NotedSVC(random_state=0), GRID, cv=FOLDS, n_jobs=n_jobs, refit=False)
    grid.fit(data.data, data.target)
    return {
        name: values.tolist()
        for name, values in grid.cv_results_.items()
        if name.endswith("_test_score")
    }


def main() -> None:
    """Run the search and write its scores as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", default="A", help="name of this process in the demo's output")
    parser.add_argument("--out", type=Path, help="file that the scores are written to")
    parser.add_argument("--n-jobs", type=int, default=2, help="workers of this process")
    parser.add_argument(
        "--backend", default="run_once", help="joblib backend; loky for plain joblib"
    )
    arguments = parser.parse_args()
    os.environ["DEMO_LABEL"] = arguments.label
    started_s = time.perf_counter()
    with joblib.parallel_config(arguments.backend):
        scores = search(arguments.n_jobs)
    seconds = time.perf_counter() - started_s
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"scores": scores, "seconds": seconds}))
    else:
        print(f"{len(scores['mean_test_score'])} candidates in {seconds:.1f} s")


if __name__ == "__main__":
    main()
