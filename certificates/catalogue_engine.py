"""The known mistakes around the rules: packing, commit, rounds, stops, and what becomes of the sampling parameters."""

from __future__ import annotations

from specdec import SamplingParams
from specdec.certificates.mutants import Mutant, adaptively, in_generations, in_parameters, in_unions
from specdec.drafters import Static, TopK, chain
from specdec.verifiers import Follow, Rejection

COMMIT = "specdec.verifiers.verifier:Verifier._commit"
SEGMENT = "specdec.verifiers.verifier:_segment"
LAWS = "specdec.sampling:ModelLaws._laws"

CHAINS = in_generations(Rejection(), chain(1, "iid"), length=4)
TREES = in_generations(Follow(), Static([[0], [1], [0, 0], [1, 0]]), length=4)
WARM = in_parameters(Rejection(), chain(2, "iid"), SamplingParams(temperature=0.6, max_new_tokens=3))
NUCLEUS = in_parameters(Rejection(), chain(2, "iid"), SamplingParams(temperature=1.0, top_p=0.7, max_new_tokens=3))

UNION = in_unions(Follow(), TopK(total=8, depth=3, k=2))
JOINED = "specdec.drafters.union:joined"
ADAPTIVE = adaptively(Rejection(), chain(2, "iid"))

ENGINE_MUTANTS = [
    Mutant(
        "adaptive choice looks at this step's draws",
        "specdec.drafters.adaptive:AdaptiveSpeculation._draft",
        "tree = drafter.propose(sequences, policy, noise)",
        "tree = drafter.propose(sequences, policy, noise)\n"
        "    if bool((tree.tokens_BN[:, 1:] == 0).any()):\n"
        "        tree = TokenTree.roots(tree.tokens_BN[:, 0])",
        ADAPTIVE,
    ),
    Mutant(
        "drawn nodes of low draft probability dropped",
        "specdec.drafters.pruning:Shallower.grow",
        "if keep_BN is None:\n",
        "if keep_BN is None:\n"
        "        q_B1 = grown.tree.draft_laws_BNV[:, 0].gather(1, grown.tree.tokens_BN[:, 1:2])\n"
        "        if bool((q_B1 < 0.5).any()):\n"
        "            bare = TokenTree.roots(draft.roots_B, draft.vocab_size)\n"
        "            return Grown(bare, torch.zeros_like(bare.tokens_BN))\n",
        ADAPTIVE,
    ),
    Mutant(
        "drawn nodes pruned like FIXED ones",
        "specdec.drafters.adaptive:outlook_for",
        "if policy.spec.kinds <= {DrawKind.FIXED}:",
        "if True:",
        ADAPTIVE,
        "construction",
    ),
    Mutant(
        "a token that two drafters propose becomes two siblings",
        JOINED,
        "child_of.get((above, token))",
        "None",
        UNION,
        "construction",
    ),
    Mutant(
        "a joined node behind the parent that it has in its own drafter's tree",
        JOINED,
        "above = place[parent]",
        "above = min(parent, len(tokens) - 1)",
        UNION,
    ),
    Mutant(
        "accepted nodes of the joined tree taken for a drafter's own",
        "specdec.drafters.member:Member.observe",
        "_translated(commit, self._follow(commit, draft, cells, hits))",
        "[replace(commit, nodes=[min(node, len(draft.tokens) - 1) for node in commit.nodes])]",
        UNION,
    ),
    Mutant(
        "stop token looked for at the end of the span only",
        "specdec.request:Request.append",
        "reason = self._ended_by(token)",
        "reason = self._ended_by(token) if i + 1 == len(tokens) else None",
        TREES,
    ),
    Mutant(
        "tokens behind the stop token kept",
        "specdec.request:Request.append",
        "if reason is not None:\n            break",
        "if reason is not None:\n            self.sequence.token_ids += tokens[i + 1 :]\n            break",
        TREES,
    ),
    Mutant(
        "accepted nodes left where they were drafted",
        COMMIT,
        "if node != depth:",
        "if False:",
        TREES,
    ),
    Mutant("rounds not counted", "specdec.engine:Engine._emit", "one.round += 1", "pass", CHAINS, "key reuse"),
    Mutant(
        "laws of rows that moved not looked up",
        "specdec.sampling:ModelLaws.at",
        "(nodes_B != self._nodes_B).nonzero().squeeze(1)",
        "(nodes_B != self._nodes_B).nonzero().squeeze(1)[:1]",
        CHAINS,
        "batch mates",
    ),
    Mutant(
        "penalties blind to drafted tokens",
        LAWS,
        "rows_R, paths, self.dtype",
        "rows_R, None, self.dtype",
        in_parameters(Rejection(), chain(2, "iid")),
    ),
    Mutant(
        "another node's keys committed",
        COMMIT,
        "source.append(one.table.slot(one.root_position + node))",
        "source.append(one.table.slot(one.root_position + node - 1))",
        TREES,
    ),
    Mutant(
        "positions of drafted tokens off by one",
        SEGMENT,
        "start + tree.depth_BN[row, :count]",
        "start + 1 + tree.depth_BN[row, :count]",
        TREES,
        "wrong context",
    ),
    Mutant(
        "nodes see their siblings",
        SEGMENT,
        "tree.ancestors_BNN[row, :count, :count]",
        "torch.ones(count, count, dtype=torch.bool).tril()",
        TREES,
        "wrong context",
    ),
    Mutant(
        "target without temperature",
        LAWS,
        "self.logits_TV.index_select(0, self.first_B[rows_R] + nodes_R)",
        "self.logits_TV.index_select(0, self.first_B[rows_R] + nodes_R) * self.sampling.params[0].temperature",
        WARM,
    ),
    Mutant(
        "top-p applied to the draft only",
        LAWS,
        "self.sampling.probabilities(",
        "BatchSampling(\n"
        "        [SamplingParams(temperature=one.temperature) for one in self.sampling.params],\n"
        "        *[[[]] * len(self.sampling.params)] * 2,\n"
        "        self.sampling.vocab_size,\n"
        "    ).probabilities(",
        NUCLEUS,
    ),
]
