"""The `run-once` command: what it shows, what it resets, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from distlock_proto import lock_table_pb2 as pb
from run_once import DistributedIterator, cli, cluster, local, notify_failure
from tests.other_client import Other
from tests.servers import InprocServer


def run(*arguments: str, answer: str = "") -> Result:
    """Run the command; `answer` is typed at its question."""
    return CliRunner().invoke(cli.main, arguments, input=answer)


@pytest.fixture
def keys(other: Other) -> Other:
    """Make one key of each kind, and one in a namespace."""
    other.finish("done/1", "done/2", "\x1ens\x1fdone/3")
    other.claim("held", ttl_s=3600)
    for _ in range(2):
        for item in DistributedIterator(["failed"]):
            notify_failure(item, ValueError("broken input"))
    return other


def test_help_is_quick() -> None:
    """Help comes without loading gRPC, protobuf, numpy or joblib."""
    program = (
        "import sys; from run_once.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'grpc', 'google.protobuf', 'joblib', 'numpy', 'tqdm'} & set(sys.modules)))"
    )
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    took_s = time.perf_counter() - started_s
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "reset" in done.stdout
    assert took_s < 5, "on a busy machine; alone it takes well under 0.25 s"


def test_version() -> None:
    """`--version` gives the package's version."""
    result = run("--version")
    assert result.exit_code == 0
    assert re.search(r"\d+\.\d+", result.output)


def test_status(keys: Other, configured_server: InprocServer) -> None:
    """Status gives server, counts and who holds how much, of one namespace."""
    result = run("status")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0].startswith(f"server {configured_server.address}, version")
    for line in ("namespace (none)", "done 2", "held 1", "expired 0", "failed 1"):
        assert line in lines
    assert "worker other: 1 held" in lines
    assert "done 1" in " ".join(run("status", "--namespace", "ns").output.split())


def test_list(keys: Other) -> None:
    """List shows states, attempts and errors; filters, prefix, limit and namespace narrow it."""
    lines = run("list").output.splitlines()
    assert [line.split()[0] for line in lines] == ["STATE", "done", "done", "failed", "held"]
    failed = run("list", "--failed").output.splitlines()[1]
    assert re.match(r"failed .* 2 .*failed  \(ValueError: broken input\)$", failed)
    assert "other" in run("list", "--held").output
    assert len(run("list", "done/").output.splitlines()) == 3
    limited = run("list", "--limit=1")
    assert "more than 1" in limited.output
    assert run("list", "--namespace=ns").output.splitlines()[1].split()[-1] == "done/3"


def test_reset_named(keys: Other) -> None:
    """Named keys are reset after the question was answered; a missing one is said."""
    assert run("reset", "done/1", "held", answer="n\n").exit_code != 0
    assert keys.states("done/1", "held") == [pb.KEY_STATE_DONE, pb.KEY_STATE_BUSY]
    result = run("reset", "done/1", "held", "nothing", answer="y\n")
    assert "2 keys (1 done, 1 held; who works on held keys now works in vain)" in result.output
    assert result.output.count("no such key") == 1
    assert "no such key: nothing" in result.output
    assert result.exit_code == 1
    assert "reset 2" in result.output
    assert keys.states("done/1", "done/2", "held") == [
        pb.KEY_STATE_ABSENT,
        pb.KEY_STATE_DONE,
        pb.KEY_STATE_ABSENT,
    ]


def test_reset_of_a_missing_key(keys: Other) -> None:
    """A key that does not exist is said once, with a status of 1."""
    result = run("reset", "nothing", "--yes")
    assert result.exit_code == 1
    assert result.output == "no such key: nothing\n"
    assert run("reset", "done/1", "--yes").exit_code == 0


@pytest.mark.parametrize("key", ["a\nb", "it's\t\x1b[1m", "'quoted'"])
def test_reset_takes_what_list_shows(key: str, other: Other) -> None:
    """Every key can be reset by what `list` shows of it, also one with characters that do not."""
    other.finish(key)
    shown = run("list").output.splitlines()[1].split("  ", 3)[-1].strip()
    shown = shown[shown.index("other") + len("other") :].strip()
    result = run("reset", shown, "--yes")
    assert (result.exit_code, result.output) == (0, "reset 1\n")
    assert other.states(key) == [pb.KEY_STATE_ABSENT]


def test_filters_exclude_each_other(keys: Other) -> None:
    """`--failed --held` is refused: no key is both."""
    result = run("list", "--failed", "--held")
    assert result.exit_code == 2
    assert "--failed and --held" in result.output


@pytest.mark.parametrize("command", ["status", "list", "reset"])
def test_fresh_machine(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing configured and nothing there, commands say so and start no server."""
    monkeypatch.setattr(local, "DEFAULT_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "multi_node_reason", lambda _environ: None)
    monkeypatch.setattr(local, "_ensure_running", lambda *_: pytest.fail("a server was started"))
    result = run(command, *(["key"] if command == "reset" else []))
    assert result.exit_code == 1
    assert "no lock server is configured, none runs" in result.output
    assert "RUN_ONCE_ADDRESS" in result.output


def test_long_namespace(configured_server: InprocServer) -> None:
    """A namespace that is too long is said to be that."""
    result = run("status", f"--namespace={'n' * 2_000}")
    assert result.exit_code == 1
    assert "a namespace has at most 500 bytes" in result.output


def test_reset_failed_and_prefix(keys: Other) -> None:
    """`--failed` takes failed keys only, `--prefix` all that start so, both of one namespace."""
    assert "reset 1" in run("reset", "--failed", "--yes").output
    assert "no such key" in run("reset", "--failed", "--yes").output
    assert "reset 2" in run("reset", "--prefix=done/", "--yes").output
    assert keys.states("done/2", "\x1ens\x1fdone/3") == [pb.KEY_STATE_ABSENT, pb.KEY_STATE_DONE]
    assert "reset 1" in run("reset", "--prefix=", "--namespace=ns", "--yes").output


def test_reset_says_which() -> None:
    """Without keys, or with keys and a filter, reset refuses."""
    assert run("reset").exit_code == 2
    assert run("reset", "a", "--failed").exit_code == 2


def test_where_configured(configured_server: InprocServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configured server is named with its source, and whether it answers."""
    result = run("where")
    assert result.output.splitlines() == [
        configured_server.address,
        "  from: RUN_ONCE_ADDRESS",
        "  it answers",
    ]
    configured_server.server.stop()
    result = run("where", f"--address={configured_server.address}")
    assert result.exit_code == 1
    assert "from: argument" in result.output
    assert "it does not answer" in result.output


def test_where_unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing configured it says what a program would find, and starts nothing."""
    monkeypatch.setattr(local, "DEFAULT_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "multi_node_reason", lambda _environ: None)
    result = run("where")
    assert result.exit_code == 0, result.output
    assert "started by the first program that needs it" in result.output
    monkeypatch.setattr(cluster, "multi_node_reason", lambda _environ: "a job on 4 nodes")
    result = run("where")
    assert result.exit_code == 1
    assert "a job on 4 nodes" in result.output


def test_where_listening(configured_server: InprocServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that listens at the usual address comes before this machine's own."""
    monkeypatch.delenv("RUN_ONCE_ADDRESS")
    monkeypatch.setattr(local, "DEFAULT_ADDRESS", configured_server.address)
    result = run("where")
    assert result.output.splitlines()[0] == configured_server.address
    assert "a server listens there" in result.output


def test_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is shown and whether it is set; the secret itself only with --show."""
    path = tmp_path / "home" / "config" / "secret"
    assert f"{path} (made on first use)" in run("secret").output
    assert not path.exists()
    shown = run("secret", "--show").output.strip()
    assert path.read_text(encoding="ascii").strip() == shown
    hidden = run("secret").output
    assert f"{path} (set)" in hidden
    assert shown not in hidden
    monkeypatch.setenv("RUN_ONCE_SECRET", "a secret of some length")
    hidden = run("secret").output
    assert hidden.startswith("set by RUN_ONCE_SECRET")
    assert "of some length" not in hidden


def test_secret_of_an_ini_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What programs started here sign with is what is shown."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".run_once.ini").write_text("[run_once]\nsecret = another one of some length\n")
    (tmp_path / ".run_once.ini").chmod(0o600)
    assert run("secret", "--show").output == "another one of some length\n"
    hidden = run("secret").output
    assert hidden.startswith("set by the option `secret`")
    assert "of some length" not in hidden


def test_server_gone_is_one_sentence(
    configured_server: InprocServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is gone is one sentence and a status of 1, without a traceback."""
    monkeypatch.setenv("RUN_ONCE_RETRY_S", "0.2")
    configured_server.server.stop()
    result = run("status")
    assert result.exit_code == 1
    assert result.output.startswith("Error: lock server")
    assert isinstance(result.exception, SystemExit)
