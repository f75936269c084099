"""The tables and the picture of a certificate."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from specdec.verifiers import RULES


def rules_table(rows: Seq[dict[str, Any]]) -> Table:
    title = "Error of the joint law (LOSSY: its total variation TV), and expected tokens of a round"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    # Where the terminal is narrow, the last column gives way.
    for name, width in {"tree": 13, "rule": 15, "max error": 9, "expected": 8, "optimum": 7, "kind": None}.items():
        table.add_column(name, no_wrap=True, min_width=width)
    for row in rows:
        state = " LOSSY" if not row["lossless"] else "" if row["passed"] else " WRONG"
        lengths = ("-" if value is None else f"{value:.4f}" for value in (row["expected_accepted"], row["optimum"]))
        error = _number(row["max_error"], ".1e")
        if not row["lossless"]:
            error = f"TV {_number(row['total_variation'], '.3f')}"
        table.add_row(row["tree"], row["rule"] + state, error, *lengths, row["kind"])
    return table


def law_table(rows: Seq[dict[str, Any]]) -> Table:
    """Systems whose texts were tested; the tokens needed are those after which the stated fault is found."""
    stated = rows[0]["alternative"]
    title = f"Texts against the target's law ({rows[0]['dtype']}); every test held to p >= {rows[0]['threshold']:.1e}"
    table = _table(title, ["system", "T", "tokens", "max |z|", "min p", "passed", "share", "T off"])
    table.caption = (
        f"share, T off: tokens after which a share of {stated['argmax']:.1%} greedy tokens, or a temperature off "
        f"by {stated['temperature']:.1%}, is found with probability {rows[0]['power']:g}"
    )
    table.caption_justify = "left"
    for row in rows:
        # The tests with a z-score are those for which a stated fault has a direction.
        scores = [abs(test["statistic"]) for test in row["tests"] if test["tokens_needed"]]
        needed = (_number(row["tokens_needed"][name], ",d") for name in ("argmax", "temperature"))
        passed = "yes" if row["passed"] else "NO"
        counts = (
            f"{row['temperature']:g}",
            f"{row['num_tokens']:,d}",
            f"{max(scores):.2f}",
            f"{row['smallest_p']:.1e}",
        )
        table.add_row(_system(row), *counts, passed, *needed)
    return table


def alarms_table(rows: Seq[dict[str, Any]]) -> Table:
    """How often the tests flag parts of plain decoding's own text."""
    names = ["T", "groups x tokens", "level", "any test", "single tests"]
    table = _table("False alarms on plain decoding, with 95 % intervals", names)
    for row in rows:
        found = row["false_alarms"]
        for level in found["levels"]:
            family = level["any_test"]
            shares = f"{_number(family['rate'], '.3f')} [{family['low']:.3f}, {family['high']:.3f}]"
            groups = f"{found['num_groups']} x {found['group_tokens']:,d}"
            single = f"{level['mean_of_tests']:.3f}"
            table.add_row(f"{row['temperature']:g}", groups, f"{level['nominal']:g}", shares, single)
    return table


def bias_table(rows: Seq[dict[str, Any]]) -> Table:
    title = "Bias of LOSSY rules: divergence of the emitted law from the target's, nats per 1,000 tokens"
    table = _table(title, ["system", "T", "tokens", "KL per 1,000", "TV per token", "estimate"])
    for row in rows:
        divergence = _with_error(row["kl_per_1k"], row["kl_per_1k_stderr"], ".1f")
        variation = _with_error(row["total_variation_per_token"], row["total_variation_per_token_stderr"], ".4f")
        counts = (f"{row['temperature']:g}", f"{row['num_tokens']:,d}")
        table.add_row(f"{_system(row)} LOSSY", *counts, divergence, variation, row["estimate"])
    return table


def numerics_table(numerics: dict[str, Any]) -> Table:
    title = f"Where rounding changes the text: {numerics['target']} in {numerics['dtype']}"
    names = ["system", "numerics", "T", "tokens", "same text", "near-ties", "true", "passed"]
    table = _table(title, names)
    table.caption = "near-ties and true divergences per 10,000 tokens; same text as plain decoding from the same seed"
    table.caption_justify = "left"
    for row in numerics["rows"]:
        table.add_row(
            _system(row),
            row["numerics"],
            f"{row['temperature']:g}",
            f"{row['num_tokens']:,d}",
            f"{row['num_prompts_equal']} of {row['num_prompts']}",
            f"{row['near_ties_per_10k']:.1f}",
            f"{row['true_divergences_per_10k']:.1f}",
            "yes" if row["passed"] else "NO",
        )
    return table


def rules_picture(rows: Seq[dict[str, Any]], path: Path) -> None:
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


def _table(title: str, names: Seq[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in names:
        # A number is cut nowhere; where the terminal is narrow, names wrap.
        table.add_column(name, no_wrap=name != "system", overflow="fold")
    return table


def _system(row: dict[str, Any]) -> str:
    """Drafter, policy and rule without their values, which the report has."""
    if row["policy"] == "none":
        return str(row["drafter"])
    return f"{row['drafter']} {row['policy'].partition('(')[0]} {row['rule']}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _with_error(value: float, stderr: float | None, form: str) -> str:
    return f"{value:{form}} ± {'?' if stderr is None else format(stderr, form)}"
