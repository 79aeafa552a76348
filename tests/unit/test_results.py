"""The store: which values go where, and what is said where one cannot be had."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import LookupAnswer
from run_once.buffers import Parts
from run_once.client import Grant
from run_once.errors import (
    ResultDamagedError,
    ResultError,
    ResultMissingError,
    RunOnceError,
    SignatureError,
)
from run_once.result_places import object_name
from run_once.results import ResultStore, discard
from run_once.secret import Secret

KEY, TOKEN, SECRET = b"module.f/12ab", 7, Secret(b"s" * 32)


class FakeClient:
    """Keeps uploads in memory."""

    def __init__(self, max_inline_bytes: int) -> None:
        self._limits = pb.GetServerInfoReply(max_inline_result_bytes=max_inline_bytes)
        self.uploads: dict[tuple[bytes, int], bytes] = {}
        self.results: dict[bytes, pb.Result] = {}

    def limits(self) -> pb.GetServerInfoReply:
        """Give the server's limits."""
        return self._limits

    def upload_result(
        self, grant: Grant, data: bytes | Parts, sha256: bytes | None = None
    ) -> pb.Result:
        """Keep a value."""
        self.uploads[grant.key, grant.token] = bytes(data)
        return pb.Result(
            storage=pb.Result.STORAGE_SERVER, size_bytes=len(data), sha256=sha256 or b""
        )

    def download_result(self, key: bytes, token: int, size_bytes: int) -> bytes:
        """Give a value back."""
        try:
            return self.uploads[key, token]
        except KeyError:
            raise ResultMissingError("gone") from None

    def lookup(self, keys: list[bytes], *, want_results: bool) -> LookupAnswer:
        """Give the results."""
        assert want_results
        return LookupAnswer(b"", [], {k: v for k, v in self.results.items() if k in keys}, 1)


GRANT = Grant(key=KEY, claim_id=b"c" * 16, token=TOKEN, attempt=1, expires_ns=0)


def _store(
    max_inline_bytes: int = 1000, results: str | None = None
) -> tuple[ResultStore, FakeClient, Grant]:
    client = FakeClient(max_inline_bytes)
    store = ResultStore(client, secret=SECRET, results=results)  # type: ignore[arg-type]
    return store, client, GRANT


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
    """Never stored, or gone: both make the key not done."""
    store, _, _ = _store()
    for storage in (pb.Result.STORAGE_NONE, pb.Result.STORAGE_SERVER):
        with pytest.raises(ResultMissingError):
            store.load(KEY, TOKEN, pb.Result(storage=storage))


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


def test_all_errors_are_ours() -> None:
    """One tree of errors for whoever catches it."""
    assert issubclass(ResultDamagedError, RunOnceError)
    assert issubclass(SignatureError, ResultError)


# ---------------------------------------------------------------- results=

LARGE = os.urandom(5000)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Give a folder for values."""
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def test_large_values_go_to_the_place(place: Path) -> None:
    """Small ones stay inline, and the server keeps nothing but the URL."""
    store, client, grant = _store(results=str(place))
    assert store.store(grant, "small").storage == pb.Result.STORAGE_INLINE
    assert list(place.iterdir()) == []
    result = store.store(grant, LARGE, 2.5)
    (path,) = place.iterdir()
    assert result == pb.Result(
        storage=pb.Result.STORAGE_URL,
        payload=path.as_uri().encode(),
        size_bytes=path.stat().st_size,
    )
    assert store.load(KEY, TOKEN, result) == (LARGE, 2.5, b"")
    assert not client.uploads


def test_arrays_from_a_place_may_be_written_to(place: Path) -> None:
    """Each load is a copy of its own."""
    store, _, grant = _store(results=str(place))
    result = store.store(grant, np.arange(50_000))
    first, second = (store.load(KEY, TOKEN, result).value for _ in range(2))
    first[0] = 99
    assert second[0] == 0


def test_no_two_claims_write_the_same_name(place: Path) -> None:
    """Neither two of one lock table nor two of different ones that share a place."""
    store, _, grant = _store(results=str(place))
    grants = [grant, grant._replace(token=8), grant._replace(claim_id=b"d" * 16)]
    results = [store.store(each, LARGE) for each in grants]
    assert len(list(place.iterdir())) == 3
    discard(KEY, TOKEN, results[0])
    discard(KEY, TOKEN, results[0])
    assert len(list(place.iterdir())) == 2
    assert store.load(KEY, 8, results[1]).value == LARGE
    assert store.load(KEY, TOKEN, results[2]).value == LARGE


def test_discarding_touches_nothing_else(place: Path, tmp_path: Path) -> None:
    """Only an object of that key and token, and only in a place that was configured here."""
    store, _, grant = _store(results=str(place))
    store.store(grant, LARGE)
    name = object_name(KEY, TOKEN, grant.claim_id)
    elsewhere = tmp_path / name
    elsewhere.write_text("mine")
    (place / "notes").write_text("mine")
    for url in (elsewhere.as_uri(), (place / "notes").as_uri(), (place / "x/.." / name).as_uri()):
        discard(KEY, TOKEN, pb.Result(storage=pb.Result.STORAGE_URL, payload=url.encode()))
    discard(
        KEY, 8, pb.Result(storage=pb.Result.STORAGE_URL, payload=(place / name).as_uri().encode())
    )
    discard(KEY, TOKEN, pb.Result(storage=pb.Result.STORAGE_INLINE, payload=b"x"))
    discard(KEY, TOKEN, None)
    assert elsewhere.exists()
    assert sorted(path.name for path in place.iterdir()) == sorted([name, "notes"])


def test_objects_that_are_gone_or_damaged_make_the_key_not_done(place: Path) -> None:
    """Missing, cut, longer, or with a flipped bit: each by its own error."""
    store, _, grant = _store(results=str(place))
    result = store.store(grant, LARGE)
    (path,) = place.iterdir()
    whole = path.read_bytes()
    for bad in (whole[:-1], whole + b"x", b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(bad)
        with pytest.raises(ResultDamagedError, match=r"module\.f/12ab"):
            store.load(KEY, TOKEN, result)
    path.unlink()
    with pytest.raises(ResultMissingError, match=str(path)) as caught:
        store.load(KEY, TOKEN, result)
    assert not isinstance(caught.value, ResultDamagedError)


@pytest.mark.parametrize("other", [None, "other", "memory://other"])
def test_a_place_that_is_not_configured_is_said(
    other: str | None, place: Path, tmp_path: Path
) -> None:
    """The error says where the value is and what to set; the value is not lost."""
    result = _store(results=str(place))[0].store(GRANT, LARGE)
    (tmp_path / "other").mkdir()
    configured = str(tmp_path / other) if other == "other" else other
    store, _, _ = _store(results=configured)
    with pytest.raises(ResultError, match=r"set results= \(or RUN_ONCE_RESULTS\) to ") as caught:
        store.load(KEY, TOKEN, result)
    assert not isinstance(caught.value, ResultMissingError)
    assert str(caught.value).endswith(place.as_uri())
    assert str(place / object_name(KEY, TOKEN, GRANT.claim_id)) in str(caught.value)


def test_values_are_found_where_a_place_has_moved(place: Path, tmp_path: Path) -> None:
    """The object's name counts: another machine may have mounted the folder elsewhere."""
    result = _store(results=str(place))[0].store(GRANT, LARGE)
    place.rename(tmp_path / "mounted")
    assert _store(results=str(tmp_path / "mounted"))[0].load(KEY, TOKEN, result).value == LARGE
    (path,) = (tmp_path / "mounted").iterdir()
    path.write_bytes(b"damaged")
    with pytest.raises(ResultError, match="If that is a copy") as caught:
        _store(results=str(tmp_path / "mounted"))[0].load(KEY, TOKEN, result)
    assert not isinstance(caught.value, ResultMissingError)


def test_a_place_that_is_gone_as_a_whole_is_not_a_missing_value(place: Path) -> None:
    """A disk that is not mounted must not make thousands of keys not done."""
    store, _, grant = _store(results=str(place))
    result = store.store(grant, LARGE)
    place.rename(place.with_name("unmounted"))
    with pytest.raises(ResultError, match="there is no folder") as caught:
        store.load(KEY, TOKEN, result)
    assert not isinstance(caught.value, ResultMissingError)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "x.result", object_name(b"other", TOKEN, b"c" * 16)]
)
def test_servers_cannot_name_other_objects(name: str, place: Path) -> None:
    """What is read is the configured place's, under a name of that very key."""
    (place / "x.result").write_bytes(b"x")
    store, _, _ = _store(results=str(place))
    url = f"{place.as_uri()}/{name}".encode()
    with pytest.raises(ResultError, match="no name of ours"):
        store.load(KEY, TOKEN, pb.Result(storage=pb.Result.STORAGE_URL, payload=url, size_bytes=1))


def test_urls_left_out_of_a_reply_are_asked_for(place: Path) -> None:
    """A reply that is full names only the kind of storage; a key that changed since is missing."""
    store, client, grant = _store(results=str(place))
    result = store.store(grant, LARGE)
    result.token = TOKEN
    client.results[KEY] = result
    cut = pb.Result(storage=pb.Result.STORAGE_URL, size_bytes=result.size_bytes)
    assert store.load(KEY, TOKEN, cut).value == LARGE
    result.token = 8
    with pytest.raises(ResultMissingError, match="replaced"):
        store.load(KEY, TOKEN, cut)


def test_a_value_that_cannot_be_written_leaves_the_key_not_done(place: Path) -> None:
    """The error names the URL, and says that the key is not done."""
    store, _, grant = _store(results=str(place / "missing"))
    with pytest.raises(ResultError, match=r"module\.f/12ab.*missing.*so the key is not done"):
        store.store(grant, LARGE)
