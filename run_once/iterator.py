"""`for key in DistributedIterator(keys): ...`: each key to one process of all that run the loop."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Final, Generic, Literal, TypeVar

from run_once.clock import SystemClock
from run_once.config import Config, load_config
from run_once.errors import ConfigError, KeyTypeError, LeaseLostError, RunOnceError
from run_once.key_pass import KeyPass
from run_once.key_source import KeySource, key_maker
from run_once.keys import check_version
from run_once.live import LiveItem, Outcome, describe, registry, show
from run_once.loop import Loop
from run_once.options import MAX_DURATION_S
from run_once.pace import MAX_AHEAD_KEYS
from run_once.pass_options import Counts, PassOptions
from run_once.task import Session

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")

SETTLE_CHOICES: Final = ("auto", "explicit")


class DistributedIterator(Generic[ItemT]):
    """Shares a loop over items with every process that runs it.

    Each item is yielded to one process at a time, and to nobody once it is done. Each `for` is a
    pass of its own over `keys`, and closes when the loop is left: by its end, `break`, an
    exception or an interrupt.

    With `timeout=None` the lease is kept alive; asking for the next item settles the last one as
    done, and an item during which the loop is left is given back. At most one completion per key
    is accepted, ever (until someone resets it); a worker that was paused or cut off may find its
    lease lost, and then its run is not accepted: one warning, and a count.

    Attributes:
        counts: What became of the keys in the pass that began last.
    """

    def __init__(
        self,
        keys: Iterable[ItemT],
        timeout: float | timedelta | None = None,
        shuffle: bool = False,
        version: int = 0,
        chunksize: int = 10,
        random_seed: int | None = None,
        *,
        key: Callable[[ItemT], str | int] | None = None,
        namespace: str | None = None,
        wait: bool = False,
        settle: Literal["auto", "explicit"] = "auto",
        progress: bool | None = None,
        max_attempts: int | None = None,
        address: str | None = None,
        lease_s: float | timedelta | None = None,
        prefetch: int | None = None,
    ) -> None:
        """Describe the loop; nothing is read or asked for yet.

        Args:
            keys: Strings or integers, or anything with `key=`: any iterable, endless ones included.
            timeout: None: the lease is kept alive. T: an item is exclusively yours for T seconds,
                and done by `notify_success(item)` only. 0: an item is done before you get it.
            shuffle: Read all keys into memory and take them in random order; else they are asked
                for in the given order.
            version: Version of the work; another version does every key again.
            chunksize: Keys in the first request; requests grow where that saves some.
            random_seed: Seed of `shuffle`.
            key: Gives an item's key, a string or an integer.
            namespace: Separates equal keys of different projects; None: configured.
            wait: Stay until every key is settled, and take over what others drop.
            settle: "auto", or "explicit" for consumers that read ahead: an item stays yours until
                `notify_success`, `notify_failure` or the end of the process.
            progress: Show a bar in a terminal or notebook, else a line every 30 s; None:
                configured.
            max_attempts: Leave keys alone that were attempted so often; 0: no limit; None:
                configured.
            address: The lock server; None: configured.
            lease_s: Length of a lease that is kept alive; None: configured (60 s).
            prefetch: Hold so many keys at most before they are started; 0: none. None: as many as
                it takes for the next one to be there in time, none while bodies take long.

        Raises:
            ConfigError: An option has a value that cannot be used.
            KeyTypeError: `keys` cannot be iterated over, or is one string.
            LimitError: `version` is no integer of 0 or more.
        """
        _check_keys(keys)
        if settle not in SETTLE_CHOICES:
            raise ConfigError(f"settle={settle!r}: choose one of {', '.join(SETTLE_CHOICES)}")
        if chunksize < 1:
            raise ConfigError(f"chunksize={chunksize!r}: an integer of 1 or more is expected")
        if prefetch is not None and prefetch < 0:
            raise ConfigError(f"prefetch={prefetch!r}: an integer of 0 or more is expected")
        self.counts = Counts()
        self._prefetch = MAX_AHEAD_KEYS if prefetch is None else prefetch
        self._keys = keys
        self._timeout_s = timeout_seconds(timeout)
        self._shuffles = shuffle
        self._random_seed = random_seed
        self._chunksize = chunksize
        self._wait = wait
        self._is_explicit = settle == "explicit" or bool(self._timeout_s)
        self._config: Config = load_config(
            address=address,
            namespace=namespace,
            lease_s=lease_s,
            max_attempts=max_attempts,
            progress=progress,
        )
        check_version(version)
        if key is not None and not callable(key):
            raise ConfigError(
                f"key={key!r:.100}: a function that gives an item's key is expected, such as "
                "key=lambda item: item.name"
            )
        self._make_keys = key_maker(key, version, self._config.namespace)
        self._has_quick_keys = key is None
        self._claims: Loop[ItemT] | None = None

    def __iter__(self) -> Loop[ItemT]:
        """Begin a pass over the keys."""
        return Loop(self._begin, self._config, is_explicit=self._is_explicit)

    @contextlib.contextmanager
    def claim(self) -> Iterator[LiveItem[ItemT] | None]:
        """Claim the next item for one `with` block, which settles it as it ends.

        The block's end makes the item done; an exception in it makes it failed, an interrupt gives
        it back, and both go on. The lease has `item`, `token` and `held`. None: nothing is left;
        the next call then begins a new pass.

        Raises:
            LeaseLostError: The lease was lost; this run was not accepted.
        """
        if self._claims is None:
            self._claims = Loop(self._begin, self._config, is_explicit=True)
        live = self._claims.claim_next()
        if live is None:
            self._claims = None
            yield None
            return
        try:
            yield live
        except Exception as error:
            _fail_quietly(live, error)
            raise
        except BaseException:
            live.release()
            raise
        else:
            if self._timeout_s == 0 or live.complete() is not Outcome.LOST:
                return
            raise LeaseLostError(
                f"the lease on key {show(live.key)} was lost, so this run was not accepted: "
                "another holder was granted the key, or it was reset"
            )
        finally:
            registry().remove(live)

    def _begin(self) -> KeyPass[ItemT]:
        """Connect, and begin to read the keys."""
        config = self._config
        clock = SystemClock()
        options = PassOptions(
            ttl_s=self._timeout_s or config.lease_s,
            is_kept=not self._timeout_s,
            is_for_good=self._timeout_s == 0,
            is_explicit=self._is_explicit,
            chunksize=self._chunksize,
            waits=self._wait,
            max_attempts=config.max_attempts,
            max_ahead=self._prefetch,
        )
        order = random.Random(self._random_seed) if self._shuffles else None  # noqa: S311
        source = KeySource(
            self._keys,
            self._make_keys,
            clock=clock,
            shuffle=order,
            has_quick_keys=self._has_quick_keys,
        )
        made = KeyPass(source, Session.get(config), options, clock)
        self.counts = made.counts
        return made


def _fail_quietly(live: LiveItem[Any], error: Exception) -> None:
    """Settle an item as failed; the user's error matters more than a server that is gone."""
    try:
        live.fail(describe(error))
    except RunOnceError as failure:
        logger.warning("key %s could not be marked as failed: %s", show(live.key), failure)


def _check_keys(keys: object) -> None:
    """Refuse what is no collection of keys.

    Raises:
        KeyTypeError: It cannot be iterated over, or is one string.
    """
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise KeyTypeError(
            f"keys must be an iterable of keys, such as a list, not {type(keys).__name__}: "
            f"{keys!r:.100}"
        )


def timeout_seconds(timeout: float | timedelta | None) -> float | None:
    """Check a timeout and give it in seconds; None stays None.

    Raises:
        ConfigError: It is no number, or negative, or longer than a year.
    """
    if timeout is None:
        return None
    return fixed_seconds("timeout", timeout, "; None keeps the lease alive")


def fixed_seconds(option: str, value: float | timedelta, advice: str = "") -> float:
    """Check the length of a lease that is not kept alive, and give it in seconds.

    Args:
        option: Name of the option, for the message.
        value: What was given.
        advice: Ends the message.

    Raises:
        ConfigError: It is no number, or negative, or longer than a year.
    """
    seconds: object = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        seconds = math.nan
    if not 0 <= seconds <= MAX_DURATION_S:
        raise ConfigError(
            f"{option}={value!r}: seconds from 0 to {MAX_DURATION_S:.0f} (a year), or such a "
            f"timedelta, are expected{advice}"
        )
    return float(seconds)
