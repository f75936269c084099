"""Mistakes in speculative sampling on chains."""

from __future__ import annotations

from specdec.certificates.checks import at_the_edges_of_chance, in_one_round
from specdec.certificates.mutants.mutant import Mutant
from specdec.certificates.policies import Alternating
from specdec.drafters import chain
from specdec.verifiers import Rejection

REJECTION = "specdec.verifiers.rejection:Rejection.__call__"
RESIDUAL = "specdec.verifiers.rejection:_residual"
DRAFT_LAW = "specdec.verifiers.rejection:_draft_law"

CHAIN = in_one_round(Rejection(), chain(2, "iid"))
SOFT_CHAIN = in_one_round(Rejection(), chain(2, "iid"), ("sharp", "flat", "close", "independent"))
ALTERNATING = in_one_round(Rejection(), Alternating(3, starts_drawn=False), ("sharp", "independent", "zeros"))

MUTANTS = [
    Mutant(
        "residual not renormalised",
        RESIDUAL,
        "rest / total.clamp_min(torch.finfo(total.dtype).tiny)",
        "rest",
        CHAIN,
        "not a law",
    ),
    Mutant("residual of q - p", RESIDUAL, "target_RV - draft_RV", "draft_RV - target_RV", CHAIN),
    Mutant(
        "rejected token drawn again from p",
        REJECTION,
        "_residual(target_RV, draft_RV), target_RV)",
        "target_RV, target_RV)",
        CHAIN,
    ),
    Mutant("accepted with p", REJECTION, "(p / q)[has_child].clamp_max(1)", "p[has_child]", CHAIN),
    Mutant("accepted with p / q, but q is the root's", DRAFT_LAW, "[rows, depth]", "[rows, 0]", CHAIN),
    Mutant("draft law of a batch mate", DRAFT_LAW, "[rows, depth]", "[: len(rows), depth]", SOFT_CHAIN, "batch mates"),
    Mutant(
        "a fixed draft is taken for a sample of the draft law",
        DRAFT_LAW,
        "is_fixed = tree.node_kinds_BN[rows, child] == DrawKind.FIXED",
        "is_fixed = torch.zeros_like(rows, dtype=torch.bool)",
        ALTERNATING,
    ),
    Mutant(
        "last token from the parent's law",
        REJECTION,
        "laws.at(node_B)[rows]",
        "laws.at(torch.where(tree.num_nodes_B > depth + 1, node_B, node_B - 1).clamp_min(0))[rows]",
        CHAIN,
    ),
    Mutant(
        "one coin for all depths", REJECTION, 'RoundKey("accept", depth)', 'RoundKey("accept", 0)', CHAIN, "key reuse"
    ),
    Mutant(
        "coin and replacement share a number",
        REJECTION,
        'RoundKey("residual", depth)',
        'RoundKey("accept", depth)',
        CHAIN,
        "key reuse",
    ),
    Mutant(
        "coin and draft share a number",
        REJECTION,
        'RoundKey("accept", depth)',
        'RoundKey("draft", depth + 1)',
        CHAIN,
        "key reuse",
    ),
    Mutant(
        "replacements drawn with other rows' numbers",
        REJECTION,
        'RoundKey("residual", depth), rows[stop]',
        'RoundKey("residual", depth), rows[: int(stop.sum())]',
        CHAIN,
        "batch mates",
    ),
    Mutant(
        "accepted when u <= a",
        "specdec.noise:CounterNoise.bernoulli",
        "self.uniform(key, rows) < prob_B",
        "self.uniform(key, rows) <= prob_B",
        at_the_edges_of_chance(Rejection(), chain(2, "iid")),
    ),
    Mutant(
        "replacement at u = 0 is the first token",
        "specdec.noise:CounterNoise.categorical",
        "right=True",
        "right=False",
        at_the_edges_of_chance(Rejection(), chain(2)),
    ),
    Mutant(
        "p without temperature in the test alone",
        REJECTION,
        "for law in (target_RV, draft_RV))",
        "for law in (torch.nn.functional.normalize(target_RV**0.8, p=1), draft_RV))",
        CHAIN,
    ),
    Mutant(
        "token behind the whole chain without temperature",
        REJECTION,
        "noise.categorical(final_RV[stop],",
        "noise.categorical(torch.nn.functional.normalize(\n"
        "                    final_RV[stop] ** torch.where(has_child[stop], 1.0, 0.8).double()[:, None], p=1\n"
        "                ),",
        CHAIN,
    ),
]
