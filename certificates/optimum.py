"""How many drafted tokens a lossless rule can accept at most, whatever it does: a linear programme over all of them.

A rule sees a drawn tree t and decides, perhaps by chance, on a path v of t and one extra token y; behind them the target
goes on by itself. So a rule is a joint law s(t, v, y) whose marginal over trees is the drafting law. It is lossless if the
tokens follow the target's law, prefix by prefix: with M(v) the probability that the accepted path goes through v,

    M(v y) + sum_t s(t, v, y) = p(y | v) M(v),        M() = 1.

What it accepts is the sum of all M(v), v not empty, which the programme maximises. A coupling of whole target sequences to
trees would promise more: there, tokens behind a mismatch may make up for the matches of other trees, and a rule cannot,
as the target goes on by itself.
"""

from __future__ import annotations

import torch
from scipy.optimize import linprog
from scipy.sparse import coo_array

from specdec.certificates.oracle import Scripts, TokenSpan, enumerate_outcomes, law_of
from specdec.certificates.processes import Case
from specdec.certificates.worlds import TableRound, World
from specdec.drafters.growth import GrowingPolicy
from specdec.tree import TokenTree

# Of a tree only its paths matter: what a rule may accept, not how it was drawn.
Paths = frozenset[TokenSpan]


def drafting_laws(policy: GrowingPolicy, world: World, cases: list[Case]) -> list[dict[Paths, float]]:
    """Per case the law of the drafted trees."""

    def run(rows: list[Case], scripts: Scripts) -> list[Paths]:
        kinds_B, states_B = (torch.tensor([getattr(row, name) for row in rows]) for name in ("kind", "state"))
        tree = policy.grow(TableRound(world, kinds_B, states_B, [row.limit for row in rows]), scripts.noise()).tree
        return [_paths(tree, row) for row in range(len(rows))]

    return [law_of(outcomes) for outcomes in enumerate_outcomes(run, cases)]


def optimum(world: World, kind: int, state: int, drafting_law: dict[Paths, float]) -> float:
    """The expected number of accepted tokens, the extra one not counted, of the best lossless rule for such drafts.

    Raises RuntimeError where the solver gives up.
    """
    nodes = sorted({path for tree in drafting_law for path in tree})
    target = {path: world.target_KCV[kind, world.walk(path, state)].tolist() for path in nodes}
    # Unknowns: M of every node but the root, then s of every tree, path and possible extra token.
    column = {path: i for i, path in enumerate(nodes[1:])}
    ends = [
        (number, path, token)
        for number, tree in enumerate(drafting_law)
        for path in sorted(tree)
        for token, p in enumerate(target[path])
        if p > 0
    ]
    spans = [
        (path, token) for path in nodes for token, p in enumerate(target[path]) if p > 0 or (*path, token) in column
    ]
    row = {(*path, token): len(drafting_law) + i for i, (path, token) in enumerate(spans)}
    entries: list[tuple[int, int, float]] = []
    wanted = [*drafting_law.values(), *(0.0 for _ in spans)]
    for i, (number, path, token) in enumerate(ends, len(column)):
        span = (*path, token)
        entries += [(number, i, 1.0), (row[span], i, 1.0)]
    for path, token in spans:
        span = (*path, token)
        at = row[span]
        if span in column:
            entries.append((at, column[span], 1.0))
        if path:
            entries.append((at, column[path], -target[path][token]))
        else:
            wanted[at] = target[path][token]
    rows, columns, values = zip(*entries, strict=True)
    width = len(column) + len(ends)
    matrix = coo_array((values, (rows, columns)), shape=(len(wanted), width))
    gain = [-1.0] * len(column) + [0.0] * len(ends)
    # Presolve takes trees and tokens less likely than its tolerance for contradictions.
    exact = {"presolve": False, "primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(gain, A_eq=matrix.tocsr(), b_eq=wanted, method="highs", options=exact)
    if found.status != 0:
        raise RuntimeError(f"the optimum was not found: {found.message}")
    return max(0.0, -float(found.fun))


def _paths(tree: TokenTree, row: int) -> Paths:
    tokens = tree.tokens_BN[row].tolist()
    nodes = range(int(tree.num_nodes_B[row]))
    return frozenset(tuple(tokens[n] for n in tree.path(node, row)[1:]) for node in nodes)
