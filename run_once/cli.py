"""The `run-once` command: look at the keys of a lock server, and have keys done again.

What needs a server is imported by the command that asks it: `--help` answers at once.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from run_once.errors import ConfigError, RunOnceError

if TYPE_CHECKING:
    from distlock_proto import lock_table_pb2 as pb
    from run_once.config import Config
    from run_once.task import Session

MAX_WORKER_KEYS: Final = 100_000
"""`status` reads so many held keys at most."""

_RETRY_S: Final = 5.0
"""A server that does not answer is tried for so long, unless the option retry_s says otherwise."""

_RESET_STEP: Final = 10_000
_AFTER_ALL_UTF8: Final = b"\xff"
_NS_PER_S: Final = 1_000_000_000

Only = Literal["all", "held", "failed"]


class _Group(click.Group):
    """A group whose commands end with one sentence when something is wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RunOnceError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="run-once")
def main() -> None:
    """Look at the work that loops, functions and joblib share through a lock server."""


def _server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that asks a server."""
    command = click.option("--namespace", help="Namespace of the keys.  [default: configured]")(
        command
    )
    return click.option("--address", help="The lock server.  [default: as `run-once where` says]")(
        command
    )


@main.command()
@_server_options
def status(address: str | None, namespace: str | None) -> None:
    """Count the keys of a namespace, and show who works on what."""
    config, session = _connect(address, namespace)
    info = session.client.server_info()
    count = session.client.count(namespace=config.namespace)
    up_s = info.uptime_ns / _NS_PER_S
    print(f"server     {session.address}, version {info.version}, {info.engine}, up {_age(up_s)}")
    print(f"namespace  {config.namespace or '(none)'}")
    for name in ("done", "held", "expired", "failed"):
        print(f"{name:<10} {getattr(count, name):,}")
    if not count.is_complete:
        print("           (an old database is still being counted)")
    _print_workers(session, config)


@main.command("list")
@click.argument("prefix", default="")
@click.option("--failed", is_flag=True, help="Only keys that failed.")
@click.option("--held", is_flag=True, help="Only keys that somebody works on.")
@click.option(
    "--limit", type=click.IntRange(1), default=1000, show_default=True, help="Keys shown."
)
@_server_options
def list_keys(
    prefix: str, failed: bool, held: bool, limit: int, address: str | None, namespace: str | None
) -> None:
    """List the keys that start with PREFIX, in byte order.

    A key with characters that do not show stands in quotes, as in Python; `reset` takes it so.
    """
    if failed and held:
        raise click.UsageError("--failed and --held exclude each other: give one of them")
    only: Only = "failed" if failed else "held" if held else "all"
    config, session = _connect(address, namespace)
    infos = _infos(session, config, prefix, only)
    print(f"{'STATE':<8} {'SINCE':>9} {'TRIES':>5}  {'OWNER':<24} KEY")
    for info in islice(infos, limit):
        _print_key(info, config)
    if next(infos, None) is not None:
        click.echo(f"there are more than {limit:,}: see --limit", err=True)


@main.command()
@click.argument("keys", nargs=-1)
@click.option("--failed", is_flag=True, help="All keys that failed.")
@click.option("--prefix", help='All keys that start so; "" is all of the namespace.')
@click.option("--yes", is_flag=True, help="Do not ask.")
@_server_options
def reset(
    keys: tuple[str, ...],
    failed: bool,
    prefix: str | None,
    yes: bool,
    address: str | None,
    namespace: str | None,
) -> None:
    """Forget what is known of KEYS, as `list` shows them, so that they are done again.

    With --failed and --prefix: the failed ones that start so. The exit status is 1 if one of KEYS
    does not exist.
    """
    if bool(keys) == (failed or prefix is not None):
        raise click.UsageError("say which keys: KEYS, or --failed, or --prefix")
    config, session = _connect(address, namespace)
    # Whatever changes from here on is newer than what the user is asked about, and is kept.
    revision = session.client.server_info().revision
    if keys:
        found = _named(session, config, keys)
    else:
        found = list(_infos(session, config, prefix or "", "failed" if failed else "all"))
        if not found:
            print("no such key")
    if found and not yes:
        click.confirm(f"reset {_describe(found)}?", abort=True)
    if found:
        _reset(session, [info.key for info in found], revision)
    if len(found) < len(set(keys)):
        sys.exit(1)


@main.command()
@click.option("--address", help="As the argument of a program.")
def where(address: str | None) -> None:
    """Say which lock server a program started here would use, and why."""
    from run_once.config import load_config  # noqa: PLC0415 (see the module)
    from run_once.local import problem  # noqa: PLC0415

    config = load_config(address=address)
    if config.address is None:
        _print_unconfigured(config)
        return
    print(config.address)
    print(f"  from: {config.source}")
    wrong = problem(config.address, config.access)
    if wrong is None:
        print("  it answers")
        return
    print(f"  it does not let this client in: {wrong}" if wrong else "  it does not answer")
    sys.exit(1)


@main.command()
@click.option("--show", is_flag=True, help="Print the secret itself; it is made if there is none.")
def secret(show: bool) -> None:
    """Say where the secret is that results are signed with."""
    import os  # noqa: PLC0415 (see the module)

    from run_once.config import load_config  # noqa: PLC0415
    from run_once.secret import how_to_share, load_secret, secret_path  # noqa: PLC0415

    configured = load_config().secret
    if show:
        print(bytes(load_secret(configured=configured)).decode("utf-8", "surrogateescape"))
        return
    if os.environ.get("RUN_ONCE_SECRET"):
        print("set by RUN_ONCE_SECRET")
    elif configured:
        print("set by the option `secret`, in an ini file")
    else:
        path = secret_path()
        print(f"{path} ({'set' if path.exists() else 'made on first use'})")
    print(how_to_share())


def _connect(address: str | None, namespace: str | None) -> tuple[Config, Session]:
    """Connect as a program started here would."""
    from run_once.config import load_config  # noqa: PLC0415 (see the module)
    from run_once.task import Session  # noqa: PLC0415

    config = load_config(address=address, namespace=namespace)
    if config.retry_s == type(config)().retry_s:
        # A person waits. Whoever has set the option wants it otherwise.
        config = dataclasses.replace(config, retry_s=_RETRY_S)
    _refuse_if_fresh(config)
    return config, Session.get(config)


def _refuse_if_fresh(config: Config) -> None:
    """Refuse to start this machine's own server just to say that it knows of nothing.

    Raises:
        ConfigError: Nothing is configured, nothing listens, and there is no database yet.
    """
    import os  # noqa: PLC0415 (see the module)

    from run_once import cluster, local  # noqa: PLC0415

    if config.address is not None or local.answers(local.DEFAULT_ADDRESS):
        return
    if cluster.multi_node_reason(os.environ) is None:
        database = local.places(config, os.environ).database
        if not database.exists():
            raise ConfigError(
                "no lock server is configured, none runs on this machine, and there is no database "
                f"of an earlier one ({database}), so there is nothing to show; set "
                "RUN_ONCE_ADDRESS or give --address if the server is elsewhere"
            )


def _infos(session: Session, config: Config, prefix: str, only: Only) -> Iterator[pb.KeyInfo]:
    """Read the keys of a namespace that start with a prefix."""
    from run_once.keys import NAMESPACE_START, namespace_prefix  # noqa: PLC0415 (see the module)

    start = f"{namespace_prefix(config.namespace)}{prefix}".encode()
    for info in session.client.list(start, start + _AFTER_ALL_UTF8, only=only):
        if config.namespace or not info.key.startswith(NAMESPACE_START.encode()):
            yield info


def _named(session: Session, config: Config, keys: tuple[str, ...]) -> list[pb.KeyInfo]:
    """Read the keys that a user names, as they are or as a list shows them; say which are not."""
    from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 (see the module)
    from run_once.keys import stored_key  # noqa: PLC0415

    def read(names: list[str]) -> list[pb.KeyInfo]:
        stored = [stored_key(name, namespace=config.namespace) for name in names]
        return session.client.lookup(stored, want_infos=True).infos

    found: dict[bytes, pb.KeyInfo] = {}
    names = list(dict.fromkeys(keys))
    for name, as_given in zip(names, read(names), strict=True):
        info, unquoted = as_given, _unquoted(name)
        if info.state == pb.KEY_STATE_ABSENT and unquoted:
            (info,) = read([unquoted])
        if info.state == pb.KEY_STATE_ABSENT:
            click.echo(f"no such key: {_shown(as_given.key, config)}", err=True)
        else:
            found[info.key] = info
    return list(found.values())


def _unquoted(text: str) -> str:
    """Give the key that a list shows in quotes; "" if this is no such form."""
    try:
        value = ast.literal_eval(text) if text[:1] in {"'", '"'} else ""
    except (ValueError, SyntaxError):
        return ""
    return value if isinstance(value, str) else ""


def _reset(session: Session, keys: list[bytes], revision: int) -> None:
    """Reset keys, and say how many."""
    from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 (see the module)

    count = 0
    for start in range(0, len(keys), _RESET_STEP):
        states = session.client.reset(keys[start : start + _RESET_STEP], revision)
        count += states.count(pb.KEY_STATE_RESET)
    kept = len(keys) - count
    print(f"reset {count:,}{f'; kept {kept:,} that changed meanwhile' if kept else ''}")


def _describe(infos: list[pb.KeyInfo]) -> str:
    """Say what is about to be reset."""
    counts = Counter(_state(info) for info in infos)
    parts = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
    note = "; who works on held keys now works in vain" if counts["held"] else ""
    return f"{len(infos):,} {'key' if len(infos) == 1 else 'keys'} ({parts}{note})"


def _print_workers(session: Session, config: Config) -> None:
    """Print who holds how many keys."""
    held: Counter[str] = Counter()
    expired: Counter[str] = Counter()
    for info in islice(_infos(session, config, "", "held"), MAX_WORKER_KEYS):
        (expired if _state(info) == "expired" else held)[info.owner or "(unknown)"] += 1
    for owner in sorted({*held, *expired}):
        note = f", {expired[owner]:,} expired" if expired[owner] else ""
        print(f"worker     {owner}: {held[owner]:,} held{note}")


def _print_key(info: pb.KeyInfo, config: Config) -> None:
    """Print one line of a list."""
    since = "-"
    if info.since_wall_ns:
        since = _age(max(0.0, time.time() - info.since_wall_ns / _NS_PER_S))
    tries = info.attempts or "-"
    last_line = (info.error.strip().splitlines() or [""])[-1]
    note = f"  ({last_line})" if last_line else ""
    shown = _shown(info.key, config)
    print(f"{_state(info):<8} {since:>9} {tries:>5}  {info.owner or '-':<24} {shown}{note}")


def _shown(key: bytes, config: Config) -> str:
    """Give a key as the user knows it, in one line."""
    from run_once.keys import namespace_prefix  # noqa: PLC0415 (see the module)

    text = key.decode("utf-8", "backslashreplace")
    text = text.removeprefix(namespace_prefix(config.namespace))
    return text if text.isprintable() else repr(text)


def _state(info: pb.KeyInfo) -> str:
    """Give a key's state as people call it."""
    from distlock_proto import lock_table_pb2 as pb  # noqa: PLC0415 (see the module)

    names = {pb.KEY_STATE_BUSY: "held", pb.KEY_STATE_BUSY_AHEAD: "held"}
    return names.get(info.state) or pb.KeyState.Name(info.state)[len("KEY_STATE_") :].lower()


def _age(seconds: float) -> str:
    """Give a length of time in few letters."""
    from run_once.progress import duration  # noqa: PLC0415 (see the module)

    return duration(seconds)


def _print_unconfigured(config: Config) -> None:
    """Say what a program would find with nothing configured; nothing is started."""
    import os  # noqa: PLC0415 (see the module)

    from run_once import cluster, local, own_server  # noqa: PLC0415

    reason = cluster.multi_node_reason(os.environ)
    if local.answers(local.DEFAULT_ADDRESS):
        local.refuse_two_servers(local.places(config, os.environ), local.DEFAULT_ADDRESS)
        print(f"{local.DEFAULT_ADDRESS}\n  nothing is configured, and a server listens there")
    elif reason is not None:
        print(f"none\n  no server is configured, and this is {reason}: set RUN_ONCE_ADDRESS")
        sys.exit(1)
    else:
        own = local.places(config, os.environ)
        running = own_server.find_running(own)
        print(running or f"unix:{own.socket}")
        print("  nothing is configured, and no lock server listens on " + local.DEFAULT_ADDRESS)
        state = "it runs" if running else "started by the first program that needs it"
        print(f"  this machine's own server: {state}; other machines do not see it")
        print(f"  database: {own.database}")


if __name__ == "__main__":
    main()
