"""The table and the picture of a run of `acceptance`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from specdec.verifiers import RULES


def acceptance_table(rows: Seq[dict[str, Any]]) -> Table:
    """A line per row: tau, and its paired difference to the policy's reference rule, each with its standard error."""
    table = Table(title=_title(rows[0]), title_justify="left")
    for name in ("temperature", "policy", "nodes", "rule", "tau", "difference"):
        table.add_column(name)
    shown = None
    for row in rows:
        group = (row["temperature"], row["policy"])
        if group != shown:
            table.add_section()
        first = (f"{row['temperature']:g}", row["policy"], f"{row['mean_num_nodes']:.1f} of {row['num_nodes']}")
        table.add_row(
            *(first if group != shown else ("", "", "")),
            _rule_name(row),
            with_error(f"{row['tau']:.3f}", row["tau_stderr"]),
            _difference(row),
        )
        shown = group
    return table


def acceptance_picture(rows: Seq[dict[str, Any]], path: Path) -> None:
    """Writes a PNG: a panel per temperature, bars of tau per rule, grouped by policy; lossy rules are hatched."""
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(max(6.0, 2.4 * len(policies)), 0.8 + 2.6 * len(temperatures)), layout="constrained")
    panels = figure.subplots(len(temperatures), 1, sharex=True, squeeze=False)[:, 0]
    for panel, temperature in zip(panels, temperatures, strict=True):
        _draw(panel, [row for row in rows if row["temperature"] == temperature], policies)
    panels[-1].set_xticks(range(len(policies)), [textwrap.fill(policy, 22) for policy in policies], fontsize=8)
    bars = {bar.get_label(): bar for panel in panels for bar in panel.containers}
    figure.legend(bars.values(), bars.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(textwrap.fill(_title(rows[0]), 110), fontsize=9)
    figure.savefig(path, dpi=150)


def with_error(value: str, stderr: float | None) -> str:
    return f"{value} ± {'?' if stderr is None else f'{stderr:.3f}'}"


def _draw(panel: Axes, rows: list[dict[str, Any]], policies: list[str]) -> None:
    names = list(RULES)
    for rule in (name for name in names if any(row["rule"] == name for row in rows)):
        own = [row for row in rows if row["rule"] == rule]
        at = []
        for row in own:
            beside = [row_["rule"] for row_ in rows if row_["policy"] == row["policy"]]
            at.append(policies.index(row["policy"]) + 0.85 * ((beside.index(rule) + 0.5) / len(beside) - 0.5))
        widths = [0.8 / sum(row_["policy"] == row["policy"] for row_ in rows) for row in own]
        errors = [row["tau_stderr"] or 0.0 for row in own]
        panel.bar(
            at,
            [row["tau"] for row in own],
            widths,
            yerr=errors,
            label=_rule_name(own[0]),
            color=colormaps["tab10"](names.index(rule) % 10),
            hatch="" if own[0]["lossless"] else "//",
            edgecolor="black",
            linewidth=0.3,
            error_kw={"linewidth": 0.8},
        )
    panel.set_ylabel(f"tau, temperature {rows[0]['temperature']:g}")
    panel.axhline(1, color="grey", linewidth=0.6)


def _difference(row: dict[str, Any]) -> str:
    if row["reference_rule"] is None:
        return ""
    if row["reference_rule"] == row["rule"]:
        return "reference"
    return with_error(f"{row['difference']:+.3f}", row["difference_stderr"])


def _rule_name(row: dict[str, Any]) -> str:
    return row["rule"] if row["lossless"] else f"{row['rule']} LOSSY"


def _title(row: dict[str, Any]) -> str:
    contexts = f"{row['num_contexts']} contexts of {row['num_prompts']} texts from {row['prompts']}"
    return f"{row['target']} ({row['dtype']}), {row['drafter']}, {contexts}, {row['num_repeats']} repeats each"
