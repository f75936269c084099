"""The best static tree for a node budget, derived from how often a drafter's r-th guess is right at each depth."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Sequence as Seq
from pathlib import Path

from specdec.drafters.growth import Static


def best_choices(accuracies: Seq[Seq[float]], total: int) -> list[list[int]]:
    """The `choices` of the static tree of at most `total` nodes, the root included, with the longest expected acceptance.

    `accuracies[d][r]` is how often the r-th best guess at depth d + 1 is right where everything above it is. Taken as
    independent (Cai et al. 2024, Medusa, section 2.3.3; Chen et al. 2024, Sequoia, section 3.1), a node is accepted with
    the product along its path, and the expected length is their sum. No node beats its parent, so taking the likeliest
    node whose parent is in, again and again, ends at the best tree of every size: no dynamic programme is needed. Nodes
    that are never right are left out. Raises ValueError where no tree can be built.
    """
    _check(accuracies)
    if total < 2 or not any(rate > 0 for rate in accuracies[0]):
        raise ValueError(f"total={total}, accuracies={list(accuracies[0])}: no node besides the root can be of use")
    # The path breaks ties, so that a tree does not depend on the order in which nodes were found.
    open_nodes: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    taken: list[list[int]] = []
    while open_nodes and len(taken) < total:
        value, path = heapq.heappop(open_nodes)
        taken.append([*path])
        if len(path) < len(accuracies):
            for rank, rate in enumerate(accuracies[len(path)]):
                if rate > 0:
                    heapq.heappush(open_nodes, (value * rate, (*path, rank)))
    return sorted(taken[1:], key=lambda path: (len(path), path))


def expected_length(accuracies: Seq[Seq[float]], choices: Seq[Seq[int]]) -> float:
    """The expected number of drafted tokens accepted from the tree of `choices`, under the same assumption."""
    _check(accuracies)
    deepest = max(map(len, choices), default=0)
    widest = max((max(path) for path in choices), default=0)
    if deepest > len(accuracies) or any(widest >= len(rates) for rates in accuracies):
        raise ValueError(f"choices reach depth {deepest} and rank {widest}; accuracies do not")
    return sum(math.prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in choices)


def static(choices: Seq[Seq[int]] | str) -> Static:
    """The static tree of `choices`: rank paths, or a JSON file that holds them under that name, as `specdec accuracies`
    writes it. Raises ValueError as `Static` does, and for a file that holds none."""
    if not isinstance(choices, str):
        return Static(choices)
    try:
        held = json.loads(Path(choices).expanduser().read_text(encoding="utf-8"))["choices"]
        paths = [[int(rank) for rank in path] for path in held]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"choices={choices}: no JSON file with a list of rank paths under `choices` ({type(error).__name__}); "
            f"`specdec accuracies` writes one"
        ) from error
    return Static(paths)


def _check(accuracies: Seq[Seq[float]]) -> None:
    if not accuracies or not all(accuracies):
        raise ValueError("accuracies is empty: give the rates of every rank, depth by depth")
    for depth, rates in enumerate(accuracies):
        if not (all(0 <= rate <= 1 for rate in rates) and sum(rates) <= 1 + 1e-9):
            raise ValueError(f"accuracies[{depth}]={list(rates)} are no rates: each in [0, 1], together at most 1")
