"""Options from arguments > environment > `.run_once.ini` of the project > of the home > default.

Every option has one name: it is an argument, an environment variable `RUN_ONCE_<NAME>` and a
line of the ini file. A value that cannot be used is a `ConfigError` that says where it stood.
"""

from __future__ import annotations

import configparser
import dataclasses
import getpass
import logging
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from run_once.access import OPEN, Access, let_in
from run_once.errors import ConfigError
from run_once.options import (
    CHECKS,
    ENV_PREFIX,
    MAX_OWNER_BYTES,
    NOT_SHOWN,
    OTHER_VARIABLES,
    BadValueError,
    did_you_mean,
    variable,
)
from run_once.warn import warn_user

INI_NAME: Final = ".run_once.ini"
SOURCE_ARGUMENT: Final = "argument"
SOURCE_DEFAULT: Final = "default"
SOURCE_LISTENING: Final = "a server that listens on this machine"
SOURCE_OWN: Final = "this machine's own server"

_MAX_SHOWN: Final = 300
_PROJECT_MARKS: Final = (".git", "pyproject.toml")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """What was configured, and where the address came from.

    What is said of each option here stands in docs/configuration.md, too; a test compares them.

    Attributes:
        address: `host:port`, `[ipv6]:port`, `unix:/path`, or `addrfile:///path` of a file that
            `distlock --address_file` wrote; None: nothing is configured, and `run_once.local` finds
            a server.
        source: Where `address` came from: "argument", "RUN_ONCE_ADDRESS", the path of an ini
            file, or "default".
        namespace: Separates equal keys of different projects.
        lease_s: Length of a lease that is kept alive.
        retry_s: For how long an unreachable server is tried before an error.
        owner: Label shown to people as the holder; None: user, host and process id.
        secret: Signs results; None: the user's own, made on first use.
        in_flight: Backend: "wait" for keys that others compute, or "skip" them.
        on_error: Backend: "raise" a call's error, "return" a `Failed` in its place, or "retry" it.
        duplicates: Backend: "number" equal calls of one `Parallel`, or compute them "once".
        inner: Backend: name of the joblib backend that does the work.
        results: Backend: where large values go, a folder or a URL; None: to the server.
        max_attempts: Do not try a key more often; 0: no limit.
        progress: Show progress.
        idle_exit_s: This machine's own server ends after so long without a request.
        data_dir: Folder for the databases of own servers; None: the user's data folder.
        runtime_dir: Folder for their sockets; None: the user's runtime folder.
        token: Shown to the server, whose tokens have roles; None: the address file's.
        tls_ca: Use TLS and trust this certificate, the server's or its CA's, PEM; `system`: the
            public CAs; None: the address file's.
        tls_cert: This client's certificate, PEM, for a server with `--tls_client_ca`; None: none.
        tls_key: Its private key, PEM; None: none.
        access: What the last four and the address file come to. No option.
    """

    address: str | None = None
    source: str = SOURCE_DEFAULT
    namespace: str = ""
    lease_s: float = 60.0
    retry_s: float = 120.0
    owner: str | None = None
    secret: str | None = field(default=None, repr=False)
    in_flight: str = "wait"
    on_error: str = "raise"
    duplicates: str = "number"
    inner: str = "loky"
    results: str | None = None
    max_attempts: int = 0
    progress: bool = False
    idle_exit_s: float = 3600.0
    data_dir: str | None = None
    runtime_dir: str | None = None
    token: str | None = field(default=None, repr=False)
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    access: Access = OPEN

    def resolved(self) -> Config:
        """Give the configuration with an address, so that all processes of a job use one server.

        Raises:
            ConfigError: Nothing is configured, and this machine's own server cannot be used.
        """
        if self.address is not None:
            return self
        from run_once import local  # noqa: PLC0415 (only needed where nothing is configured)

        found = local.find_server(self)
        return dataclasses.replace(self, address=found.address, source=found.source)


class _Given(NamedTuple):
    """A value as it was found, and where."""

    value: Any
    source: str


def load_config(
    *,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    home: Path | None = None,
    **overrides: Any,
) -> Config:
    """Gather the options.

    Args:
        environ: The environment; None: the process's.
        cwd: Where the search for the project's ini file starts; None: the working folder.
        home: The home folder; None: the user's.
        overrides: Options by name; None means not given.

    Returns:
        All options, checked.

    Raises:
        ConfigError: An option is unknown or has a value that cannot be used.
    """
    environ = os.environ if environ is None else environ
    unknown = sorted(set(overrides) - set(CHECKS))
    if unknown:
        raise ConfigError(f"no such option: {', '.join(unknown)}; options: {', '.join(CHECKS)}")
    given = {
        name: _Given(value, SOURCE_ARGUMENT)
        for name, value in overrides.items()
        if value is not None
    }
    for name in CHECKS:
        if environ.get(variable(name)):
            given.setdefault(name, _Given(environ[variable(name)], variable(name)))
    _warn_of_unknown_variables(environ)
    for path in _ini_paths(cwd or _working_folder(), home or _home_folder()):
        for name, value in _read_ini(path).items():
            given.setdefault(name, _Given(value, str(path)))
    parsed = {name: _parse(name, item) for name, item in given.items()}
    source = given["address"].source if "address" in given else SOURCE_DEFAULT
    return _with_access(dataclasses.replace(Config(), source=source, **parsed))


def _with_access(config: Config) -> Config:
    """Read the address file, and gather what opens the server."""
    address, access = let_in(
        config.address,
        token=config.token,
        tls_ca=config.tls_ca,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
    )
    if address == config.address:
        return dataclasses.replace(config, access=access)
    source = f"{config.address}, {config.source}"
    return dataclasses.replace(config, address=address, source=source, access=access)


def _warn_of_unknown_variables(environ: Mapping[str, str]) -> None:
    """Warn, once per process, of variables that look like options and are none."""
    known = [*map(variable, CHECKS), *OTHER_VARIABLES]
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in known or name in _WARNED_OF:
            continue
        if environ[name]:
            _WARNED_OF.add(name)
            warn_user(f"variable {name} is no option, and is ignored{did_you_mean(name, known)}")


_WARNED_OF: Final[set[str]] = set()


def default_owner() -> str:
    """Make the label that people see as a lease's holder: user, host and process id."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user id may have no name
        user = str(os.getuid())
    label = f"{user}@{socket.gethostname()}"
    return f"{label.encode()[: MAX_OWNER_BYTES - 20].decode('utf-8', 'ignore')}:{os.getpid()}"


def _parse(name: str, given: _Given) -> Any:
    """Check one value; the error names option, value and place."""
    try:
        return CHECKS[name](given.value)
    except BadValueError as error:
        shown = "(not shown)" if name in NOT_SHOWN else _cut(repr(given.value))
        raise ConfigError(
            f"option {name} has a value that cannot be used: {shown} (from {given.source}); {error}"
        ) from None


def _cut(text: str) -> str:
    """Cut a text that would fill the screen."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _working_folder() -> Path:
    """Give the working folder, or the root if it was deleted."""
    try:
        return Path.cwd()
    except OSError:
        return Path("/")


def _home_folder() -> Path:
    """Give the home folder; a user id without a name may have none."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def _ini_paths(cwd: Path, home: Path) -> Iterator[Path]:
    """Yield the ini files that exist, the nearest first, the home's last."""
    for folder in (cwd, *cwd.parents):
        if folder == home:
            break
        path = folder / INI_NAME
        if _is_there(path) and not _may_be_anybodys(folder, path):
            yield path
        if any((folder / mark).exists() for mark in _PROJECT_MARKS):
            break
    if _is_there(home / INI_NAME):
        yield home / INI_NAME


def _is_there(path: Path) -> bool:
    """Tell whether there is an ini file, or a folder in its place, which is an error."""
    return path.is_file() or path.is_dir()


def _may_be_anybodys(folder: Path, path: Path) -> bool:
    """Tell whether a stranger may have put the file there, as into /tmp."""
    is_open = bool(folder.stat().st_mode & stat.S_IWOTH)
    return is_open and path.stat().st_uid not in {0, os.getuid()}


def _read_ini(path: Path) -> dict[str, str]:
    """Read the options of one ini file; host and port of 2021 become one address."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with path.open(encoding="utf-8") as file:
            parser.read_file(file)
    except (OSError, configparser.Error, UnicodeDecodeError) as error:
        strerror = error.strerror if isinstance(error, OSError) else None
        reason = " ".join((strerror or str(error)).split())
        raise ConfigError(
            f"{path} cannot be read: {reason}; it should start with a line [DEFAULT], followed by "
            "lines such as: address = host:22113"
        ) from None
    lines = dict(parser.defaults())
    for section in parser.sections():
        lines.update(parser.items(section))
    port = lines.pop("port", "")
    if port and "address" not in lines:
        lines["address"] = "127.0.0.1"
    if port and not _has_port(lines["address"]):
        lines["address"] = _join(lines["address"], port)
    for name in sorted(set(lines) - set(CHECKS)):
        options = f"options: {', '.join(CHECKS)}{did_you_mean(name, CHECKS)}"
        logger.warning("%s: no such option: %s; %s", path, name, options)
    return {name: value for name, value in lines.items() if name in CHECKS and value}


def _has_port(address: str) -> bool:
    """Tell whether an address of an ini file already says its port, or needs none."""
    if address.startswith("unix:"):
        return True
    if address.startswith("["):
        return "]:" in address
    return address.count(":") == 1


def _join(host: str, port: str) -> str:
    """Join host and port as 2021's file gives them; a bare IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
