"""The tables and the picture of a run of `acceptance`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table

from specdec.verifiers import RULES


def acceptance_tables(rows: Seq[dict[str, Any]]) -> Group:
    """A table per policy, a line per temperature and rule: tau and its paired difference to the policy's reference rule, each
    with its standard error."""
    policies = dict.fromkeys(row["policy"] for row in rows)
    return Group(_title(rows[0]), *(_table([row for row in rows if row["policy"] == one]) for one in policies))


def acceptance_picture(rows: Seq[dict[str, Any]], path: Path) -> None:
    """Writes a PNG: a panel per temperature, bars of tau per rule, grouped by policy; lossy rules are hatched."""
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(max(6.0, 2.4 * len(policies)), 0.8 + 2.6 * len(temperatures)), layout="constrained")
    panels = figure.subplots(len(temperatures), 1, sharex=True, squeeze=False)[:, 0]
    for panel, temperature in zip(panels, temperatures, strict=True):
        _draw(panel, [row for row in rows if row["temperature"] == temperature], policies)
    # One value to a line: `branching=[3, 1, 1, 1, 1]` stays whole.
    ticks = [re.sub(r"\(|, (?=\w+=)", "\n", policy.removesuffix(")")) for policy in policies]
    panels[-1].set_xticks(range(len(policies)), ticks, fontsize=8)
    entries = {label: bar for panel in panels for bar, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(textwrap.fill(_title(rows[0]), 110), fontsize=9)
    figure.savefig(path, dpi=150)


def with_error(value: str, stderr: float | None) -> str:
    return f"{value} ± {'?' if stderr is None else f'{stderr:.3f}'}"


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    table = Table(title=f"\n{first['policy']}", title_justify="left", min_width=60)
    for name in ("temperature", "nodes", "rule", "tau", f"difference to {first['reference_rule'] or 'no rule'}"):
        table.add_column(name)
    shown = None
    for row in rows:
        is_first = row["temperature"] != shown
        if is_first:
            table.add_section()
        where = (f"{row['temperature']:g}", f"{row['mean_num_nodes']:.1f} of {row['num_nodes']}")
        tau = with_error(f"{row['tau']:.3f}", row["tau_stderr"])
        table.add_row(*(where if is_first else ("", "")), _rule_name(row), tau, _difference(row))
        shown = row["temperature"]
    return table


def _draw(panel: Axes, rows: list[dict[str, Any]], policies: list[str]) -> None:
    places: dict[str, list[tuple[float, float, dict[str, Any]]]] = {name: [] for name in RULES}
    for group, policy in enumerate(policies):
        beside = [row for row in rows if row["policy"] == policy]
        width = 0.8 / len(beside)
        for i, row in enumerate(beside):
            places[row["rule"]].append((group + (i + 0.5) * width - 0.4, width, row))
    for number, bars in enumerate(places.values()):
        if bars:
            at, widths, own = zip(*bars, strict=True)
            panel.bar(
                at,
                [row["tau"] for row in own],
                widths,
                yerr=[row["tau_stderr"] or 0.0 for row in own],
                label=_rule_name(own[0]),
                color=colormaps["tab10"](number % 10),
                hatch="" if own[0]["lossless"] else "//",
                edgecolor="black",
                linewidth=0.3,
                error_kw={"linewidth": 0.8},
            )
    panel.set_ylabel(f"tau, temperature {rows[0]['temperature']:g}")


def _difference(row: dict[str, Any]) -> str:
    if row["reference_rule"] in (None, row["rule"]):
        return ""
    return with_error(f"{row['difference']:+.3f}", row["difference_stderr"])


def _rule_name(row: dict[str, Any]) -> str:
    return row["rule"] if row["lossless"] else f"{row['rule']} LOSSY"


def _title(row: dict[str, Any]) -> str:
    contexts = f"{row['num_contexts']} contexts of {row['num_prompts']} texts from {row['prompts']}"
    return f"{row['target']} ({row['dtype']}), {row['drafter']}, {contexts}, {row['num_repeats']} repeats each"
