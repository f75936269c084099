"""Measurements that outlive the process that made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from specdec.tracking import JsonlTracker


class Measurements(JsonlTracker):
    """Measurements by key in a file of rows; whoever opens the same file again finds those that were finished."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._known: dict[str, dict[str, Any]] = {}
        self.num_resumed = 0
        for line in path.read_text(encoding="utf-8").splitlines():
            # A process that was killed may have left half a line; what it measured is measured again.
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                self._known[row["key"]] = row

    def get(self, key: str) -> dict[str, Any] | None:
        found = self._known.get(key)
        self.num_resumed += found is not None
        return found

    def put(self, key: str, **fields: Any) -> None:
        self.row({"key": key, **fields})


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that stand for values JSON can hold, whatever the order of a dict's keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
