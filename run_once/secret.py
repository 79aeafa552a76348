"""The secret that results are signed with; the server never has it.

Whoever can write to the server could otherwise put a pickle there that runs code in every process
that loads it. Each user has one secret, made on first use; machines that share results need the
same one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import stat
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import platformdirs

from run_once.errors import ConfigError, RunOnceWarning

MIN_SECRET_CHARS: Final = 16
"""Shorter secrets are refused."""

_FILE_NAME: Final = "secret"
_NEW_SECRET_BYTES: Final = 32
_READ_ATTEMPTS: Final = 40
_READ_PAUSE_S: Final = 0.05
_SHARE: Final = (
    "copy the file to the other machines, or set RUN_ONCE_SECRET to the same text on each of them"
)

logger = logging.getLogger(__name__)


class Secret(bytes):
    """The secret's bytes, which do not show in logs and tracebacks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<secret>"

    __str__ = __repr__


def secret_path(environ: Mapping[str, str] | None = None) -> Path:
    """Return the file that holds this user's secret.

    Args:
        environ: Environment variables; None is this process's. ``RUN_ONCE_SECRET_FILE`` names the
            file, ``RUN_ONCE_CONFIG_DIR`` its folder.

    Returns:
        Its path, whether it exists or not.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("RUN_ONCE_SECRET_FILE")
    if named:
        return Path(named).expanduser()
    folder = environ.get("RUN_ONCE_CONFIG_DIR")
    if folder:
        return Path(folder).expanduser() / _FILE_NAME
    return Path(platformdirs.user_config_dir("run-once", appauthor=False)) / _FILE_NAME


def load_secret(
    environ: Mapping[str, str] | None = None,
    *,
    configured: str | None = None,
    address: str | None = None,
) -> Secret:
    """Return the secret: ``RUN_ONCE_SECRET``, else the file's; made now if there is none yet.

    Args:
        environ: Environment variables; None is this process's.
        configured: The option `secret`, which comes before both; None: not given.
        address: The lock server. If it is on another machine, making a new secret is told: others
            cannot read what is signed with it.

    Returns:
        The secret, kept for the life of the process.

    Raises:
        ConfigError: It is too short, or its file cannot be read or made.
    """
    environ = os.environ if environ is None else environ
    if configured:
        return _checked(configured, "the option secret")
    text = environ.get("RUN_ONCE_SECRET")
    if text:
        return _checked(text, "RUN_ONCE_SECRET")
    path, is_named = secret_path(environ), bool(environ.get("RUN_ONCE_SECRET_FILE"))
    if address and not is_here(address) and not is_named and not path.exists():
        logger.warning(
            "this machine has no secret to sign results with, so a new one is made in %s. Machines "
            "that share the lock server %s can only load each other's results with the same "
            "secret: if one of them has it already, %s",
            path,
            address,
            how_to_get(environ),
        )
    return _load_file(path, is_named)


def is_here(address: str) -> bool:
    """Tell whether a server's address is on this machine (or forwarded to one of its ports)."""
    host = address.rpartition(":")[0].strip("[]")
    return address.startswith("unix:") or host in ("localhost", "::1") or host.startswith("127.")


def _checked(text: str, origin: str) -> Secret:
    text = text.strip()
    if len(text) < MIN_SECRET_CHARS:
        raise ConfigError(
            f"the secret of {origin} has {len(text)} characters: it needs at least "
            f"{MIN_SECRET_CHARS}. `python -c 'import secrets; print(secrets.token_hex(32))'` "
            "makes a good one"
        )
    return Secret(text.encode("utf-8", "surrogateescape"))


@functools.lru_cache(maxsize=8)
def _load_file(path: Path, is_named: bool) -> Secret:
    """Read the file once in a process; only the default one is made if it is missing."""
    try:
        text = _read(path)
        if text is None:
            if is_named:
                raise ConfigError(
                    f"RUN_ONCE_SECRET_FILE names {path}, which does not exist: copy the secret "
                    "there, or unset the variable to use this user's own"
                )
            _create(path)
            text = _read(path) or ""
    except OSError as error:
        raise ConfigError(
            f"cannot read or make the secret file {path}: {error.strerror or error}. Make it "
            "readable and writable for this user, or set RUN_ONCE_SECRET"
        ) from error
    return _checked(text, f"the file {path}")


def _read(path: Path) -> str | None:
    """Return the file's text; None if it is missing. Waits a little for its writer."""
    text = ""
    for _ in range(_READ_ATTEMPTS):
        try:
            with path.open("rb") as file:
                _warn_if_readable(path, os.fstat(file.fileno()).st_mode)
                text = file.read().decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            return None
        if text:
            return text
        time.sleep(_READ_PAUSE_S)  # only where there are no hard links: see _create
    return text


def _warn_if_readable(path: Path, mode: int) -> None:
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        warnings.warn(
            f"the secret file {path} can be read by other users, who can then forge results: "
            f"run `chmod 600 {path}`",
            RunOnceWarning,
            stacklevel=2,
        )


def _create(path: Path) -> None:
    """Make the file with a new secret, unless another process is faster.

    It appears whole: it is written under another name and then linked, which fails if the name is
    taken. Where there are no hard links it is written in place, and readers wait for its content.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = secrets.token_hex(_NEW_SECRET_BYTES).encode() + b"\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    _write_new(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:
        with contextlib.suppress(FileExistsError):
            _write_new(path, content)
    finally:
        temporary.unlink()
    logger.info("made a secret to sign results with at %s; to share results, %s", path, _SHARE)


def _write_new(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def how_to_get(environ: Mapping[str, str] | None = None) -> str:
    """Return what to do to load what another machine signed, as a clause.

    Args:
        environ: Environment variables; None is this process's.
    """
    environ = os.environ if environ is None else environ
    if environ.get("RUN_ONCE_SECRET"):
        where = "set RUN_ONCE_SECRET to that text here (now it is another one)"
    else:
        where = f"set RUN_ONCE_SECRET to that text here, or write it to {secret_path(environ)}"
    return f"run `run-once secret --show` there, and {where}"


def how_to_share(environ: Mapping[str, str] | None = None) -> str:
    """Return what to do to make two machines use one secret, as a clause.

    Args:
        environ: Environment variables; None is this process's.
    """
    environ = os.environ if environ is None else environ
    if environ.get("RUN_ONCE_SECRET"):
        return "set RUN_ONCE_SECRET to the same text everywhere (here it is set)"
    return f"this machine's secret is in {secret_path(environ)}: {_SHARE}"
