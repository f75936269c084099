"""Certificates as JSON, as a table and as a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from specdec.certificates.certificate import Certificate
from specdec.certificates.check import TOLERANCE
from specdec.certificates.mutants import Trial


def rule_row(one: Certificate) -> dict[str, Any]:
    """A certificate as JSON; null where a fault left nothing to measure."""
    return {
        "rule": one.rule,
        "lossless": one.lossless,
        "kind": one.kind,
        "tree": one.tree,
        "max_error": _number(one.max_error),
        "expected_accepted": _number(one.expected_accepted),
        "optimum": _number(one.optimum),
        "errors": {name: _number(finding.error) for name, finding in one.findings.items()},
        "faults": one.faults,
        "lengths": {kind: asdict(length) for kind, length in one.lengths.items()},
    }


def mutant_row(trial: Trial) -> dict[str, Any]:
    return {"name": trial.name, "caught": trial.caught, "by": trial.by, "effect": _number(trial.effect)}


def rules_table(certificates: Sequence[Certificate]) -> Table:
    """Rule x draws x tree: the error of the joint law, and the accepted length beside the optimum."""
    table = Table(
        title="Error of the emitted tokens' joint law; drafted tokens accepted per round", title_justify="left"
    )
    for name in ("rule", "draws", "tree"):
        table.add_column(name)
    for name in ("error", "accepted", "optimum"):
        table.add_column(name, justify="right")
    for i, one in enumerate(certificates):
        if i and certificates[i - 1].rule != one.rule:
            table.add_section()
        faults = sorted(set(one.faults.values()))
        error = ", ".join(faults) if math.isnan(one.max_error) else f"{one.max_error:.0e}"
        if not one.lossless:
            error += " LOSSY"
        elif faults:
            error += " WRONG"
        kind = one.kind.replace("_replacement", "")
        table.add_row(one.rule, kind, one.tree, error, *(_shown(x) for x in (one.expected_accepted, one.optimum)))
    return table


def verdict(certificates: Sequence[Certificate], trials: Sequence[Trial], passed: bool) -> str:
    """Mutants and outcome in a few lines; what went wrong by name."""
    by = Counter(trial.by for trial in trials if trial.caught)
    counts = ", ".join(f"{name} {count}" for name, count in by.most_common())
    lines = [f"{by.total()} of {len(trials)} mutants caught ({counts})"]
    lines += [f"NOT CAUGHT: {trial.name}" for trial in trials if not trial.caught]
    lines += [
        f"WRONG: {one.rule} on {one.kind} {one.tree}: {name} ({fault})"
        for one in certificates
        if not one.holds
        for name, fault in one.faults.items()
    ]
    exact = sum(one.lossless and one.holds for one in certificates)
    lossy = sum(not one.lossless for one in certificates)
    exempt = f", {lossy} of LOSSY rules exempt" if lossy else ""
    outcome = "PASSED" if passed else "FAILED"
    lines.append(f"{outcome}: {exact} of {len(certificates) - lossy} exact to {TOLERANCE:.0e}{exempt}")
    return "\n".join(lines)


def save_picture(certificates: Sequence[Certificate], path: Path) -> None:
    """Accepted length per rule against the optimum, a column for each kind of tree; LOSSY rules as crosses."""
    drafts = list(dict.fromkeys((one.kind, one.tree) for one in certificates))
    rules = list(dict.fromkeys(one.rule for one in certificates))
    figure = Figure(figsize=(4 + 0.42 * len(drafts), 5.5), layout="constrained")
    axes = figure.add_subplot()
    best = {(one.kind, one.tree): one.optimum for one in certificates}
    axes.hlines(
        [best[draft] for draft in drafts],
        [x - 0.4 for x in range(len(drafts))],
        [x + 0.4 for x in range(len(drafts))],
        colors="black",
        label="optimum of lossless rules",
    )
    for number, rule in enumerate(rules):
        own = [one for one in certificates if one.rule == rule]
        # Side by side, so that rules that accept the same are all seen.
        shift = 0.7 * ((number + 0.5) / len(rules) - 0.5)
        axes.plot(
            [drafts.index((one.kind, one.tree)) + shift for one in own],
            [one.expected_accepted for one in own],
            "o" if own[0].lossless else "x",
            markersize=4,
            label=rule if own[0].lossless else f"{rule} (LOSSY)",
        )
    labels = [f"{kind.replace('_replacement', '')} {tree}" for kind, tree in drafts]
    axes.set_xticks(range(len(drafts)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("drafted tokens accepted per round")
    axes.set_title("Accepted length against the optimum, mean over sharp, flat, close, independent and holed laws")
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
