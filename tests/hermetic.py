"""An environment without the user's configuration, home and variables."""

from __future__ import annotations

import os
from pathlib import Path

KEPT = "RUN_ONCE_2021_WHEEL"


def user_folders(home: Path) -> dict[str, str]:
    """Make a home; give the variables that say where it and its folders are."""
    folders = {
        "HOME": home,
        "XDG_CONFIG_HOME": home / ".config",
        "XDG_DATA_HOME": home / ".local" / "share",
        "XDG_CACHE_HOME": home / ".cache",
        "XDG_STATE_HOME": home / ".local" / "state",
        "RUN_ONCE_CONFIG_DIR": home / "config",
        "RUN_ONCE_DATA_DIR": home / "data",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    return {name: str(folder) for name, folder in folders.items()}


def ours() -> list[str]:
    """Name the variables that would change what the client does."""
    return [name for name in os.environ if name.startswith("RUN_ONCE_") and name != KEPT]


def hide_user(home: Path) -> dict[str, str]:
    """Give the environment of a process that sees nothing of the user's."""
    hidden = ours()
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | user_folders(home)
