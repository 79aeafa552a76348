"""The embedded default: with nothing configured, find or start this machine's own server.

First a distlock that answers at 127.0.0.1:22113 is used, started by hand or forwarded by
`ssh -L`. Else a detached one for this user and machine: it listens on a unix socket in a folder
that only the user may enter, outlives the process that started it, and ends when nobody has
asked it anything for some time. Its database lies under the user's data folder and the
machine's id, since homes are shared between machines.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import platformdirs

from distlock_proto import legacy_pb2 as legacy
from distlock_proto import lock_table_pb2 as pb
from run_once.access import OPEN, Access, is_unix
from run_once.channel import NO_TLS, SERVICE, GrpcTransport, TransportError
from run_once.cluster import multi_node_reason
from run_once.config import SOURCE_LISTENING, SOURCE_OWN, Config
from run_once.errors import ConfigError
from run_once.options import DEFAULT_PORT

DEFAULT_ADDRESS: Final = f"127.0.0.1:{DEFAULT_PORT}"

_CONNECT_TIMEOUT_S: Final = 1.0
_PROBE_TIMEOUT_S: Final = 3.0
_LISTENING_TIMEOUT_S: Final = 10.0
_MAX_SOCKET_PATH_BYTES: Final = 100
_PRIVATE: Final = 0o700
_NOT_LET_IN: Final = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", NO_TLS})


class Endpoint(NamedTuple):
    """A server, and how it was found."""

    address: str
    source: str


class Places(NamedTuple):
    """Where a machine's own server has its things.

    Attributes:
        folder: Database, log and notes; of this user on this machine alone.
        socket: Where a server that is started from here listens.
    """

    folder: Path
    socket: Path

    @property
    def database(self) -> Path:
        """The folder of the database."""
        return self.folder / "db"

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.folder / "server.log"

    @property
    def note(self) -> Path:
        """Process id and socket of the server that was started last."""
        return self.folder / "server.json"

    @property
    def start_lock(self) -> Path:
        """Locked while somebody starts a server."""
        return self.folder / "start.lock"

    @property
    def last_source(self) -> Path:
        """Which server was used last."""
        return self.folder / "last_source"


def find_server(
    config: Config,
    *,
    environ: Mapping[str, str] | None = None,
    default_address: str = DEFAULT_ADDRESS,
) -> Endpoint:
    """Find or start the server to use if none is configured.

    Args:
        config: Says where folders are, if not in the usual places.
        environ: The environment; None: the process's.
        default_address: Where a server is looked for first.

    Returns:
        The server, which has answered.

    Raises:
        ConfigError: This is part of a job on several machines, or the server cannot be started, or
            another is in use beside the one that listens.
    """
    environ = os.environ if environ is None else environ
    if _is_server(default_address, config.access):
        found = Endpoint(default_address, SOURCE_LISTENING)
        own = places(config, environ)
        refuse_two_servers(own, default_address)
        _note_source(own, found)
        return found
    reason = multi_node_reason(environ)
    if reason is not None:
        raise ConfigError(_several_machines(reason))
    own = places(config, environ)
    found = Endpoint(_ensure_running(own, config), SOURCE_OWN)
    _note_source(own, found)
    return found


def refuse_two_servers(own: Places, listening: str) -> None:
    """Refuse to pass this machine's own server over while somebody works with it.

    Raises:
        ConfigError: It runs, and has leases that run.
    """
    from run_once import own_server  # noqa: PLC0415 (needs what only POSIX systems have)

    address = own_server.find_running(own)
    holder = own_server.holder_at(address) if address is not None else None
    if holder is not None:
        raise ConfigError(
            f"no lock server is configured, and two are in use: one listens at {listening}, and "
            f"with this machine's own at {address} {holder} is at work, so that the same work "
            f"might be done twice; set RUN_ONCE_ADDRESS={listening} or RUN_ONCE_ADDRESS={address} "
            "for all processes"
        )


def reviver(config: Config) -> Callable[[], None]:
    """Give what starts this machine's own server again after it ended in the midst of a run."""

    def revive() -> None:
        path = Path((config.address or "").removeprefix("unix:"))
        _make_private(path.parent, "runtime_dir")
        _ensure_running(places(config, os.environ)._replace(socket=path), config)

    return revive


def places(config: Config, environ: Mapping[str, str]) -> Places:
    """Find the folders, and make them.

    Raises:
        ConfigError: One cannot be made, or does not belong to this user alone.
    """
    data = Path(config.data_dir or platformdirs.user_data_dir("run-once", appauthor=False))
    folder = data / machine_id()
    _make_private(folder, "data_dir")
    name = f"{hashlib.sha256(bytes(folder)).hexdigest()[:16]}.sock"
    runtime = _runtime_folder(config, environ, len(name) + 1)
    _make_private(runtime, "runtime_dir")
    return Places(folder, runtime / name)


def machine_id() -> str:
    """Give an id of this machine that lasts and does not reveal the one it is made from."""
    source = ""
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        try:
            source = source or path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
    if len(source) < 32:  # noqa: PLR2004 (hexadecimal digits; images ship an empty or odd one)
        hardware = uuid.getnode()
        is_random = bool(hardware >> 40 & 1)
        source = socket.gethostname() if is_random else f"{hardware:012x}"
    return hashlib.sha256(f"run-once {source}".encode()).hexdigest()[:16]


def answers(address: str, access: Access = OPEN) -> bool:
    """Tell whether a distlock of version 1 or newer answers at an address."""
    return problem(address, access) is None


def problem(address: str, access: Access) -> str | None:
    """Tell what keeps a client from using a server; "": nothing answers, None: nothing does."""
    if not _is_listening(address):
        return ""
    failure = _failure(address, _PROBE_TIMEOUT_S, access)
    if failure is None:
        return None
    return failure.detail if failure.code in _NOT_LET_IN else ""


def announce(text: str, *, about: str | None = None) -> None:
    """Say something that a user must know to standard error, in one line, once per process.

    Args:
        text: The sentence.
        about: What is said once, where the sentence itself differs each time; None: the sentence.
    """
    about = about or text
    if about in _ANNOUNCED:
        return
    if len(_ANNOUNCED) >= _MAX_ANNOUNCED:
        _ANNOUNCED.clear()
    _ANNOUNCED.add(about)
    try:
        sys.stderr.write(f"run-once: {text}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # no standard error, or a closed one
        return


_ANNOUNCED: Final[set[str]] = set()
_MAX_ANNOUNCED: Final = 1_000


def _is_server(address: str, access: Access) -> bool:
    """Tell whether the server is to be used that listens where one is looked for first.

    Raises:
        ConfigError: It cannot be used, but passing it over might repeat all the work.
    """
    if not _is_listening(address):
        return False
    failure = _failure(address, _LISTENING_TIMEOUT_S, access)
    if failure is None:
        return True
    if failure.code == "DEADLINE_EXCEEDED":
        raise ConfigError(
            f"no lock server is configured, and what listens at {address} has not answered for "
            f"{_LISTENING_TIMEOUT_S:.0f} s; if it is a lock server, look after it, else set "
            "RUN_ONCE_ADDRESS"
        )
    if failure.code in _NOT_LET_IN:
        raise ConfigError(
            f"no lock server is configured, and the one that listens at {address} does not let "
            f"this client in: {failure.detail}; set RUN_ONCE_ADDRESS=addrfile:///path to the file "
            "that `distlock --address_file` writes"
        )
    is_old = failure.code == "UNIMPLEMENTED"
    if is_old and _failure(address, _PROBE_TIMEOUT_S, access, is_old=True) is None:
        raise ConfigError(
            f"the lock server at {address} is of 2021; run a newer `distlock` in its place, which "
            "opens its database and serves its clients too, or set RUN_ONCE_ADDRESS"
        )
    return False


def _failure(
    address: str, timeout_s: float, access: Access, *, is_old: bool = False
) -> TransportError | None:
    """Ask a server something; give the error it fails with, None if it answers."""
    service = legacy.DESCRIPTOR.services_by_name["LockManagerService"].full_name
    transport = GrpcTransport(address, service=service if is_old else SERVICE, access=access)
    try:
        if is_old:
            old_request = legacy.GetCurrentServerTimeRequest()
            reply_type = legacy.GetCurrentServerTimeResponse
            transport.call("GetCurrentServerTime", old_request, reply_type, timeout_s)
        else:
            request = pb.GetServerInfoRequest()
            transport.call("GetServerInfo", request, pb.GetServerInfoReply, timeout_s)
    except TransportError as error:
        return error
    finally:
        transport.close()
    return None


def _ensure_running(own: Places, config: Config) -> str:
    """Give the address of this machine's own server; start it if it does not run."""
    from run_once import own_server  # noqa: PLC0415 (needs what only POSIX systems have)

    running = own_server.find_running(own)
    if running is not None:
        return running
    address, is_new = own_server.start(own, idle_exit_s=config.idle_exit_s)
    if is_new:
        announce(
            f"started this machine's own lock server (database {own.database}); other machines do "
            "not see it: to share the work, run `distlock` and set RUN_ONCE_ADDRESS"
        )
    return address


def _note_source(own: Places, found: Endpoint) -> None:
    """Say it if another server is used than in the last run: keys done there are not done here."""
    name = found.address if found.source == SOURCE_LISTENING else found.source
    try:
        before = own.last_source.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        before = ""
    if before == name:
        return
    if before:
        announce(f"the lock server is {name} now; the last run used {before}, with its own keys")
    write_whole(own.last_source, name)


def write_whole(path: Path, text: str) -> None:
    """Replace a small file in one go."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(f"{text}\n", encoding="utf-8")
    part.replace(path)


def read_note(own: Places) -> dict[str, Any]:
    """Read what is known of the server that was started last; {} if nothing is."""
    try:
        note = json.loads(own.note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _is_listening(address: str) -> bool:
    """Tell whether anything accepts connections there; much quicker than to ask."""
    try:
        if is_unix(address):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_CONNECT_TIMEOUT_S)
                probe.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _runtime_folder(config: Config, environ: Mapping[str, str], name_bytes: int) -> Path:
    """Choose the folder of the socket, whose path must be short."""
    mine = f"run-once-{os.getuid()}"
    if config.runtime_dir:
        choices = [Path(config.runtime_dir)]
    else:
        choices = [Path(tempfile.gettempdir()) / mine, Path("/tmp") / mine]  # noqa: S108 (made private)
        session = environ.get("XDG_RUNTIME_DIR", "")
        if session and os.access(session, os.W_OK):
            choices.insert(0, Path(session) / "run-once")
    for choice in choices:
        if len(bytes(choice)) + name_bytes <= _MAX_SOCKET_PATH_BYTES:
            return choice
    raise ConfigError(
        f"the path of a unix socket in {choices[0]} would be too long for the system; set "
        "RUN_ONCE_RUNTIME_DIR to a folder with a shorter path"
    )


def _make_private(folder: Path, option: str) -> None:
    """Make a folder that only this user may enter, or check that it is one."""
    advice = f"set RUN_ONCE_{option.upper()} to a folder of your own"
    try:
        folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            if stat.S_IMODE(found.st_mode) & 0o077:
                folder.chmod(_PRIVATE)
            return
    except OSError as error:
        raise ConfigError(f"folder {folder} cannot be used: {error.strerror}; {advice}") from None
    raise ConfigError(f"folder {folder} belongs to another user; {advice}")


def _several_machines(reason: str) -> str:
    """Say what to run instead."""
    return (
        f"no lock server is configured, and this is {reason}: a server of its own on each machine "
        "would repeat all the work. Start one server where all of them reach it, its database on a "
        "disk of its own (not NFS), and name the file that it writes where all of them read it:\n"
        "    distlock --db=/var/tmp/distlock-db --host=0.0.0.0 --secure "
        '--address_file="$HOME/run-once.addr"\n'
        '    export RUN_ONCE_ADDRESS="addrfile://$HOME/run-once.addr"\n'
        "(or the line `address = addrfile://~/run-once.addr` in ~/.run_once.ini). For joblib's "
        "results set RUN_ONCE_SECRET to the same text on all of them, too."
    )
