"""Single calls, outside of a `Parallel`: is one done, forget it, what is its key made of.

Each takes the options (namespace, version, key, ignore, code, address) of the
`joblib.parallel_config("run_once", ...)` that is in force, else those that are configured. Of equal
calls within one `Parallel` the first is meant.
"""

from __future__ import annotations

from typing import Any

from joblib.parallel import get_active_backend

from distlock_proto import lock_table_pb2 as pb
from run_once.call_keys import CallKeyer
from run_once.joblib_options import BackendOptions, make_options, resolve
from run_once.keys import stored_key
from run_once.results import discard
from run_once.task import Session


def is_done(func: Any, /, *args: Any, **kwargs: Any) -> bool:
    """Tell whether the value of `func(*args, **kwargs)` is stored.

    Args:
        func: What is called.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        Whether a `Parallel` would load the value instead of running the call.

    Raises:
        UnkeyableError: An argument has no lasting value.
        ServerUnavailableError: The server could not be asked.
    """
    session, key = _find(func, args, kwargs)
    return session.client.lookup([key]).states[0] == pb.KEY_STATE_DONE


def forget(func: Any, /, *args: Any, **kwargs: Any) -> bool:
    """Forget what is known of `func(*args, **kwargs)`, so that it is computed again.

    A lease that another process holds on it is ended, too: its completion will not be accepted.

    Args:
        func: What is called.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        Whether there was anything to forget.

    Raises:
        UnkeyableError: An argument has no lasting value.
        ServerUnavailableError: The server could not be asked.
    """
    session, key = _find(func, args, kwargs)
    revision = session.client.server_info().revision
    before = session.client.lookup([key], want_results=True)
    states = session.client.reset([key], revision)
    result = before.results.get(key)
    if result is not None and states[0] == pb.KEY_STATE_RESET:
        discard(key, result.token, result)
    return before.states[0] != pb.KEY_STATE_ABSENT


def explain_key(func: Any, /, *args: Any, **kwargs: Any) -> str:
    """Tell what goes into the key of `func(*args, **kwargs)`; no server is asked.

    Args:
        func: What is called.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        Lines: the key, the function, then the arguments as a tree.

    Raises:
        UnkeyableError: An argument has no lasting value.
    """
    return _keyer(_active_options()).explain(func, args, kwargs)


def _find(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Session, bytes]:
    """Give the server, and the call's key there."""
    options = _active_options()
    config = resolve(options)
    text = _keyer(options).key(func, args, kwargs)
    key = stored_key(text, version=options.version, namespace=config.namespace)
    return Session.get(config), key


def _keyer(options: BackendOptions) -> CallKeyer:
    return CallKeyer(ignore=tuple(options.ignore), key=options.key, code=options.code)


def _active_options() -> BackendOptions:
    """Give the options of the `parallel_config` that is in force, if it is about run_once."""
    backend, _ = get_active_backend()
    options = getattr(backend, "options", None)
    return options if isinstance(options, BackendOptions) else make_options({})
