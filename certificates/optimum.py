"""The longest expected acceptance that any lossless rule can reach on given drafts: a linear programme."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from specdec.certificates.oracle import Scripts, TokenSpan, enumerate_outcomes
from specdec.certificates.processes import Case
from specdec.certificates.worlds import TableRound, World
from specdec.drafters.growth import GrowingPolicy

Paths = frozenset[TokenSpan]


def optimum(policy: GrowingPolicy, world: World, case: Case) -> float:
    """Expected tokens of a round, the extra one included, of the best lossless rule for `policy`'s drafts.

    Whatever a rule does, it turns a drawn tree into a span: a path of the tree and one token behind it, with some joint
    probability. It is lossless where those probabilities keep the law of the trees and, continued by the target's own law,
    give the target's law of texts. Both are linear, and so is the expected length (for one level this is the transport
    problem of Sun et al. 2023, SpecTr, section 4).
    """
    trees = _law_of_trees(policy, world, case)
    length = policy.max_depth + 1
    texts = world.stopped_law(case.kind, case.state, length)
    number = {text: len(trees) + i for i, text in enumerate(texts)}
    laws: dict[TokenSpan, dict[TokenSpan, float]] = {}
    rows, columns, values, lengths = list[int](), list[int](), list[float](), list[int]()
    for row, paths in enumerate(trees):
        for path in ((), *paths):
            for token in range(world.vocab_size):
                span = (*path, token)
                if span not in laws:
                    laws[span] = _continued(world, case, span, length)
                # A span that the target cannot emit has no text, and no rule may emit it.
                if laws[span]:
                    column = len(lengths)
                    lengths.append(len(span))
                    entries = [(row, 1.0), *((number[text], p) for text, p in laws[span].items())]
                    rows += [at for at, _ in entries]
                    columns += [column] * len(entries)
                    values += [value for _, value in entries]
    masses = np.array([*trees.values(), *texts.values()])
    equations = coo_matrix((values, (rows, columns)), shape=(len(masses), len(lengths))).tocsr()
    # The masses of trees and of texts both sum to one: with all equations, rounding would make them contradict.
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    result = linprog(-np.array(lengths), A_eq=equations[:-1], b_eq=masses[:-1], method="highs", options=tight)
    assert result.success, result.message
    return -float(result.fun)


def _continued(world: World, case: Case, span: TokenSpan, length: int) -> dict[TokenSpan, float]:
    """The target's law of texts that begin with `span`; none where the target cannot emit it."""
    state = case.state
    for token in span:
        if world.target_KCV[case.kind, state, token] <= 0:
            return {}
        state = int(world.next_CV[state, token])
    return world.continued(case.kind, case.state, span, length)


def _law_of_trees(policy: GrowingPolicy, world: World, case: Case) -> dict[Paths, float]:
    """Trees as sets of token paths: what else is known of a draw cannot lengthen a match."""

    def run(rows: list[Case], scripts: Scripts) -> list[Paths]:
        kinds_B, states_B = (torch.tensor([getattr(row, name) for row in rows]) for name in ("kind", "state"))
        draft = TableRound(world, kinds_B, states_B, [row.limit for row in rows])
        tree = policy.grow(draft, scripts.noise()).tree
        tokens, counts = tree.tokens_BN.tolist(), tree.num_nodes_B.tolist()
        return [
            frozenset(tuple(tokens[row][n] for n in tree.path(node, row)[1:]) for node in range(1, counts[row]))
            for row in range(len(rows))
        ]

    (outcomes,) = enumerate_outcomes(run, [case])
    law: dict[Paths, float] = {}
    for prob, paths in outcomes:
        law[paths] = law.get(paths, 0.0) + prob
    return law
