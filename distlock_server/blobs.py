"""Large results on disk, one file each, named by key and fencing token.

A value arrives in chunks, in order, in a file of its own (`.part`). When its last byte is there, it
is checked against its SHA-256, synced and renamed (`.blob`), and the folder is synced: a blob that
exists is whole and survives a power cut. Only then may a completion name it. Files that no record
names are removed by `sweep`; each begins with its key and token, so that it can be asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from distlock_server.blob_file import Header, is_whole, read_header
from distlock_server.clock import Clock, SystemClock
from distlock_server.failpoints import reach
from distlock_server.folders import sync_folder

logger = logging.getLogger(__name__)

MAX_UNFINISHED: Final = 256
"""Uploads that may be under way at once, unless the store is made with another limit."""

IDLE_UPLOAD_NS: Final = 300 * 10**9
"""An upload that got no chunk for so long makes room when there are too many."""

_SHA256_BYTES: Final = 32
FINISHED: Final = ".blob"
"""How the files of finished values end."""

_UNFINISHED: Final = ".part"


class BlobError(Exception):
    """A large result cannot be stored or read."""


class BlobMissingError(BlobError):
    """There is no such value, or the upload lacks the bytes before this chunk."""


class BlobChecksumError(BlobError):
    """The value does not have the SHA-256 that it was announced with."""


class BlobSizeError(BlobError):
    """A length or an offset does not fit the value."""


class BlobLimitError(BlobError):
    """Too many uploads are under way; try again later."""


class BlobDiskError(BlobError):
    """The disk failed or is full, or a file is damaged."""


class _Upload:
    """An upload under way; chunks of it take turns under `mutex`."""

    def __init__(self, header: Header, part: Path, now_ns: int) -> None:
        self.header = header
        self.part = part
        self.last_chunk_ns = now_ns
        self.mutex = threading.Lock()
        self.received_bytes = 0
        self.digest = hashlib.sha256()


class BlobStore:
    """The folder of large results.

    Threads may use it at once. Uploads under way are known in memory only: after a restart they
    start anew.
    """

    def __init__(
        self, folder: Path, max_unfinished: int = MAX_UNFINISHED, clock: Clock | None = None
    ) -> None:
        """Open the store.

        Args:
            folder: Where the files are; made when the first value arrives.
            max_unfinished: Uploads that may be under way at once.
            clock: Tells how long an upload has been idle. None: the system's.
        """
        self._folder = folder
        self._max_unfinished = max_unfinished
        self._clock = clock or SystemClock()
        self._mutex = threading.Lock()  # guards _uploads, and finished files coming and going
        self._uploads: dict[Path, _Upload] = {}
        self._made: set[Path] = set()  # folders whose names survive a power cut

    def write_chunk(
        self, key: bytes, token: int, offset: int, chunk: bytes, size_bytes: int, sha256: bytes
    ) -> int:
        """Take one chunk of a value; chunks come in order, and any may be repeated.

        A value that was stored under the same key and token with other content stays until the new
        one is whole.

        Args:
            key: The key as stored.
            token: The holder's fencing token.
            offset: Where the chunk starts in the value; 0 starts the upload anew.
            chunk: The bytes.
            size_bytes: Length of the whole value.
            sha256: SHA-256 of the whole value, 32 bytes.

        Returns:
            Bytes received so far. Equal to `size_bytes`: the value is checked and on disk.

        Raises:
            BlobMissingError: Bytes before `offset` were not received: start anew at 0.
            BlobSizeError: The chunk reaches over the end, or the size changed on the way.
            BlobChecksumError: All is there and its SHA-256 is another; the upload is dropped.
            BlobLimitError: Too many uploads are under way.
            BlobDiskError: The disk failed or is full; the upload is dropped.
        """
        header = Header(key, token, size_bytes, sha256)
        _check_chunk(header, offset, chunk)
        path = self.path(key, token)
        with _disk_errors(f"store the value of key {key!r}"):
            if self.exists(key, token, size_bytes, sha256):
                sync_folder(path.parent)  # whoever renamed it may not be there yet
                return size_bytes
            reach("upload.asked")
            upload = self._begin(path, header) if offset == 0 else self._resume(path, header)
            reach("upload.made")
            with upload.mutex:
                if offset > upload.received_bytes:
                    raise _gap(key, offset, upload.received_bytes)
                try:
                    self._append(upload, chunk[upload.received_bytes - offset :])
                    if upload.received_bytes == size_bytes:
                        self._finish(path, upload)
                except FileNotFoundError as error:
                    raise _gap(key, offset, 0) from error  # started anew or deleted meanwhile
                except (OSError, BlobChecksumError):
                    self._forget(path, upload)
                    raise
                return upload.received_bytes

    def read(self, key: bytes, token: int, offset: int, max_bytes: int) -> tuple[bytes, int]:
        """Read a piece of a value; its SHA-256 is for the reader of the whole to check.

        Args:
            key: The key as stored.
            token: The fencing token of the completion.
            offset: Where the piece starts.
            max_bytes: Its length at most.

        Returns:
            The piece, short or empty at the end, and the length of the whole value.

        Raises:
            BlobMissingError: There is no such value.
            BlobSizeError: The offset lies behind the end.
            BlobDiskError: The file cannot be read or is damaged.
        """
        with _disk_errors(f"read the value of key {key!r}"):
            try:
                file = self.path(key, token).open("rb")
            except FileNotFoundError as error:
                raise BlobMissingError(
                    f"no value is stored for key {key!r} with token {token}"
                ) from error
            with file:
                header = read_header(file)
                if header is None or not is_whole(file, header):
                    raise BlobDiskError(f"the file of key {key!r} with token {token} is damaged")
                if not 0 <= offset <= header.size_bytes:
                    raise BlobSizeError(
                        f"offset {offset} of key {key!r}: its value has {header.size_bytes} bytes"
                    )
                file.seek(header.n_bytes + offset)
                return file.read(max(0, max_bytes)), header.size_bytes

    def exists(self, key: bytes, token: int, size_bytes: int, sha256: bytes) -> bool:
        """Tell whether this value is on disk, whole, under this key and token.

        Raises:
            BlobDiskError: The file cannot be read.
        """
        with _disk_errors(f"look for the value of key {key!r}"):
            try:
                file = self.path(key, token).open("rb")
            except FileNotFoundError:
                return False
            with file:
                header = read_header(file)
                wanted = Header(key, token, size_bytes, sha256)
                return header == wanted and is_whole(file, wanted)

    def delete(self, key: bytes, token: int) -> None:
        """Remove a value and its unfinished upload; removing nothing is no error.

        Raises:
            BlobDiskError: The file cannot be removed.
        """
        path = self.path(key, token)
        self._forget(path)
        with self._mutex, _disk_errors(f"remove the value of key {key!r}"):
            path.unlink(missing_ok=True)

    def sweep(
        self, is_live: Callable[[bytes, int], bool], older_than_s: float, now_s: float
    ) -> int:
        """Remove old files that no record names, and uploads that were left unfinished.

        Args:
            is_live: Tells whether key and token are those of a holder or of a completion.
            older_than_s: Leave files alone that changed within this time, in seconds.
            now_s: Wall time in seconds since 1970.

        Returns:
            How many files were removed.

        Raises:
            BlobDiskError: The folder cannot be read.
        """
        n_removed = 0
        changed_before_s = now_s - older_than_s
        with _disk_errors(f"sweep {self._folder}"):
            for file in self._files():
                with contextlib.suppress(FileNotFoundError):
                    if file.stat().st_mtime > changed_before_s or self._is_named(file, is_live):
                        continue
                    n_removed += self._remove_old(file, changed_before_s)
        return n_removed

    # -- files ------------------------------------------------------------------------------------

    def path(self, key: bytes, token: int) -> Path:
        """Give the file of a finished value: any key becomes a short, harmless name."""
        name = hashlib.sha256(token.to_bytes(8, "big") + key).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}{FINISHED}"

    def _files(self) -> Iterator[Path]:
        if self._folder.exists():
            for shard in sorted(self._folder.iterdir()):
                if shard.is_dir():
                    yield from (f for f in shard.iterdir() if f.suffix in (FINISHED, _UNFINISHED))

    def _is_named(self, file: Path, is_live: Callable[[bytes, int], bool]) -> bool:
        if file.suffix == _UNFINISHED:
            return False
        with file.open("rb") as opened:
            header = read_header(opened)
        if header is None:
            logger.warning("%s is damaged beyond use and is removed", file)
            return False
        return self.path(header.key, header.token) == file and is_live(header.key, header.token)

    def _remove_old(self, file: Path, changed_before_s: float) -> bool:
        """Remove a file unless it was written again in the meantime."""
        with self._mutex:
            if file.stat().st_mtime > changed_before_s:
                return False
            file.unlink()
            for path, upload in list(self._uploads.items()):
                if upload.part == file:
                    del self._uploads[path]
            return True

    # -- uploads ----------------------------------------------------------------------------------

    def _begin(self, path: Path, header: Header) -> _Upload:
        """Start an upload anew, whatever was there; each has a file of its own."""
        # A folder that is there may have been made by a server that was killed before it synced.
        if path.parent not in self._made or not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(self._folder)
            sync_folder(self._folder.parent)
            self._made.add(path.parent)
        now_ns = self._clock.now_ns()
        part = path.with_suffix(f".{uuid.uuid4().hex}{_UNFINISHED}")
        upload = _Upload(header, part, now_ns)
        with self._mutex:
            self._drop(path)
            self._make_room(header.key, now_ns)
            self._uploads[path] = upload
            try:
                part.write_bytes(header.pack())
            except OSError:
                self._drop(path)
                raise
        return upload

    def _make_room(self, key: bytes, now_ns: int) -> None:
        """Drop idle uploads if there are too many; `_mutex` is held."""
        if len(self._uploads) < self._max_unfinished:
            return
        for path, upload in list(self._uploads.items()):
            if upload.last_chunk_ns <= now_ns - IDLE_UPLOAD_NS:
                self._drop(path)
        if len(self._uploads) >= self._max_unfinished:
            raise BlobLimitError(
                f"{len(self._uploads)} uploads are under way, the most that is allowed: "
                f"send the value of key {key!r} later"
            )

    def _resume(self, path: Path, header: Header) -> _Upload:
        with self._mutex:
            upload = self._uploads.get(path)
        if upload is None:
            raise BlobMissingError(
                f"no upload for key {header.key!r} is under way: start anew at offset 0"
            )
        if upload.header != header:
            raise BlobSizeError(
                f"size or SHA-256 of the value of key {header.key!r} changed on the way: "
                "start anew at offset 0"
            )
        return upload

    def _append(self, upload: _Upload, chunk: bytes) -> None:
        with upload.part.open("r+b") as file:
            file.seek(upload.header.n_bytes + upload.received_bytes)
            file.write(chunk)
        reach("upload.appended")
        upload.digest.update(chunk)
        upload.received_bytes += len(chunk)
        upload.last_chunk_ns = self._clock.now_ns()

    def _finish(self, path: Path, upload: _Upload) -> None:
        """Check, sync, rename, sync the folder: in this order a blob is never half there."""
        if upload.digest.digest() != upload.header.sha256:
            raise BlobChecksumError(
                f"the value of key {upload.header.key!r} arrived with another SHA-256 than "
                "announced: send it again"
            )
        reach("upload.checked")
        with upload.part.open("r+b") as file:
            os.fsync(file.fileno())
        reach("upload.synced")
        with self._mutex:
            upload.part.replace(path)
            reach("upload.renamed")
            if self._uploads.get(path) is upload:
                del self._uploads[path]
            try:
                sync_folder(path.parent)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        reach("upload.ended")

    def _forget(self, path: Path, upload: _Upload | None = None) -> None:
        """Drop an upload with its file: this one, or whichever is under way."""
        with self._mutex:
            if upload is None or self._uploads.get(path) is upload:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        """Drop the upload under way, if any, with its file; `_mutex` is held."""
        upload = self._uploads.pop(path, None)
        if upload is not None:
            with contextlib.suppress(OSError):
                upload.part.unlink(missing_ok=True)


def _check_chunk(header: Header, offset: int, chunk: bytes) -> None:
    if len(header.sha256) != _SHA256_BYTES:
        raise BlobChecksumError(
            f"the SHA-256 of the value of key {header.key!r} has {len(header.sha256)} bytes, not 32"
        )
    if offset < 0 or offset + len(chunk) > header.size_bytes:
        raise BlobSizeError(
            f"a chunk of key {header.key!r} covers bytes {offset} to {offset + len(chunk)} of a "
            f"value of {header.size_bytes}"
        )


def _gap(key: bytes, offset: int, received_bytes: int) -> BlobMissingError:
    return BlobMissingError(
        f"a chunk of key {key!r} starts at byte {offset}, but {received_bytes} bytes were "
        "received: start anew at offset 0"
    )


@contextlib.contextmanager
def _disk_errors(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BlobDiskError(f"cannot {action}: {error.strerror or error}") from error
