"""Options and where they come from."""

from __future__ import annotations

import logging
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from run_once import config
from run_once.config import Config, default_owner, load_config
from run_once.errors import ConfigError, RunOnceWarning
from run_once.options import CHECKS, MAX_OWNER_BYTES, parse_address, variable


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Give a project folder with a marker, beside the home."""
    folder = tmp_path / "project"
    (folder / "src" / "deep").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Give an empty home folder."""
    folder = tmp_path / "a-home"
    folder.mkdir()
    return folder


def _write(folder: Path, text: str) -> Path:
    path = folder / ".run_once.ini"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_configured(project: Path, home: Path) -> None:
    """With nothing configured there is no address, and every option has its default."""
    assert load_config(environ={}, cwd=project, home=home) == Config()


def test_precedence(project: Path, home: Path) -> None:
    """Argument > environment > ini of the project > ini of the home > default, and it is told."""
    in_home = _write(home, "[DEFAULT]\naddress = home:1\nlease_s = 11\nretry_s = 12\n")
    found = load_config(environ={}, cwd=project, home=home)
    assert (found.address, found.source, found.lease_s) == ("home:1", str(in_home), 11)

    in_project = _write(project, "[DEFAULT]\naddress = project:2\nlease_s = 21\n")
    found = load_config(environ={}, cwd=project / "src" / "deep", home=home)
    assert (found.address, found.source) == ("project:2", str(in_project))
    assert (found.lease_s, found.retry_s) == (21, 12)

    environ = {"RUN_ONCE_ADDRESS": "env:3", "RUN_ONCE_NAMESPACE": "n"}
    found = load_config(environ=environ, cwd=project, home=home)
    assert (found.address, found.source) == ("env:3", "RUN_ONCE_ADDRESS")
    assert (found.lease_s, found.namespace) == (21, "n")

    found = load_config(environ=environ, cwd=project, home=home, address="arg:4", lease_s=None)
    assert (found.address, found.source, found.lease_s) == ("arg:4", "argument", 21)


def test_empty_variable_is_unset(project: Path, home: Path) -> None:
    """`RUN_ONCE_ADDRESS=` hides nothing."""
    _write(home, "[DEFAULT]\naddress = home:1\n")
    assert load_config(environ={"RUN_ONCE_ADDRESS": ""}, cwd=project, home=home).address == "home:1"


def test_search_ends_at_the_project(project: Path, home: Path, tmp_path: Path) -> None:
    """An ini file above the folder with .git or pyproject.toml is not the project's."""
    _write(tmp_path, "[DEFAULT]\naddress = above:1\n")
    assert load_config(environ={}, cwd=project / "src", home=home).address is None
    assert load_config(environ={}, cwd=home, home=home).address is None


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("[DEFAULT]\naddress = lock.example\nport = 22113\n", "lock.example:22113"),
        ("[DEFAULT]\naddress = 10.0.0.7\nport = 99\n", "10.0.0.7:99"),
        ("[DEFAULT]\naddress = ::1\nport = 99\n", "[::1]:99"),
        ("[DEFAULT]\naddress = [::1]\nport = 99\n", "[::1]:99"),
        ("[DEFAULT]\nport = 99\n", "127.0.0.1:99"),
        ("[DEFAULT]\naddress = lock.example:5\n", "lock.example:5"),
        ("[DEFAULT]\naddress = lock.example\n", "lock.example:22113"),
        ("[run_once]\naddress = lock.example:5\n", "lock.example:5"),
        ("[DEFAULT]\naddress = unix:/run/lock.sock\nport = 1\n", "unix:/run/lock.sock"),
    ],
)
def test_ini_forms(text: str, address: str, project: Path, home: Path) -> None:
    """Address and port on two lines, as in 2021, mean the same as one `address = host:port`."""
    _write(home, text)
    assert load_config(environ={}, cwd=project, home=home).address == address


@pytest.mark.parametrize(
    "text", ["address = x\n", "[DEFAULT\n", "[DEFAULT]\na\n", "[DEFAULT]\n\0="]
)
def test_unreadable_ini(text: str, project: Path, home: Path) -> None:
    """A file that is no ini file is an error that names it and shows the form."""
    path = _write(home, text)
    if text.endswith("\0="):
        path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"run_once\.ini cannot be read.*address = host:22113"):
        load_config(environ={}, cwd=project, home=home)


def test_unknown_line_of_ini(project: Path, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line that is no option, perhaps misspelt, is named in the log."""
    _write(home, "[DEFAULT]\nadress = lock:1\n")
    with caplog.at_level(logging.WARNING):
        assert load_config(environ={}, cwd=project, home=home).address is None
    assert "no such option: adress" in caplog.text
    assert "did you mean address?" in caplog.text


def test_unknown_variable(
    project: Path, home: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """A variable that is no option, perhaps misspelt, is one warning in a process."""
    monkeypatch.setattr(config, "_WARNED_OF", set())
    environ = {"RUN_ONCE_ADRESS": "lock:1", "RUN_ONCE_EMPTY": "", "RUN_ONCE": "1", "RUNONCE_X": "1"}
    for _ in range(2):
        assert load_config(environ=environ, cwd=project, home=home).address is None
    (warning,) = recwarn
    assert warning.category is RunOnceWarning
    assert "RUN_ONCE_ADRESS is no option" in str(warning.message)
    assert str(warning.message).endswith("did you mean RUN_ONCE_ADDRESS?")
    assert warning.filename == __file__


def test_variables_that_are_read_are_known(
    project: Path, home: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """No variable that the code names, in the library or for the tests, is warned of."""
    monkeypatch.setattr(config, "_WARNED_OF", set())
    package = Path(config.__file__).parent
    named = {"RUN_ONCE_2021_WHEEL"}
    for path in package.glob("*.py"):
        named |= set(re.findall(r"RUN_ONCE_[A-Z0-9_]+\b", path.read_text(encoding="utf-8")))
    assert {"RUN_ONCE_SECRET_FILE", "RUN_ONCE_CONFIG_DIR", "RUN_ONCE_ADDRESS"} < named
    environ = dict.fromkeys(named, "x") | {variable(name): "" for name in CHECKS}
    load_config(environ=environ, cwd=project, home=home)
    assert [str(warning.message) for warning in recwarn] == []


def test_unknown_argument() -> None:
    """An argument that is no option is an error that lists the options."""
    with pytest.raises(ConfigError, match="no such option: adress; options: address"):
        load_config(environ={}, adress="x")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("address", "http://lock:1"),
        ("address", "lock:port"),
        ("address", "lock:70000"),
        ("address", "::1"),
        ("address", ":5"),
        ("address", "two words:5"),
        ("address", "unix:relative"),
        ("address", "[::1"),
        ("address", "[lock]:5"),
        ("namespace", "a\x1fb"),
        ("lease_s", "soon"),
        ("lease_s", "0"),
        ("lease_s", "-1"),
        ("lease_s", "nan"),
        ("lease_s", "inf"),
        ("lease_s", "1e9"),
        ("retry_s", "-1"),
        ("owner", "x" * (MAX_OWNER_BYTES + 1)),
        ("in_flight", "later"),
        ("max_attempts", "-1"),
        ("max_attempts", "1.5"),
        ("progress", "perhaps"),
        ("idle_exit_s", "0"),
    ],
)
def test_bad_values(option: str, value: str, project: Path, home: Path) -> None:
    """A value that cannot be used is an error that names option, value and where it stood."""
    variable = f"RUN_ONCE_{option.upper()}"
    with pytest.raises(ConfigError) as raised:
        load_config(environ={variable: value}, cwd=project, home=home)
    assert f"option {option} " in str(raised.value)
    assert repr(value) in str(raised.value)
    assert f"from {variable}" in str(raised.value)
    with pytest.raises(ConfigError, match="from argument"):
        load_config(environ={}, cwd=project, home=home, **{option: value})


def test_longest_duration_is_said(project: Path, home: Path) -> None:
    """A length of time that is too long is an error that says how long it may be."""
    with pytest.raises(ConfigError, match=r"from 0\.01 to 31536000 \(a year\)"):
        load_config(environ={}, cwd=project, home=home, lease_s=1e9)


def test_long_namespace(project: Path, home: Path) -> None:
    """A namespace that leaves no room for a key is an error that is not as long itself."""
    with pytest.raises(ConfigError, match=r"at most 500 bytes, and this one has 2,000") as raised:
        load_config(environ={}, cwd=project, home=home, namespace="n" * 2_000)
    assert len(str(raised.value)) < 600
    assert load_config(environ={}, cwd=project, home=home, namespace="n" * 500).namespace


def test_folder_in_place_of_the_ini_file(project: Path, home: Path) -> None:
    """A folder of the ini file's name is an error, and not passed over."""
    for folder in (home, project):
        (folder / ".run_once.ini").mkdir()
        with pytest.raises(ConfigError, match=r"ini cannot be read: Is a directory;"):
            load_config(environ={}, cwd=project, home=home)


def test_secret_is_never_shown(project: Path, home: Path) -> None:
    """Neither an error nor the repr of a configuration shows the secret."""
    with pytest.raises(ConfigError) as raised:
        load_config(environ={"RUN_ONCE_SECRET": "short"}, cwd=project, home=home)
    assert "short" not in str(raised.value)
    found = load_config(environ={"RUN_ONCE_SECRET": "long enough for it"}, cwd=project, home=home)
    assert found.secret == "long enough for it"
    assert "long enough for it" not in repr(found)


@pytest.mark.parametrize(
    ("option", "value", "parsed"),
    [
        ("lease_s", "0.15", 0.15),
        ("lease_s", timedelta(minutes=2), 120.0),
        ("retry_s", 0, 0.0),
        ("max_attempts", "3", 3),
        ("progress", "yes", True),
        ("progress", "0", False),
        ("progress", True, True),
        ("in_flight", "skip", "skip"),
        ("data_dir", "~/x", str(Path.home() / "x")),
    ],
)
def test_good_values(option: str, value: Any, parsed: Any, project: Path, home: Path) -> None:
    """Texts of variables and ini lines become what the option is."""
    if option == "data_dir":
        parsed = os.path.expanduser("~/x")  # noqa: PTH111 (as of now, not of import)
    found = load_config(environ={}, cwd=project, home=home, **{option: value})
    assert getattr(found, option) == parsed


def test_every_option_is_a_field() -> None:
    """What can be configured is what a Config has, but for what is made of it."""
    assert set(CHECKS) == set(Config.__dataclass_fields__) - {"source", "access"}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("lock", "lock:22113"),
        ("[::1]", "[::1]:22113"),
        ("unix:///run/x", "unix:/run/x"),
        (" lock:1 ", "lock:1"),
    ],
)
def test_parse_address(text: str, address: str) -> None:
    """An address has one form after parsing."""
    assert parse_address(text) == address
    assert parse_address(address) == address


def test_parse_address_refuses() -> None:
    """What is no address is an error that shows it."""
    with pytest.raises(ConfigError, match="'a b'"):
        parse_address("a b")


def test_a_strangers_ini_is_ignored(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder where anybody may write, a file of another user does not choose the server."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    _write(shared, "[DEFAULT]\naddress = evil:1\n")
    assert load_config(environ={}, cwd=shared, home=home).address == "evil:1"
    owner = (shared / ".run_once.ini").stat().st_uid
    if owner == 0:
        try:
            os.chown(shared / ".run_once.ini", 12345, -1)
        except OSError:
            pytest.skip("cannot give a file to another user")
        owner = 12345
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert load_config(environ={}, cwd=shared, home=home).address is None


def test_default_owner() -> None:
    """People see user, host and process as the holder."""
    owner = default_owner()
    assert owner.endswith(f":{os.getpid()}")
    assert "@" in owner
    assert len(owner.encode()) <= MAX_OWNER_BYTES


def test_resolved_keeps_an_address() -> None:
    """A configured address is never looked for, let alone replaced."""
    found = load_config(environ={}, address="nowhere.invalid:1")
    assert found.resolved() is found
