"""A campaign of measurements: where its rows go, how it is gone on with, and what is told at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, RenderableType

from specdec.config import TrackingConfig
from specdec.experiments.building import build
from specdec.experiments.resume import Measurements
from specdec.provenance import provenance
from specdec.tracking import Tracker


class CampaignConfig(Protocol):
    """A dataclass of these fields among others."""

    tracking: TrackingConfig
    work_dir: str


@dataclass(frozen=True)
class Campaign:
    """The tracker that takes the rows, and the measurements in raw.jsonl of the work_dir that outlive the process."""

    tracker: Tracker
    raw: Measurements

    def tell(
        self,
        rows: list[dict[str, Any]],
        draw: Callable[[list[dict[str, Any]], Path], object],
        tables: Callable[[list[dict[str, Any]]], RenderableType],
    ) -> None:
        """Draws the rows into a picture beside them, prints their tables and says where both are."""
        picture = self.tracker.path.with_suffix(".png")
        draw(rows, picture)
        Console(markup=False, highlight=False).print(tables(rows))
        print(f"{len(rows)} rows in {self.tracker.shown_path}, picture in {picture.name} beside it", flush=True)


@contextmanager
def campaign(config: CampaignConfig, command: str, what: str) -> Iterator[Campaign]:
    """Begins a campaign, or goes on with the one in the same `work_dir`; both files are closed at its end.

    Raises KeyboardInterrupt anew where it is broken off, saying where `what` are and how to go on.
    """
    tracker: Tracker = build(config.tracking)
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    raw = Measurements(Path(config.work_dir) / "raw.jsonl")
    try:
        tracker.start({**asdict(config), "provenance": provenance(command)})  # type: ignore[call-overload]
        yield Campaign(tracker, raw)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{what} are in {raw.shown_path}; go on with work_dir={config.work_dir}") from None
    finally:
        raw.finish()
        tracker.finish()
