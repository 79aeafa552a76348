"""Large results on disk: what is accepted is whole, and nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from distlock_server import blobs
from distlock_server.blobs import (
    BlobChecksumError,
    BlobDiskError,
    BlobError,
    BlobLimitError,
    BlobMissingError,
    BlobSizeError,
    BlobStore,
)
from distlock_server.clock import ManualClock

KEY = b"\x1ens\x1f../key \xc3\xbc"
TOKEN = 7
VALUE = bytes(range(256)) * 10
HOUR_S = 3_600.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give the folder of results, which need not exist."""
    return tmp_path / "results"


@pytest.fixture
def store(folder: Path) -> BlobStore:
    """Open an empty store."""
    return BlobStore(folder)


def sha256(value: bytes) -> bytes:
    """Give the SHA-256 of a value."""
    return hashlib.sha256(value).digest()


def send(
    store: BlobStore,
    offset: int,
    chunk: bytes,
    value: bytes = VALUE,
    key: bytes = KEY,
    token: int = TOKEN,
) -> int:
    """Send one chunk of a value."""
    return store.write_chunk(key, token, offset, chunk, len(value), sha256(value))


def send_all(
    store: BlobStore, value: bytes = VALUE, chunk_bytes: int = 1_000, key: bytes = KEY
) -> None:
    """Send a value in chunks."""
    for offset in range(0, max(len(value), 1), chunk_bytes):
        send(store, offset, value[offset : offset + chunk_bytes], value, key)


def is_stored(store: BlobStore, value: bytes = VALUE, key: bytes = KEY, token: int = TOKEN) -> bool:
    """Tell whether a value is stored whole."""
    return store.exists(key, token, len(value), sha256(value))


def files(folder: Path) -> list[str]:
    """Name the files below a folder by their endings."""
    return sorted(path.suffix for path in folder.rglob("*") if path.is_file())


# -- storing and reading --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"", b"x", VALUE])
@pytest.mark.parametrize("chunk_bytes", [1, 1_000, 1_280, 10_000])
def test_value_comes_back(store: BlobStore, value: bytes, chunk_bytes: int) -> None:
    """Whatever its length and its chunks, a value is read as it was sent."""
    send_all(store, value, chunk_bytes)
    assert is_stored(store, value)
    assert store.read(KEY, TOKEN, 0, 10_000) == (value, len(value))


def test_progress_is_told(store: BlobStore) -> None:
    """Each chunk is answered by the bytes received; the value exists only after the last."""
    assert send(store, 0, VALUE[:1_000]) == 1_000
    assert send(store, 1_000, VALUE[1_000:2_000]) == 2_000
    assert not is_stored(store)
    with pytest.raises(BlobMissingError):
        store.read(KEY, TOKEN, 0, 10)
    assert send(store, 2_000, VALUE[2_000:]) == len(VALUE)
    assert is_stored(store)


def test_value_is_read_in_pieces(store: BlobStore) -> None:
    """A piece begins at its offset, is as long as was asked, and short or empty at the end."""
    send_all(store)
    assert store.read(KEY, TOKEN, 100, 50) == (VALUE[100:150], len(VALUE))
    assert store.read(KEY, TOKEN, len(VALUE) - 10, 50) == (VALUE[-10:], len(VALUE))
    assert store.read(KEY, TOKEN, len(VALUE), 50) == (b"", len(VALUE))
    for offset in (-1, len(VALUE) + 1):
        with pytest.raises(BlobSizeError, match=f"offset {offset} "):
            store.read(KEY, TOKEN, offset, 50)


def test_keys_and_tokens_keep_apart(store: BlobStore) -> None:
    """Each pair of key and token has a value of its own."""
    pairs = [(b"a", 1), (b"a", 2), (b"b", 1), (b"a\x00", 1), (b"", 1), (b"a", 2**64 - 1)]
    for number, (key, token) in enumerate(pairs):
        send(store, 0, b"%d" % number, b"%d" % number, key, token)
    for number, (key, token) in enumerate(pairs):
        assert store.read(key, token, 0, 10)[0] == b"%d" % number


def test_exists_asks_for_this_very_value(store: BlobStore) -> None:
    """Another size, SHA-256, token or key is another value."""
    send_all(store)
    right = sha256(VALUE)
    assert store.exists(KEY, TOKEN, len(VALUE), right)
    assert not store.exists(KEY, TOKEN, len(VALUE) - 1, right)
    assert not store.exists(KEY, TOKEN, len(VALUE), sha256(b""))
    assert not store.exists(KEY, TOKEN + 1, len(VALUE), right)
    assert not store.exists(b"other", TOKEN, len(VALUE), right)


def test_value_survives_a_restart(folder: Path) -> None:
    """A store opened later over the same folder finds it."""
    send_all(BlobStore(folder))
    assert BlobStore(folder).read(KEY, TOKEN, 0, 10_000)[0] == VALUE


def test_opening_a_store_touches_nothing(folder: Path) -> None:
    """Reading, sweeping and deleting in a store without values make no folder either."""
    store = BlobStore(folder)
    assert not is_stored(store)
    store.delete(KEY, TOKEN)
    assert store.sweep(lambda key, token: False, 0, 10**12) == 0
    assert not folder.exists()


# -- repeated, late and wrong chunks --------------------------------------------------------------


def test_repeated_chunks_change_nothing(store: BlobStore) -> None:
    """A retry after a lost reply gets the bytes received so far, also after the last chunk."""
    send(store, 0, VALUE[:1_000])
    send(store, 1_000, VALUE[1_000:2_000])
    assert send(store, 1_000, VALUE[1_000:2_000]) == 2_000
    assert send(store, 1_000, VALUE[1_000:1_500]) == 2_000
    assert send(store, 1_500, VALUE[1_500:2_300]) == 2_300
    assert send(store, 2_300, VALUE[2_300:]) == len(VALUE)
    assert send(store, 2_300, VALUE[2_300:]) == len(VALUE)
    assert send(store, 0, VALUE[:1_000]) == len(VALUE)
    assert store.read(KEY, TOKEN, 0, 10_000)[0] == VALUE


def test_offset_zero_starts_anew(store: BlobStore, folder: Path) -> None:
    """An upload may begin again with another value; nothing of the first is left."""
    send(store, 0, b"wrong" * 100)
    send_all(store, b"right" * 50)
    assert store.read(KEY, TOKEN, 0, 10_000)[0] == b"right" * 50
    assert files(folder) == [".blob"]


def test_value_may_be_replaced(store: BlobStore, folder: Path) -> None:
    """A holder may store another value before it completes; the old one stays until then."""
    send_all(store, b"first")
    send(store, 0, b"sec", b"second")
    assert is_stored(store, b"first")
    send(store, 3, b"ond", b"second")
    assert not is_stored(store, b"first")
    assert store.read(KEY, TOKEN, 0, 10)[0] == b"second"
    assert files(folder) == [".blob"]


def test_gap_is_an_error(store: BlobStore) -> None:
    """A chunk without those before it is refused and says where to go on; the upload stays."""
    with pytest.raises(BlobMissingError, match="start anew at offset 0"):
        send(store, 1_000, VALUE[1_000:])
    send(store, 0, VALUE[:1_000])
    with pytest.raises(BlobMissingError, match="1000 bytes were received"):
        send(store, 1_500, VALUE[1_500:])
    assert send(store, 1_000, VALUE[1_000:]) == len(VALUE)


def test_upload_does_not_survive_a_restart(folder: Path) -> None:
    """After a restart an unfinished upload starts anew, and then succeeds."""
    send(BlobStore(folder), 0, VALUE[:1_000])
    store = BlobStore(folder)
    with pytest.raises(BlobMissingError, match="start anew"):
        send(store, 1_000, VALUE[1_000:])
    send_all(store)
    assert is_stored(store)


def test_wrong_checksum_is_an_error(store: BlobStore, folder: Path) -> None:
    """A value with another SHA-256 than announced is not stored, and leaves nothing."""
    send(store, 0, VALUE[:1_000])
    with pytest.raises(BlobChecksumError, match="key"):
        send(store, 1_000, bytes(len(VALUE) - 1_000))
    assert not is_stored(store)
    assert files(folder) == []
    send_all(store)
    assert is_stored(store)


@pytest.mark.parametrize(
    ("offset", "chunk", "size_bytes"), [(0, b"abc", 2), (2, b"ab", 3), (-1, b"a", 3), (4, b"", 3)]
)
def test_chunk_that_does_not_fit_is_an_error(
    store: BlobStore, folder: Path, offset: int, chunk: bytes, size_bytes: int
) -> None:
    """A chunk outside its value is refused before anything is written."""
    with pytest.raises(BlobSizeError, match="of a value of"):
        store.write_chunk(KEY, TOKEN, offset, chunk, size_bytes, bytes(32))
    assert not folder.exists()


def test_announcement_may_not_change_on_the_way(store: BlobStore) -> None:
    """Another size or SHA-256 in a later chunk is refused; a SHA-256 has 32 bytes."""
    send(store, 0, VALUE[:1_000])
    with pytest.raises(BlobSizeError, match="changed on the way"):
        store.write_chunk(KEY, TOKEN, 1_000, b"x", len(VALUE) + 1, sha256(VALUE))
    with pytest.raises(BlobSizeError, match="changed on the way"):
        store.write_chunk(KEY, TOKEN, 1_000, b"x", len(VALUE), bytes(32))
    with pytest.raises(BlobChecksumError, match="31 bytes"):
        store.write_chunk(KEY, TOKEN, 1_000, b"x", len(VALUE), bytes(31))
    assert send(store, 1_000, VALUE[1_000:]) == len(VALUE)


def test_unfinished_uploads_are_bounded(folder: Path) -> None:
    """Over the limit an upload is refused; finishing, or starting one anew, needs no more room."""
    store = BlobStore(folder, max_unfinished=2)
    send(store, 0, b"a", b"ab", b"1")
    send(store, 0, b"a", b"ab", b"2")
    with pytest.raises(BlobLimitError, match="2 uploads are under way"):
        send(store, 0, b"a", b"ab", b"3")
    assert files(folder) == [".part"] * 2
    send(store, 0, b"a", b"ab", b"2")
    send(store, 1, b"b", b"ab", b"1")
    send(store, 0, b"a", b"ab", b"3")


def test_idle_uploads_make_room(folder: Path) -> None:
    """Uploads that were given up do not block others for ever, and one that goes on is spared."""
    clock = ManualClock()
    store = BlobStore(folder, max_unfinished=2, clock=clock)
    send(store, 0, b"a", b"abc", b"given up")
    send(store, 0, b"a", b"abc", b"slow")
    clock.advance(blobs.IDLE_UPLOAD_NS / 1e9 - 1)
    send(store, 1, b"b", b"abc", b"slow")
    with pytest.raises(BlobLimitError):
        send(store, 0, b"a", b"abc", b"new")
    clock.advance(1)
    send(store, 0, b"a", b"abc", b"new")
    assert send(store, 2, b"c", b"abc", b"slow") == 3
    with pytest.raises(BlobMissingError):
        send(store, 1, b"b", b"abc", b"given up")


# -- deleting and sweeping ------------------------------------------------------------------------


def test_delete_removes_value_and_upload(store: BlobStore, folder: Path) -> None:
    """Nothing is left of either, and deleting again is no error."""
    send_all(store)
    send(store, 0, b"n", b"new")
    store.delete(KEY, TOKEN)
    store.delete(KEY, TOKEN)
    assert files(folder) == []
    with pytest.raises(BlobMissingError, match="token 7"):
        store.read(KEY, TOKEN, 0, 10)
    with pytest.raises(BlobMissingError):
        send(store, 1, b"ew", b"new")


def test_sweep_removes_only_orphans(store: BlobStore, folder: Path) -> None:
    """Of old files those stay that a record names; it is asked by key and token."""
    for key in (b"live", b"orphan", KEY):
        send_all(store, key=key)
    asked = []

    def is_live(key: bytes, token: int) -> bool:
        asked.append((key, token))
        return key != b"orphan"

    assert store.sweep(is_live, HOUR_S, newest(folder) + HOUR_S + 1) == 1
    assert sorted(asked) == sorted([(b"live", TOKEN), (b"orphan", TOKEN), (KEY, TOKEN)])
    assert is_stored(store, key=b"live")
    assert is_stored(store, key=KEY)
    assert not is_stored(store, key=b"orphan")


def newest(folder: Path) -> float:
    """Give the time of the file that changed last, in seconds."""
    return max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())


def test_sweep_spares_what_is_new(store: BlobStore, folder: Path) -> None:
    """A value whose completion is still on its way, or an upload under way, is not an orphan."""
    send_all(store)
    send(store, 0, b"a", b"ab", b"under way")
    assert store.sweep(lambda key, token: False, HOUR_S, newest(folder) + HOUR_S - 10) == 0
    assert is_stored(store)
    assert send(store, 1, b"b", b"ab", b"under way") == 2


def test_sweep_removes_old_uploads(folder: Path) -> None:
    """Uploads left unfinished go, whether this process or one before began them."""
    send(BlobStore(folder), 0, b"a", b"ab", b"before the restart")
    store = BlobStore(folder)
    send(store, 0, b"a", b"ab", b"given up")
    assert store.sweep(lambda key, token: True, HOUR_S, newest(folder) + HOUR_S + 1) == 2
    assert files(folder) == []
    with pytest.raises(BlobMissingError):
        send(store, 1, b"b", b"ab", b"given up")


def test_sweep_leaves_other_files_alone(store: BlobStore, folder: Path) -> None:
    """Files that are not ours by their ending stay; one that is ours and damaged goes."""
    send_all(store)
    (path,) = folder.rglob("*.blob")
    (path.parent / "notes.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (path.parent / "short.blob").write_bytes(b"short")
    copy = path.with_name("copy.blob")  # right inside, but under a name that nobody asks for
    copy.write_bytes(path.read_bytes())
    assert store.sweep(lambda key, token: True, HOUR_S, newest(folder) + HOUR_S + 1) == 2
    assert files(folder) == [".blob", ".txt", ".txt"]
    assert is_stored(store)


# -- damage and failing disks ---------------------------------------------------------------------


def truncate(path: Path) -> None:
    """Cut a file's last byte off."""
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    """Put a byte behind a file's end."""
    path.write_bytes(path.read_bytes() + b"x")


def flip_key(path: Path) -> None:
    """Flip a bit of the key in the header."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(KEY)] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [truncate, lengthen, flip_key])
def test_damaged_file_is_not_read(
    store: BlobStore, folder: Path, harm: Callable[[Path], None]
) -> None:
    """A file of the wrong length or with a damaged header does not exist, and may be replaced."""
    send_all(store)
    (path,) = folder.rglob("*.blob")
    harm(path)
    assert not is_stored(store)
    with pytest.raises(BlobDiskError, match="damaged"):
        store.read(KEY, TOKEN, 0, 10)
    send_all(store)
    assert store.read(KEY, TOKEN, 0, 10_000)[0] == VALUE


def test_value_is_synced_before_it_has_its_name(
    store: BlobStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is: sync the file, rename it, sync its folder; the reply comes after all that."""
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"sync {path.suffix or 'folder'}")
        sync(descriptor)

    def note_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files have no names here")
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    send(store, 0, VALUE[:1_000])
    assert events == ["sync folder", "sync folder"], "the new folders' names"
    events.clear()
    send(store, 1_000, VALUE[1_000:])
    assert events == ["sync .part", "rename", "sync folder"]


@pytest.mark.parametrize("n_good", [0, 1])
def test_failed_sync_stores_nothing(
    store: BlobStore, folder: Path, monkeypatch: pytest.MonkeyPatch, n_good: int
) -> None:
    """If the file or its folder cannot be synced, there is no value, and sending again works."""
    send(store, 0, VALUE[:1_000])
    sync = os.fsync
    left = [n_good]

    def fail(descriptor: int) -> None:
        if not left[0]:
            raise OSError(5, "Input/output error")
        left[0] -= 1
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(BlobDiskError, match="Input/output error"):
            send(store, 1_000, VALUE[1_000:])
    assert not is_stored(store)
    assert files(folder) == []
    send_all(store)
    assert is_stored(store)


def test_full_disk_is_an_error_of_ours(store: BlobStore, folder: Path) -> None:
    """A folder that cannot be made is reported with its key, and takes up no room."""
    folder.write_text("in the way")
    for _ in range(blobs.MAX_UNFINISHED + 1):
        with pytest.raises(BlobDiskError, match=r"cannot .* the value of key"):
            send(store, 0, VALUE[:10])
    folder.unlink()
    send_all(store)
    assert is_stored(store)


def test_all_errors_are_blob_errors() -> None:
    """One tree: a caller may catch them all at once."""
    tree = {BlobMissingError, BlobChecksumError, BlobSizeError, BlobLimitError, BlobDiskError}
    assert tree == set(BlobError.__subclasses__())


# -- threads --------------------------------------------------------------------------------------


def test_uploads_of_one_key_at_once(store: BlobStore, folder: Path) -> None:
    """Whoever gets through, what is stored is one of the values, whole; nothing else is left."""
    values = [bytes([number]) * 5_000 for number in range(6)]
    started = threading.Barrier(len(values))

    def upload(value: bytes) -> None:
        started.wait()
        for _ in range(20):
            try:
                send_all(store, value, 500)
            except (BlobMissingError, BlobSizeError):
                continue  # another started anew in between

    threads = [threading.Thread(target=upload, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    send_all(store, values[0])
    stored, _ = store.read(KEY, TOKEN, 0, 10_000)
    assert stored == values[0]
    assert files(folder) == [".blob"]


def test_what_is_seen_during_uploads_is_whole(store: BlobStore) -> None:
    """A reader beside uploads that replace each other always sees one of the values, whole."""
    values = [bytes([number]) * 3_000 for number in range(3)]
    is_over = threading.Event()
    send_all(store, values[0])

    def upload() -> None:
        while not is_over.is_set():
            for value in values:
                send_all(store, value, 1_000)

    thread = threading.Thread(target=upload)
    thread.start()
    seen = set()
    try:
        # Bounded, but far above what it takes until each value was seen.
        for _ in range(1_000_000):
            seen.add(store.read(KEY, TOKEN, 0, 10_000)[0])
            if len(seen) == len(values):
                break
    finally:
        is_over.set()
        thread.join(60)
    assert seen == set(values)
