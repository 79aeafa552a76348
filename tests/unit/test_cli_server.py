"""The options of `distlock`, without starting a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from distlock_server import cli, security
from distlock_server.server import ServeError


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[cli.Options]:
    """Collect the options that the command would run with, instead of running and exiting."""
    seen: list[cli.Options] = []

    def run(options: cli.Options) -> int:
        seen.append(options)
        return 0

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(cli, "_exit", leave)
    monkeypatch.setattr(cli, "_configure_logging", lambda _level: None)
    return seen


def invoke(*arguments: str) -> Any:
    """Run the command."""
    return CliRunner().invoke(cli.main, arguments)


def test_defaults(parsed: list[cli.Options]) -> None:
    """With --db alone everything else is as documented."""
    assert invoke("--db=/tmp/testdb").exit_code == 0
    (options,) = parsed
    assert options.db == Path("/tmp/testdb")
    assert (options.host, options.port, options.cache_size) == ("127.0.0.1", None, 200)
    assert (options.engine, options.idle_exit_s, options.log_level) == ("auto", None, "info")
    assert cli.DEFAULT_PORT == 22113


@pytest.mark.parametrize(
    "arguments",
    [
        ("--db=/d", "--port=5", "--cache_size=7", "--unix_socket=/s", "--idle_exit_s=2"),
        (
            "--db",
            "/d",
            "--port",
            "5",
            "--cache_size",
            "7",
            "--unix_socket",
            "/s",
            "--idle_exit_s",
            "2",
        ),
        ("--db=/d", "--port=5", "--cache-size=7", "--unix-socket=/s", "--idle-exit-s=2"),
    ],
)
def test_spellings(parsed: list[cli.Options], arguments: tuple[str, ...]) -> None:
    """Options are taken as --x=y and --x y, with underscores and with hyphens."""
    assert invoke(*arguments).exit_code == 0
    (options,) = parsed
    assert (options.db, options.port, options.cache_size) == (Path("/d"), 5, 7)
    assert (options.unix_socket, options.idle_exit_s) == (Path("/s"), 2.0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "--db"),
        (("--db=/d", "--port=70000"), "port"),
        (("--db=/d", "--cache_size=0"), "cache_size"),
        (("--db=/d", "--engine=nope"), "engine"),
        (("--db=/d", "--idle_exit_s=0"), "idle_exit_s"),
        (("--db=/d", "--idle_exit_s=nan"), "idle_exit_s"),
        (("--db=/d", "--idle_exit_s=inf"), "idle_exit_s"),
        (("--db=/d", "--nope"), "--nope"),
    ],
)
def test_bad_options(parsed: list[cli.Options], arguments: tuple[str, ...], word: str) -> None:
    """A missing or wrong option is named, with a non-zero exit and no traceback."""
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert word in done.output
    assert parsed == []


def test_memory_needs_no_folder(parsed: list[cli.Options]) -> None:
    """--engine=memory works without --db."""
    assert invoke("--engine=memory").exit_code == 0
    assert parsed[0].db is None


def test_version_and_help(parsed: list[cli.Options]) -> None:
    """--version and --help answer and start nothing."""
    assert invoke("--version").output.startswith("distlock ")
    text = invoke("--help").output
    for option in ("--db", "--port", "--host", "--cache_size", "--engine", "--unix_socket"):
        assert option in text
    assert invoke("-h").output == text
    assert parsed == []


@pytest.mark.parametrize("option", ["pid_file", "port_file"])
def test_file_that_cannot_be_written(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], parsed: list[cli.Options]
) -> None:
    """A file that cannot be written is named with its option, and not the one written before it."""
    path = tmp_path / "missing" / "file"
    invoke("--engine=memory", f"--{option}={path}")
    with pytest.raises(ServeError) as raised, cli._Files(parsed[0], 5):
        pass
    said = str(raised.value)
    assert said.startswith(f"--{option}={path} cannot be written: No such file or directory; ")


def test_help_does_not_load_grpc() -> None:
    """The command's module, which --help needs, imports neither grpc nor protobuf."""
    script = (
        "import sys, distlock_server.cli; "
        "print([name for name in ('grpc', 'google.protobuf', 'plyvel') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, is_loopback: bool) -> None:
    """Only addresses of this machine alone count as loopback."""
    assert security.is_loopback(host) is is_loopback
