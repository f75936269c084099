"""Trackers: where an experiment's rows and summary go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

WANDB_MODES = ("offline", "online", "disabled")


class Tracker(Protocol):
    """Takes one experiment's resolved config, its rows as they come, and its summary; `path` is the file of the rows."""

    path: Path

    @property
    def shown_path(self) -> str: ...

    def start(self, config: Mapping[str, Any]) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def finish(self) -> None: ...


class JsonlTracker:
    """Appends each row to a file as one line of JSON, at once, so that an interrupted run keeps what it has.

    The file is opened here: raises ValueError where that fails, before anything expensive has been done.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write rows to {self.path}: {error.strerror or error}") from error
        if self._ends_inside_a_line():
            self._file.write("\n")

    @property
    def shown_path(self) -> str:
        """The path as a reader of the terminal wants it: relative where it lies below the working directory."""
        path = self.path.absolute()
        return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

    def start(self, config: Mapping[str, Any]) -> None:
        """A file of rows does not repeat the config; Hydra's run folder holds it."""

    def row(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Rows only: every number of a summary follows from them."""

    def _ends_inside_a_line(self) -> bool:
        content = self.path.read_bytes() if self.path.is_file() else b""
        return bool(content) and not content.endswith(b"\n")

    def finish(self) -> None:
        """Closes the file; one that no row was written to is not left behind."""
        self._file.close()
        if self.path.is_file() and self.path.stat().st_size == 0:
            self.path.unlink()


class WandbTracker(JsonlTracker):
    """Logs to Weights & Biases as well; `mode` is offline (files in `dir` only), online or disabled.

    Raises ValueError for another mode, or where wandb refuses to start.
    """

    def __init__(self, path: str | Path, mode: str, project: str, dir: str, name: str | None = None) -> None:
        if mode not in WANDB_MODES:
            raise ValueError(f"tracking.mode={mode} is unknown; choose one of {', '.join(WANDB_MODES)}")
        super().__init__(path)
        self._options: dict[str, Any] = {"mode": mode, "project": project, "dir": dir, "name": name}
        self._run: Any = None
        self._num_rows = 0

    def start(self, config: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(**self._options, config=dict(config), settings=wandb.Settings(silent=True))
        except wandb.errors.Error as error:
            raise ValueError(f"tracking=wandb with mode={self._options['mode']}: {error}") from error

    def row(self, row: Mapping[str, Any]) -> None:
        super().row(row)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self._run.log({**numbers, **{k: row[k] for k in ("prompt", "text") if k in row}}, step=self._num_rows)
        self._num_rows += 1

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def finish(self) -> None:
        super().finish()
        if self._run is not None:
            self._run.finish()
