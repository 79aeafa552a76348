"""Stored values: signed, checked before they are unpickled, and each fault told apart."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from run_once import result_frames
from run_once.buffers import ALIGNED_BYTES, Parts, aligned_buffer
from run_once.errors import ResultDamagedError, ResultError, ResultMissingError, SignatureError
from run_once.result_frames import HEADER_BYTES, dump, load
from run_once.secret import Secret

KEY, TOKEN, SECRET = b"module.f/12ab", 7, Secret(b"s" * 32)


def packed(value: Any = "value", **changes: Any) -> bytes:
    """A stored value; keywords change key, token or secret."""
    return bytes(dump(value, **{"key": KEY, "token": TOKEN, "secret": SECRET, **changes}))


def unpacked(data: bytes, **changes: Any) -> Any:
    """What `data` holds for the key, token and secret of these tests, or changed ones."""
    return load(data, **{"key": KEY, "token": TOKEN, "secret": SECRET, **changes}).value


class Trap:
    """Says so if it is unpickled."""

    sprung = False

    def __reduce__(self) -> Any:
        return Trap.spring, ()

    @staticmethod
    def spring() -> None:
        """Be what unpickling calls."""
        Trap.sprung = True


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    Trap.sprung = False
    yield
    assert not Trap.sprung, "something was unpickled before it was checked"


@given(st.none() | st.text() | st.binary() | st.lists(st.floats(allow_nan=False)))
def test_values_come_back(value: Any) -> None:
    """What was stored is what is loaded."""
    assert unpacked(packed(value)) == value


def test_functions_made_here_come_back() -> None:
    """Cloudpickle takes what pickle does not."""
    n = 3
    assert unpacked(packed(lambda x: x + n))(4) == 7


@pytest.mark.parametrize("size", [0, 10, 4096, 5000, 200_000, 3_000_000])
def test_what_compresses_well_is_compressed(size: int) -> None:
    """Beyond 4 KiB, and if it saves a tenth; else bytes stay as they are."""
    dull, noise = b"x" * size, os.urandom(size)
    assert unpacked(packed(dull)) == dull
    assert unpacked(packed(noise)) == noise
    assert len(packed(noise)) <= size + HEADER_BYTES + 64
    if size > 4096:
        assert len(packed(dull)) < size // 10 + 500


@pytest.mark.parametrize("begins_dull", [False, True])
def test_noise_is_not_compressed_whole_to_find_out(
    begins_dull: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples from all over decide: zlib is slower than the network on what does not shrink."""
    sizes: list[int] = []
    real = zlib.compress

    def compress(data: bytes, level: int) -> bytes:
        sizes.append(len(data))
        return real(data, level)

    monkeypatch.setattr(zlib, "compress", compress)
    monkeypatch.setattr(zlib, "compressobj", lambda level: pytest.fail("compressed whole"))
    noise = os.urandom(3_000_000)
    packed(b"x" * 200_000 * begins_dull + noise)
    packed(np.frombuffer(noise, np.uint8).copy())
    assert sum(sizes) <= 2 * (64 << 10)


def test_compression_ends_as_soon_as_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples may be wrong: what grew too long is thrown away before the whole was compressed."""
    monkeypatch.setattr(result_frames, "CHUNK_BYTES", 100_000)
    monkeypatch.setattr(result_frames, "_sample", lambda part: b"x" * 1000)
    chunks: list[int] = []
    real = zlib.compressobj

    class Packer:
        def __init__(self, level: int) -> None:
            self._real = real(level)

        def compress(self, data: bytes) -> bytes:
            chunks.append(len(data))
            return self._real.compress(data)

        def flush(self) -> bytes:
            return self._real.flush()

    monkeypatch.setattr(zlib, "compressobj", Packer)
    noise = os.urandom(1_000_000)
    assert unpacked(packed(noise)) == noise
    assert 9 <= len(chunks) <= 10
    noise = os.urandom(90_000)
    assert unpacked(packed(noise)) == noise
    assert len(packed(noise)) < len(noise) + HEADER_BYTES + 64


def test_every_flipped_bit_is_damage_and_nothing_is_unpickled() -> None:
    """Damage is told from a foreign signature wherever it hits, header and signature included."""
    data = packed(Trap())
    for at in range(len(data)):
        for bit in (1, 128):
            bad = bytearray(data)
            bad[at] ^= bit
            with pytest.raises(ResultDamagedError):
                unpacked(bytes(bad))


def test_every_cut_is_damage() -> None:
    """So is each length but the full one."""
    data = packed(Trap())
    for size in range(len(data)):
        with pytest.raises(ResultDamagedError):
            unpacked(data[:size])
    with pytest.raises(ResultDamagedError):
        unpacked(data + b"\0")


def test_damage_counts_as_missing() -> None:
    """Who makes keys not done again catches one error for both, and signatures not at all."""
    assert issubclass(ResultDamagedError, ResultMissingError)
    assert not issubclass(SignatureError, ResultMissingError)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"secret": Secret(b"t" * 32)}, "signed with another secret"),
        ({"key": b"other"}, "belongs to another key"),
        ({"token": 8}, "belongs to the completion with token 7, not 8"),
    ],
)
def test_foreign_values_are_refused_by_their_own_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    """Another secret, key or token is an error, never loaded and never damage."""
    with pytest.raises(SignatureError, match=sentence) as caught:
        unpacked(packed(Trap()), **changes)
    assert "sss" not in str(caught.value)


def test_a_foreign_secret_says_how_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error ends with what to do."""
    monkeypatch.setenv("RUN_ONCE_SECRET", "x" * 20)
    with pytest.raises(SignatureError, match="set RUN_ONCE_SECRET to that text here"):
        unpacked(packed(), secret=Secret(b"t" * 32))
    monkeypatch.delenv("RUN_ONCE_SECRET")
    monkeypatch.setenv("RUN_ONCE_CONFIG_DIR", "/somewhere")
    with pytest.raises(SignatureError, match="or write it to /somewhere/secret"):
        unpacked(packed(), secret=Secret(b"t" * 32))


def test_a_forged_body_with_a_right_checksum_is_refused() -> None:
    """Whoever can write to the server can make checksums right, but no signature."""
    data = packed("value")
    body = pickle.dumps(Trap())
    head = result_frames._Head(*result_frames._HEAD.unpack(data[: result_frames._HEAD.size]))
    digest = hashlib.sha256(body).digest()
    forged = result_frames._HEAD.pack(*head._replace(size_bytes=len(body), body_sha256=digest))
    mac = data[result_frames._HEAD.size : result_frames._HEAD.size + 32]
    crc = result_frames._CRC.pack(zlib.crc32(forged + mac))
    with pytest.raises(SignatureError, match="bad signature though it names this secret"):
        unpacked(forged + mac + crc + body)


def test_a_newer_format_says_so() -> None:
    """It is neither damage nor forgery, and must not be computed again."""
    data = packed()
    head = result_frames._Head(*result_frames._HEAD.unpack(data[: result_frames._HEAD.size]))
    newer = result_frames._HEAD.pack(*head._replace(version=2))
    mac = data[result_frames._HEAD.size : result_frames._HEAD.size + 32]
    crc = result_frames._CRC.pack(zlib.crc32(newer + mac))
    with pytest.raises(ResultError, match="upgrade") as caught:
        unpacked(newer + mac + crc + data[HEADER_BYTES:])
    assert not isinstance(caught.value, ResultMissingError)


class Unpicklable:
    """Fails when it is pickled."""

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("not this one")


@pytest.mark.parametrize("value", [threading.Lock(), (n for n in "a"), Unpicklable()])
def test_a_value_that_cannot_be_pickled_says_that_its_key_is_not_done(value: Any) -> None:
    """The error names key and type, and keeps the cause."""
    with pytest.raises(ResultError, match=r"module\.f/12ab.*so the key is not done") as caught:
        packed(value)
    assert caught.value.__cause__ is not None


class Unloadable:
    """Fails when it is unpickled."""

    def __reduce__(self) -> Any:
        return _missing_module, ()


def _missing_module() -> NoReturn:
    raise ModuleNotFoundError("no module named 'gone'")


def test_a_genuine_value_that_cannot_be_loaded_here_is_no_damage() -> None:
    """A missing module is this machine's fault; the value is worth keeping."""
    with pytest.raises(ResultError, match="genuine but cannot be loaded here") as caught:
        unpacked(packed(Unloadable()))
    assert not isinstance(caught.value, ResultMissingError)


def test_frames_are_read_by_other_processes() -> None:
    """The form does not depend on the process."""
    script = (
        "import sys; from run_once.result_frames import load\n"
        "data = bytes.fromhex(sys.stdin.read())\n"
        f"print(load(data, key={KEY!r}, token={TOKEN}, secret=b's' * 32).value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        input=packed({"a": [1, 2]}).hex(),
        timeout=60,
    )
    assert done.stdout.strip() == "{'a': [1, 2]}"


# ---------------------------------------------------------------- arrays


def noisy(n: int = 50_000, dtype: str = "f8") -> np.ndarray[Any, Any]:
    """Make an array that does not compress."""
    data = random.Random(1).randbytes(n * np.dtype(dtype).itemsize)
    array: np.ndarray[Any, Any] = np.frombuffer(data, dtype).copy()
    return array


def received(frame: bytes | Parts) -> memoryview:
    """What a download puts into memory."""
    room = aligned_buffer(len(frame))
    room[:] = bytes(frame)
    return room


@pytest.mark.parametrize("is_received", [False, True])
@pytest.mark.parametrize(
    "array",
    [
        noisy(),
        noisy().reshape(500, 100).T,
        noisy(dtype="i2"),
        np.zeros((400, 500)),
        noisy(10),
        noisy()[::2],
        np.array([], dtype="f4"),
    ],
    ids=["noise", "fortran", "i2", "zeros", "small", "strided", "empty"],
)
def test_arrays_come_back_as_good_as_fresh_ones(
    array: np.ndarray[Any, Any], is_received: bool
) -> None:
    """Equal, of the same kind, writable and aligned, whether large or small, packed or not."""
    frame = dump([array, "and more"], key=KEY, token=TOKEN, secret=SECRET)
    data = received(frame) if is_received else bytes(frame)
    back, more = load(data, key=KEY, token=TOKEN, secret=SECRET).value
    np.testing.assert_array_equal(back, array, strict=True)
    assert more == "and more"
    if array.flags.forc:
        assert back.flags.f_contiguous == array.flags.f_contiguous
    assert back.flags.writeable
    assert back.flags.aligned
    back[...] = 0
    if is_received and array.nbytes > 64 << 10 and array.flags.forc:
        assert back.__array_interface__["data"][0] % ALIGNED_BYTES == 0


def test_read_only_arrays_stay_so() -> None:
    """As a value that was just computed would be."""
    array = noisy()
    array.flags.writeable = False
    back = unpacked(packed(array))
    np.testing.assert_array_equal(back, array)
    assert not back.flags.writeable


def test_each_array_is_compressed_if_that_pays() -> None:
    """One that does does not wait for one that does not, and a value of both comes back."""
    dull, noise = np.zeros(100_000), noisy(100_000)
    data = packed({"dull": dull, "noise": noise})
    assert noise.nbytes < len(data) < noise.nbytes + 10_000
    back = unpacked(data)
    np.testing.assert_array_equal(back["dull"], dull)
    np.testing.assert_array_equal(back["noise"], noise)


def test_large_arrays_are_not_copied() -> None:
    """Storing one takes no second of its size; loading it takes none beside what was received."""
    array = noisy(1_000_000)
    tracemalloc.start()
    try:
        frame = dump(array, key=KEY, token=TOKEN, secret=SECRET)
        peak_to_dump = tracemalloc.get_traced_memory()[1]
        data = received(frame)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        back = load(data, key=KEY, token=TOKEN, secret=SECRET).value
        peak_to_load = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(back, array)
    assert np.shares_memory(back, np.frombuffer(data, np.uint8))
    assert max(peak_to_dump, peak_to_load) < array.nbytes / 10


def test_damaged_arrays_are_damage() -> None:
    """A bit that flipped in the table, in what aligns, or in an array is found as anywhere."""
    data = packed([noisy(10_000), np.zeros(10_000)])
    for at in [*range(0, 1000, 7), *range(1000, len(data), 997)]:
        bad = bytearray(data)
        bad[at] ^= 4
        with pytest.raises(ResultDamagedError):
            unpacked(bytes(bad))
