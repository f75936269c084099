"""The table and the picture of a training."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table


def training_table(rows: Seq[dict[str, Any]]) -> Table:
    """A line per evaluation: held-out loss, accuracy of each drafted place, tau; the best one is marked."""
    evals = [row for row in rows if row["kind"] == "eval"]
    table = Table(title="evaluations: held-out loss, accuracy of each drafted place, tau", min_width=60)
    num_places = max((len(places(row, "accuracy")) for row in evals), default=0)
    for name in ("step", "loss", *(f"{k}." for k in range(1, num_places + 1)), "tau"):
        table.add_column(name, justify="right")
    best = next((row["step"] for row in reversed(evals) if row["is_best"]), None)
    for row in evals:
        found = [f"{value:.3f}" for value in places(row, "accuracy")]
        tau = f"{row['tau']:.3f}" if "tau" in row else ""
        mark = "best " if row["step"] == best else ""
        loss = f"{row['loss']:.3f}" if "loss" in row else ""
        table.add_row(str(row["step"]), loss, *found, *[""] * (num_places - len(found)), mark + tau)
    return table


def training_rows(rows_file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of training and those of evaluations in a file, by step.

    Rows of a step that was taken twice, before and after a stop, count once: the later ones.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for line in rows_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("kind") in ("train", "eval"):
            rows[row["kind"], row["step"]] = row
    train, evals = ([rows[key] for key in sorted(rows) if key[0] == kind] for kind in ("train", "eval"))
    return train, evals


def training_picture(rows_file: Path, path: Path) -> None:
    """Writes a PNG from a file of rows: loss, accuracy of each drafted place and tau, over steps and the tokens in them."""
    train, evals = training_rows(rows_file)
    has_tau = any("tau" in row for row in evals)
    figure = Figure(figsize=(7, 2.6 * (2 + has_tau)), layout="constrained")
    panels = figure.subplots(2 + has_tau, 1, sharex=True)
    _line(panels[0], train, "loss", "training", "C0-")
    _line(panels[0], evals, "loss", "held out", "C1o-")
    panels[0].set_ylabel("loss per token")
    for k in range(1, 1 + max((len(places(row, "accuracy")) for row in train + evals), default=0)):
        color = colormaps["viridis"]((k - 1) / 8)
        _line(panels[1], train, f"accuracy_{k}", f"place {k}", "-", color=color)
        _line(panels[1], evals, f"accuracy_{k}", None, "o", color=color)
    panels[1].set_ylabel("accuracy (dots: held out)")
    if has_tau:
        _line(panels[2], evals, "tau", "tau", "C2o-")
        panels[2].set_ylabel("tau on held-out prompts")
    for panel in panels:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, ncols=2)
    if evals and "num_tokens" in evals[-1]:
        # Every step has about as many tokens as any other.
        per_step = evals[-1]["num_tokens"] / evals[-1]["step"]
        top = panels[0].secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
        top.set_xlabel("training tokens")
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)


def _line(panel: Axes, rows: Seq[dict[str, Any]], name: str, label: str | None, style: str, **options: Any) -> None:
    found = [row for row in rows if name in row]
    if found:
        xs, ys = [row["step"] for row in found], [row[name] for row in found]
        panel.plot(xs, ys, style, label=label, linewidth=1, markersize=4, **options)


def places(row: dict[str, Any], name: str) -> list[float]:
    """The values of `name`_1, `name`_2, ... in a row."""
    values: list[float] = []
    while (value := row.get(f"{name}_{len(values) + 1}")) is not None:
        values.append(value)
    return values
