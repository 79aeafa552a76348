"""docs/configuration.md says what the code does: every option, variable, place and limit."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from pathlib import Path

import pytest

from run_once import DistributedIterator, local, run_once
from run_once.config import INI_NAME, Config, load_config
from run_once.joblib_options import BackendOptions
from run_once.options import CHECKS, OTHER_VARIABLES, variable
from run_once.secret import secret_path

DOC = Path(__file__).parents[2] / "docs" / "configuration.md"

pytestmark = pytest.mark.skipif(not DOC.exists(), reason="the docs are not installed")


def _meanings() -> dict[str, str]:
    """Read what each option means from the docstring of its class."""
    text = (inspect.getdoc(Config) or "").partition("Attributes:")[2]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def _taken_by(option: str) -> str:
    """Name what takes an option as an argument."""
    takers = {
        "loop": inspect.signature(DistributedIterator).parameters,
        "decorator": inspect.signature(run_once).parameters,
        "joblib": {field.name: field for field in dataclasses.fields(BackendOptions)},
    }
    return ", ".join(name for name, parameters in takers.items() if option in parameters)


def _default(value: object) -> str:
    """Give a default as an ini file would have it."""
    if isinstance(value, bool):
        return "`yes`" if value else "`no`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if value not in {None, ""} else "none"


def test_every_option() -> None:
    """The table has each option: ini line, variable, who takes it, default, meaning."""
    meanings = _meanings()
    expected = [
        f"| `{name} =` | `{variable(name)}` | {_taken_by(name)} | "
        f"{_default(getattr(Config(), name))} | {meanings[name]} |"
        for name in CHECKS
    ]
    text = DOC.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+ =`", line)]
    assert rows == expected, "write this:\n" + "\n".join(expected)


def test_every_other_variable() -> None:
    """The variables that are no options are there with their meaning."""
    text = DOC.read_text(encoding="utf-8")
    for name, meaning in OTHER_VARIABLES.items():
        assert f"| `{name}` | {meaning} |" in text


def test_every_place() -> None:
    """Each file that is made or read is named."""
    text = DOC.read_text(encoding="utf-8")
    own = local.places(load_config(), os.environ)
    paths = (own.database, own.log, own.note, own.start_lock, own.last_source, secret_path({}))
    for name in [*(path.name for path in paths), INI_NAME, "db.results", local.DEFAULT_ADDRESS]:
        assert f"`{name}`" in text, name
