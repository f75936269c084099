"""The table and the picture of a benchmark."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from specdec.experiments.contenders import PLAIN

EFFICIENCIES = (1.0, 0.75, 0.5, 0.25)
MARKERS = "osD^vP*X"


def benchmark_table(rows: Seq[dict[str, Any]]) -> Table:
    """A line per system and batch size; speedup and text are against the same system's plain decoding."""
    table = Table(
        title=_title(rows[0]), title_justify="left", caption="speedup, same text: against its own plain decoding"
    )
    names = ("system", "policy", "batch", "tokens/s", "speedup", "tau", "efficiency", "TTFT ms", "same text", "memory")
    for name in names:
        table.add_column(name, overflow="fold")
    shown = rows[0]["batch_size"]
    for row in rows:
        if row["batch_size"] != shown:
            table.add_section()
        shown = row["batch_size"]
        low_high = row["speedup_interval"]
        table.add_row(
            f"{_label(row)}{'' if row['lossless'] else ' LOSSY'}",
            row["policy"],
            str(shown),
            f"{row['tokens_per_s']:.1f}",
            f"{row['speedup']:.2f}x" + (f" ({low_high[0]:.2f}-{low_high[1]:.2f})" if low_high else ""),
            "?" if row["tau"] is None else f"{row['tau']:.2f}",
            "?" if row["efficiency"] is None else f"{row['efficiency']:.0%}",
            f"{1000 * row['ttft_s']:.0f}",
            f"{row['same_text_as_plain']:.0%}",
            "?" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f} MiB",
        )
    return table


def benchmark_picture(rows: Seq[dict[str, Any]], path: Path) -> None:
    """Writes a PNG, a panel per batch size: speedup over tau of whatever drafts, with lines of equal efficiency."""
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    figure = Figure(figsize=(1.0 + 6.0 * len(sizes), 5.2), layout="constrained")
    drafting = [row for row in rows if row["drafter"] != PLAIN and row["tau"] is not None]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    limit = 1.1 * max([row["tau"] for row in drafting], default=2.0)
    for panel, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        _draw(panel, [row for row in drafting if row["batch_size"] == size], systems, limit)
        panel.set_title(f"batch {size}", fontsize=9)
    figure.suptitle(textwrap.fill(_title(rows[0]), 50 + 60 * len(sizes)), fontsize=9)
    figure.savefig(path, dpi=150)


def _draw(panel: Axes, rows: list[dict[str, Any]], systems: list[str], limit: float) -> None:
    taus = np.linspace(1, limit, 2)
    for efficiency in EFFICIENCIES:
        panel.plot(taus, efficiency * taus, color="0.8", linewidth=0.8, zorder=0)
        panel.annotate(f"{efficiency:.0%}", (taus[-1], efficiency * taus[-1]), fontsize=7, color="0.5")
    panel.axhline(1, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
    for row in rows:
        number = systems.index(row["system"])
        low, high = row["speedup_interval"] or (row["speedup"], row["speedup"])
        panel.errorbar(
            row["tau"],
            row["speedup"],
            # A ratio of totals may lie a hair outside its own percentiles.
            yerr=[[max(row["speedup"] - low, 0.0)], [max(high - row["speedup"], 0.0)]],
            fmt=MARKERS[number % len(MARKERS)],
            color=colormaps["tab10"](number % 10),
            capsize=2,
            elinewidth=0.8,
        )
        text = f"{_label(row)}, {row['tokens_per_s']:.0f}/s"
        panel.annotate(text, (row["tau"], row["speedup"]), (5, 4), textcoords="offset points", fontsize=7)
    panel.set_xlabel("tau (tokens per target forward)")
    panel.set_ylabel("speedup over the system's own plain decoding")


def _label(row: dict[str, Any]) -> str:
    return f"{row['system']} {row['drafter']}{', adaptive' if row.get('speculation') == 'adaptive' else ''}"


def _title(row: dict[str, Any]) -> str:
    prompts = f"{row['num_prompts']} prompts of {row['prompts']}"
    return f"{row['target']} ({row['dtype']}), {prompts}, at most {row['max_new_tokens']} new tokens, {row['device']}"
