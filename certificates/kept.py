"""Finished pieces of long work, kept from one process to the next."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.provenance import revision
from specdec.tracking import JsonlTracker


class Kept:
    """Pieces by key and number in a file of lines; whoever opens the same file again finds those that were finished, each with
    the `revision` of the code that made it.

    The folder is made where there is none; without a path pieces last as long as this object. Raises ValueError where the
    file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._known: dict[tuple[str, int], dict[str, Any]] = {}
        self._tracker: JsonlTracker | None = None
        self._revision = revision()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tracker = JsonlTracker(path)
        for line in path.read_text(encoding="utf-8").splitlines():
            # A process that was killed may have left half a line; that piece is made again.
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                self._known[row["key"], row["batch"]] = row

    def get(self, key: str, number: int) -> dict[str, Any] | None:
        return self._known.get((key, number))

    def put(self, key: str, number: int, piece: dict[str, Any]) -> dict[str, Any]:
        """The piece as it is kept, written at once; numbers may be infinite, which Python's JSON reads back."""
        row = {"key": key, "batch": number, "revision": self._revision, **piece}
        self._known[key, number] = row
        if self._tracker is not None:
            self._tracker.row(row)
        return row

    def finish(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits for values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def derived_seed(*parts: object) -> int:
    """A seed of its own for every list of parts."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """On a terminal only, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress
