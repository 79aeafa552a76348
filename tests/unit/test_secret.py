"""The secret: made once per user, never shown, the same for all processes."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from run_once import secret as secret_module
from run_once.errors import ConfigError, RunOnceWarning
from run_once.secret import (
    Secret,
    how_to_get,
    how_to_share,
    is_here,
    load_secret,
    secret_path,
)


@pytest.fixture(autouse=True)
def _no_cache() -> None:
    secret_module._load_file.cache_clear()


def _environ(folder: Path, **more: str) -> dict[str, str]:
    return {"RUN_ONCE_CONFIG_DIR": str(folder), **more}


def test_it_is_made_on_first_use_for_this_user_only(tmp_path: Path) -> None:
    """0600 in a folder of 0700; the second use reads the same; nothing else is left there."""
    folder = tmp_path / "deep" / "config"
    made = load_secret(_environ(folder))
    secret_module._load_file.cache_clear()
    assert load_secret(_environ(folder)) == made
    assert len(made) == 64
    path = folder / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [entry.name for entry in folder.iterdir()] == ["secret"]


def test_two_users_have_two(tmp_path: Path) -> None:
    """It is random."""
    assert load_secret(_environ(tmp_path / "a")) != load_secret(_environ(tmp_path / "b"))


@pytest.mark.parametrize("links", [True, False])
def test_processes_that_start_at_once_agree(tmp_path: Path, links: bool) -> None:
    """Whoever is first makes it, also where there are no hard links."""
    folder = tmp_path / "config"
    script = (
        "import os, sys\n"
        "from run_once.secret import load_secret\n"
        f"if not {links}:\n"
        "    def link(*_): raise PermissionError(1, 'no links here')\n"
        "    os.link = link\n"
        "sys.stdin.readline()\n"
        "print(load_secret().hex())\n"
    )
    environ = {**os.environ, **_environ(folder)}
    environ.pop("RUN_ONCE_SECRET", None)
    environ.pop("RUN_ONCE_SECRET_FILE", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = {process.communicate(timeout=60)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(found) == 1
    assert [entry.name for entry in folder.iterdir()] == ["secret"]


def test_the_environment_comes_first(tmp_path: Path) -> None:
    """RUN_ONCE_SECRET, then RUN_ONCE_SECRET_FILE, then the user's own."""
    named = tmp_path / "named"
    named.write_text("f" * 20 + "\n")
    named.chmod(0o600)
    environ = _environ(tmp_path / "own", RUN_ONCE_SECRET_FILE=str(named))
    assert load_secret(environ) == b"f" * 20
    assert load_secret({**environ, "RUN_ONCE_SECRET": "e" * 20}) == b"e" * 20
    assert not (tmp_path / "own").exists()


def test_without_settings_it_is_in_the_users_config_folder() -> None:
    """Where platformdirs says."""
    assert secret_path({}).name == "secret"
    assert secret_path({}).parent.name == "run-once"


@pytest.mark.parametrize("text", ["short", "x" * 15, "   " + "x" * 15 + "   "])
def test_short_ones_are_refused_without_showing_them(tmp_path: Path, text: str) -> None:
    """At least 16 characters; the message says where it is from and how to make a good one."""
    with pytest.raises(ConfigError, match=r"RUN_ONCE_SECRET.*16.*token_hex") as caught:
        load_secret({"RUN_ONCE_SECRET": text})
    assert text.strip() not in str(caught.value)
    (tmp_path / "secret").write_text(text)
    (tmp_path / "secret").chmod(0o600)
    with pytest.raises(ConfigError, match=r"the file .*secret"):
        load_secret(_environ(tmp_path))


def test_a_missing_named_file_is_an_error(tmp_path: Path) -> None:
    """A file that the user named is not made by us: it would be another secret."""
    folder = tmp_path / "own"
    folder.mkdir()
    with pytest.raises(ConfigError, match="does not exist"):
        load_secret({"RUN_ONCE_SECRET_FILE": str(folder / "gone")})
    assert not list(folder.iterdir())


def test_an_unusable_folder_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    """It names the file and RUN_ONCE_SECRET."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/secret.*RUN_ONCE_SECRET"):
        load_secret(_environ(tmp_path / "file"))


def test_an_empty_file_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer may be at work; if not, the error names the file."""
    monkeypatch.setattr(secret_module, "_READ_PAUSE_S", 0.0)
    (tmp_path / "secret").touch(mode=0o600)
    with pytest.raises(ConfigError, match="0 characters"):
        load_secret(_environ(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_a_file_that_others_can_read_gives_a_warning(tmp_path: Path) -> None:
    """It says which command mends it; a private one says nothing."""
    load_secret(_environ(tmp_path))
    secret_module._load_file.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_secret(_environ(tmp_path))
    secret_module._load_file.cache_clear()
    (tmp_path / "secret").chmod(0o644)
    with pytest.warns(RunOnceWarning, match="chmod 600"):
        load_secret(_environ(tmp_path))


def test_it_is_never_shown() -> None:
    """Not by repr, str, format or in a container; as bytes it is whole, pickled too."""
    made = Secret(b"very secret text")
    for text in (repr(made), str(made), f"{made}", f"{made!r}", repr([made])):
        assert "very" not in text
    assert made == b"very secret text"
    assert pickle.loads(pickle.dumps(made)) == made
    assert isinstance(pickle.loads(pickle.dumps(made)), Secret)


def test_sharing_is_explained(tmp_path: Path) -> None:
    """By the file, or by the variable where that is in use."""
    assert str(tmp_path / "secret") in how_to_share(_environ(tmp_path))
    assert "same text everywhere" in how_to_share({"RUN_ONCE_SECRET": "x" * 16})


def test_getting_another_machines_secret_is_explained(tmp_path: Path) -> None:
    """It is shown there and set here, never the other way round."""
    told = how_to_get(_environ(tmp_path))
    assert "`run-once secret --show` there" in told
    assert f"here, or write it to {tmp_path / 'secret'}" in told
    assert "now it is another one" in how_to_get({"RUN_ONCE_SECRET": "x" * 16})


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:22113", True),
        ("127.8.0.1:1", True),
        ("[::1]:22113", True),
        ("localhost:22113", True),
        ("unix:/run/user/1/run-once.sock", True),
        ("lockhost:22113", False),
        ("10.0.0.7:22113", False),
        ("[fe80::1]:22113", False),
    ],
)
def test_addresses_of_this_machine(address: str, expected: bool) -> None:
    """Loopback and sockets are here."""
    assert is_here(address) is expected


def test_a_new_secret_beside_a_server_elsewhere_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, when it is made: what it signs cannot be loaded by other machines."""
    environ = _environ(tmp_path)
    load_secret({"RUN_ONCE_SECRET": "x" * 16}, address="lockhost:22113")
    assert caplog.text == ""
    load_secret(environ, address="lockhost:22113")
    assert "a new one is made" in caplog.text
    assert "lockhost:22113" in caplog.text
    caplog.clear()
    load_secret(environ, address="lockhost:22113")
    assert caplog.text == ""


def test_a_new_secret_beside_a_server_here_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nobody to share it with."""
    load_secret(_environ(tmp_path), address="127.0.0.1:22113")
    assert caplog.text == ""
