"""Prove the acceptance rules exact by enumeration, catch every known mistake, and test the text of a real model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from specdec.certificates import Certificate, certify
from specdec.certificates.catalogue import MUTANTS
from specdec.certificates.certify import best_length
from specdec.certificates.checks import TOLERANCE
from specdec.certificates.mutants import Mutant, mutated, verdict
from specdec.config import CertifyConfig
from specdec.drafters import Coupled, Mixed, Sampled, Static, TopK, chain
from specdec.drafters.growth import GrowingPolicy
from specdec.experiments.certify_real import RealParts
from specdec.experiments.certify_report import (
    alarms_table,
    bias_table,
    law_table,
    numerics_table,
    rules_picture,
    rules_table,
)
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
LEVELS = ("quick", "full", "real", "all")
# Beside worlds of three tokens, larger ones for policies that draw little enough; Gumbel noise needs three.
WIDER = {"chain 2": 5, "top_k 6": 5, "static": 5, "chain 3 iid": 4, "[3] iid": 5}


def run(config: CertifyConfig, command: str) -> int:
    """Certifies every rule with every policy that it accepts and plants the mutants (levels quick, full, all), and tests the
    texts of a real model (levels real, all); exit status 1 when not passed.

    Raises ValueError for an unknown level or rule, or what is wrong with the real model's part, before anything is run.
    """
    if config.level not in LEVELS:
        raise ValueError(f"level={config.level!r} is unknown; use {', '.join(LEVELS)}")
    for name in config.rules:
        if name not in RULES:
            raise ValueError(f"rules: {name!r} is no rule; known are {', '.join(sorted(RULES))}")
    parts = RealParts.check(config, command) if config.level in ("real", "all") else None
    rules, mutants = ([], []) if config.level == "real" else _enumerated(config)
    real, numerics = list[dict[str, Any]](), dict[str, Any]()
    if parts is not None:
        try:
            real, numerics = parts.rows(), parts.numerics()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what is finished is kept; go on with work_dir={config.work_dir}") from None
    # A lossy rule's bias is measured, not judged.
    judged = [*rules, *(row for row in real if row["lossless"]), *([numerics] if numerics else [])]
    passed = all(row["passed"] for row in judged) and all(row["caught"] for row in mutants)
    report = {
        "experiment": "certify",
        "level": config.level,
        "tolerance": TOLERANCE,
        "rules": rules,
        "mutants": mutants,
        "real": real,
        "numerics": numerics,
        "passed": passed,
        **provenance(command),
    }
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files = [config.output]
    console = Console(markup=False, highlight=False)
    if rules:
        rules_picture(rules, output.with_suffix(".png"))
        files.append(str(output.with_suffix(".png")))
        console.print(rules_table(rules))
        caught = sum(row["caught"] for row in mutants)
        print(f"{caught} of {len(mutants)} mutants caught{_missed(mutants)}")
    if real:
        laws = [row for row in real if row["measured"] == "law"]
        console.print(law_table(laws), alarms_table([row for row in laws if "false_alarms" in row]))
        if biased := [row for row in real if row["measured"] == "bias"]:
            console.print(bias_table(biased))
        console.print(numerics_table(numerics))
    print(f"{'passed' if passed else 'NOT PASSED'}: {', '.join(files)}", flush=True)
    return 0 if passed else 1


def _enumerated(config: CertifyConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of every rule with every policy that it accepts, and of every mutant."""
    is_full = config.level in ("full", "all")
    names = list(config.rules) or list(RULES)
    policies = FULL if is_full else QUICK
    pairs = [(rule, tree) for tree in policies for rule in names if RULES[rule]().accepts(policies[tree].spec) is None]
    rules, mutants = list[dict[str, Any]](), list[dict[str, Any]]()
    optima: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("rules", total=len(pairs))
        for rule, tree in pairs:
            found = _certified(RULES[rule](), policies[tree], WIDER.get(tree), is_full)
            if tree not in optima:
                optima[tree] = best_length(policies[tree])
            rules.append(_rule_row(found, tree, optima[tree]))
            progress.update(task, advance=1, description=f"{rule}, {tree}")
        task = progress.add_task("mutants", total=len(MUTANTS))
        for row in _mutant_rows():
            mutants.append(row)
            progress.update(task, advance=1, description=row["name"])
    return rules, mutants


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
        "total_variation": _finite(found.total_variation),
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


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["certify", *sys.argv[1:]]))
