"""The tables and the picture of a load."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table

from specdec.experiments.load_rows import crossover

Row = dict[str, Any]
AXES = {"concurrency": "users at once", "rate": "requests per second"}
UNITS = {"concurrency": "users", "rate": "/s"}


def load_tables(rows: Seq[Row]) -> Group:
    """Speed and latencies at every point, where speculation stops paying, and what sharing prefixes spares."""
    parts: list[Any] = [_title(rows[0]), _speed_table(rows)]
    for (name, kind), speedups in _speedups(rows).items():
        point = crossover(speedups)
        if point is not None:
            slower = ", ".join(f"{load:g}" for load, speedup in speedups if load < point and speedup < 1)
            parts.append(
                f"{name}: faster than plain decoding up to about {point:.1f} {AXES[kind]}"
                + (f", but slower at {slower}" if slower else "")
            )
    if len({row["share_prefixes"] for row in rows if row["share_prefixes"] is not None}) > 1:
        parts.append(prefix_table(rows))
    return Group(*parts)


def prefix_table(rows: Seq[Row]) -> Table:
    """Prompt tokens computed and time to first token, with prefixes shared and not."""
    table = Table(title="\nsharing prefixes", title_justify="left")
    for name in ("load", "contender", "prompt tokens", "computed", "not shared", "TTFT ms p50/p95", "not shared"):
        table.add_column(name)
    for row in rows:
        other = next((one for one in rows if _place(one) == _place(row) and one["share_prefixes"] is False), None)
        if row["share_prefixes"] and other is not None:
            computed = [_count(one.get("num_prompt_tokens_computed")) for one in (row, other)]
            waits = [_times(one["ttft_p50_s"], one["ttft_p95_s"]) for one in (row, other)]
            table.add_row(_load(row), row["contender"], _count(row.get("num_prompt_tokens")), *computed, *waits)
    return table


def load_picture(rows: Seq[Row], path: Path) -> None:
    """Writes a PNG. A line of panels per kind of load: tokens per second over the load, inter-token latency over tokens per
    second, time to first token over the load; a vertical line where speculation stops paying."""
    kinds = [kind for kind in AXES if any(row[kind] is not None for row in rows)]
    figure = Figure(figsize=(14, 0.8 + 4.0 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 3, squeeze=False)
    for line, kind in zip(panels, kinds, strict=True):
        _draw(line, [row for row in rows if row[kind] is not None], kind)
    entries = {label: one for one, label in zip(*panels[0, 0].get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(textwrap.fill(_title(rows[0]), 150), fontsize=9)
    figure.savefig(path, dpi=150)


def _draw(panels: Seq[Axes], rows: list[Row], kind: str) -> None:
    speed, between, first = panels
    names = list(dict.fromkeys(row["name"] for row in rows))
    colors = {name: colormaps["tab10"](i % 10) for i, name in enumerate(dict.fromkeys(r["contender"] for r in rows))}
    for name in names:
        own = [row for row in rows if row["name"] == name]
        loads = [row[kind] for row in own]
        style: dict[str, Any] = {
            "color": colors[own[0]["contender"]],
            "linestyle": "--" if own[0]["share_prefixes"] is False and name != own[0]["contender"] else "-",
            "marker": "o",
            "markersize": 4,
        }
        speeds = [row["tokens_per_s"] for row in own]
        speed.plot(loads, speeds, label=name, **style)
        between.plot(*_known(speeds, [row["itl_p50_s"] for row in own]), **style)
        between.plot(*_known(speeds, [row["itl_p95_s"] for row in own]), **{**style, "alpha": 0.35})
        first.plot(*_known(loads, [row["ttft_p50_s"] for row in own]), **style)
        first.plot(*_known(loads, [row["ttft_p95_s"] for row in own]), **{**style, "alpha": 0.35})
    for (name, _), speedups in _speedups(rows).items():
        if (point := crossover(speedups)) is not None:
            contender = next(row["contender"] for row in rows if row["name"] == name)
            speed.axvline(point, color=colors[contender], linewidth=0.8, linestyle=":")
    for panel in (speed, first):
        panel.set_xscale("log", base=2)
        ticks = sorted({row[kind] for row in rows})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xlabel(AXES[kind])
    speed.set_ylabel("tokens/s")
    between.set_xlabel("tokens/s")
    between.set_ylabel("ms between tokens, p50 (pale: p95)")
    first.set_ylabel("ms to first token, p50 (pale: p95)")


def _speed_table(rows: Seq[Row]) -> Table:
    columns: dict[str, Callable[[Row], str]] = {
        "load": _load,
        "contender": lambda row: row["name"] + ("" if row["lossless"] else " LOSSY"),
        "tokens/s": lambda row: f"{row['tokens_per_s']:.1f}",
        "speedup": lambda row: f"{row['speedup']:.2f}x" if "speedup" in row else "",
        "tau": lambda row: "" if row.get("tau") is None else f"{row['tau']:.2f}",
        "TTFT ms": lambda row: _times(row["ttft_p50_s"], row["ttft_p95_s"]),
        "ITL ms": lambda row: _times(row["itl_p50_s"], row["itl_p95_s"], row["itl_p99_s"]),
        "busy": lambda row: "" if row.get("occupancy") is None else f"{row['occupancy']:.0%}",
        "preempted": lambda row: _count(row.get("num_preemptions")),
        "differing": lambda row: f"{row['num_differing']}/{row['num_compared']}",
    }
    table = Table(caption="TTFT: p50/p95, ITL: p50/p95/p99; busy: occupancy; differing: texts unlike plain decoding's")
    for name in columns:
        table.add_column(name, overflow="fold")
    shown = None
    for row in rows:
        if _load(row) != shown:
            table.add_section()
        shown = _load(row)
        table.add_row(*(text(row) for text in columns.values()))
    return table


def _speedups(rows: Seq[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Per name and kind of load, of contenders that speculate: loads and speedups over plain decoding."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["system"] == "specdec" and row["speculation"] != "plain" and "speedup" in row:
            kind = _kind(row)
            found.setdefault((row["name"], kind), []).append((row[kind], row["speedup"]))
    return {key: sorted(points) for key, points in found.items()}


def _known(xs: Seq[float], ys: Seq[float | None]) -> tuple[list[float], list[float]]:
    """The points with both coordinates, the second in milliseconds."""
    pairs = [(x, 1000 * y) for x, y in zip(xs, ys, strict=True) if y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _kind(row: Row) -> str:
    return next(kind for kind in AXES if row[kind] is not None)


def _load(row: Row) -> str:
    kind = _kind(row)
    return f"{row[kind]:g} {UNITS[kind]}"


def _place(row: Row) -> tuple[Any, ...]:
    return row["contender"], row["concurrency"], row["rate"]


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _times(*seconds: float | None) -> str:
    return "/".join("?" if one is None else f"{1000 * one:.0f}" for one in seconds)


def _title(row: Row) -> str:
    return (
        f"{row['target']} ({row['dtype']}), {row['drafter_asked']}, {row['num_asked']} requests of {row['prompts']}, "
        f"at most {row['max_batch_size']} at once, medians of {row['num_repeats']}"
    )
