"""The `distlock` command."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import click

from distlock_server import tools
from distlock_server.cli_options import PATH, Seconds, option, security_options
from distlock_server.version import version

if TYPE_CHECKING:
    from distlock_server.auth import Legacy
    from distlock_server.security import Security, Wanted
    from distlock_server.server import Server

logger = logging.getLogger("distlock")

DEFAULT_PORT: Final = 22_113
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_CACHE_MB: Final = 200

GARBAGE_AFTER: Final = 20_000
"""Python looks for garbage whenever so many more objects live: batches make thousands each."""

SIGNAL_LOOK_S: Final = 0.2
"""How often the main thread runs the handlers of signals that did not wake it, in seconds."""

HARD_EXIT_S: Final = 4.5
"""After SIGTERM the process is gone so soon, whatever hangs: what was acknowledged is on disk."""

_LAST_WORDS_S: Final = 0.2
"""How long the sentence that says so may take to be written."""

_DEATH_FLUSH_S: Final = 0.5
"""How long the last replies may take to leave when the storage has failed."""


class Options(NamedTuple):
    """The options of the command."""

    db: Path | None
    port: int | None
    host: str
    cache_size: int
    engine: str
    unix_socket: Path | None
    idle_exit_s: float | None
    reserve_mb: int
    pid_file: Path | None
    port_file: Path | None
    log_level: str
    secure: bool
    secure_dir: Path | None
    address_file: Path | None
    address_role: str | None
    public_host: str | None
    insecure: bool
    tls_cert: Path | None
    tls_key: Path | None
    tls_client_ca: Path | None
    token_file: Path | None
    legacy: Legacy | None
    legacy_port: int | None


def _show_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"distlock {version()}")
        context.exit()


@click.group(
    invoke_without_command=True,
    subcommand_metavar="[COMMAND]",
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@option("db", type=PATH, help="Folder of the database, made if it is missing.")
@option(
    "port",
    type=click.IntRange(0, 65_535),
    help=f"TCP port; 0: a free one, see --port_file. {DEFAULT_PORT} unless --unix_socket is given.",
)
@option("host", default=DEFAULT_HOST, help="Name or address of the interface to listen on.")
@option(
    "cache_size",
    type=click.IntRange(min=1),
    default=DEFAULT_CACHE_MB,
    help="Memory for the database's cache, in MB.",
)
@option(
    "engine",
    type=click.Choice(["auto", "leveldb", "rocksdb", "memory"]),
    default="auto",
    help="Storage engine. auto: what the folder holds; else leveldb, or rocksdb without plyvel. "
    "memory: nothing is kept.",
)
@option("unix_socket", type=PATH, help="Listen on this unix socket; on TCP only with --port.")
@option(
    "idle_exit_s",
    type=Seconds(min=0, min_open=True),
    help="Exit after so many seconds without a request and without a running lease.",
)
@option(
    "reserve_mb",
    type=click.IntRange(min=0),
    default=64,
    help="Begin nothing new while less is free on the disk of the database, in MiB. 0: no limit.",
)
@option("pid_file", type=PATH, help="Write the process id to this file once listening.")
@option("port_file", type=PATH, help="Write the bound TCP port to this file once listening.")
@security_options
@option(
    "log_level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    help="What to log, on stderr.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def main(**values: Any) -> None:
    """Serve a lock table to run-once clients, over gRPC.

    SIGTERM and SIGINT finish what is under way and exit with status 0. The commands look after a
    database; without one the server is started.
    """
    if click.get_current_context().invoked_subcommand is not None:
        return
    options = Options(**values)
    if options.db is None and options.engine != "memory":
        raise click.UsageError("--db is missing: name the folder of the database")
    _configure_logging(options.log_level)
    gc.set_threshold(GARBAGE_AFTER)
    _exit(run(options))


for _command in tools.COMMANDS:
    main.add_command(_command)


def run(options: Options) -> int:
    """Serve until told to stop; return the exit status."""
    # gRPC would write its own complaint beside ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    ends: queue.SimpleQueue[object] = queue.SimpleQueue()
    _end_on_signals(ends)
    from distlock_server import files  # noqa: PLC0415 - for a quick --help
    from distlock_server.engines.base import EngineError  # noqa: PLC0415
    from distlock_server.security import SecurityError, prepare  # noqa: PLC0415
    from distlock_server.server import Idle, ServeError  # noqa: PLC0415

    try:
        files.raise_limit()
        wanted = _wanted(options)
        security = prepare(wanted)
        with contextlib.ExitStack() as cleanup:
            server = _start(options, security, ends, cleanup)
            _write_address(options, security, wanted, server.port)
            cleanup.enter_context(_Files(options, server.port))
            logger.info("Server listening on %s", ", ".join(server.targets))
            if server.legacy_port:
                logger.info("and for clients of 0.4.2 on 127.0.0.1:%d", server.legacy_port)
            reason = _first(ends)
            if isinstance(reason, (Idle, signal.Signals)):
                why = "nobody uses the server" if isinstance(reason, Idle) else reason.name
                logger.info("%s: finishing what is under way", why)
                server.stop()
    except (EngineError, SecurityError, ServeError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename or 'the server'}: {error.strerror or error}")
    if server.death is not None:
        code = _complain(f"the storage failed, and the server must end: {server.death}")
        time.sleep(_DEATH_FLUSH_S)
        return code
    logger.info("Server stopped")
    return 0


def _wanted(options: Options) -> Wanted:
    """Give the options that protect the server."""
    from distlock_server.security import Wanted  # noqa: PLC0415

    given = {name: getattr(options, name) for name in Wanted._fields if hasattr(options, name)}
    host = options.host if _uses_tcp(options) else None
    return Wanted(**{**given, "host": host, "database": options.db})


def _uses_tcp(options: Options) -> bool:
    return options.unix_socket is None or options.port is not None


def _write_address(options: Options, security: Security, wanted: Wanted, port: int) -> None:
    """Write the file that tells clients all they need; it stays for the next start."""
    if options.address_file is None:
        if options.secure:
            logger.info("No --address_file: clients need address, certificate and token one by one")
        return
    from distlock_server.security import address_file  # noqa: PLC0415
    from distlock_server.server import ServeError  # noqa: PLC0415
    from distlock_server.tls import write_private  # noqa: PLC0415

    content = address_file(security, wanted, port, options.unix_socket)
    try:
        write_private(options.address_file, content)
    except OSError as error:
        raise ServeError(
            f"--address_file={options.address_file} cannot be written: {error.strerror or error}; "
            "name a file in a folder that exists and can be written to"
        ) from None
    logger.info(
        "Clients need RUN_ONCE_ADDRESS=addrfile://%s, or a copy of that file",
        options.address_file.absolute(),
    )


def _start(
    options: Options,
    security: Security,
    ends: queue.SimpleQueue[object],
    cleanup: contextlib.ExitStack,
) -> Server:
    from distlock_server import engines  # noqa: PLC0415
    from distlock_server.blobs import BlobStore  # noqa: PLC0415
    from distlock_server.clock import SystemClock  # noqa: PLC0415
    from distlock_server.security import is_loopback  # noqa: PLC0415
    from distlock_server.server import Listen, Server  # noqa: PLC0415
    from distlock_server.space import Space  # noqa: PLC0415

    folder = options.db or Path()
    kind = options.engine
    if kind == "auto":
        kind = engines.kind_in(folder) or engines.default_kind()
    listen = Listen(
        host=options.host if _uses_tcp(options) else None,
        port=DEFAULT_PORT if options.port is None else options.port,
        unix_socket=options.unix_socket,
        credentials=security.credentials,
        legacy_port=options.legacy_port,
    )
    if listen.host is not None and security.is_open and not is_loopback(listen.host):
        logger.warning(
            "%s can be reached from other machines, and --insecure asks for no authentication: "
            "whoever reaches the port can change every lock",
            options.host,
        )
    engine = engines.open_engine(kind, folder, options.cache_size)
    blobs = BlobStore(_blob_folder(options, cleanup))
    space = Space(None if kind == "memory" else folder, options.reserve_mb * 2**20)
    server = Server(
        engine,
        blobs,
        SystemClock(),
        listen,
        ends.put,
        idle_exit_s=options.idle_exit_s,
        space=space,
        guard=security.guard,
    )
    server.start()
    return server


def _blob_folder(options: Options, cleanup: contextlib.ExitStack) -> Path:
    """Give the folder of large values: beside the database, or thrown away like it."""
    if options.engine == "memory" or options.db is None:
        return Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="distlock-")))
    db = options.db.resolve()
    return db.with_name(f"{db.name}.results")


class _Files:
    """The files that tell others about the running server; removed when it ends."""

    def __init__(self, options: Options, port: int) -> None:
        self._contents = [
            (name, path, text)
            for name, path, text in (
                ("pid_file", options.pid_file, os.getpid()),
                ("port_file", options.port_file, port),
            )
            if path is not None
        ]

    def __enter__(self) -> None:
        from distlock_server.server import ServeError  # noqa: PLC0415 - for a quick --help

        for name, path, text in self._contents:
            # Written whole or not at all: a reader may be polling for it.
            written = path.with_name(f"{path.name}.{os.getpid()}")
            try:
                written.write_text(f"{text}\n", encoding="ascii")
                written.replace(path)
            except OSError as error:
                raise ServeError(
                    f"--{name}={path} cannot be written: {error.strerror or error}; name a file "
                    "in a folder that exists and can be written to"
                ) from None

    def __exit__(self, *exc: object) -> None:
        for _, path, _ in self._contents:
            path.unlink(missing_ok=True)


def _end_on_signals(ends: queue.SimpleQueue[object]) -> None:
    def end(number: int, _frame: object) -> None:
        # Started here and not by the main thread, which may be busy opening the database.
        threading.Thread(target=_exit_late, daemon=True).start()
        ends.put(signal.Signals(number))

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)


def _first(ends: queue.SimpleQueue[object]) -> object:
    """Wait for the first reason to end.

    Not for ever at once: a signal that the system hands to another thread does not wake this one,
    and only this one runs the handlers.
    """
    while True:
        with contextlib.suppress(queue.Empty):
            return ends.get(timeout=SIGNAL_LOOK_S)


def _exit_late() -> None:
    time.sleep(HARD_EXIT_S)
    # Whoever reads stderr may hang as well.
    say = threading.Thread(target=_say_late, daemon=True)
    say.start()
    say.join(_LAST_WORDS_S)
    os._exit(0)


def _say_late() -> None:
    logger.warning(
        "not all requests finished within %s s, the disk may be hanging: exiting all the same; "
        "what was acknowledged is stored",
        HARD_EXIT_S,
    )
    sys.stderr.flush()


def _configure_logging(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
    )


def _complain(sentence: str) -> int:
    click.echo(f"distlock: {sentence}", err=True)
    return 1


def _exit(code: int) -> NoReturn:
    """End the process at once: threads of gRPC and of readers must not hold it up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
