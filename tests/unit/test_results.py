"""Stored values: signed, checked before they are unpickled, and each fault told apart."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distlock_proto import lock_table_pb2 as pb
from run_once import results
from run_once.client import Grant
from run_once.errors import (
    ResultDamagedError,
    ResultError,
    ResultMissingError,
    RunOnceError,
    SignatureError,
)
from run_once.results import HEADER_BYTES, ResultStore, dump, load
from run_once.secret import Secret

KEY, TOKEN, SECRET = b"module.f/12ab", 7, Secret(b"s" * 32)


def packed(value: Any = "value", **changes: Any) -> bytes:
    """A stored value; keywords change key, token or secret."""
    return dump(value, **{"key": KEY, "token": TOKEN, "secret": SECRET, **changes})


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


def test_noise_is_not_compressed_whole_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample decides: zlib is slower than the network on what does not shrink."""
    sizes: list[int] = []
    real = zlib.compress

    def compress(data: bytes, level: int) -> bytes:
        sizes.append(len(data))
        return real(data, level)

    monkeypatch.setattr(zlib, "compress", compress)
    packed(os.urandom(3_000_000))
    assert sum(sizes) <= 64 << 10


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
    with pytest.raises(SignatureError, match="set RUN_ONCE_SECRET to the same text everywhere"):
        unpacked(packed(), secret=Secret(b"t" * 32))
    monkeypatch.delenv("RUN_ONCE_SECRET")
    monkeypatch.setenv("RUN_ONCE_CONFIG_DIR", "/somewhere")
    with pytest.raises(SignatureError, match=r"/somewhere/secret: copy the file"):
        unpacked(packed(), secret=Secret(b"t" * 32))


def test_a_forged_body_with_a_right_checksum_is_refused() -> None:
    """Whoever can write to the server can make checksums right, but no signature."""
    data = packed("value")
    body = pickle.dumps(Trap())
    head = results._Head(*results._HEAD.unpack(data[: results._HEAD.size]))
    digest = hashlib.sha256(body).digest()
    forged = results._HEAD.pack(*head._replace(size_bytes=len(body), body_sha256=digest))
    mac = data[results._HEAD.size : results._HEAD.size + 32]
    crc = results._CRC.pack(zlib.crc32(forged + mac))
    with pytest.raises(SignatureError, match="bad signature though it names this secret"):
        unpacked(forged + mac + crc + body)


def test_a_newer_format_says_so() -> None:
    """It is neither damage nor forgery, and must not be computed again."""
    data = packed()
    head = results._Head(*results._HEAD.unpack(data[: results._HEAD.size]))
    newer = results._HEAD.pack(*head._replace(version=2))
    mac = data[results._HEAD.size : results._HEAD.size + 32]
    crc = results._CRC.pack(zlib.crc32(newer + mac))
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


class FakeClient:
    """Keeps uploads in memory."""

    def __init__(self, max_inline_bytes: int) -> None:
        self._limits = pb.GetServerInfoReply(max_inline_result_bytes=max_inline_bytes)
        self.uploads: dict[tuple[bytes, int], bytes] = {}

    def limits(self) -> pb.GetServerInfoReply:
        """Give the server's limits."""
        return self._limits

    def upload_result(self, grant: Grant, data: bytes, sha256: bytes | None = None) -> pb.Result:
        """Keep a value."""
        self.uploads[grant.key, grant.token] = data
        return pb.Result(
            storage=pb.Result.STORAGE_SERVER, size_bytes=len(data), sha256=sha256 or b""
        )

    def download_result(self, key: bytes, token: int, size_bytes: int) -> bytes:
        """Give a value back."""
        try:
            return self.uploads[key, token]
        except KeyError:
            raise ResultMissingError("gone") from None


def _store(max_inline_bytes: int = 1000) -> tuple[ResultStore, FakeClient, Grant]:
    client = FakeClient(max_inline_bytes)
    grant = Grant(key=KEY, claim_id=b"c" * 16, token=TOKEN, attempt=1, expires_ns=0)
    return ResultStore(client, secret=SECRET), client, grant  # type: ignore[arg-type]


def test_small_values_travel_inside_the_messages() -> None:
    """No upload, no download."""
    store, client, grant = _store()
    result = store.store(grant, "small")
    assert result.storage == pb.Result.STORAGE_INLINE
    assert result.size_bytes == len(result.payload)
    assert store.load(KEY, TOKEN, result).value == "small"
    assert not client.uploads


def test_large_values_are_uploaded_first() -> None:
    """The settlement only names them."""
    store, client, grant = _store()
    value = os.urandom(5000)
    result = store.store(grant, value)
    assert result.storage == pb.Result.STORAGE_SERVER
    assert not result.payload
    assert list(client.uploads) == [(KEY, TOKEN)]
    assert store.load(KEY, TOKEN, result).value == value


def test_a_lease_may_stand_for_its_grant() -> None:
    """`run_task` hands over leases."""
    store, _, grant = _store()

    class Lease:
        def __init__(self) -> None:
            self.grant = grant

    assert store.load(KEY, TOKEN, store.store(Lease(), 1)).value == 1  # type: ignore[arg-type]


def test_values_left_out_of_a_reply_are_fetched() -> None:
    """An inline value whose payload is empty comes by download."""
    store, client, grant = _store()
    result = store.store(grant, "small")
    client.uploads[KEY, TOKEN] = result.payload
    result.payload = b""
    assert store.load(KEY, TOKEN, result).value == "small"


def test_missing_values_say_so() -> None:
    """Never stored, or gone: both make the key not done; a URL does not."""
    store, _, _ = _store()
    for storage in (pb.Result.STORAGE_NONE, pb.Result.STORAGE_SERVER):
        with pytest.raises(ResultMissingError):
            store.load(KEY, TOKEN, pb.Result(storage=storage))
    with pytest.raises(ResultError, match="URL") as caught:
        store.load(KEY, TOKEN, pb.Result(storage=pb.Result.STORAGE_URL, payload=b"s3://a/b"))
    assert not isinstance(caught.value, ResultMissingError)


def test_the_secret_is_loaded_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the store is made."""
    folder = tmp_path / "config"
    monkeypatch.setenv("RUN_ONCE_CONFIG_DIR", str(folder))
    monkeypatch.delenv("RUN_ONCE_SECRET", raising=False)
    monkeypatch.delenv("RUN_ONCE_SECRET_FILE", raising=False)
    _, client, grant = _store()
    store = ResultStore(client)  # type: ignore[arg-type]
    assert not folder.exists()
    assert store.load(KEY, TOKEN, store.store(grant, 5)).value == 5
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert (folder / "secret").read_text().strip() not in repr(vars(store))


def test_frames_are_read_by_other_processes() -> None:
    """The form does not depend on the process."""
    script = (
        "import sys; from run_once.results import load\n"
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


def test_all_errors_are_ours() -> None:
    """One tree of errors for whoever catches it."""
    assert issubclass(ResultDamagedError, RunOnceError)
    assert issubclass(SignatureError, ResultError)
