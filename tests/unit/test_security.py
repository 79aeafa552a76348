"""What `distlock` makes of its options: refusals, keys, certificates, tokens, the address file."""

from __future__ import annotations

import json
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from distlock_server import security, tls
from distlock_server.security import SecurityError, Wanted, address_file, prepare
from tests.certificates import Authority

TOKEN = "t" * 16


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Give a token file."""
    path = tmp_path / "my-tokens"
    path.write_text(f"work {TOKEN}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """Give a certificate and key of the user's own CA."""
    certificate, key = Authority(tmp_path / "ca").issue("server")
    return {"tls_cert": certificate, "tls_key": key}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", None])
def test_loopback_needs_nothing(host: str | None) -> None:
    """On loopback, or on a unix socket alone, nothing is needed and nothing is checked."""
    assert prepare(Wanted(host)) == (None, None, None, True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "server"])
def test_beyond_loopback(host: str, tmp_path: Path) -> None:
    """Beyond loopback the server does not start, and shows the two lines that set it up."""
    with pytest.raises(SecurityError) as raised:
        prepare(Wanted(host, tmp_path / "my db"))
    first, command, export = str(raised.value).splitlines()
    assert first.startswith(f"{host} can be reached from other machines")
    assert "--insecure" in first
    assert command.strip() == (
        f"distlock --db='{tmp_path}/my db' --host={host} --secure --address_file=run-once.addr"
    )
    assert export.strip() == "export RUN_ONCE_ADDRESS=addrfile://run-once.addr"
    assert not (tmp_path / "my db.secure").exists()


def test_half_of_it_is_not_enough(token_file: Path, own: dict[str, Any], tmp_path: Path) -> None:
    """Beyond loopback neither TLS alone nor tokens alone are enough; together they are."""
    with pytest.raises(SecurityError, match="TLS and a token are needed"):
        prepare(Wanted("0.0.0.0", **own))
    with pytest.raises(SecurityError, match="must not travel in the clear"):
        prepare(Wanted("0.0.0.0", token_file=token_file))
    with pytest.raises(SecurityError, match="must not travel in the clear"):
        prepare(Wanted("0.0.0.0", token_file=token_file, insecure=True))
    assert prepare(Wanted("0.0.0.0", token_file=token_file, **own)).guard is not None
    client_ca = tmp_path / "ca" / "ca.pem"
    assert prepare(Wanted("0.0.0.0", tls_client_ca=client_ca, **own)).guard is not None


def test_insecure() -> None:
    """--insecure starts without anything, but old clients of other machines need --legacy=on."""
    made = prepare(Wanted("0.0.0.0", insecure=True))
    assert (made.tls, made.token, made.is_open) == (None, None, True)
    assert made.guard is not None
    assert prepare(Wanted("0.0.0.0", insecure=True, legacy="on")).guard is None
    assert prepare(Wanted("127.0.0.1", legacy="on")).guard is None
    assert prepare(Wanted("127.0.0.1", legacy="off")).guard is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tls_cert": Path("x")}, "go together"),
        ({"tls_key": Path("x")}, "go together"),
        ({"tls_client_ca": Path("x")}, "--tls_client_ca needs TLS"),
        ({"legacy_port": 5}, "--legacy_port is for a server with TLS"),
        ({"secure": True, "legacy_port": 5, "legacy": "off"}, "--legacy_port is for"),
        ({"host": "0.0.0.0", "secure": True, "legacy": "on"}, "add --insecure"),
        ({"secure": True}, "needs --secure_dir"),
        ({"token_file": Path("/nowhere/tokens")}, "/nowhere/tokens cannot be read"),
        ({"secure": True, "secure_dir": Path("/proc/nowhere")}, "--secure_dir"),
        ({"tls_cert": Path("/no/c"), "tls_key": Path("/no/k")}, "/no/k cannot be read"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    """What cannot be, or means nothing, is one sentence."""
    with pytest.raises(SecurityError, match=words):
        prepare(Wanted(**{"host": "127.0.0.1", **options}))


def test_made_once(tmp_path: Path) -> None:
    """--secure makes a key, a certificate and tokens, for this user alone, and keeps them."""
    wanted = Wanted("0.0.0.0", tmp_path / "db", secure=True)
    first = prepare(wanted)
    folder = tmp_path / "db.secure"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["cert.pem", "key.pem", "tokens"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert {stat.S_IMODE(path.stat().st_mode) for path in before} == {0o600}
    again = prepare(wanted)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert (again.tls, again.token) == (first.tls, first.token)
    other = prepare(Wanted("0.0.0.0", tmp_path / "other", secure=True))
    assert other.token != first.token
    assert prepare(wanted._replace(secure_dir=tmp_path / "mine")).token != first.token


def test_a_clients_certificate_does_not_stand_for_a_token(tmp_path: Path) -> None:
    """--secure beside --tls_client_ca makes and asks for tokens, too: they say the role."""
    tls.make(tmp_path / "ca.key", tmp_path / "ca.pem", ["ca"])
    made = prepare(
        Wanted("0.0.0.0", tmp_path / "db", secure=True, tls_client_ca=tmp_path / "ca.pem")
    )
    assert (tmp_path / "db.secure" / "tokens").exists()
    assert made.token is not None


def test_certificate_made_anew_for_the_same_key(tmp_path: Path) -> None:
    """Whoever deletes the certificate gets another one, with the same key and tokens."""
    wanted = Wanted("0.0.0.0", tmp_path / "db", secure=True)
    first = prepare(wanted)
    (tmp_path / "db.secure" / "cert.pem").unlink()
    again = prepare(wanted)
    assert first.tls is not None
    assert again.tls is not None
    assert again.tls.key == first.tls.key
    assert again.tls.certificate != first.tls.certificate
    assert again.token == first.token


def test_unusable_keys(tmp_path: Path, own: dict[str, Any]) -> None:
    """A certificate that has expired, of another key, or that is none, is named."""
    authority = Authority(tmp_path / "more")
    certificate, key = authority.issue("late", lasts_s=-60)
    with pytest.raises(SecurityError, match=r"late\.pem expired on \d{4}-\d\d-\d\d"):
        prepare(Wanted("127.0.0.1", tls_cert=certificate, tls_key=key))
    with pytest.raises(SecurityError, match="is not that of the certificate"):
        prepare(Wanted("127.0.0.1", tls_cert=own["tls_cert"], tls_key=key))
    with pytest.raises(SecurityError, match="holds no certificate"):
        prepare(Wanted("127.0.0.1", tls_cert=key, tls_key=key))
    with pytest.raises(SecurityError, match="holds no private key"):
        prepare(Wanted("127.0.0.1", tls_cert=own["tls_cert"], tls_key=certificate))


def test_a_certificate_that_ends_soon_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever starts the server has a month to get another one."""
    authority = Authority(tmp_path / "more")
    for days, is_warned in ((29, True), (31, False)):
        caplog.clear()
        certificate, key = authority.issue("short", lasts_s=days * 86_400)
        prepare(Wanted("127.0.0.1", tls_cert=certificate, tls_key=key))
        assert ("short.pem expires on" in caplog.text) == is_warned


def test_address_file_of_a_made_certificate(tmp_path: Path) -> None:
    """The file has address, certificate, the name to check and the admin's token; no key."""
    wanted = Wanted("0.0.0.0", tmp_path / "db", secure=True, public_host="lock.example.org")
    made = prepare(wanted)
    text = address_file(made, wanted, 4711, None)
    content = json.loads(text)
    assert content["address"] == "lock.example.org:4711"
    assert content["tls"] is True
    assert content["ca"] == (tmp_path / "db.secure" / "cert.pem").read_text()
    assert content["tls_name"] == tls.TLS_NAME
    tokens = (tmp_path / "db.secure" / "tokens").read_text()
    assert f"admin {content['token']}\n" in tokens
    assert b"PRIVATE" not in text
    assert set(content) == {"format", "address", "tls", "ca", "tls_name", "token"}


def test_role_of_the_address_file(tmp_path: Path, token_file: Path) -> None:
    """--address_role chooses the token; without it the highest role that there is counts."""
    wanted = Wanted("0.0.0.0", tmp_path / "db", secure=True, address_role="read")
    assert f"read {prepare(wanted).token}\n" in (tmp_path / "db.secure" / "tokens").read_text()
    assert prepare(Wanted("127.0.0.1", token_file=token_file)).token == TOKEN
    with pytest.raises(SecurityError, match="no token of this role"):
        prepare(Wanted("127.0.0.1", token_file=token_file, address_role="admin"))


def test_address_file_of_other_servers(tmp_path: Path, own: dict[str, Any]) -> None:
    """A CA is named if it is known here; a loopback or unix address has only what it needs."""
    assert json.loads(address_file(prepare(Wanted(None)), Wanted(None), 0, Path("/run/x"))) == {
        "format": security.ADDRESS_FORMAT,
        "address": "unix:/run/x",
    }
    wanted = Wanted("::1")
    assert json.loads(address_file(prepare(wanted), wanted, 5, None))["address"] == "[::1]:5"
    ca = tmp_path / "ca" / "ca.pem"
    for client_ca, expected in ((ca, ca.read_text()), (None, None)):
        wanted = Wanted("127.0.0.1", tls_client_ca=client_ca, **own)
        content = json.loads(address_file(prepare(wanted), wanted, 5, None))
        assert content.get("ca") == expected
        assert content["tls"] is True
        assert "tls_name" not in content


def test_made_certificate_suits_openssl(tmp_path: Path) -> None:
    """Another TLS library than gRPC's loads the certificate as one to trust."""
    prepare(Wanted("0.0.0.0", tmp_path / "db", secure=True))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tmp_path / "db.secure" / "cert.pem")
    assert len(context.get_ca_certs()) + context.cert_store_stats()["x509"] >= 1


def test_reprs_show_nothing(tmp_path: Path) -> None:
    """Neither key nor token is in a repr."""
    made = prepare(Wanted("0.0.0.0", tmp_path / "db", secure=True))
    shown = f"{made!r} {made.tls!r} {made.guard!r} {made}"
    assert "PRIVATE" not in shown
    assert made.token is not None
    assert made.token not in shown


def test_files_open_to_others_are_warned_about(
    token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A token file that others can read is one warning."""
    prepare(Wanted("127.0.0.1", token_file=token_file))
    assert caplog.text == ""
    token_file.chmod(0o644)
    prepare(Wanted("127.0.0.1", token_file=token_file))
    assert caplog.text.count("chmod 600") == 1


def test_key_of_another_kind(tmp_path: Path) -> None:
    """A key in the folder that was not made by --secure is named, not taken for one."""
    folder = tmp_path / "db.secure"
    folder.mkdir(mode=0o700)
    key = ed25519.Ed25519PrivateKey.generate()
    form = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    with pytest.raises(SecurityError, match="none that was made here"):
        prepare(Wanted("0.0.0.0", tmp_path / "db", secure=True))


def test_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no hard links, keys and tokens are made all the same, and kept."""

    def no_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_link)
    wanted = Wanted("0.0.0.0", tmp_path / "db", secure=True)
    first = prepare(wanted)
    assert prepare(wanted).tls == first.tls
    tls.write_private(tmp_path / "db.secure" / "cert.pem", b"other", keep=True)
    assert prepare(wanted).tls == first.tls


def test_write_private(tmp_path: Path) -> None:
    """A file is replaced whole, is private from the start, and leaves nothing behind."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o644)
    tls.write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tls.write_private(path, b"newer", keep=True)
    assert path.read_bytes() == b"new"
    assert not list(tmp_path.glob(".*"))
