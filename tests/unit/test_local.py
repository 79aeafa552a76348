"""The embedded default: where it puts things, when it refuses, what it says."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from run_once import local, own_server
from run_once.cluster import multi_node_reason
from run_once.config import SOURCE_LISTENING, SOURCE_OWN, Config
from run_once.errors import ConfigError
from run_once.local import Endpoint, Places, find_server, places

NOWHERE = "127.0.0.1:9"
"""An address at which nothing listens."""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Give a configuration with folders of its own and no address."""
    return Config(data_dir=str(tmp_path / "data"), runtime_dir=os.environ["RUN_ONCE_RUNTIME_DIR"])


@pytest.fixture(autouse=True)
def _nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_ANNOUNCED", set())


@pytest.fixture
def silent_listener() -> Iterator[str]:
    """Give the address of something that accepts connections and closes them unanswered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "8"}, None),
        ({"SLURM_JOB_NUM_NODES": "4"}, "a Slurm job on 4 nodes"),
        ({"SLURM_NNODES": "2"}, "a Slurm job on 2 nodes"),
        ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_COUNT": "10"}, "a Slurm job array"),
        ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1"}, None),
        ({"SLURM_ARRAY_JOB_ID": "7"}, "a Slurm job array"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            "an indexed Kubernetes job",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        (
            {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            "an MPI job on several nodes",
        ),
        ({"PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, "an MPI job on several nodes"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, None),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "a torchrun job on several nodes"),
        ({"PBS_ARRAY_INDEX": "3"}, "a PBS job array"),
        ({"SGE_TASK_ID": "undefined", "NHOSTS": "1"}, None),
        ({"SGE_TASK_ID": "3"}, "a Grid Engine job on several nodes or an array"),
        ({"LSB_JOBINDEX": "0", "LSB_HOSTS": "a a"}, None),
        ({"LSB_HOSTS": "a b"}, "an LSF job on several nodes or an array"),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "0"}, "an AWS Batch job on several nodes or an array"),
        ({"CLOUD_RUN_TASK_COUNT": "3"}, "a Cloud Run job of several tasks"),
        ({"SLURM_JOB_NUM_NODES": "many"}, None),
    ],
)
def test_multi_node(environ: dict[str, str], reason: str | None) -> None:
    """Jobs on several machines are recognised, wide ones on a single machine are not."""
    assert multi_node_reason(environ) == reason


def test_refusal_shows_what_to_run(config: Config) -> None:
    """Inside of such a job nothing is started, and the error shows the commands to run."""
    with pytest.raises(ConfigError) as raised:
        find_server(config, environ={"SLURM_JOB_NUM_NODES": "4"}, default_address=NOWHERE)
    message = str(raised.value)
    assert "a Slurm job on 4 nodes" in message
    assert "distlock --db=" in message
    assert "--host=" in message
    assert "export RUN_ONCE_ADDRESS=" in message
    assert config.data_dir is not None
    assert not Path(config.data_dir).exists()


def test_places(config: Config, tmp_path: Path) -> None:
    """Database and socket lie in folders of this user alone, by machine, under short paths."""
    found = places(config, {})
    assert found.folder == tmp_path / "data" / local.machine_id()
    assert found.database.parent == found.folder
    assert stat.S_IMODE(found.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(found.socket.parent.stat().st_mode) == 0o700
    assert len(bytes(found.socket)) <= 100
    assert places(config, {}) == found


def test_two_databases_have_two_sockets(config: Config, tmp_path: Path) -> None:
    """Servers of different data folders do not meet on one socket."""
    other = Config(data_dir=str(tmp_path / "other"), runtime_dir=config.runtime_dir)
    assert places(config, {}).socket != places(other, {}).socket


def test_too_open_folder_is_closed(config: Config) -> None:
    """A folder that others may enter is closed to them."""
    assert config.runtime_dir is not None
    Path(config.runtime_dir).chmod(0o755)
    places(config, {})
    assert stat.S_IMODE(Path(config.runtime_dir).stat().st_mode) == 0o700


def test_foreign_folder_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that another user made is not used."""
    places(config, {})
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user; set RUN_ONCE_DATA_DIR"):
        places(config, {})


def test_link_is_refused(tmp_path: Path) -> None:
    """A link where the socket's folder should be, laid by anybody in /tmp, is not followed."""
    (tmp_path / "target").mkdir()
    link = tmp_path / "r"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match=r"RUN_ONCE_RUNTIME_DIR|too long"):
        places(Config(data_dir=str(tmp_path / "data"), runtime_dir=str(link)), {})


def test_unusable_folder(tmp_path: Path) -> None:
    """A folder that cannot be made is an error that names it and the option."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be used.*RUN_ONCE_DATA_DIR"):
        places(Config(data_dir=str(tmp_path / "file")), {})


def test_long_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which a socket's path would be too long is refused, or passed over if found."""
    monkeypatch.setattr(tempfile, "tempdir", os.environ["RUN_ONCE_RUNTIME_DIR"])
    long = tmp_path / ("x" * 100)
    config = Config(data_dir=str(tmp_path / "data"), runtime_dir=str(long))
    with pytest.raises(ConfigError, match="RUN_ONCE_RUNTIME_DIR"):
        places(config, {})
    long.mkdir()
    found = places(Config(data_dir=str(tmp_path / "data")), {"XDG_RUNTIME_DIR": str(long)})
    assert found.socket.parent.name == f"run-once-{os.getuid()}"


def test_runtime_folder_of_the_session(tmp_path: Path) -> None:
    """The session's runtime folder is used where there is one."""
    runtime = os.environ["RUN_ONCE_RUNTIME_DIR"]
    found = places(Config(data_dir=str(tmp_path / "data")), {"XDG_RUNTIME_DIR": runtime})
    assert found.socket.parent == Path(runtime) / "run-once"


def test_machine_id() -> None:
    """The id of a machine lasts, and is not the one that the system keeps secret."""
    assert local.machine_id() == local.machine_id()
    assert len(local.machine_id()) == 16
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        if path.exists():
            assert local.machine_id() not in path.read_text(encoding="ascii")


def test_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence goes to standard error once per process, in one line."""
    local.announce("something")
    local.announce("something")
    assert capsys.readouterr().err == "run-once: something\n"


def test_change_of_server_is_said(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """If the server found differs from the last run's, one line says so; else nothing does."""
    own = places(config, {})
    listening = Endpoint("127.0.0.1:22113", SOURCE_LISTENING)
    mine = Endpoint(f"unix:{own.socket}", SOURCE_OWN)
    local._note_source(own, mine)
    local._note_source(own, mine)
    assert capsys.readouterr().err == ""
    local._note_source(own, listening)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "127.0.0.1:22113" in said
    assert SOURCE_OWN in said
    local._note_source(own, mine)
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_answers(silent_listener: str) -> None:
    """Neither a port where nothing listens nor a missing socket is a server."""
    assert not local.answers(NOWHERE)
    assert not local.answers("unix:/nowhere/at/all.sock")


def test_what_hangs_is_not_passed_over(
    silent_listener: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What listens and does not answer may be a busy server: passing it over is not ours to do."""
    monkeypatch.setattr(local, "_LISTENING_TIMEOUT_S", 0.3)
    with pytest.raises(ConfigError, match="has not answered"):
        find_server(config, environ={}, default_address=silent_listener)


def test_server_that_does_not_start(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ends at once is an error that quotes its log and says what to do."""
    own = places(config, {})
    own.database.write_text("no folder", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"did not start: .*RUN_ONCE_ADDRESS"):
        own_server.start(own, idle_exit_s=5)


def test_start_lock_is_bounded(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never ends starting a server does not hold up others for ever."""
    own = places(config, {})
    monkeypatch.setattr(own_server, "_LOCK_WAIT_S", 0.1)
    with (
        own_server._locked(own),
        pytest.raises(ConfigError, match="is locked"),
        own_server._locked(own),
    ):
        pass


def test_damaged_note(tmp_path: Path) -> None:
    """A note that cannot be read is as good as none."""
    own = Places(tmp_path, tmp_path / "s")
    assert local.read_note(own) == {}
    for text in ["", "[]", "{"]:
        own.note.write_text(text, encoding="utf-8")
        assert local.read_note(own) == {}
