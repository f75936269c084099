"""Several drafters in one tree: what is joined and kept, that no text changes, and that every part keeps its own state."""

from __future__ import annotations

import itertools
import random
from functools import partial

import numpy as np
import pytest
import torch
from head_cases import eagle_config, learn_eagle

from specdec import Engine, PagedModel, SamplingParams
from specdec.certificates.checks import TOLERANCE, generation_error, impressionable, union_mismatch
from specdec.certificates.worlds import ToyModel, World
from specdec.drafters import (
    Coupled,
    EagleDrafter,
    MedusaDrafter,
    Mixed,
    NGramDrafter,
    Sampled,
    SmallModelDrafter,
    Static,
    TopK,
    UnionDrafter,
    chain,
)
from specdec.drafters.adaptive import AdaptiveSpeculation
from specdec.drafters.heads import MedusaConfig, MedusaHeads
from specdec.drafters.member import Draft
from specdec.drafters.union import joined
from specdec.interfaces import Drafter, TreePolicy
from specdec.verifiers import RULES, Follow, Verifier

POLICIES: dict[str, TreePolicy] = {
    "chain": chain(4),
    "static": Static([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]]),
    "top_k": TopK(total=12, depth=4, k=3),
}
SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=30, stop_token_ids=(11,)),
    "everything": SamplingParams(
        temperature=0.9, top_k=30, repetition_penalty=1.2, frequency_penalty=0.2, seed=7, max_new_tokens=30
    ),
}
PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7], [9, 10, 11], [3] * 23, [4, 5, 4, 5, 4], [8]]


def draft(tokens: list[int], parents: list[int], edges: list[float]) -> Draft:
    return Draft([0, *tokens], [-1, *parents], np.zeros(len(tokens) + 1, dtype=np.int64), [1.0, *edges])


def paths(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        found.append((*found[parent], token))
    return found[1:]


def test_equal_paths_share_nodes_and_the_likeliest_are_kept() -> None:
    one = draft([1, 2, 3], [0, 1, 2], [0.5, 0.5, 0.5])
    other = draft([4, 1, 2, 9], [0, 0, 2, 2], [0.3, 0.6, 0.4, 0.2])
    tokens, parents, edges = joined(7, [one, other], 16)
    assert paths(tokens, parents) == [(1,), (1, 2), (4,), (1, 2, 3), (1, 9)]
    assert tokens[0] == 7 and edges[1:] == [0.6, 0.5, 0.3, 0.5, 0.2]
    tokens, parents, _ = joined(7, [one, other], 4)
    assert paths(tokens, parents) == [(1,), (1, 2), (4,)]
    assert joined(7, [], 4)[:2] == joined(7, [draft([], [], [])], 4)[:2] == ([7], [-1])


def test_of_equally_likely_nodes_those_of_the_first_drafter_stay() -> None:
    rows = [draft([token], [0], [0.5]) for token in (5, 3, 4)]
    assert [joined(7, list(order), 3)[0][1:] for order in (rows, rows[::-1])] == [[5, 3], [4, 3]]


def test_of_chains_the_longest_expected_one_stays() -> None:
    sure, long = draft([1], [0], [0.9]), draft([2, 3, 4], [0, 1, 2], [0.6, 0.6, 0.6])
    assert joined(7, [sure, long], 4, is_chain=True)[0] == [7, 2, 3, 4]
    assert joined(7, [sure, draft([2, 3], [0, 1], [0.6, 0.4])], 4, is_chain=True)[0] == [7, 1]


def test_random_trees_are_joined_as_sets_of_paths() -> None:
    chance = random.Random(0)
    for _ in range(200):
        drafts, worth = [], dict[tuple[int, ...], float]()
        for _ in range(chance.randint(1, 3)):
            known: dict[tuple[int, ...], tuple[int, float]] = {(): (0, 1.0)}
            for _ in range(chance.randint(0, 12)):
                path = (*chance.choice(list(known)), chance.randrange(3))
                if path not in known:
                    known[path] = len(known), chance.choice([0.2, 0.5, 0.9, 1.0])
            order = list(known)[1:]
            above = [known[path[:-1]][0] for path in order]
            drafts.append(draft([path[-1] for path in order], above, [known[path][1] for path in order]))
            for path in order:
                worth[path] = max(worth.get(path, 0.0), known[path][1])
        probs = {path: float(np.prod([worth[path[:i]] for i in range(1, len(path) + 1)])) for path in worth}
        total = chance.randint(1, 20)
        tokens, parents, _ = joined(7, drafts, total)
        found = paths(tokens, parents)
        assert len(set(found)) == len(found) == min(total - 1, len(probs)) and set(found) <= set(probs)
        assert sorted(probs[path] for path in found) == sorted(probs.values(), reverse=True)[: len(found)][::-1]
        assert all(parent < node for node, parent in enumerate(parents))


@pytest.fixture(scope="module")
def target(tiny) -> PagedModel:
    return PagedModel(tiny(0), name="target")


@pytest.fixture(scope="module")
def draft_model(tiny) -> PagedModel:
    return PagedModel(tiny(0, noise=0.05), name="draft")


@pytest.fixture(scope="module")
def plain(target) -> dict[tuple[str, str], list[list[int]]]:
    found = {}
    for rule, (name, params) in itertools.product(("follow", "coupled"), SAMPLING.items()):
        engine = Engine(Verifier(target, RULES[rule]()), max_batch_size=1)
        found[rule, name] = [result.token_ids for result in engine.generate(PROMPTS, params)]
    return found


@pytest.fixture(scope="module")
def unions(target, draft_model, plain) -> dict[str, UnionDrafter]:
    texts = [prompt + out for outputs in plain.values() for prompt, out in zip(PROMPTS, outputs, strict=True)]
    head = learn_eagle(target, eagle_config(target, 3, draft_vocab_size=50), [one for one in texts if len(one) > 4], 40)
    torch.manual_seed(0)
    heads = MedusaHeads.initial(MedusaConfig(target.hidden_size, target.vocab_size, 2), target.model.lm_head.weight)
    return {
        "ngram eagle": UnionDrafter([NGramDrafter(), EagleDrafter(head)], enough=0.5),
        "all": UnionDrafter(
            [SmallModelDrafter(draft_model), EagleDrafter(head), NGramDrafter(), MedusaDrafter(heads)], enough=0.9
        ),
    }


def engine_of(target: PagedModel, drafter: Drafter, policy: TreePolicy, rule: str = "follow", batch: int = 5) -> Engine:
    verifier = Verifier(target, RULES[rule]())
    return Engine(verifier, drafter, policy, max_batch_size=batch, prefill_chunk=7, page_size=4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["ngram eagle", "all"])
def test_speculative_equals_plain(target, plain, unions, name: str, policy: str) -> None:
    accepted = 0
    for sampling, batch in itertools.product(SAMPLING, (1, 5)):
        engine = engine_of(target, unions[name], POLICIES[policy], batch=batch)
        results = engine.generate(PROMPTS, SAMPLING[sampling])
        assert [r.token_ids for r in results] == plain["follow", sampling], f"{sampling}, batch {batch}"
        engine.check()
        for member in unions[name].members:
            assert not member.drafts and not member._offsets
            assert not getattr(member.drafter, "_states", None) and not getattr(member.drafter, "_indexes", None)
        accepted += sum(sum(r.metrics.accepted_by_depth) for r in results)
    assert accepted > 80


def test_coupled_and_adaptive_speculation_equal_plain(target, plain, unions) -> None:
    for sampling, params in SAMPLING.items():
        engine = engine_of(target, unions["all"], Coupled(total=10, depth=4, k=3), "coupled")
        assert [r.token_ids for r in engine.generate(PROMPTS, params)] == plain["coupled", sampling]
        for name, policy in itertools.product(unions, (POLICIES["top_k"], POLICIES["chain"])):
            engine = engine_of(target, unions[name], policy)
            # A cheap draft and a forward bound by memory: much is drafted, and then pruned.
            engine.speculation = AdaptiveSpeculation(policy, costs())
            assert [r.token_ids for r in engine.generate(PROMPTS, params)] == plain["follow", sampling]
            assert engine.speculation.counts.num_nodes > 0 and engine.speculation.counts.num_pruned > 0


def test_quick_drafters_serve_where_the_others_do_not_pay(target, tiny, plain) -> None:
    """A head that costs more than it brings is left alone, and what n-gram lookup finds is verified all the same."""
    from specdec.cost import CostModel, DraftCost, TargetCost

    class Frozen(CostModel):
        def observe_step(self, *seen: object) -> None:
            pass

    asked: list[int] = []

    class Counting(SmallModelDrafter):
        def propose(self, sequences, policy, noise):
            asked.append(len(sequences))
            return super().propose(sequences, policy, noise)

    union = UnionDrafter([NGramDrafter(), Counting(PagedModel(tiny(0)))])
    for draft_s in (1e3, 1e-6):
        asked.clear()
        costs = Frozen(TargetCost((1, 64), (1.0, 1.5)), DraftCost(draft_s))
        engine = engine_of(target, union, POLICIES["top_k"])
        engine.speculation = AdaptiveSpeculation(POLICIES["top_k"], costs, explore=0.0)
        results = engine.generate(PROMPTS, SAMPLING["greedy"])
        assert [r.token_ids for r in results] == plain["follow", "greedy"]
        assert bool(asked) == (draft_s < 1)
        assert sum(sum(r.metrics.accepted_by_depth) for r in results) > 5


def costs():
    from specdec.cost import CostModel, DraftCost, TargetCost

    return CostModel(TargetCost((1, 8, 64), (1.0, 1.1, 3.0)), DraftCost(0.0))


def test_a_part_equal_to_its_target_always_drafts_the_text(target, tiny, monkeypatch) -> None:
    """Its keys and values follow what was accepted, whoever drafted it."""
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    text = PROMPTS[0] + Engine(Verifier(target)).generate([PROMPTS[0]], params)[0].token_ids
    model = SmallModelDrafter(PagedModel(tiny(0)))
    propose, rounds = model.propose, []

    def watched(sequences, policy, noise):
        tree = propose(sequences, policy, noise)
        (one,) = sequences
        rounds.append(tree.tokens_BN[0].tolist() == text[one.root_position :][: tree.max_nodes])
        return tree

    monkeypatch.setattr(model, "propose", watched)
    for rival in (NGramDrafter(), SmallModelDrafter(PagedModel(tiny(0, noise=0.05)))):
        engine = Engine(Verifier(target), UnionDrafter([rival, model], enough=2.0), chain(4), page_size=4)
        assert engine.generate([PROMPTS[0]], params)[0].metrics.tau > 2
    assert len(rounds) > 15 and all(rounds)


def test_drafters_behind_one_that_is_sure_are_spared(target, tiny) -> None:
    calls = []

    class Counting(SmallModelDrafter):
        def propose(self, sequences, policy, noise):
            calls.append([one.id for one in sequences])
            return super().propose(sequences, policy, noise)

    steps = {}
    for enough in (0.6, 2.0):
        calls.clear()
        union = UnionDrafter([SmallModelDrafter(PagedModel(tiny(0))), Counting(PagedModel(tiny(0)))], enough)
        engine = Engine(Verifier(target), union, chain(4))
        results = engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=80, ignore_eos=True))
        steps[enough] = len(calls)
        assert results[0].metrics.tau > 4.5
    assert 0 < steps[0.6] < steps[2.0] - 5


@pytest.mark.parametrize("policy", [Sampled([2, 1]), chain(2, "iid"), Mixed([2, 1])])
def test_policies_that_draw_are_refused_with_what_to_use_instead(target, policy: TreePolicy) -> None:
    engine = Engine(Verifier(target), UnionDrafter([NGramDrafter()]), policy)
    with pytest.raises(ValueError, match=r"joins trees without chance.*draws nodes: use a policy top_k.*alone"):
        engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=4))


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="drafters is empty"):
        UnionDrafter([])
    with pytest.raises(ValueError, match="enough=0"):
        UnionDrafter([NGramDrafter()], enough=0)


def toy_union(world: World) -> UnionDrafter:
    torch.manual_seed(5)
    heads = MedusaHeads(MedusaConfig(ToyModel.hidden_size, world.vocab_size, num_heads=2)).double()
    model = SmallModelDrafter(ToyModel(world, world.draft_KCV, "draft"))  # type: ignore[arg-type]
    return UnionDrafter([NGramDrafter(), model, MedusaDrafter(heads)], enough=0.5)


@pytest.mark.parametrize(
    ("rule", "policy"),
    [
        ("follow", TopK(4, 2, 2)),
        ("rejection", chain(2)),
        ("recursive", TopK(4, 2, 2)),
        ("traversal", TopK(4, 2, 2)),
        ("coupled", Coupled(total=4, depth=2, k=2)),
    ],
)
def test_whole_generations_keep_the_law(rule: str, policy: TreePolicy) -> None:
    """What a union has learned shapes its trees, so each request is enumerated in an engine of its own."""
    world = World.tree(3, 7).select("sharp", "independent", "zeros")
    # Races have far more outcomes than draws.
    length = 2 if rule == "coupled" else 3
    assert generation_error(world, RULES[rule](), policy, length, drafter=toy_union(world), max_batch=1) < TOLERANCE


@pytest.mark.parametrize("rule", ["follow", "traversal"])
def test_adaptive_generations_keep_the_law(rule: str) -> None:
    """What lookup has found is verified even where nobody else is asked, and who is asked depends on what became of drafts."""
    world, policy = World.tree(3, 7).select("sharp", "independent", "zeros"), TopK(4, 2, 2)
    speculation = partial(impressionable, policy)
    error = generation_error(
        world, RULES[rule](), policy, 3, drafter=toy_union(world), speculation=speculation, max_batch=1
    )
    assert error < TOLERANCE


def test_trees_hold_what_the_parts_drafted_behind_the_very_text() -> None:
    for policy in (TopK(8, 3, 2), TopK(5, 4, 3), Static([[0], [1], [0, 0], [1, 0]])):
        assert union_mismatch(Follow(), policy) == 0
