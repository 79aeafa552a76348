"""Kinds of options of the `distlock` command, and those on who is let in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def option(name: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    """Make an option that may be spelled with underscores, as in 2021, or with hyphens."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    return click.option(*names, name, show_default=True, **settings)


class _NamedPath(click.Path):
    """A path that is not empty: `--db=$UNSET` must not fill the working folder."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Convert a value, or refuse it."""
        if not value:
            self.fail("it is empty: name a path ('.' is the working folder)", param, ctx)
        return super().convert(value, param, ctx)


PATH: Final = _NamedPath(path_type=Path)


class Seconds(click.FloatRange):
    """A length of time above 0, and no endless one."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Convert a value, or refuse it."""
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


_SECURITY: Final[tuple[Callable[..., Any], ...]] = (
    option(
        "secure",
        is_flag=True,
        help="TLS and tokens: key, certificate and tokens are made at the first start, then kept.",
    ),
    option("secure_dir", type=PATH, help="Their folder.  [default: <db>.secure]"),
    option(
        "address_file",
        type=PATH,
        help="Write address, certificate and token to this file, for RUN_ONCE_ADDRESS=addrfile://FILE.",
    ),
    option(
        "address_role",
        type=click.Choice(["read", "work", "admin"]),
        help="Role of the token in that file.  [default: the highest there is]",
    ),
    option(
        "public_host",
        help="How other machines reach this one, for that file.  [default: --host, or this "
        "machine's name]",
    ),
    option("insecure", is_flag=True, help="Beyond loopback do without TLS and tokens."),
    option("tls_cert", type=PATH, help="Certificate of the server, PEM, instead of one made here."),
    option("tls_key", type=PATH, help="Its private key, PEM."),
    option(
        "tls_client_ca", type=PATH, help="Answer only clients with a certificate of this CA, PEM."
    ),
    option(
        "token_file",
        type=PATH,
        help="Tokens: one `role token` a line, role read, work or admin; read again if it changes.",
    ),
    option(
        "legacy",
        type=click.Choice(["loopback", "on", "off"]),
        help="Whom of the clients of 0.4.2 to answer, which have neither TLS nor tokens.  "
        "[default: loopback; off with tokens and no TLS]",
    ),
    option(
        "legacy_port",
        type=click.IntRange(0, 65_535),
        help="With TLS: answer clients of 0.4.2 on this port of 127.0.0.1, in the clear.",
    ),
)


def security_options(command: Decorated) -> Decorated:
    """Add the options on TLS, tokens and clients of 2021."""
    for add in reversed(_SECURITY):
        command = add(command)
    return command
