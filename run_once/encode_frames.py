"""How pandas' and polars' frames, series and indexes are encoded; neither is imported here."""

from __future__ import annotations

import sys
from typing import Any

from run_once.encode import Encoder, Handler, record


def find_pandas(kind: type) -> Handler | None:
    """Return the handler of a pandas type."""
    pd: Any = sys.modules.get("pandas")
    if pd is None:
        return None
    bases = ((pd.DataFrame, _frame), (pd.Series, _series), (pd.Index, _index))
    return next((handler for base, handler in bases if issubclass(kind, base)), None)


def _frame(encoder: Encoder, value: Any) -> bytes:
    columns = (value.iloc[:, at] for at in range(value.shape[1]))
    parts = [
        encoder.encode(type(value).__name__, ""),
        encoder.encode(value.index, ".index"),
        encoder.encode(value.columns, ".columns"),
    ]
    parts += [_values(encoder, column) for column in columns]
    return record("pandas", *parts)


def _series(encoder: Encoder, value: Any) -> bytes:
    return record(
        "pandas",
        encoder.encode(type(value).__name__, ""),
        encoder.encode(value.index, ".index"),
        encoder.encode(value.name, ".name"),
        _values(encoder, value),
    )


def _index(encoder: Encoder, value: Any) -> bytes:
    pd: Any = sys.modules["pandas"]
    names = encoder.encode(list(value.names), ".names")
    if isinstance(value, pd.RangeIndex):
        span = (value.start, value.stop, value.step)
        return record("index", names, encoder.encode(span, ""))
    if isinstance(value, pd.MultiIndex):
        used = value.remove_unused_levels()
        levels = [_values(encoder, level) for level in used.levels]
        codes = [encoder.encode(codes.astype("<i8"), "") for codes in used.codes]
        return record("multi", names, *levels, *codes)
    return record("index", names, _values(encoder, value))


def _values(encoder: Encoder, value: Any) -> bytes:
    """Encode the values of a column or index; missing ones by a mask."""
    np: Any = sys.modules["numpy"]
    pd: Any = sys.modules["pandas"]
    dtype = value.dtype
    if isinstance(dtype, np.dtype):
        return record("values", encoder.encode(value.to_numpy(), ".values"))
    if isinstance(dtype, pd.CategoricalDtype):
        array = value.array
        parts = (dtype.categories, dtype.ordered, array.codes.astype("<i8"))
        return record("categories", *(encoder.encode(part, ".values") for part in parts))
    if isinstance(dtype, pd.DatetimeTZDtype):
        times = value.to_numpy(dtype=f"datetime64[{dtype.unit}]")
        return record("times", *(encoder.encode(part, ".values") for part in (str(dtype), times)))
    mask = np.asarray(value.isna())
    kept = list(value.array[~mask].astype(object))
    return record("extension", *(encoder.encode(x, ".values") for x in (str(dtype), mask, kept)))


def find_polars(kind: type) -> Handler | None:
    """Return the handler of a polars type."""
    pl: Any = sys.modules.get("polars")
    if pl is None:
        return None
    bases = ((pl.DataFrame, _polars_frame), (pl.Series, _polars_series), (pl.LazyFrame, _lazy))
    return next((handler for base, handler in bases if issubclass(kind, base)), None)


def _polars_frame(encoder: Encoder, value: Any) -> bytes:
    return record("polars", *(_polars_series(encoder, series) for series in value.get_columns()))


def _polars_series(encoder: Encoder, value: Any) -> bytes:
    head = encoder.encode((value.name, str(value.dtype)), ".name")
    if value.dtype.is_numeric() and not value.null_count() and not value.dtype.is_decimal():
        return record("column", head, encoder.encode(value.to_numpy(), ".values"))
    return record("column", head, encoder.encode(value.to_list(), ".values"))


def _lazy(encoder: Encoder, value: Any) -> bytes:
    raise encoder.refusal(value, "is a query that has not run; collect() it first")
