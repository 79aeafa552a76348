"""Address files, and the options that open a server."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from distlock_server.security import ADDRESS_FORMAT as WRITTEN
from distlock_server.security import Wanted, address_file, prepare
from run_once import access
from run_once.access import OPEN, Access, read_address_file
from run_once.config import Config, load_config
from run_once.errors import ConfigError, RunOnceWarning
from tests.certificates import Authority

TOKEN = "t0ken-of-some-length"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give an address file as the server writes it."""
    wanted = Wanted("0.0.0.0", tmp_path / "db", secure=True, public_host="lock")
    path = tmp_path / "address"
    path.touch(0o600)
    path.write_bytes(address_file(prepare(wanted), wanted, 4711, None))
    return path


def changed(path: Path, **changes: Any) -> Path:
    """Change what an address file says."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))
    return path


def load(tmp_path: Path, environ: dict[str, str] | None = None, **options: Any) -> Config:
    """Load a configuration that only these variables and options are in."""
    return load_config(environ=environ or {}, cwd=tmp_path, home=tmp_path, **options)


def test_what_the_server_writes_is_read(file: Path, tmp_path: Path) -> None:
    """Address, certificate, name and token are read; both sides name one format."""
    assert access.ADDRESS_FORMAT == WRITTEN
    address, found = read_address_file(file)
    assert address == "lock:4711"
    assert found.tls
    assert found.ca == (tmp_path / "db.secure" / "cert.pem").read_bytes()
    assert found.name == "distlock.internal"
    assert f"admin {found.token}\n" in (tmp_path / "db.secure" / "tokens").read_text()


@pytest.mark.parametrize("spelling", ["addrfile://{}", "addrfile://~/address", " addrfile://{} "])
@pytest.mark.parametrize("way", ["argument", "variable", "ini"])
def test_ways_to_name_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str, way: str
) -> None:
    """An address file is named as any other address; the source says which file it was."""
    monkeypatch.setenv("HOME", str(tmp_path))
    name = spelling.format(file)
    if way == "ini":
        (tmp_path / ".run_once.ini").write_text(f"[DEFAULT]\naddress = {name}\n")
    config = {
        "argument": lambda: load(tmp_path, address=name),
        "variable": lambda: load(tmp_path, {"RUN_ONCE_ADDRESS": name}),
        "ini": lambda: load(tmp_path),
    }[way]()
    assert config.address == "lock:4711"
    assert config.access == read_address_file(file)[1]
    assert config.source.startswith(f"addrfile://{file}, ")


def test_relative_path(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is one from the working folder."""
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path, address="addrfile://address").address == "lock:4711"


def test_missing_and_unreadable(tmp_path: Path) -> None:
    """A file that is not there, or a folder in its place, is named with what to do."""
    for name, words in (("nothing", "No such file"), ("", "Is a directory")):
        with pytest.raises(ConfigError, match=words) as raised:
            load(tmp_path, address=f"addrfile://{tmp_path / name}")
        assert "`distlock --address_file` wrote" in str(raised.value)
    with pytest.raises(ConfigError, match="path of an address file is missing"):
        load(tmp_path, address="addrfile://")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "run-once-address-2"},
        {"format": None},
        {"address": ""},
        {"address": 5},
        {"address": "http://lock"},
        {"address": "addrfile:///other"},
        {"ca": "no certificate"},
        {"ca": ["x"]},
        {"token": 7},
        {"token": "tökenwithumlauts"},
        {"tls_name": {}},
    ],
)
def test_malformed(file: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """What is no address file is one sentence, which shows nothing of its content."""
    token = json.loads(file.read_text())["token"]
    changed(file, **changes)
    with pytest.raises(ConfigError, match="no address file, or a damaged one") as raised:
        load(tmp_path, address=f"addrfile://{file}")
    assert token not in str(raised.value)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("content", [b"", b"lock:22113", b"[]", b"{", b"\xff\xfe", b"null"])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    """So is any other file, a cut off one included."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no address file, or a damaged one"):
        load(tmp_path, address=f"addrfile://{path}")


def test_open_to_others(file: Path, tmp_path: Path) -> None:
    """A file with a token that others can read is a warning; without a token it is none."""
    file.chmod(0o640)
    with pytest.warns(RunOnceWarning, match="chmod 600"):
        load(tmp_path, address=f"addrfile://{file}")
    changed(file, token="")
    load(tmp_path, address=f"addrfile://{file}")


def test_options_come_first(file: Path, tmp_path: Path) -> None:
    """The options token and tls_ca replace what the file says, the name of its certificate too."""
    authority = Authority(tmp_path / "ca")
    config = load(
        tmp_path,
        {"RUN_ONCE_ADDRESS": f"addrfile://{file}", "RUN_ONCE_TOKEN": TOKEN},
        tls_ca=authority.file,
    )
    assert config.access == Access(tls=True, ca=authority.file.read_bytes(), token=TOKEN)


def test_options_alone(tmp_path: Path) -> None:
    """Without a file the options are all; `system` trusts what comes with gRPC."""
    certificate, key = Authority(tmp_path / "ca").issue("client")
    config = load(
        tmp_path,
        {"RUN_ONCE_TLS_CERT": str(certificate), "RUN_ONCE_TLS_KEY": str(key)},
        address="lock:1",
        tls_ca="system",
        token=TOKEN,
    )
    assert config.access == Access(
        tls=True, cert_file=str(certificate), key_file=str(key), token=TOKEN
    )
    assert load(tmp_path, address="lock:1").access == OPEN


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tls_cert": "/x"}, "set both or neither"),
        ({"tls_key": "/x"}, "set both or neither"),
        ({"tls_ca": "/nowhere/ca"}, "/nowhere/ca cannot be read"),
        ({"tls_ca": __file__}, "holds no certificate"),
        ({"token": "with blank"}, r"\(not shown\)"),
        ({"token": "tökentökentöken"}, r"\(not shown\)"),
    ],
)
def test_unusable_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """What cannot be used is named, a token without its value."""
    with pytest.raises(ConfigError, match=words) as raised:
        load(tmp_path, address="lock:1", **options)
    assert options.get("token", "\0") not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "is_refused"),
    [
        ("lock:22113", True),
        ("192.0.2.7:22113", True),
        ("127.example.com:22113", True),
        ("localhost:22113", False),
        ("[::1]:22113", False),
        ("unix:/run/x", False),
        (None, False),
    ],
)
def test_no_token_in_the_clear(tmp_path: Path, address: str | None, is_refused: bool) -> None:
    """Without TLS a token is not sent to another machine."""
    if not is_refused:
        assert load(tmp_path, address=address, token=TOKEN).access.token == TOKEN
        return
    with pytest.raises(ConfigError, match="travel in the clear") as raised:
        load(tmp_path, address=address, token=TOKEN)
    assert TOKEN not in str(raised.value)


def test_token_is_not_shown(file: Path, tmp_path: Path) -> None:
    """No repr has the token; a configuration still travels to workers with it."""
    token = read_address_file(file)[1].token
    config = load(tmp_path, address=f"addrfile://{file}", token=TOKEN)
    assert TOKEN not in repr(config)
    assert token not in repr(load(tmp_path, address=f"addrfile://{file}"))
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) != hash(dataclasses.replace(config, access=OPEN))
