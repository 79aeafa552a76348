"""Places for values: a folder without fsspec, anything else with it."""

from __future__ import annotations

import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from run_once import result_places
from run_once.buffers import Parts
from run_once.config import load_config
from run_once.errors import ConfigError
from run_once.result_places import (
    Place,
    WrongSizeError,
    check_place,
    is_object_name,
    object_name,
    open_place,
)

NAME = object_name(b"a key", 5, b"c" * 16)
DATA = Parts([b"head", os.urandom(100_000), b"", b"tail"])


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No place is open."""
    monkeypatch.setattr(result_places, "_opened", {})
    monkeypatch.setattr(result_places, "_checked", set())


@pytest.fixture(params=["folder", "memory", "fsspec's folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Give each kind of place."""
    if request.param == "folder":
        yield open_place(str(tmp_path))
    elif request.param == "memory":
        yield open_place(f"memory://{uuid.uuid4().hex}/deeper")
    else:
        yield open_place(f"file://{tmp_path}")  # the configuration makes a path of it


def test_objects_come_back(place: Place) -> None:
    """As they were, in memory that may be written to; writing one anew replaces it."""
    place.check()
    place.write(NAME, b"before")
    place.write(NAME, DATA)
    back = place.read(NAME, len(DATA))
    assert back == bytes(DATA)
    assert not back.readonly


def test_large_objects_come_in_ranges(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a range is."""
    place.write(NAME, DATA)
    for n_bytes in (1, 33_333, 50_004, 100_008):
        monkeypatch.setattr(result_places, "_READ_BYTES", n_bytes if n_bytes > 1 else 7_001)
        assert place.read(NAME, len(DATA)) == bytes(DATA)


def test_missing_objects_say_so(place: Place) -> None:
    """Never there, or deleted: FileNotFoundError and nothing else."""
    with pytest.raises(FileNotFoundError):
        place.read(NAME, 5)
    place.write(NAME, b"12345")
    assert bytes(place.read(NAME, 5)) == b"12345"
    place.delete(NAME)
    with pytest.raises(FileNotFoundError):
        place.read(NAME, 5)


def test_old_listings_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing that the user's code made before another machine wrote is not the last word."""
    place = open_place(f"memory://{uuid.uuid4().hex}")
    assert isinstance(place, result_places.FsspecPlace)
    place.write(NAME, b"12345")
    is_listed = [False]
    real = place._fs.info

    def info(path: str) -> Any:
        if not is_listed[0]:
            raise FileNotFoundError(path)
        return real(path)

    def invalidate_cache() -> None:
        is_listed[0] = True

    monkeypatch.setattr(place._fs, "info", info)
    monkeypatch.setattr(place._fs, "invalidate_cache", invalidate_cache)
    assert bytes(place.read(NAME, 5)) == b"12345"


@pytest.mark.parametrize("size", [0, 4, 6])
def test_another_length_is_said(place: Place, size: int) -> None:
    """Before anything is read."""
    place.write(NAME, b"12345")
    with pytest.raises(WrongSizeError, match=f"5 bytes, not {size}"):
        place.read(NAME, size)


def test_a_folder_holds_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails on the way leaves nothing; a file is synced, renamed, then its folder synced."""
    folder = tmp_path / "results"
    place = open_place(str(folder))
    place.check()
    assert list(folder.iterdir()) == []
    done: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        assert (folder / NAME).exists() == (done[-1] == "folder")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    place.write(NAME, DATA)
    assert done == ["file", "folder"]

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        place.write("other", DATA)
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_urls_name_the_object_and_no_password(tmp_path: Path) -> None:
    """What goes to the server can be read by everybody who may ask it."""
    assert open_place(str(tmp_path)).url("x") == f"{tmp_path.as_uri()}/x"
    assert open_place("memory://a/b").url("x") == "memory://a/b/x"
    for url, shown in (
        ("ftp://me:pa@ss@host/b", "ftp://host/b/x"),
        ("abfs://box@account/b", "abfs://box@account/b/x"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c/x"),
    ):
        place = result_places.FsspecPlace.__new__(result_places.FsspecPlace)
        place._url = url
        assert place.url("x") == shown


def test_names_belong_to_key_and_token() -> None:
    """No name of one key or token passes for another's, and none leads elsewhere."""
    assert is_object_name(NAME, b"a key", 5)
    assert not is_object_name(NAME, b"a key", 6)
    assert not is_object_name(NAME, b"b key", 5)
    start = NAME.removesuffix(".result")
    for name in ("", "/", start, f"{start}/../x.result", f"{NAME}\n", f"x{NAME}"):
        assert not is_object_name(name, b"a key", 5)


@pytest.mark.parametrize("given", ["{}/a", "{}/a/", "file://{}/a", "file://{}/a/"])
def test_a_folder_has_one_form(given: str, tmp_path: Path) -> None:
    """With or without file://, from wherever it is configured."""
    given = given.format(tmp_path)
    assert load_config(results=given).results == str(tmp_path / "a")
    assert load_config(environ={"RUN_ONCE_RESULTS": given}).results == str(tmp_path / "a")


def test_other_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are made absolute, URLs lose a slash at their end, and nonsense is refused."""
    monkeypatch.chdir(tmp_path)
    assert load_config(results=Path("a b")).results == str(tmp_path / "a b")
    assert load_config(results="file:///a%20b").results == "/a b"
    assert load_config(results="~/r").results == str(Path.home() / "r")
    assert load_config(results="s3://bucket/a/").results == "s3://bucket/a"
    (tmp_path / ".run_once.ini").write_text("[run_once]\nresults = s3://bucket\n")
    for bad in ("  ", 5, "x" * 2000, b"bytes"):
        with pytest.raises(ConfigError, match="option results"):
            load_config(results=bad)


def _make_file(folder: Path) -> str:
    (folder / "file").touch()
    return str(folder / "file")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_make_file, "File exists"),
        (lambda folder: f"{_make_file(folder)}/below", "Not a directory"),
        (lambda folder: f"{folder}/missing/below", "no folder .*/missing to make it in"),
        (lambda folder: "nonsense://a/b", "Protocol not known"),
        (lambda folder: "oci://a/b", "the package that fsspec needs for it is missing"),
        (lambda folder: f"file://{folder}/missing/below", "FileNotFoundError"),
    ],
)
def test_what_cannot_be_used_is_said(
    make: Callable[[Path], str], sentence: str, tmp_path: Path
) -> None:
    """By one sentence that names the option and its value."""
    results = make(tmp_path)
    with pytest.raises(ConfigError, match=rf"^results='{results}' cannot be used.*{sentence}"):
        check_place(results)


def test_passwords_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the error either."""
    with pytest.raises(ConfigError) as caught:
        check_place("nonsense://me:secret@host/b")
    assert "secret" not in str(caught.value)


def test_without_fsspec_folders_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for a URL the error says what to install."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == "fsspec"]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fsspec", None)  # as if it were not installed
    check_place(str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir()
    with pytest.raises(ConfigError, match=r"results='memory://x'.*pip install 'run-once\[fsspec\]"):
        check_place("memory://x")


def test_a_place_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by each Parallel; one that failed is tried again."""
    tries: list[Any] = []
    real = result_places.FolderPlace.check

    def check(self: result_places.FolderPlace) -> None:
        tries.append(self)
        real(self)

    monkeypatch.setattr(result_places.FolderPlace, "check", check)
    folder = tmp_path / "a" / "b"
    with pytest.raises(ConfigError):
        check_place(str(folder))
    folder.parent.mkdir()
    check_place(str(folder))
    check_place(str(folder))
    assert len(tries) == 2
