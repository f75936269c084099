"""The table at the end of a run of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from specdec.experiments.measurement import Measurement
from specdec.experiments.system import SAME_TEXT
from specdec.request import Result


def comparison_table(
    labels: dict[str, Any],
    speculative: Measurement,
    plain: Measurement | None,
    pairs: Sequence[tuple[Result, Result]],
) -> Table:
    """What speculative decoding cost, beside plain decoding where it was run; `pairs` are their results per prompt."""
    table = Table(title=_title(labels), title_justify="left", min_width=60)
    table.add_column("")
    table.add_column("plain" if labels["drafter"] == "plain" else "speculative")
    columns = [speculative]
    if plain is not None:
        table.add_column("plain")
        columns.append(plain)

    def add(name: str, *values: str) -> None:
        table.add_row(name, *values)

    if speculative.num_prompts != 1:
        add("prompts", *(f"{one.num_prompts}" for one in columns))
    add("tokens", *(f"{one.num_tokens}" for one in columns))
    add("tokens/s", *(f"{one.tokens_per_s:.1f}" for one in columns))
    add("time to first token", *(f"{one.mean_ttft_s * 1000:.0f} ms" for one in columns))
    add("target forwards", *(f"{one.num_target_forwards}" for one in columns))
    add("tau (tokens per forward)", *(f"{one.tau:.2f}" for one in columns))
    add("drafted nodes per forward", *(f"{one.mean_nodes:.1f}" for one in columns))
    add("accepted per depth", *(" ".join(f"{share:.0%}" for share in one.acceptance) or "-" for one in columns))
    for phase in speculative.phases:
        add(f"{phase} time", *(f"{one.phases[phase]:.2f} s ({one.shares[phase]:.0%})" for one in columns))
    if plain is not None:
        table.add_section()
        add("speedup", f"{speculative.tokens_per_s / plain.tokens_per_s:.2f}x", "")
        add("same text", same_text(pairs, labels), "")
    if not labels["lossless"]:
        add("output law", "LOSSY: not the target's", "")
    return table


def same_text(pairs: Sequence[tuple[Result, Result]], labels: dict[str, Any]) -> str:
    """Whether speculative and plain decoding emitted the same token ids, and if not, where they part and why."""
    differing = [(one, other) for one, other in pairs if one.token_ids != other.token_ids]
    if not differing:
        return "yes, token for token"
    where = first_difference(differing[0][0].token_ids, differing[0][1].token_ids)
    text = f"no, from token {where} on" if len(pairs) == 1 else f"{len(pairs) - len(differing)} of {len(pairs)} prompts"
    if len(pairs) > 1:
        text += f"; first difference at token {where} of prompt {pairs.index(differing[0])}"
    if not labels["lossless"]:
        return f"{text} (the rule is LOSSY)"
    if labels["temperature"] > 0 and labels["rule"] not in SAME_TEXT:
        return f"{text} (the law is the same, the random draws are others)"
    if labels["dtype"] != "float32" and labels["numerics"] != "invariant":
        return f"{text} ({labels['dtype']}: near-ties round differently; target.dtype=float32 to be sure)"
    return text


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Index of the first token that differs; the shorter length where one begins the other."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _title(labels: dict[str, Any]) -> str:
    drafter = labels["drafter"] if labels["policy"] == "none" else f"{labels['drafter']}, {labels['policy']}"
    law = "greedy" if labels["temperature"] == 0 else f"temperature {labels['temperature']:g}"
    parts = [f"{labels['target']} ({labels['dtype']})", drafter, f"rule {labels['rule']}", law]
    if labels["batch_size"] > 1:
        parts.append(f"batch {labels['batch_size']}")
    return " · ".join(parts)
