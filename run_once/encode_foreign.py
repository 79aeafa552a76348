"""How the types of numpy, scipy, pandas, polars and scikit-learn are encoded.

None of these is ever imported here: a value of such a type can only exist where its library is
loaded already.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from run_once.encode import BIG_BYTES, Encoder, Handler, encode_buffer, record
from run_once.encode_frames import find_pandas, find_polars
from run_once.encode_sklearn import find_sklearn

_SAMPLES: Final = 64


def find_foreign(kind: type) -> Handler | None:
    """Return the handler of another library's type, or None if it is not known here."""
    for base in kind.__mro__:
        finder = _FINDERS.get(base.__module__.partition(".")[0])
        handler = finder(kind) if finder is not None else None
        if handler is not None:
            return handler
    return None


def find_numpy(kind: type) -> Handler | None:
    """Return the handler of a numpy type."""
    np: Any = sys.modules.get("numpy")
    if np is None:
        return None
    bases = [(np.ndarray, _array), (np.generic, _scalar), (np.dtype, _dtype), (np.ufunc, _ufunc)]
    random: Any = sys.modules.get("numpy.random")
    if random is not None:
        bases += [
            (random.RandomState, _random_state),
            (random.Generator, _generator),
            (random.BitGenerator, _bit_generator),
            (random.SeedSequence, _seed_sequence),
        ]
    return next((handler for base, handler in bases if issubclass(kind, base)), None)


def _array(encoder: Encoder, value: Any) -> bytes:
    if value.nbytes < BIG_BYTES or value.dtype.hasobject or value.dtype.kind == "T":
        return _array_content(encoder, value)
    sample = value.flat[:: max(1, value.size // _SAMPLES)].tobytes()
    guard = (value.shape, value.strides, value.dtype.str, sample)
    return encoder.remembered(value, guard, lambda: _array_content(encoder, value))


def _array_content(encoder: Encoder, value: Any) -> bytes:
    np: Any = sys.modules["numpy"]
    masked: Any = sys.modules.get("numpy.ma")
    kind = type(value)
    if masked is not None and isinstance(value, masked.MaskedArray):
        content = (value.filled(value.fill_value), masked.getmaskarray(value), value.fill_value)
        return record("masked", *(encoder.encode(part, "") for part in content))
    shape = encoder.encode(value.shape, ".shape")
    data = _array_data(encoder, np.asarray(value))
    parts = [_dtype(encoder, value.dtype), shape, data]
    # A memmap is the array it maps; other subclasses may compute differently.
    if kind is not np.ndarray and not issubclass(kind, np.memmap):
        state = getattr(value, "__dict__", {})
        parts += [encoder.encode(kind, ".__class__"), encoder.named(state)]
    return record("array", *parts)


def _array_data(encoder: Encoder, value: Any) -> bytes:
    """Encode the elements in C order, without what lies between them."""
    np: Any = sys.modules["numpy"]
    dtype = value.dtype
    if dtype.names is not None:
        fields = (_array_data(encoder, np.asarray(value[name])) for name in dtype.names)
        return record("fields", *fields)
    if dtype.hasobject or dtype.kind == "T":
        return b"l%d:%b" % (value.size, b"".join(encoder.each(value.flat)))
    if dtype.kind in "fc" and dtype.itemsize > (8 if dtype.kind == "f" else 16):
        return _long_floats(encoder, value)
    flat = np.ascontiguousarray(value).reshape(-1)
    return encode_buffer(b"b", memoryview(flat.view(np.uint8)) if flat.nbytes else b"")


def _long_floats(encoder: Encoder, value: Any) -> bytes:
    """Encode extended precision as two doubles: its own bytes have undefined gaps."""
    np: Any = sys.modules["numpy"]
    if value.dtype.kind == "c":
        return record(
            "complex", *(_long_floats(encoder, part) for part in (value.real, value.imag))
        )
    with np.errstate(all="ignore"):
        high = value.astype(np.float64)
        low = (value - high).astype(np.float64)
    return record("long", _array_data(encoder, high), _array_data(encoder, low))


def _dtype(encoder: Encoder, value: Any) -> bytes:
    if value.names is not None:
        fields = [(name, value.fields[name][0]) for name in value.names]
        return record("dtype", encoder.encode(fields, ".fields"))
    if value.subdtype is not None:
        return record("dtype", encoder.encode(value.subdtype, ".subdtype"))
    return record("dtype", encoder.encode((value.str, value.name), ""))


def _scalar(encoder: Encoder, value: Any) -> bytes:
    np: Any = sys.modules["numpy"]
    array = np.asarray(value)
    return record("scalar", _dtype(encoder, array.dtype), _array_data(encoder, array))


def _ufunc(encoder: Encoder, value: Any) -> bytes:
    name = value.__name__
    for module in ("numpy", "scipy.special"):
        if getattr(sys.modules.get(module), name, None) is value:
            return record("ufunc", encoder.encode(f"{module}.{name}", ""))
    raise encoder.refusal(value, "is a ufunc that no module has under its name")


def _random_state(encoder: Encoder, value: Any) -> bytes:
    return record("random", encoder.encode(value.get_state(legacy=False), ".<state>"))


def _generator(encoder: Encoder, value: Any) -> bytes:
    return record("generator", encoder.encode(value.bit_generator, ".bit_generator"))


def _bit_generator(encoder: Encoder, value: Any) -> bytes:
    seed = getattr(value, "seed_seq", None)
    parts = (value.state, seed)  # numbers spawned so far are the seed sequence's
    return record("bits", *(encoder.encode(part, ".<state>") for part in parts))


def _seed_sequence(encoder: Encoder, value: Any) -> bytes:
    names = ("entropy", "spawn_key", "pool_size", "n_children_spawned")
    return record("seed", encoder.named({name: getattr(value, name) for name in names}))


def find_scipy(kind: type) -> Handler | None:
    """Return the handler of scipy's sparse matrices and arrays."""
    sparse: Any = sys.modules.get("scipy.sparse")
    if sparse is None:
        return None
    bases = (sparse.spmatrix, getattr(sparse, "sparray", sparse.spmatrix))
    return _sparse if issubclass(kind, bases) else None


def _sparse(encoder: Encoder, value: Any) -> bytes:
    # Not by type(value): its module is private and has moved before.
    head = encoder.encode((type(value).__name__, value.format, value.shape), ".format")
    if value.format in {"csr", "csc", "bsr"}:
        return record("sparse", head, *_compressed(encoder, value))
    if value.format == "dia":
        parts = (value.data, value.offsets)
        return record("sparse", head, *(encoder.encode(part, ".data") for part in parts))
    ordered = value.tocsr(copy=True)
    ordered.sum_duplicates()
    return record("sparse", head, *_compressed(encoder, ordered))


def _compressed(encoder: Encoder, value: Any) -> list[bytes]:
    # Indices are 32 or 64 bits wide by how the matrix came about, not by what it is.
    indices = (value.indices.astype("<i8", copy=False), value.indptr.astype("<i8", copy=False))
    return [encoder.encode(part, ".data") for part in (value.data, *indices)]


_FINDERS: Final = {
    "numpy": find_numpy,
    "scipy": find_scipy,
    "pandas": find_pandas,
    "polars": find_polars,
    "sklearn": find_sklearn,
}
