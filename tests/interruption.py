"""What tests of long work share: breaking it off as Ctrl-C does, at a measurement that is certain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from specdec.tracking import JsonlTracker


@contextmanager
def interrupted_after(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the work is interrupted as soon as raw.jsonl has so many rows."""
    write = JsonlTracker.row

    def stop(self: JsonlTracker, row: dict) -> None:
        write(self, row)
        if self.path.name == "raw.jsonl" and len(self.path.read_text().splitlines()) == num_rows:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonlTracker, "row", stop)
        yield
