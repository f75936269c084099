"""Mistakes in following the target's own tokens."""

from __future__ import annotations

from specdec.certificates.checks import in_one_round, with_the_same_seed
from specdec.certificates.mutants.mutant import Mutant
from specdec.drafters import Static, TopK
from specdec.verifiers import Follow

FOLLOW = "specdec.verifiers.follow:Follow.__call__"

TREE = in_one_round(Follow(), Static([[0], [1], [0, 0], [0, 1], [1, 0]]))
SAME_SEED = with_the_same_seed(Follow(), TopK(total=8, depth=3, k=2))

MUTANTS = [
    Mutant(
        "drawn again after a mismatch",
        FOLLOW,
        "found = is_child.any(1)",
        "found = is_child.any(1)\n"
        "        lost = rows[~found]\n"
        "        again = noise.categorical(laws.at(node_B)[lost], PositionKey(depth + 100), lost)\n"
        "        next_token_B = next_token_B.index_copy(0, lost, again)",
        TREE,
    ),
    Mutant(
        "any child taken where the token is not in the tree",
        FOLLOW,
        "found = is_child.any(1)",
        "is_any = tree.parents_BN[rows] == node_B[rows][:, None]\n"
        "        is_child = torch.where(is_child.any(1, keepdim=True), is_child, is_any)\n"
        "        found = is_child.any(1)",
        TREE,
    ),
    Mutant("law of the root at every node", FOLLOW, "laws.at(node_B)", "laws.at(torch.zeros_like(node_B))", TREE),
    Mutant("one number for all depths", FOLLOW, "PositionKey(depth)", "PositionKey(0)", TREE, "key reuse"),
    Mutant("law of a batch mate", FOLLOW, "laws.at(node_B)[rows]", "laws.at(node_B)[: len(rows)]", TREE, "batch mates"),
    Mutant(
        "keyed by depth, not by position",
        "specdec.noise:CounterNoise.uniform",
        "self.positions_B[rows] + (key.depth + 1)",
        "self.rounds_B[rows] * 64 + (key.depth + 1)",
        SAME_SEED,
    ),
]
