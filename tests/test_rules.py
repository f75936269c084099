"""Every rule with every policy it accepts: the law of the output is the target's, enumerated outcome by outcome."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence as Seq
from dataclasses import fields, replace

import pytest
import torch

from specdec import SamplingParams
from specdec.certificates.checks import (
    PARAMETERS,
    PROMPTS,
    STOP,
    TOLERANCE,
    Alternating,
    generation_error,
    parameters_error,
    recorded_error,
    seed_mismatch,
)
from specdec.certificates.oracle import (
    BatchDependentError,
    KeyReusedError,
    NotALawError,
    Scripts,
    TokenSpan,
    distance,
    enumerate_outcomes,
    law_of,
    product_law,
    spans,
)
from specdec.certificates.processes import (
    Case,
    engine_laws,
    one_round,
    ragged_cases,
    round_error,
    round_laws,
)
from specdec.certificates.reference import plain_outputs
from specdec.certificates.worlds import KINDS, FixedLaws, World
from specdec.drafters import Coupled, Mixed, Sampled, Static, TopK, chain
from specdec.interfaces import Noise, TreePolicy
from specdec.noise import PositionKey, RoundKey
from specdec.tree import DrawKind, TokenTree, TreeSpec
from specdec.verifiers import RULES, Follow, Rejection, Threshold, Typical, Verifier

BUSHY = [[0], [1], [0, 0], [0, 1], [1, 0]]

# Policies with the vocabulary they are enumerated on; trees that draw a lot get the smaller one.
POLICIES: dict[str, tuple[TreePolicy, int]] = {
    "chain": (chain(3), 4),
    "chain_iid": (chain(3, "iid"), 4),
    "chain_without": (chain(2, "without_replacement"), 4),
    "static": (Static(BUSHY), 4),
    "top_k": (TopK(total=6, depth=3, k=2), 4),
    "top_k_wide": (TopK(total=8, depth=2, k=4), 3),
    "iid": (Sampled([2, 2]), 3),
    "iid_bush": (Sampled([3, 1]), 3),
    "iid_star": (Sampled([3]), 4),
    "without": (Sampled([2, 2], "without_replacement"), 3),
    "without_bush": (Sampled([3, 1], "without_replacement"), 3),
    "mixed": (Mixed([3, 2]), 4),
    "mixed_deep": (Mixed([2, 1, 1]), 3),
    "mixed_chain": (Mixed([1, 1]), 4),
    "coupled": (Coupled(total=6, depth=2, k=2), 3),
    "coupled_chain": (Coupled(total=4, depth=3, k=1), 3),
}


def exact(spec: TreeSpec) -> list[str]:
    """The lossless rules that take such trees."""
    return [name for name, rule in RULES.items() if rule.lossless and rule().accepts(spec) is None]


EXACT = [(name, rule) for name, (policy, _) in POLICIES.items() for rule in exact(policy.spec)]
DRAWN = [name for name, (policy, _) in POLICIES.items() if policy.spec.is_sampled]


def test_every_rule_meets_the_policies_it_is_made_for() -> None:
    met = {rule: [name for name, other in EXACT if other == rule] for rule in RULES}
    chains = ["chain", "chain_iid", "chain_without", "mixed_chain", "coupled_chain"]
    assert met == {
        **{rule: list(POLICIES) for rule in ("follow", "recursive", "traversal", "coupled")},
        **{rule: chains for rule in ("rejection", "block")},
        "kseq": ["chain_iid", "iid", "iid_bush", "iid_star", "mixed_chain"],
        **{rule: [] for rule in ("typical", "threshold")},
    }


@pytest.mark.parametrize(("policy", "rule"), EXACT)
def test_one_round_keeps_the_law(policy: str, rule: str) -> None:
    """All kinds of laws and ragged depths in one batch; with independent rounds this is the law of every length."""
    grown, vocab = POLICIES[policy]
    for seed in (0, 1) if vocab == 4 else (0,):
        world = World.tree(vocab, grown.max_depth + 2, seed)
        cases = ragged_cases(world, grown.max_depth)
        assert round_error(grown, RULES[rule](), world, cases, grown.max_depth + 1) < TOLERANCE


@pytest.mark.parametrize("policy", DRAWN)
def test_trees_are_drawn_with_the_recorded_laws(policy: str) -> None:
    grown, vocab = POLICIES[policy]
    world = World.tree(vocab, grown.max_depth + 1)
    assert recorded_error(grown, world) < TOLERANCE


@pytest.mark.parametrize("rule", exact(Alternating.spec))
def test_fixed_and_drawn_tokens_alternate(rule: str) -> None:
    world = World.tree(3, 5).select(*(kind for kind in KINDS if kind != "silent_draft"))
    cases = [Case(kind, 0, 3) for kind in range(len(world.kinds))]
    assert round_error(Alternating(), RULES[rule](), world, cases, 4) < TOLERANCE


def test_follow_keeps_the_law_on_any_tree() -> None:
    """Nodes in any order that has parents first, ragged, padded with what looks like tokens."""
    world = World.tree(3, 5)
    rng = random.Random(0)
    for _ in range(10):
        rows = [_random_tree(rng, 3, depth=3) for _ in world.kinds]
        tree = TokenTree.from_lists(rows, vocab_size=3)
        tree = replace(tree, tokens_BN=torch.where(tree.is_node_BN, tree.tokens_BN, 1))

        def run(kinds: list[int], scripts: Scripts, tree: TokenTree = tree) -> list[TokenSpan]:
            kinds_B = torch.tensor(kinds)
            names = ("tokens_BN", "parents_BN", "num_nodes_B", "draws_BM", "kinds_BM")
            batch = replace(tree, **{name: getattr(tree, name)[kinds_B] for name in names})
            laws = FixedLaws(world, batch, kinds_B, torch.zeros_like(kinds_B))
            return spans(batch, Follow()(batch, laws, scripts.noise()))

        for kind, outcomes in enumerate(enumerate_outcomes(run, range(len(world.kinds)))):
            assert world.continued_error(kind, 0, law_of(outcomes), 4) < TOLERANCE


def _random_tree(rng: random.Random, vocab: int, depth: int) -> tuple[list[int], list[int]]:
    tokens, parents, depths = [0], [-1], [0]
    for _ in range(rng.randrange(12)):
        parent = rng.randrange(len(tokens))
        taken = {tokens[node] for node, above in enumerate(parents) if above == parent}
        if depths[parent] < depth and len(taken) < vocab:
            tokens.append(rng.choice([token for token in range(vocab) if token not in taken]))
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return tokens, parents


PAIRED: dict[str, TreePolicy] = {
    "chain": chain(2),
    "chain_iid": chain(2, "iid"),
    "static": Static(BUSHY),
    "iid": Sampled([2]),
    "without": Sampled([2], "without_replacement"),
    "mixed": Mixed([2, 1]),
}
PAIRED_EXACT = [(name, rule) for name in PAIRED for rule in exact(PAIRED[name].spec)]


@pytest.mark.parametrize(("policy", "rule"), PAIRED_EXACT)
def test_two_rows_are_independent(policy: str, rule: str) -> None:
    """The joint law of two rows with laws and depths of their own is the product of the target's."""
    world, grown = World.tree(3, 5), PAIRED[policy]
    pairs = [("sharp", "independent"), ("close", "zeros"), ("one_hot_target", "flat")]
    cases = [
        (Case(KINDS.index(one), 0, grown.max_depth), Case(KINDS.index(other), world.walk([1]), 1))
        for one, other in pairs
    ]

    def run(batch: list[tuple[Case, Case]], scripts: Scripts) -> list[tuple[TokenSpan, ...]]:
        rows = [row for pair in batch for row in pair]
        emitted = one_round(grown, RULES[rule](), world, rows, scripts.noise())[1]
        return list(zip(emitted[::2], emitted[1::2], strict=True))

    for case, outcomes in zip(cases, enumerate_outcomes(run, cases, rows_per_case=2), strict=True):
        alone = round_laws(grown, RULES[rule](), world, case)
        assert distance(law_of(outcomes), product_law(*alone)) < TOLERANCE
        for row, law in zip(case, alone, strict=True):
            assert world.continued_error(row.kind, row.state, law, grown.max_depth + 1) < TOLERANCE


# Through the engine on toy models: every round, cut and page move is production code, and so is the drafter.
ENGINE: dict[str, TreePolicy] = {
    "chain": chain(2),
    "chain_iid": chain(2, "iid"),
    "static": Static([[0], [1], [0, 0], [1, 0]]),
    "top_k": TopK(total=5, depth=2, k=2),
    "iid": Sampled([2, 1]),
    "without": Sampled([2, 1], "without_replacement"),
    "mixed": Mixed([2, 1]),
    "coupled": Coupled(total=5, depth=2, k=2),
}
ENGINE_EXACT = [(name, rule) for name in ENGINE for rule in exact(ENGINE[name].spec)]


@pytest.mark.parametrize(("policy", "rule"), ENGINE_EXACT)
def test_whole_generations_keep_the_law(policy: str, rule: str) -> None:
    """Several rounds, stop token and length limit inside accepted spans, prompts of several chunks."""
    # A rule that does not ask for the drafts' law leaves every outcome of theirs to be followed up.
    grown = ENGINE[policy]
    length = 3 if (rule in ("follow", "coupled") and grown.spec.is_sampled) or policy == "coupled" else 4
    for kinds in (("sharp", "independent", "zeros"), ("close", "one_hot_target", "silent_draft")):
        # The longest prompt and all that may be drafted behind it.
        world = World.tree(3, length + 4).select(*kinds)
        assert generation_error(world, RULES[rule](), grown, length) < TOLERANCE


@pytest.mark.parametrize("rule", exact(chain(1, "iid").spec))
def test_two_generations_are_independent(rule: str) -> None:
    world = World.tree(3, 5).select("sharp", "independent", "zeros")
    params = SamplingParams(temperature=1.0, max_new_tokens=2, stop_token_ids=(STOP,))
    for policy in (None, chain(1, "iid")):
        (law,) = engine_laws(world, RULES[rule](), policy, [((0,), (1, 2))], params)
        one, other = (world.stopped_law(k, world.walk(rest), 2, {STOP}) for k, rest in ((0, ()), (1, (2,))))
        emitted = law_of((prob, (a, b)) for ((a, _), (b, _)), prob in law.items())
        assert distance(emitted, product_law(one, other)) < TOLERANCE


@pytest.mark.parametrize(("policy", "rule"), ENGINE_EXACT)
def test_sampling_parameters_follow_the_drafted_path(policy: str, rule: str) -> None:
    assert parameters_error(RULES[rule](), ENGINE[policy]) < TOLERANCE


def test_plain_decoding_follows_the_reference_and_every_parameter_matters() -> None:
    assert parameters_error(Follow(), None) < TOLERANCE
    world = World.tree(3, 7).select("sharp", "independent", "flat")
    for params in PARAMETERS:
        changed = {field.name for field in fields(params)} - {"max_new_tokens", "seed"}
        changed = {name for name in changed if getattr(params, name) != getattr(SamplingParams(), name)}
        for name in changed:
            off = replace(params, **{name: 1.0 if name == "temperature" else getattr(SamplingParams(), name)})
            laws = ((plain_outputs(world, prompt, one) for one in (params, off)) for (prompt,) in PROMPTS)
            assert max(distance(*pair) for pair in laws) > 1e-3, name


SEEDED: dict[str, TreePolicy] = {name: policy for name, (policy, _) in POLICIES.items()} | {
    "chain_long": chain(6),
    "iid_wide": Sampled([4, 2, 1]),
    "mixed_wide": Mixed([4, 2, 2]),
    "top_k_deep": TopK(total=12, depth=6, k=3),
    "coupled_deep": Coupled(total=12, depth=6, k=3),
}


@pytest.mark.parametrize("policy", SEEDED)
@pytest.mark.parametrize("rule", ["follow", "coupled"])
def test_a_rule_that_follows_emits_what_plain_decoding_emits(policy: str, rule: str) -> None:
    """Same seed, same tokens: real noise, float32 laws, many seeds and kinds of laws in one batch."""
    assert seed_mismatch(RULES[rule](), SEEDED[policy]) == 0


def test_rejection_refuses_trees_it_is_not_exact_for() -> None:
    sampled = frozenset({DrawKind.IID})
    rule = Rejection()
    assert rule.accepts(TreeSpec(sampled, is_chain=True)) is None
    assert "branch" in str(rule.accepts(TreeSpec(sampled, is_chain=False)))
    assert "without the law" in str(rule.accepts(TreeSpec(sampled, is_chain=True, has_laws=False)))
    assert "dropped" in str(rule.accepts(TreeSpec(sampled, is_chain=True, adapted=False)))
    assert all(
        Follow().accepts(TreeSpec(sampled, *flags)) is None for flags in itertools.product((True, False), repeat=3)
    )


BRANCHING = {name: policy for name, (policy, _) in POLICIES.items() if not policy.spec.is_chain}


REFUSED = [
    (name, rule.name, "branch" if name in BRANCHING and rule.name != "kseq" else "i.i.d.")
    for name, (policy, _) in POLICIES.items()
    for rule in RULES.values()
    if rule().accepts(policy.spec) is not None
]


@pytest.mark.parametrize(("policy", "rule", "reason"), REFUSED)
def test_a_rule_refuses_trees_it_is_not_exact_for_at_run_time(policy: str, rule: str, reason: str) -> None:
    grown, vocab = POLICIES[policy]
    world = World.tree(vocab, grown.max_depth + 2)
    with pytest.raises(ValueError, match=rf"rule {rule} is not exact for these trees: .*{reason}"):
        round_error(grown, RULES[rule](), world, ragged_cases(world, grown.max_depth), 1)
    with pytest.raises(ValueError, match=rf"rule {rule} is not exact for this policy: .*{reason}"):
        Verifier(None, RULES[rule]()).require(grown.spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["rejection", "block", "recursive", "traversal", "kseq"])
def test_draws_without_a_law_or_dropped_after_they_were_seen_are_refused(rule: str) -> None:
    iid = frozenset({DrawKind.IID})
    assert RULES[rule]().accepts(TreeSpec(iid, is_chain=True)) is None
    assert "without the law" in str(RULES[rule]().accepts(TreeSpec(iid, is_chain=True, has_laws=False)))
    assert "dropped" in str(RULES[rule]().accepts(TreeSpec(iid, is_chain=True, adapted=False)))


@pytest.mark.parametrize("policy", ["chain", "chain_iid", "chain_without", "mixed_chain"])
def test_traversal_is_block_and_recursive_is_rejection_on_chains(policy: str) -> None:
    grown, vocab = POLICIES[policy]
    world = World.tree(vocab, grown.max_depth + 2)
    cases = ragged_cases(world, grown.max_depth)
    for one, other in (("traversal", "block"), ("recursive", "rejection")):
        laws = zip(*(round_laws(grown, RULES[name](), world, cases) for name in (one, other)), strict=True)
        assert max(distance(*pair) for pair in laws) < TOLERANCE


def expected_length(policy: str, rule: str, seed: int = 0) -> list[float]:
    """Expected tokens of a round, per kind of laws and ragged case."""
    grown, vocab = POLICIES[policy]
    world = World.tree(vocab, grown.max_depth + 2, seed)
    laws = round_laws(grown, RULES[rule](), world, ragged_cases(world, grown.max_depth))
    return [sum(prob * len(span) for span, prob in law.items()) for law in laws]


@pytest.mark.parametrize(
    ("better", "worse", "policies"),
    [
        ("block", "rejection", ["chain_iid"]),
        ("traversal", "recursive", ["chain_iid", "iid", "without", "iid_bush", "without_bush", "mixed"]),
        ("recursive", "follow", ["iid", "without", "mixed"]),
        ("kseq", "follow", ["iid", "iid_star"]),
    ],
)
def test_a_better_rule_never_accepts_less(better: str, worse: str, policies: list[str]) -> None:
    for policy in policies:
        more, less = (expected_length(policy, rule) for rule in (better, worse))
        assert all(a > b - TOLERANCE for a, b in zip(more, less, strict=True))
        assert max(a - b for a, b in zip(more, less, strict=True)) > 1e-3


def test_coupled_drafts_win_more_often_than_others_of_their_shape() -> None:
    coupled, plain = expected_length("coupled", "coupled"), expected_length("coupled", "follow")
    assert sum(coupled) > 1.05 * sum(plain)
    assert max(a - b for a, b in zip(coupled, plain, strict=True)) > 0.8


@pytest.mark.parametrize("rule", ["typical", "threshold"])
def test_lossy_rules_are_biased_and_refused_unless_allowed(rule: str) -> None:
    grown, vocab = POLICIES["chain_iid"]
    world = World.tree(vocab, grown.max_depth + 2)
    assert round_error(grown, RULES[rule](), world, ragged_cases(world, grown.max_depth), grown.max_depth + 1) > 0.05
    with pytest.raises(ValueError, match=f"rule {rule} is LOSSY.*allow_lossy=true"):
        Verifier(None, RULES[rule]())  # type: ignore[arg-type]
    assert Verifier(None, RULES[rule](), allow_lossy=True).rule.name == rule  # type: ignore[arg-type]


def test_lossy_rules_keep_what_passes() -> None:
    """Two paths of two tokens; node probabilities by hand."""
    world = World.tree(3, 4).select("flat")
    tree = TokenTree.from_paths([0], [[[0, 1], [1, 0], [1, 2]]], vocab_size=3)
    laws = FixedLaws(world, tree, torch.tensor([0]), torch.tensor([0]))
    probs = laws.all()[0]
    tokens, parents = tree.tokens_BN[0].tolist(), tree.parents_BN[0].tolist()
    node_prob = [1.0] + [float(probs[parents[n], tokens[n]]) for n in range(1, 6)]
    for cut in (0.01, 0.33, 0.34, 0.9):
        passing = [n for n in range(6) if all(node_prob[m] >= cut for m in tree.path(n)[1:])]
        best = max(passing, key=lambda n: (len(tree.path(n)), math.prod(node_prob[m] for m in tree.path(n)[1:])))
        verdict = Threshold(cut)(tree, laws, Scripts([[]], 1, False).noise())
        assert [n for n in verdict.path_BK[0].tolist() if n >= 0] == tree.path(best)
    entropy = -float((probs[0] * probs[0].log()).sum())
    kept = Typical(epsilon=1.0, delta=1.0)(tree, laws, Scripts([[]], 1, False).noise())
    assert (int(kept.num_accepted_B[0]) > 0) == any(node_prob[n] >= math.exp(-entropy) for n in (1, 3))
    for wrong in ({"epsilon": 0.0}, {"delta": 2.0}):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            Typical(**wrong)
    with pytest.raises(ValueError, match=r"threshold=0\.0"):
        Threshold(0.0)


def test_rejection_refuses_a_second_draw_and_dropped_draws_at_run_time() -> None:
    law = torch.full((1, 2, 3), 1 / 3, dtype=torch.float64)
    tree = TokenTree.chain(torch.tensor([[0, 1]]), law, DrawKind.IID)
    laws = FixedLaws(World.tree(3, 3), tree, torch.tensor([0]), torch.tensor([0]))
    noise = Scripts([[]], 1, False).noise()
    Rejection()(tree, laws, noise)
    # One node, but the draft law was drawn from twice.
    twice = replace(tree, draws_BM=torch.tensor([[1, 1]]), kinds_BM=torch.full((1, 2), DrawKind.IID))
    for wrong, reason in ((twice, "branch"), (replace(tree, adapted=False), "dropped")):
        with pytest.raises(ValueError, match=f"rule rejection is not exact for these trees: .*{reason}"):
            Rejection()(wrong, laws, Scripts([[]], 1, False).noise())
    with pytest.raises(ValueError, match="need draft_laws_BNV"):
        replace(tree, draft_laws_BNV=None, vocab_size=3)


def _with_noise(use: object, seen: list[int]) -> object:
    """A run of one row per case that hands its noise to `use`."""

    def run(rows: list[int], scripts: Scripts) -> list[object]:
        seen.append(len(rows))
        return use(scripts.noise(), torch.arange(len(rows)))  # type: ignore[operator,no-any-return]

    return run


def test_oracle_gives_every_outcome_its_probability() -> None:
    law = torch.tensor([0.5, 0.0, 0.125, 0.375], dtype=torch.float64)

    def use(noise: Noise, rows: torch.Tensor) -> list[object]:
        token = noise.categorical(law.expand(len(rows), 4), PositionKey(0), rows)
        coin = noise.bernoulli(law[token], RoundKey("accept", 0), rows)
        sure = noise.bernoulli(torch.ones(len(rows)).double(), RoundKey("accept", 1), rows)
        assert sure.all()
        return list(zip(token.tolist(), coin.tolist(), strict=True))

    seen: list[int] = []
    (outcomes,) = enumerate_outcomes(_with_noise(use, seen), [0])  # type: ignore[arg-type]
    want = {(t, c): p * (p if c else 1 - p) for t, p in enumerate(law.tolist()) if p for c in (True, False)}
    assert len(outcomes) == 6 and distance(law_of(outcomes), want) < 1e-15
    (alone,) = enumerate_outcomes(_with_noise(use, seen), [0], max_batch=1)  # type: ignore[arg-type]
    assert law_of(alone) == law_of(outcomes) and max(seen[:-6]) > 1 and seen[-6:] == [1] * 6


def test_oracle_shares_one_number_where_it_is_told_to() -> None:
    """u < 0.25 implies u < 0.5: with one number for both coins, heads of the first forces the second."""

    def use(noise: Noise, rows: torch.Tensor) -> list[object]:
        coins = [
            noise.bernoulli(torch.full((len(rows),), p).double(), RoundKey("accept", 0), rows) for p in (0.25, 0.5)
        ]
        return list(zip(*(coin.tolist() for coin in coins), strict=True))

    (outcomes,) = enumerate_outcomes(_with_noise(use, []), [0], share=True)  # type: ignore[arg-type]
    assert law_of(outcomes) == {(True, True): 0.25, (False, True): 0.25, (False, False): 0.5}
    with pytest.raises(KeyReusedError):
        enumerate_outcomes(_with_noise(use, []), [0])  # type: ignore[arg-type]


def test_oracle_refuses_what_is_no_law_and_what_depends_on_the_batch() -> None:
    def draw(laws: Seq[Seq[float]], dtype: torch.dtype = torch.float64) -> None:
        tokens = torch.tensor(laws, dtype=dtype)
        Scripts([[]], 1, False).noise().categorical(tokens, PositionKey(0), torch.tensor([0]))

    draw([[0.5, 0.5]])
    for wrong in ([[0.5, 0.4]], [[0.0, 0.0]], [[1.5, -0.5]], [[float("nan"), 1.0]], [[0.5, 0.5]] * 2):
        with pytest.raises(NotALawError):
            draw(wrong)
    with pytest.raises(NotALawError, match="float32"):
        draw([[0.5, 0.5]], torch.float32)
    with pytest.raises(TypeError):
        Scripts([[]], 1, False).noise().bernoulli(torch.ones(1).double(), PositionKey(0), torch.tensor([0]))  # type: ignore[arg-type]

    def leaky(noise: Noise, rows: torch.Tensor) -> list[object]:
        first = noise.categorical(torch.full((len(rows), 2), 0.5).double(), PositionKey(0), rows)
        # Every row's coin is the first row's.
        coin = noise.bernoulli((0.25 + first[:1] / 2).double().expand(len(rows)), RoundKey("accept", 0), rows)
        return coin.tolist()

    with pytest.raises(BatchDependentError):
        enumerate_outcomes(_with_noise(leaky, []), range(3))  # type: ignore[arg-type]
