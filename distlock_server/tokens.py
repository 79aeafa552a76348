"""Tokens and their roles, from a file that is read again when it changes.

A token is in no log, error or repr.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

logger = logging.getLogger(__name__)

MIN_TOKEN_CHARS: Final = 16
"""Shorter tokens are refused: they could be guessed."""

LOOK_EVERY_S: Final = 1.0
"""How often the token file is looked at, at most."""


class Role(enum.IntEnum):
    """What the holder of a token may do; each role may do what those below it may."""

    READ = 1
    WORK = 2
    ADMIN = 3

    @property
    def label(self) -> str:
        """Its name in a token file."""
        return self.name.lower()


class TokenFileError(Exception):
    """A token file cannot be used; the message says why, and shows no token."""


class Token(NamedTuple):
    """One line of a token file."""

    role: Role
    text: str

    def __repr__(self) -> str:
        return f"<token of role {self.role.label}>"


def read_tokens(path: Path) -> list[Token]:
    """Read a file with one `role token` a line; empty lines and those that start with # are none.

    Raises:
        TokenFileError: It cannot be read, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise TokenFileError(f"token file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TokenFileError(f"token file {path} is no ASCII text") from None
    tokens = [
        _parse_line(line, f"token file {path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not tokens:
        raise TokenFileError(f"token file {path} has no token: write one `role token` a line")
    if len({token.text for token in tokens}) < len(tokens):
        raise TokenFileError(f"token file {path} has a token twice: each has one role")
    return tokens


def _parse_line(line: str, where: str) -> Token:
    words = line.split()
    roles = {role.label: role for role in Role}
    if len(words) != 2 or words[0] not in roles:  # noqa: PLR2004 (a role and a token)
        raise TokenFileError(
            f"{where}: write a role (read, work or admin), a blank and a token without blanks"
        )
    if len(words[1]) < MIN_TOKEN_CHARS or not words[1].isprintable():
        raise TokenFileError(
            f"{where}: the token has {len(words[1])} characters, it needs {MIN_TOKEN_CHARS} or more"
        )
    return Token(roles[words[0]], words[1])


class Tokens:
    """The tokens of a file; read again within a second when it changes.

    A file that cannot be used any more changes nothing, and is logged.
    """

    def __init__(self, path: Path, now_s: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            TokenFileError: It cannot be used.
        """
        self._path = path
        self._now_s = now_s
        self._looked_s = now_s()
        self._stamp = _stamp(path)
        self._roles = _hashed(read_tokens(path))

    def role_of(self, token: str) -> Role | None:
        """Give the role of a token; None: it is unknown. Takes as long for any of one length."""
        if self._now_s() - self._looked_s >= LOOK_EVERY_S:
            self._look()
        wanted, found = _digest(token), None
        for digest, role in self._roles:
            if hmac.compare_digest(digest, wanted):
                found = role
        return found

    def _look(self) -> None:
        self._looked_s = self._now_s()
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._roles = _hashed(read_tokens(self._path))
        except TokenFileError as error:
            logger.error("%s; the tokens read before stay valid", error)  # noqa: TRY400 (foreseen)
        else:
            logger.info("read the changed token file %s", self._path)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _hashed(tokens: Sequence[Token]) -> list[tuple[bytes, Role]]:
    return [(_digest(token.text), token.role) for token in tokens]
