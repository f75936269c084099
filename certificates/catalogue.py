"""The known mistakes: one wrong edit of the production code each, and the check that must catch it."""

from __future__ import annotations

from functools import partial

from specdec.certificates.catalogue_engine import ENGINE_MUTANTS
from specdec.certificates.checks import Alternating, seed_mismatch
from specdec.certificates.mutants import (
    Check,
    Mutant,
    at_the_edges_of_chance,
    in_one_round,
    in_recorded_laws,
)
from specdec.drafters import Coupled as CoupledPolicy
from specdec.drafters import Mixed, Sampled, Static, TopK, chain
from specdec.verifiers import Block, Coupled, Follow, KSeq, Recursive, Rejection, Traversal

FOLLOW = "specdec.verifiers.follow:Follow.__call__"
REJECTION = "specdec.verifiers.rejection:Rejection.__call__"
RESIDUAL = "specdec.verifiers.rejection:_residual"
DRAFT_LAW = "specdec.verifiers.rejection:_draft_law"
DRAW = "specdec.drafters.sampled:Sampled._draw_level"

CHAIN = in_one_round(Rejection(), chain(2, "iid"))
SOFT_CHAIN = in_one_round(Rejection(), chain(2, "iid"), ("sharp", "flat", "close", "independent"))
ALTERNATING = in_one_round(Rejection(), Alternating(), ("sharp", "independent", "zeros"))
TREE = in_one_round(Follow(), Static([[0], [1], [0, 0], [0, 1], [1, 0]]))
IID = Sampled([2, 2])
WITHOUT = Sampled([2, 2], "without_replacement")
MIXED = Mixed([2, 2])

BLOCK = "specdec.verifiers.block:Block.__call__"
RECURSIVE = "specdec.verifiers.recursive:Recursive.__call__"
TRAVERSAL = "specdec.verifiers.traversal:_State"
KSEQ = "specdec.verifiers.kseq:KSeq.__call__"
DRAWN_LAW = "specdec.verifiers.siblings:Siblings.laws"

BLOCK_CHAIN = in_one_round(Block(), chain(3, "iid"))
RECURSIVE_IID = in_one_round(Recursive(), Sampled([3, 1]))
RECURSIVE_WITHOUT = in_one_round(Recursive(), Sampled([3], "without_replacement"))
RECURSIVE_MIXED = in_one_round(Recursive(), Mixed([2, 2]))
TRAVERSAL_WITHOUT = in_one_round(Traversal(), WITHOUT)
KSEQ_IID = in_one_round(KSeq(), Sampled([3]))
COUPLED_TREE = in_one_round(Coupled(), CoupledPolicy(total=6, depth=2, k=2))

MUTANTS = [
    # Speculative sampling on chains.
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
    # Following the target.
    Mutant(
        "drawn again after a mismatch",
        FOLLOW,
        "child = _child(parents[row], tokens[row], node, token)",
        "child = _child(parents[row], tokens[row], node, token)\n"
        "            if child is None:\n"
        "                again = noise.categorical(laws_BV[[row]], PositionKey(depth + 100), int_tensor([row]))\n"
        "                next_tokens[row] = int(again)",
        TREE,
    ),
    Mutant(
        "any child taken where the token is not in the tree",
        FOLLOW,
        "child = _child(parents[row], tokens[row], node, token)",
        "child = _child(parents[row], tokens[row], node, token)\n"
        "            if child is None and node in parents[row]:\n"
        "                child = parents[row].index(node)",
        TREE,
    ),
    Mutant("law of the root at every node", FOLLOW, "[path[-1] for path in paths]", "[0 for path in paths]", TREE),
    Mutant("one number for all depths", FOLLOW, "PositionKey(depth)", "PositionKey(0)", TREE, "key reuse"),
    Mutant("law of a batch mate", FOLLOW, "laws_BV[rows_R]", "laws_BV[: len(rows)]", TREE, "batch mates"),
    Mutant(
        "keyed by depth, not by position",
        "specdec.noise:CounterNoise.keys",
        "self.positions_B[rows] + (key.depth + 1)",
        "self.rounds_B[rows] * 64 + (key.depth + 1)",
        Check("other tokens", partial(seed_mismatch, Follow(), TopK(total=8, depth=3, k=2))),
    ),
    # Block verification.
    Mutant(
        "block with early exit",
        BLOCK,
        "final_BV = final_BV.index_copy(0, rows[passed], rest_RV[passed])",
        "final_BV = final_BV.index_copy(0, rows[passed], rest_RV[passed])\n        rows = rows[passed]",
        BLOCK_CHAIN,
    ),
    Mutant(
        "block with the token-level residual",
        BLOCK,
        "weight_R[goes_on, None] * target_RV[goes_on] - draft_RV",
        "target_RV[goes_on] - draft_RV",
        BLOCK_CHAIN,
    ),
    Mutant(
        "block whose prefixes pass with their weight",
        BLOCK,
        "torch.where(short > 0, mass / short.clamp_min(torch.finfo(mass.dtype).tiny), 0)",
        "weight_R[goes_on]",
        BLOCK_CHAIN,
    ),
    Mutant("block with one coin", BLOCK, 'RoundKey("accept", node)', 'RoundKey("accept", 1)', BLOCK_CHAIN, "key reuse"),
    # Trees tested child by child.
    Mutant(
        "without replacement corrected as i.i.d.",
        DRAWN_LAW,
        "torch.where(gone.any(1, keepdim=True), normalised(left, law_RV), law_RV)",
        "law_RV",
        RECURSIVE_WITHOUT,
    ),
    Mutant(
        "without replacement, not renormalised in the test",
        DRAWN_LAW,
        "normalised(left, law_RV)",
        "left",
        RECURSIVE_WITHOUT,
    ),
    Mutant(
        "fixed children with a soft law",
        DRAWN_LAW,
        "torch.where((kinds == DrawKind.FIXED)[:, None], one_hot, law_RV)",
        "law_RV.clamp_min(0.1)",
        RECURSIVE_MIXED,
    ),
    Mutant(
        "duplicates merged without multiplicity",
        "specdec.verifiers.siblings:Siblings.__init__",
        "drawn = tree.draws_BM >= 0",
        "same = tree.draws_BM[:, :, None] == tree.draws_BM[:, None]\n"
        "    drawn = (tree.draws_BM >= 0) & ~same.tril(-1).any(2)",
        RECURSIVE_IID,
    ),
    Mutant(
        "siblings all tested against the target's law",
        RECURSIVE,
        "rest_RV = rest_RV.index_copy(0, lost, normalised(left, rest_RV[lost]))",
        "pass",
        RECURSIVE_IID,
    ),
    Mutant(
        "siblings share a coin",
        RECURSIVE,
        'RoundKey("accept", draws)',
        'RoundKey("accept", 0)',
        RECURSIVE_IID,
        "key reuse",
    ),
    # Trees from the leaves up.
    Mutant(
        "traversal without the parent's weight update",
        f"{TRAVERSAL}._take_off",
        "torch.where(whole > 0, mass / whole.clamp_min(torch.finfo(mass.dtype).tiny), 1)",
        "weight",
        TRAVERSAL_WITHOUT,
    ),
    Mutant(
        "traversal with the token-level residual",
        f"{TRAVERSAL}._take_off",
        "weight[:, None] * law_RV - draft_RV",
        "law_RV - draft_RV",
        TRAVERSAL_WITHOUT,
    ),
    Mutant(
        "traversal whose children forget their parent's weight",
        f"{TRAVERSAL}.descend",
        "self.weight_BN[going, nodes] * r / q",
        "r / q",
        TRAVERSAL_WITHOUT,
    ),
    Mutant(
        "traversal that goes on with the untouched law",
        f"{TRAVERSAL}._take_off",
        "self.law_BNV[rows, nodes] = normalised(left, law_RV)",
        "pass",
        TRAVERSAL_WITHOUT,
    ),
    Mutant(
        "traversal that forgets why a child was given up",
        f"{TRAVERSAL}.give_up",
        "self._via_BN[rows, nodes]",
        "self._siblings.draws_BNJ[rows, parents, 0]",
        TRAVERSAL_WITHOUT,
    ),
    # All draws with one acceptance probability.
    Mutant(
        "k-seq without the division factor",
        "specdec.verifiers.kseq:_kept",
        "target_RV / high[:, None]",
        "target_RV",
        KSEQ_IID,
    ),
    Mutant(
        "k-seq whose residual knows one draw only",
        KSEQ,
        "(1 - (1 - beta_R) ** count_R[on]) / beta_R.clamp_min(torch.finfo(beta_R.dtype).tiny)",
        "torch.ones_like(beta_R)",
        KSEQ_IID,
    ),
    # Gumbel noise that the drafter sees.
    Mutant(
        "one Gumbel number for all depths",
        "specdec.verifiers.coupled:_Gumbel.categorical",
        "GumbelKey(key.depth)",
        "GumbelKey(0)",
        COUPLED_TREE,
    ),
    Mutant(
        "Gumbel noise keyed by round",
        "specdec.noise:CounterNoise.keys",
        "self.positions_B[rows] + (key.depth + 1)",
        "self.rounds_B[rows] * 64 + (key.depth + 1)",
        Check("other tokens", partial(seed_mismatch, Coupled(), TopK(total=8, depth=3, k=2))),
    ),
    # Drawing trees.
    Mutant(
        "without replacement, not renormalised",
        DRAW,
        "remaining / total.clamp_min(torch.finfo(total.dtype).tiny)",
        "remaining",
        in_recorded_laws(WITHOUT),
        "not a law",
    ),
    Mutant(
        "without replacement, yet put back",
        DRAW,
        "remaining.scatter(2, token[..., None], 0.0)",
        "remaining.clone()",
        in_recorded_laws(WITHOUT),
        "construction",
    ),
    Mutant(
        "law recorded after the draws",
        DRAW,
        "slots.laws.append(laws)",
        "slots.laws.append(remaining)",
        in_recorded_laws(WITHOUT),
        "construction",
    ),
    Mutant(
        "sampled child drawn from a law that holds its fixed siblings",
        DRAW,
        "laws_BWV.scatter(2, fixed_BWf, 0.0)",
        "laws_BWV.clone()",
        in_recorded_laws(MIXED),
        "construction",
    ),
    Mutant(
        "recorded law holds the fixed siblings",
        DRAW,
        "slots.laws.append(laws)",
        "slots.laws.append(laws_BWV)",
        in_recorded_laws(MIXED),
        "construction",
    ),
    Mutant(
        "duplicates lose their draws",
        "specdec.drafters.sampled:_Slots.add_level",
        "torch.where(exists,",
        "torch.where(exists & (reached == own % children),",
        in_recorded_laws(IID),
    ),
    Mutant(
        "unlikely drafts dropped after they were seen",
        DRAW,
        "exists.append(can)",
        "exists.append(can & (laws.gather(2, token[..., None]).squeeze(2) > 0.3))",
        CHAIN,
    ),
    Mutant(
        "the likelier of two samples kept",
        DRAW,
        "token = torch.zeros_like(live_BW",
        'again = noise.categorical(remaining[rows, nodes], RoundKey("draft", slot + 1000), rows)\n'
        "        q = remaining[rows, nodes]\n"
        "        is_likelier = q.gather(1, again[:, None]) > q.gather(1, drawn[:, None])\n"
        "        drawn = torch.where(is_likelier[:, 0], again, drawn)\n"
        "        token = torch.zeros_like(live_BW",
        CHAIN,
    ),
    Mutant(
        "drawn from the two likeliest, recorded with the whole law",
        DRAW,
        "remaining = laws\n",
        "remaining = laws * (laws >= laws.topk(2).values[..., 1:])\n"
        "    remaining = torch.nn.functional.normalize(remaining, p=1, dim=-1)\n",
        CHAIN,
    ),
    Mutant(
        "sampled siblings tested in another order than they were drawn in",
        "specdec.verifiers.siblings:Siblings.__init__",
        ".tril(-1)",
        ".triu(1)",
        RECURSIVE_WITHOUT,
    ),
    Mutant(
        "draws share a number",
        DRAW,
        'RoundKey("draft", slot)',
        'RoundKey("draft", 0)',
        CHAIN,
        "key reuse",
    ),
    *ENGINE_MUTANTS,
]
