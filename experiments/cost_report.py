"""The table and the picture of what steps cost."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.table import Table


def costs_table(rows: Seq[dict[str, Any]]) -> Table:
    """A line per row; ratios are to the first size of the same context."""
    table = Table("what", "context", "ms", "of one token's", "where", title=_title(rows[0]), title_justify="left")
    for row in rows:
        what, where = _told(row)
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        table.add_row(what, str(row.get("context", "")), f"{1e3 * row['seconds']:.2f}", ratio, where)
    return table


def costs_picture(rows: Seq[dict[str, Any]], path: Path) -> None:
    """Writes a PNG: the time of a forward by nodes, with what its linear layers take alone, and that of a draft by levels."""
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    forwards, drafts = figure.subplots(1, 2)
    contexts = list(dict.fromkeys(row["context"] for row in rows if row["measure"] == "forward"))
    for number, context in enumerate(contexts):
        some = [row for row in rows if row.get("context") == context]
        color, trees = f"C{number}", [row for row in some if row["measure"] == "forward"]
        nodes = [row["num_nodes"] for row in trees]
        forwards.plot(
            nodes, [1e3 * row["seconds"] for row in trees], "o-", color=color, label=f"behind {context} tokens"
        )
        if context == contexts[0]:
            linear = [1e3 * row["linear_s"] for row in trees]
            forwards.plot(nodes, linear, "--", color="0.5", label="linear layers alone")
        levels = [row for row in some if row["measure"] == "draft"]
        drafts.plot([row["num_levels"] for row in levels], [1e3 * row["seconds"] for row in levels], "o-", color=color)
    forwards.set_xscale("log", base=2)
    forwards.xaxis.set_major_formatter(ScalarFormatter())
    forwards.set_xlabel("nodes of the tree, the root included")
    forwards.set_ylabel("ms of the target's forward")
    forwards.legend(fontsize=8)
    drafts.set_xlabel("levels drafted")
    drafts.set_ylabel("ms of the draft")
    for panel in (forwards, drafts):
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    figure.suptitle(_title(rows[0]), fontsize=9)
    figure.savefig(path, dpi=150)


def _told(row: dict[str, Any]) -> tuple[str, str]:
    if row["measure"] == "startup":
        parts = ("import", "load", "setup", "first_token")
        where = ", ".join(f"{name.replace('_', ' ')} {row[f'{name}_s']:.1f} s" for name in parts)
        return f"start, {'cached' if row['cached'] else 'nothing cached'}", where
    if row["measure"] == "draft":
        return f"draft, {row['num_levels']} level{'s' if row['num_levels'] > 1 else ''}", row["drafter"]
    pace = row["weight_bytes"] / row["linear_s"] / 1e9
    return f"forward, {row['num_nodes']} nodes", f"linear layers {1e3 * row['linear_s']:.2f} ms ({pace:.0f} GB/s)"


def _title(row: dict[str, Any]) -> str:
    return f"{row['target']} ({row['dtype']}, {row['numerics']}), {row['device']}"
