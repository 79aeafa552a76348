"""What of scikit-learn goes into a key, and what does not; it is not imported here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from run_once import identity
from run_once.encode import Encoder, Handler, record

VOLATILE_OPTIONS: Final = frozenset(
    {
        "display",
        "enable_cython_pairwise_dist",
        "pairwise_dist_chunk_size",
        "print_changed_only",
        "skip_parameter_validation",
        "working_memory",
    }
)
"""Options of ``sklearn.set_config`` that change how a result is computed or shown, not the result.

All others are part of the key, ones of later versions included.
"""

VOLATILE_ARGUMENTS: Final = frozenset(
    {
        "callback_ctx",  # callbacks watch a fit
        "caller",  # the search object, which only the callbacks see
        "candidate_progress",
        "message",
        "message_clsname",
        "n_trees",
        "split_progress",
        "total_n_estimators",
        "tree_idx",
        "verbose",
    }
)
"""Arguments of scikit-learn's own functions that only change what is printed meanwhile."""

VOLATILE_PARAMETERS: Final = frozenset({"n_jobs", "verbose"})
"""Parameters of scikit-learn's own estimators that do not change what they compute."""

VOLATILE_ATTRIBUTES: Final = frozenset(
    {
        "_parent_callback_ctx",
        "_skl_callbacks",
        "_skl_callbacks_to_teardown",
        "cv_results_",  # holds times; the best estimator says what the search came to
        "refit_time_",
    }
)
"""Attributes of estimators that differ from one fit to the next, or only watch it."""

_NO_SEED_NEEDED: Final[dict[str, Callable[[Mapping[str, Any]], bool]]] = {
    "SVC": lambda p: not p.get("probability") or p.get("probability") == "deprecated",
    "NuSVC": lambda p: not p.get("probability") or p.get("probability") == "deprecated",
    "LogisticRegression": lambda p: p.get("solver") not in {"sag", "saga", "liblinear"},
    "LogisticRegressionCV": lambda p: p.get("solver") not in {"sag", "saga", "liblinear"},
    "Ridge": lambda p: p.get("solver") not in {"sag", "saga"},
    "RidgeClassifier": lambda p: p.get("solver") not in {"sag", "saga"},
    "Lasso": lambda p: p.get("selection") == "cyclic",
    "LassoCV": lambda p: p.get("selection") == "cyclic",
    "ElasticNet": lambda p: p.get("selection") == "cyclic",
    "ElasticNetCV": lambda p: p.get("selection") == "cyclic",
    "MultiTaskLasso": lambda p: p.get("selection") == "cyclic",
    "MultiTaskElasticNet": lambda p: p.get("selection") == "cyclic",
    "PCA": lambda p: p.get("svd_solver") in {"full", "covariance_eigh"},
    "KernelPCA": lambda p: p.get("eigen_solver") == "dense",
    "KFold": lambda p: not p.get("shuffle"),
    "StratifiedKFold": lambda p: not p.get("shuffle"),
    "GaussianProcessRegressor": lambda p: not p.get("n_restarts_optimizer"),
    "GaussianProcessClassifier": lambda p: not p.get("n_restarts_optimizer"),
}
"""Estimators that draw random numbers only with some parameters."""


def is_sklearn(module: object) -> bool:
    """Tell whether a module's name is of scikit-learn itself."""
    return isinstance(module, str) and module.partition(".")[0] == "sklearn"


def result_options(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the scikit-learn options that may change a result."""
    if config is None:
        return None
    return {name: value for name, value in config.items() if name not in VOLATILE_OPTIONS}


def find_sklearn(kind: type) -> Handler | None:
    """Return the handler of estimators: all that derive from ``sklearn.base.BaseEstimator``."""
    base: Any = getattr(sys.modules.get("sklearn.base"), "BaseEstimator", None)
    return _estimator if base is not None and issubclass(kind, base) else None


def _estimator(encoder: Encoder, value: Any) -> bytes:
    """Encode an estimator by class, version, parameters, and what it was fitted to."""
    kind = type(value)
    try:
        parameters = value.get_params(deep=False)
    except Exception as error:
        reason = f"does not tell its parameters ({type(error).__name__}: {error})"
        raise encoder.refusal(value, reason) from error
    fitted = {
        name: item
        for name, item in vars(value).items()
        if name not in parameters and name not in VOLATILE_ATTRIBUTES
    }
    unseeded = set(encoder.unseeded)
    if _lacks_seed(kind, parameters, fitted):
        unseeded.add(kind.__name__)
    if is_sklearn(kind.__module__):
        parameters = {k: v for k, v in parameters.items() if k not in VOLATILE_PARAMETERS}
    owner = identity.distribution_of(kind.__module__)
    data = record(
        "estimator",
        encoder.encode(kind, ".__class__"),
        encoder.encode(tuple(owner) if owner else None, ".<distribution>"),
        encoder.named(parameters),
        encoder.named(fitted),
    )
    if "random_state" in parameters:
        encoder.unseeded = unseeded  # it seeds what it holds
    return data


def _lacks_seed(kind: type, parameters: Mapping[str, Any], fitted: Mapping[str, Any]) -> bool:
    if "random_state" not in parameters or parameters["random_state"] is not None:
        return False
    if any(name.endswith("_") and not name.startswith("_") for name in fitted):
        return False  # it has drawn its numbers already
    needs_none = _NO_SEED_NEEDED.get(kind.__name__)
    return needs_none is None or not needs_none(parameters)
