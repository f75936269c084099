"""Prove the acceptance rules exact: enumerate the law of what they emit, and catch every known mistake."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from specdec.certificates import Certificate, certify
from specdec.certificates.catalogue import MUTANTS
from specdec.certificates.certify import best_length
from specdec.certificates.checks import TOLERANCE
from specdec.certificates.mutants import Mutant, mutated, verdict
from specdec.config import CertifyConfig
from specdec.drafters import Coupled, Mixed, Sampled, Static, TopK, chain
from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import AcceptanceRule
from specdec.provenance import provenance
from specdec.verifiers import RULES

QUICK: dict[str, GrowingPolicy] = {
    "chain 2": chain(2),
    "chain 3 iid": chain(3, "iid"),
    "top_k 6": TopK(total=6, depth=2, k=2),
    "[2,2] iid": Sampled([2, 2]),
    "[2,2] without": Sampled([2, 2], "without_replacement"),
    "[2,2] mixed": Mixed([2, 2]),
    "coupled 4": Coupled(total=4, depth=2, k=2),
}
FULL = QUICK | {
    "static": Static([[0], [1], [0, 0], [0, 1], [1, 0]]),
    "chain 4 iid": chain(4, "iid"),
    "[3] iid": Sampled([3]),
    "[3,1] without": Sampled([3, 1], "without_replacement"),
    "[2,1,1] mixed": Mixed([2, 1, 1]),
    "coupled 6": Coupled(total=6, depth=2, k=2),
}
# Beside worlds of three tokens, larger ones for policies that draw little enough; Gumbel noise needs three.
WIDER = {"chain 2": 5, "top_k 6": 5, "static": 5, "chain 3 iid": 4, "[3] iid": 5}


def run(config: CertifyConfig, command: str) -> int:
    """Certifies every rule with every policy that it accepts, then plants the mutants; exit status 1 when not passed.

    Raises ValueError for an unknown level or rule, before anything is run.
    """
    if config.level not in ("quick", "full"):
        raise ValueError(f"level={config.level!r} is unknown; use quick or full")
    for name in config.rules:
        if name not in RULES:
            raise ValueError(f"rules: {name!r} is no rule; known are {', '.join(sorted(RULES))}")
    names = list(config.rules) or list(RULES)
    policies = FULL if config.level == "full" else QUICK
    pairs = [(rule, tree) for tree in policies for rule in names if RULES[rule]().accepts(policies[tree].spec) is None]
    rules, mutants = list[dict[str, Any]](), list[dict[str, Any]]()
    optima: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("rules", total=len(pairs))
        for rule, tree in pairs:
            found = _certified(RULES[rule](), policies[tree], WIDER.get(tree), is_full=config.level == "full")
            if tree not in optima:
                optima[tree] = best_length(policies[tree])
            rules.append(_rule_row(found, tree, optima[tree]))
            progress.update(task, advance=1, description=f"{rule}, {tree}")
        task = progress.add_task("mutants", total=len(MUTANTS))
        for row in _mutant_rows():
            mutants.append(row)
            progress.update(task, advance=1, description=row["name"])
    passed = all(row["passed"] for row in rules) and all(row["caught"] for row in mutants)
    report = {
        "experiment": "certify",
        "level": config.level,
        "tolerance": TOLERANCE,
        "rules": rules,
        "mutants": mutants,
        "real": [],
        "numerics": {},
        "passed": passed,
        **provenance(command),
    }
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    picture = output.with_suffix(".png")
    _draw(rules, picture)
    Console(markup=False, highlight=False).print(_table(rules))
    caught = sum(row["caught"] for row in mutants)
    print(f"{caught} of {len(mutants)} mutants caught{_missed(mutants)}")
    print(f"{'passed' if passed else 'NOT PASSED'}: {config.output}, {picture}", flush=True)
    return 0 if passed else 1


def _certified(rule: AcceptanceRule, policy: GrowingPolicy, wider: int | None, is_full: bool) -> Certificate:
    """A certificate, on the full level with the engine's generations and a round on a larger vocabulary."""
    found = certify(rule, policy, generations=is_full, with_optimum=False)
    if wider is None or not is_full:
        return found
    more = certify(rule, policy, vocab_size=wider, generations=False, with_optimum=False)
    name = f"round of {wider}"
    faults = {name: more.faults["round"]} if "round" in more.faults else {}
    return replace(found, errors=found.errors | {name: more.errors["round"]}, faults=found.faults | faults)


def _rule_row(found: Certificate, tree: str, optimum: float) -> dict[str, Any]:
    spec = FULL[tree].spec
    return {
        "rule": found.rule,
        "kind": "+".join(kind.name.lower() for kind in sorted(spec.kinds)),
        "tree": tree,
        "lossless": found.lossless,
        "max_error": _finite(found.max_error),
        "errors": {name: _finite(error) for name, error in found.errors.items()},
        "faults": found.faults,
        "expected_accepted": _finite(found.expected_accepted),
        "optimum": optimum,
        "passed": found.passed,
    }


def _mutant_rows() -> Iterator[dict[str, Any]]:
    """A mutant counts as caught only where the code as it is passes the same check."""
    clean: dict[int, bool] = {}
    for mutant in MUTANTS:
        if id(mutant.check) not in clean:
            clean[id(mutant.check)] = verdict(mutant.check)[0] == "nothing"
        yield _mutant_row(mutant, clean[id(mutant.check)])


def _mutant_row(mutant: Mutant, is_clean: bool) -> dict[str, Any]:
    with mutated(mutant):
        by, effect = verdict(mutant.check)
    return {"name": mutant.name, "caught": is_clean and by != "nothing", "by": by, "effect": _finite(effect)}


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity: null says that there was nothing to measure."""
    return value if math.isfinite(value) else None


def _missed(mutants: list[dict[str, Any]]) -> str:
    missed = [row["name"] for row in mutants if not row["caught"]]
    return f"; missed: {', '.join(missed)}" if missed else ""


def _table(rows: list[dict[str, Any]]) -> Table:
    title = "Error of the joint law, and expected tokens of a round"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    # Where the terminal is narrow, the last column gives way.
    for name, width in {"tree": 13, "rule": 15, "max error": 9, "expected": 8, "optimum": 7, "kind": None}.items():
        table.add_column(name, no_wrap=True, min_width=width)
    for row in rows:
        state = " LOSSY" if not row["lossless"] else "" if row["passed"] else " WRONG"
        lengths = ("-" if value is None else f"{value:.4f}" for value in (row["expected_accepted"], row["optimum"]))
        error = "-" if row["max_error"] is None else f"{row['max_error']:.1e}"
        table.add_row(row["tree"], row["rule"] + state, error, *lengths, row["kind"])
    return table


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Expected tokens of a round per tree and rule, a line at the most that any lossless rule can reach."""
    trees = list(dict.fromkeys(row["tree"] for row in rows))
    names = [name for name in RULES if any(row["rule"] == name and row["lossless"] for row in rows)]
    figure = Figure(figsize=(1.4 * len(trees) + 2, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        of_rule = {row["tree"]: row["expected_accepted"] or 0.0 for row in rows if row["rule"] == name}
        places = [at + (i - len(names) / 2 + 0.5) * width for at, tree in enumerate(trees) if tree in of_rule]
        axes.bar(places, [of_rule[tree] for tree in trees if tree in of_rule], width, label=name)
    for at, tree in enumerate(trees):
        best = next(row["optimum"] for row in rows if row["tree"] == tree)
        axes.hlines(best, at - 0.45, at + 0.45, colors="black", label="optimum" if at == 0 else "_")
    axes.set_xticks(range(len(trees)), trees, rotation=20, ha="right")
    axes.set_ylabel("expected tokens of a round")
    axes.set_ylim(bottom=1)
    axes.legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["certify", *sys.argv[1:]]))
