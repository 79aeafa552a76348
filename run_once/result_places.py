"""Places for large values outside the lock server: a folder, or whatever fsspec reaches.

An object's name is made of the key's hash, the token and the claim id, so that no two holders ever
write the same one, not even those of two lock tables that share a place. It is read only from the
place that this process was configured with, whatever URL a server names.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from run_once.buffers import CHUNK_BYTES, Parts, aligned_buffer
from run_once.errors import ConfigError

_SUFFIX: Final = ".result"
_PROBE: Final = "run-once-probe.tmp"
_READ_BYTES: Final = 32 << 20
_PASSWORD: Final = re.compile(r"//[^/:]*:[^/]*@")


class WrongSizeError(Exception):
    """An object does not have the length that it was written with."""


class Place(Protocol):
    """Where objects are kept. Whatever its library raises, its methods raise."""

    def url(self, name: str) -> str:
        """Give an object's URL, without passwords."""
        ...

    def check(self) -> None:
        """Raise whatever it is that keeps us from writing there."""
        ...

    def write(self, name: str, data: bytes | Parts) -> None:
        """Write an object; it is there as a whole when this returns."""
        ...

    def read(self, name: str, size_bytes: int) -> memoryview:
        """Read an object of known length into memory of its own, which may be written to.

        Raises:
            FileNotFoundError: It is not there.
            WrongSizeError: It has another length.
        """
        ...

    def delete(self, name: str) -> None:
        """Delete an object."""
        ...


class FolderPlace:
    """A folder, perhaps one that several machines mount."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def url(self, name: str) -> str:
        """Give an object's URL."""
        return (self._folder / name).as_uri()

    def check(self) -> None:
        """Make the folder, but not its parents: those of a disk that is not mounted are missing."""
        try:
            self._folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no folder {self._folder.parent} to make it in; is the disk mounted?"
            ) from None
        probe = self._temporary(_PROBE)
        probe.touch(exist_ok=False)
        probe.unlink()

    def write(self, name: str, data: bytes | Parts) -> None:
        """Write a file under another name, sync it, rename it, and sync the folder."""
        temporary = self._temporary(name)
        try:
            with temporary.open("xb", buffering=0) as file:
                for chunk in _chunks(data):
                    _write_all(file, chunk)
                os.fsync(file.fileno())
            temporary.replace(self._folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(self._folder)

    def read(self, name: str, size_bytes: int) -> memoryview:
        """Read a file."""
        try:
            file = (self._folder / name).open("rb", buffering=0)
        except FileNotFoundError:
            if self._folder.is_dir():
                raise
            raise NotADirectoryError(f"there is no folder {self._folder}") from None
        with file:
            _check_size(os.fstat(file.fileno()).st_size, size_bytes)
            data = aligned_buffer(size_bytes)
            start = 0
            while start < size_bytes:
                n_bytes = file.readinto(data[start : start + _READ_BYTES])
                if not n_bytes:
                    raise WrongSizeError(f"only {start} of {size_bytes} bytes can be read")
                start += n_bytes
        return data

    def delete(self, name: str) -> None:
        """Delete a file."""
        (self._folder / name).unlink()

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"


class FsspecPlace:
    """A URL of whatever fsspec has a file system for."""

    def __init__(self, url: str) -> None:
        import fsspec.core  # noqa: PLC0415 (an optional dependency)

        self._url = url
        self._fs, self._path = fsspec.core.url_to_fs(url)

    def url(self, name: str) -> str:
        """Give an object's URL; a password in it stays here."""
        return _without_password(f"{self._url}/{name}")

    def check(self) -> None:
        """Write an object, and delete it if that is allowed."""
        self.write(_PROBE, b"run-once")
        with contextlib.suppress(Exception):
            self.delete(_PROBE)

    def write(self, name: str, data: bytes | Parts) -> None:
        """Write an object in chunks."""
        with self._fs.open(self._named(name), "wb") as file:
            for chunk in _chunks(data):
                file.write(chunk)

    def read(self, name: str, size_bytes: int) -> memoryview:
        """Read an object in large ranges."""
        path = self._named(name)
        _check_size(self._find_size(path), size_bytes)
        data = aligned_buffer(size_bytes)
        for start in range(0, size_bytes, _READ_BYTES):
            end = min(start + _READ_BYTES, size_bytes)
            part = self._fs.cat_file(path, start=start, end=end)
            if len(part) != end - start:
                raise WrongSizeError(f"only {start + len(part)} of {size_bytes} bytes can be read")
            data[start:end] = part
        return data

    def delete(self, name: str) -> None:
        """Delete an object."""
        self._fs.rm_file(self._named(name))

    def _find_size(self, path: str) -> int:
        """Give an object's length, also if a listing that fsspec remembers does not have it."""
        try:
            return int(self._fs.info(path)["size"])
        except FileNotFoundError:
            self._fs.invalidate_cache()
        return int(self._fs.info(path)["size"])

    def _named(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"


_opened: dict[tuple[int, str], Place] = {}
_checked: set[tuple[int, str]] = set()


def open_place(results: str) -> Place:
    """Give the place that an option names; nothing is read or written yet.

    Args:
        results: The option, as `run_once.config` has it.

    Raises:
        ConfigError: fsspec, or its package for this kind of URL, is missing.
    """
    # Not across a fork: the connections of some of fsspec's file systems do not survive it.
    mark = (os.getpid(), results)
    place = _opened.get(mark)
    if place is None:
        _opened[mark] = place = _new_place(results)
    return place


def check_place(results: str) -> None:
    """Make sure, once in a process, that values can be written to a place.

    Raises:
        ConfigError: They cannot.
    """
    mark = (os.getpid(), results)
    if mark in _checked:
        return
    place = open_place(results)
    try:
        place.check()
    except Exception as error:
        raise ConfigError(
            f"results={_without_password(results)!r} cannot be used, values cannot be written "
            f"there: {type(error).__name__}: {error}"
        ) from error
    _checked.add(mark)


def opened_places() -> Iterator[Place]:
    """Yield the places that this process has been configured with."""
    for (pid, _), place in list(_opened.items()):
        if pid == os.getpid():
            yield place


def object_name(key: bytes, token: int, claim_id: bytes) -> str:
    """Name the object for the value of one claim."""
    return f"{_name_start(key, token)}{claim_id[:8].hex()}{_SUFFIX}"


def is_object_name(name: str, key: bytes, token: int) -> bool:
    """Tell whether a name is one that a holder of this key with this token gives."""
    start = _name_start(key, token)
    return name.startswith(start) and bool(
        re.fullmatch(rf"[0-9a-f]*{re.escape(_SUFFIX)}", name.removeprefix(start))
    )


def _name_start(key: bytes, token: int) -> str:
    return f"{hashlib.sha256(key).hexdigest()[:40]}-{token:016x}-"


def _new_place(results: str) -> Place:
    if "://" not in results:
        return FolderPlace(Path(results))
    try:
        return FsspecPlace(results)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == "fsspec":
            reason = "it needs fsspec: `pip install 'run-once[fsspec]'`"
        else:
            reason = f"the package that fsspec needs for it is missing: {error}"
    except Exception as error:  # noqa: BLE001 (each of fsspec's file systems has errors of its own)
        reason = f"{type(error).__name__}: {error}"
    raise ConfigError(f"results={_without_password(results)!r} cannot be used, {reason}")


def _without_password(url: str) -> str:
    return _PASSWORD.sub("//", url)


def _chunks(data: bytes | Parts) -> Iterator[memoryview]:
    return (data if isinstance(data, Parts) else Parts([data])).chunks(CHUNK_BYTES)


def _write_all(file: Any, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[file.write(chunk) :]


def _check_size(found_bytes: int, size_bytes: int) -> None:
    if found_bytes != size_bytes:
        raise WrongSizeError(f"it has {found_bytes} bytes, not {size_bytes}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
