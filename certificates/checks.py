"""What a certificate measures: each function is 0, but for rounding, where the law of the output is the target's."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from specdec import SamplingParams
from specdec.certificates.oracle import Scripts, TokenSpan, distance, enumerate_outcomes, law_of, recorded_prob
from specdec.certificates.processes import Case, engine_laws, ragged_cases, toy_engine
from specdec.certificates.reference import plain_outputs
from specdec.certificates.worlds import KINDS, TableRound, ToyModel, World
from specdec.cost import CostModel, DraftCost, DraftSize, TargetCost, TargetSize
from specdec.drafters import NGramDrafter, SmallModelDrafter, UnionDrafter
from specdec.drafters.adaptive import AdaptiveSpeculation
from specdec.drafters.growth import GrowingPolicy, Grown
from specdec.interfaces import AcceptanceRule, Drafter, Noise, TreePolicy
from specdec.noise import CounterNoise, RoundKey
from specdec.sequence import Sequence
from specdec.tree import DrawKind, TokenTree, TreeSpec

TOLERANCE = 1e-12
# One prompt per request; the first token names the kind of the world's laws.
PROMPTS = [((0,),), ((1, 2),), ((2, 1, 0, 1),)]
STOP = 2
# Every parameter that shapes a law, in two turns: of three tokens, one cut after another would leave a single one.
PARAMETERS = [
    SamplingParams(
        temperature=0.8,
        top_k=2,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.7,
        logit_bias={0: 0.6, 1: -0.4},
        max_new_tokens=3,
    ),
    SamplingParams(temperature=1.3, top_p=0.8, min_p=0.4, max_new_tokens=3),
]


def recorded_error(policy: GrowingPolicy, world: World) -> float:
    """The largest difference between a tree's probability and what its draws, kinds and draft laws say it is."""

    def run(rows: list[Case], scripts: Scripts) -> list[float]:
        kinds_B, states_B = (torch.tensor([getattr(row, name) for row in rows]) for name in ("kind", "state"))
        draft = TableRound(world, kinds_B, states_B, [row.limit for row in rows])
        tree = policy.grow(draft, scripts.noise()).tree
        return [recorded_prob(tree, row) for row in range(len(rows))]

    outcomes = enumerate_outcomes(run, ragged_cases(world, policy.max_depth))
    assert all(abs(sum(prob for prob, _ in case) - 1) < TOLERANCE for case in outcomes)
    return max(abs(prob - recorded) for case in outcomes for prob, recorded in case)


def generation_error(world: World, rule: AcceptanceRule, policy: GrowingPolicy, length: int, **options: Any) -> float:
    """The largest error of the law of whole outputs: tokens up to the stop token or the limit, and the reason."""
    params = SamplingParams(temperature=1.0, max_new_tokens=length, stop_token_ids=(STOP,))
    errors = []
    for (prompt,), law in zip(PROMPTS, engine_laws(world, rule, policy, PROMPTS, params, **options), strict=True):
        wanted = world.stopped_law(prompt[0], world.walk(prompt[1:]), length, {STOP})
        named: dict[tuple[tuple[TokenSpan, str], ...], float] = {
            ((tokens, "stop" if tokens[-1] == STOP else "length"),): prob for tokens, prob in wanted.items()
        }
        errors.append(distance(named, law))
    return max(errors)


def parameters_error(
    rule: AcceptanceRule,
    policy: GrowingPolicy | None,
    params: Seq[SamplingParams] = PARAMETERS,
    drafter: Drafter | None = None,
) -> float:
    """The largest error of the law of whole outputs under sampling parameters, by a reference that shares no code."""
    world = World.tree(3, 7).select("sharp", "independent", "flat")
    errors = []
    for one in params:
        for (prompt,), law in zip(
            PROMPTS, engine_laws(world, rule, policy, PROMPTS, one, drafter=drafter), strict=True
        ):
            wanted: dict[tuple[tuple[TokenSpan, str], ...], float] = {
                (output,): prob for output, prob in plain_outputs(world, prompt, one).items()
            }
            errors.append(distance(wanted, law))
    return max(errors)


class FrozenCosts(CostModel):
    """Costs that no measured time changes, so that choices are those of the tokens alone."""

    def observe_step(self, size: TargetSize, seconds: float) -> None:
        pass

    def observe_draft(self, size: DraftSize, seconds: float) -> None:
        pass


def impressionable(policy: TreePolicy, longest_habit: int = 0) -> AdaptiveSpeculation:
    """An adaptive speculation that a single verdict moves from one depth to another."""
    costs = FrozenCosts(TargetCost((1, 2, 3), (1.0, 1.52, 1.93)), DraftCost(0.0))
    return AdaptiveSpeculation(policy, costs, explore=0.0, longest_habit=longest_habit, clock=lambda: 0.0)


def adaptive_error(rule: AcceptanceRule, policy: GrowingPolicy, longest_habit: int = 0) -> float:
    """The largest error of the law of outputs where every step's depth depends on what became of the steps before."""
    world, length = World.tree(2, 6).select("independent", "close"), 4
    params = SamplingParams(temperature=1.0, max_new_tokens=length)
    errors = []
    for prompt in ((0,), (1,)):
        (law,) = engine_laws(
            world,
            rule,
            policy,
            [(prompt,)],
            params,
            speculation=partial(impressionable, policy, longest_habit),
            max_batch=1,
        )
        tokens = law_of((prob, span) for ((span, _),), prob in law.items())
        errors.append(distance(tokens, world.stopped_law(prompt[0], 0, length)))
    return max(errors)


def seed_mismatch(rule: AcceptanceRule, policy: GrowingPolicy) -> float:
    """The share of requests that a drafted run answers otherwise than a plain one with the same seed."""
    world = World.markov(vocab=len(KINDS), order=2)
    prompts = [[kind, seed % world.vocab_size] for kind in range(len(KINDS)) for seed in range(8)]
    params = [
        SamplingParams(
            temperature=(1.0, 0.7, 0.0)[i % 3], seed=i, max_new_tokens=10, stop_token_ids=(3,) if i % 2 else ()
        )
        for i in range(len(prompts))
    ]
    plain, drafted = (
        [(result.token_ids, result.finish_reason) for result in toy_engine(world, rule, tree).generate(prompts, params)]
        for tree in (None, policy)
    )
    return sum(one != other for one, other in zip(plain, drafted, strict=True)) / len(plain)


def union_mismatch(rule: AcceptanceRule, policy: GrowingPolicy) -> float:
    """The share of a union's trees that are not made of its drafters' paths alone, as many as there is room for, or where the
    draft model among them does not draft as the world says that it drafts behind this very text."""
    world = World.markov(vocab=5, order=2).select("sharp", "flat", "close", "independent")
    wrong: list[bool] = []

    class Watched(UnionDrafter):
        def propose(self, sequences: Seq[Sequence], policy: TreePolicy, noise: Noise) -> TokenTree:
            tree = super().propose(sequences, policy, noise)
            tokens, parents, sizes = tree.tokens_BN.tolist(), tree.parents_BN.tolist(), tree.num_nodes_B.tolist()
            for row, (one, size) in enumerate(zip(sequences, sizes, strict=True)):
                drafts = [member.drafts[one.id] for member in self.members if one.id in member.drafts]
                parts = [_paths(draft.tokens, draft.parents) for draft in drafts]
                found, known = _paths(tokens[row][:size], parents[row][:size]), set[TokenSpan]().union(*parts)
                room = min(policy.max_nodes - 1, len(known))
                wrong.append(not found <= known or len(found) != room or size != room + 1)
                if one.max_draft_depth:
                    wrong[-1] |= parts[-1] != drawn_up(one)
            return tree

    def drawn_up(one: Sequence) -> set[TokenSpan]:
        kind, state = one.token_ids[0], world.walk(one.token_ids[1:])
        limit = min(policy.max_depth, one.max_draft_depth)
        draft = TableRound(world, torch.tensor([kind]), torch.tensor([state]), [limit])
        tree = policy.grow(draft, CounterNoise([0], [0], [0])).tree
        return _paths(tree.tokens_BN[0].tolist(), tree.parents_BN[0].tolist())

    model = SmallModelDrafter(ToyModel(world, world.draft_KCV, "draft"))  # type: ignore[arg-type]
    drafter = Watched([NGramDrafter(), model], enough=2.0)
    prompts = [[kind, token, *([token, kind] * 3)] for kind in range(len(world.kinds)) for token in range(5)]
    params = [SamplingParams(temperature=0.7, seed=i, max_new_tokens=16) for i in range(len(prompts))]
    toy_engine(world, rule, policy, drafter).generate(prompts, params)
    return sum(wrong) / len(wrong)


def _paths(tokens: Seq[int], parents: Seq[int]) -> set[TokenSpan]:
    """The token path of every node but the root."""
    paths: list[TokenSpan] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return set(paths[1:])


class Alternating:
    """Chains whose tokens are FIXED and drawn by turns, starting with either: a tree's draws need not be of one kind.

    Grows on a `TableRound` only, whose kinds of laws say which comes first.
    """

    spec = TreeSpec(frozenset({DrawKind.FIXED, DrawKind.IID}), is_chain=True)
    max_depth, max_nodes, max_expanded = 3, 4, 3

    def grow(self, draft: Any, noise: Noise) -> Grown:
        tokens, laws, kinds = [draft.roots_B], [], []
        following = draft.expand_root()
        for depth in range(self.max_depth):
            paths = torch.stack([*tokens[1:], torch.full_like(draft.roots_B, -1)], 1)[:, None]
            law_BV = following.laws(paths)[:, 0]
            is_fixed_B = (draft.kinds_B + depth) % 2 == 0
            rows = (~is_fixed_B).nonzero()[:, 0]
            drawn = noise.categorical(law_BV[rows], RoundKey("draft", depth), rows)
            tokens.append(law_BV.argmax(1).index_copy(0, rows, drawn))
            laws.append(law_BV)
            kinds.append(torch.where(is_fixed_B, DrawKind.FIXED, DrawKind.IID))
            if depth + 1 < self.max_depth:
                following = draft.expand(tokens[-1][:, None], torch.full_like(tokens[-1][:, None], depth), depth + 1)
        laws_BNV = torch.stack([*laws, torch.zeros_like(laws[0])], 1)
        tree = TokenTree.chain(torch.stack(tokens, 1), laws_BNV, DrawKind.IID)
        return Grown(replace(tree, kinds_BM=torch.stack(kinds, 1)), torch.zeros_like(tree.tokens_BN))
