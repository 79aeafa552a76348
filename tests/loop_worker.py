"""A process of the loop tests: takes keys, and writes down what it began and what was accepted.

Lines of its file: "begun KEY TOKEN", "accepted KEY", "lost KEY", "failed KEY".
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from run_once import (
    AlreadyDoneError,
    DistributedIterator,
    LeaseLostError,
    LeaseLostWarning,
    lease_of,
    notify_failure,
    notify_success,
)
from run_once.config import load_config
from run_once.key_pass import KeyPass
from run_once.live import LiveItem, Outcome
from run_once.task import Session

Log = Callable[[str, str], None]


class BodyError(Exception):
    """What a body that fails raises."""


def main() -> None:
    """Do passes until all keys are done, or one if `--once` is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--keys", type=int, required=True)
    parser.add_argument("--failing", type=float, default=0.0, help="share of bodies that fail")
    parser.add_argument("--stopping", type=float, default=0.0, help="share that stop the process")
    parser.add_argument("--body-s", type=float, default=0.0)
    parser.add_argument("--notify", action="store_true", help="settle by notify_*")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore", LeaseLostWarning)
    rng = random.Random(options.seed)
    keys = [f"key-{number}" for number in range(options.keys)]
    with options.log.open("a", buffering=1) as file:

        def log(what: str, key: str) -> None:
            file.write(f"{what} {key}\n")

        def body(key: str) -> None:
            log("begun", f"{key} {lease_of(key).token}")
            time.sleep(rng.uniform(0, 2 * options.body_s))
            if rng.random() < options.stopping:
                os.kill(os.getpid(), signal.SIGSTOP)  # the test lets it go on
            if rng.random() < options.failing:
                raise BodyError

        run = notifying_pass if options.notify else settling_pass
        while True:
            run(DistributedIterator(keys, wait=options.wait), body, log)
            if options.once or Session.get(load_config()).client.count().done == options.keys:
                break


def notifying_pass(loop: DistributedIterator[str], body: Callable[[str], None], log: Log) -> None:
    """Settle each key by `notify_*`: it was accepted if `notify_success` returns."""
    for key in loop:
        try:
            body(key)
            notify_success(key)
            log("accepted", key)
        except BodyError:
            notify_failure(key)
            log("failed", key)
        except (LeaseLostError, AlreadyDoneError):
            log("lost", key)


def settling_pass(loop: DistributedIterator[str], body: Callable[[str], None], log: Log) -> None:
    """Settle each key by asking for the next, and note what the server said of it."""
    on_settled = KeyPass.on_settled

    def noted(running: KeyPass[str], items: Sequence[LiveItem[str]]) -> None:
        on_settled(running, items)
        words = {Outcome.COMPLETED: "accepted", Outcome.LOST: "lost"}
        for live in items:
            if live.outcome in words:
                log(words[live.outcome], live.item)

    with mock.patch.object(KeyPass, "on_settled", noted):
        for key in loop:
            try:
                body(key)
            except BodyError:
                notify_failure(key)
                log("failed", key)


if __name__ == "__main__":
    main()
