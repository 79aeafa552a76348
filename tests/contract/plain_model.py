"""A plain model of the lock table: one dictionary, no batches, no disk; written from the rules.

It is slow and naive on purpose. Time is an integer of nanoseconds that the test moves.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

Key = dict[str, Any]


@dataclass
class PlainModel:
    """What the table should hold, and how it should answer."""

    now: int = 0
    token: int = 0
    revision: int = 0
    generation: int = 0
    keys: dict[bytes, Key] = field(default_factory=dict)

    def copy(self) -> PlainModel:
        """Give an independent copy."""
        return copy.deepcopy(self)

    def view(self, key: bytes) -> Any:
        """Give what a reader may see of a key."""
        entry = self.keys.get(key)
        if entry is None:
            return None
        if entry["is"] == "held":
            return ("held", entry["token"], entry["attempts"], entry["ahead"], entry["deadline"])
        if entry["is"] == "failed":
            return ("failed", entry["attempts"], entry["error"])
        return ("done", entry["token"], entry["value"])

    def claim(
        self, keys: list[bytes], claim_id: bytes, ttl: int, grants: int, attempts: int, ahead: bool
    ) -> list[str]:
        """Claim keys in order; those held by this claim id count first."""
        room = grants or len(keys)
        for key in keys:
            if self._is_held_by(key, claim_id) and grants:
                room -= 1
        answers = []
        for key in keys:
            answer = self._claim_one(key, claim_id, ttl, attempts, ahead, may_grant=room > 0)
            if answer == "granted anew":
                room -= 1
            answers.append("granted" if answer == "granted anew" else answer)
        return answers

    def _claim_one(
        self, key: bytes, claim_id: bytes, ttl: int, limit: int, ahead: bool, *, may_grant: bool
    ) -> str:
        entry = self.keys.get(key)
        tried, error = 0, ""
        if entry is not None:
            if entry["is"] == "done":
                return "done"
            if entry["id"] == claim_id:
                return "granted" if entry["is"] == "held" else "lost"
            if entry["is"] == "held" and entry["deadline"] > self.now:
                return "busy"
            tried, error = entry["attempts"], entry["error"]
            if entry["is"] == "held" and entry["ahead"]:
                tried -= 1
        if limit and tried >= limit:
            return "exhausted"
        if not may_grant:
            return "not asked"
        self.token += 1
        self._put(
            key,
            {
                "is": "held",
                "id": claim_id,
                "token": self.token,
                "deadline": self.now + ttl,
                "ttl": ttl,
                "attempts": tried + 1,
                "ahead": ahead,
                "error": error,
                "marked": False,
            },
        )
        return "granted anew"

    def renew(self, key: bytes, claim_id: bytes, token: int, ttl: int, started: bool) -> str:
        """Renew a lease."""
        if not self._is_held_by(key, claim_id, token):
            return "lost"
        entry = self.keys[key]
        if ttl > entry["ttl"] or (started and entry["ahead"]):
            self.revision += 1
            entry["revision"] = self.revision
        entry["ttl"] = max(ttl, entry["ttl"])
        entry["deadline"] = max(entry["deadline"], self.now + ttl)
        entry["ahead"] = entry["ahead"] and not started
        entry["marked"] = False
        return "renewed"

    def complete(self, key: bytes, claim_id: bytes, token: int, value: bytes) -> str:
        """Complete a key."""
        entry = self.keys.get(key)
        if entry is not None and entry["is"] == "done" and entry["token"] == token:
            return "completed"
        if not self._is_held_by(key, claim_id, token):
            return "lost"
        self._put(key, {"is": "done", "token": token, "value": value})
        return "completed"

    def give_up(self, key: bytes, claim_id: bytes, token: int, error: str | None) -> str:
        """Fail a key with an error, or release it (None)."""
        entry = self.keys.get(key)
        if entry is not None and entry["is"] == "failed":
            if (entry["id"], entry["token"]) != (claim_id, token):
                return "lost"
            return "released" if entry["released"] else "failed"
        if entry is None:
            return "released" if error is None else "lost"
        if not self._is_held_by(key, claim_id, token):
            return "lost"
        tried = entry["attempts"]
        if error is not None:
            self._fail(key, entry, tried, error, released=False)
            return "failed"
        if tried == 1:
            self._put(key, None)
        else:
            self._fail(key, entry, tried - 1, entry["error"], released=True)
        return "released"

    def _fail(self, key: bytes, entry: Key, tried: int, error: str, *, released: bool) -> None:
        self._put(
            key,
            {
                "is": "failed",
                "id": entry["id"],
                "token": entry["token"],
                "attempts": tried,
                "error": error,
                "released": released,
            },
        )

    def reset(self, key: bytes, max_revision: int) -> str:
        """Make a key absent unless it is newer."""
        entry = self.keys.get(key)
        if entry is None:
            return "reset"
        if entry["revision"] > max_revision:
            return "kept"
        self._put(key, None)
        return "reset"

    def invalidate(self, key: bytes, token: int) -> str:
        """Make a done key absent if it is this completion."""
        entry = self.keys.get(key)
        if entry is None or entry["is"] != "done" or entry["token"] != token:
            return "kept"
        self._put(key, None)
        return "reset"

    def seize(self, key: bytes, claim_id: bytes, ttl: int) -> str:
        """Take a key whatever its state; for ever with ttl 0."""
        entry = self.keys.get(key)
        if ttl == 0 and entry is not None and entry["is"] == "done":
            return "done"
        self.token += 1
        if ttl == 0:
            self._put(key, {"is": "done", "token": self.token, "value": b""})
            return "seized"
        self._put(
            key,
            {
                "is": "held",
                "id": claim_id,
                "token": self.token,
                "deadline": self.now + ttl,
                "ttl": ttl,
                "attempts": 1,
                "ahead": False,
                "error": "",
                "marked": False,
            },
        )
        return "seized"

    def restart(self, *, is_clean: bool) -> None:
        """Start the server again: leases run anew unless a clean end marked them as expired."""
        for entry in self.keys.values():
            if entry["is"] != "held":
                continue
            if is_clean and entry["deadline"] <= self.now:
                entry["marked"] = True
            entry["deadline"] = self.now if entry["marked"] else self.now + entry["ttl"]

    def _is_held_by(self, key: bytes, claim_id: bytes, token: int | None = None) -> bool:
        entry = self.keys.get(key)
        return (
            entry is not None
            and entry["is"] == "held"
            and entry["id"] == claim_id
            and token in (None, entry["token"])
        )

    def _put(self, key: bytes, entry: Key | None) -> None:
        before = self.keys.pop(key, None)
        self.revision += 1
        if before is not None and before["is"] == "done":
            self.generation += 1
        if entry is not None:
            self.keys[key] = entry
            entry["revision"] = self.revision
