"""Adaptive speculation in a world whose costs and acceptance are known: near the best, and never far below plain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from simulated import Always, World

from specdec import Engine, PagedModel, SamplingParams
from specdec.cost import CostModel, DraftCost, TargetCost, TargetSize
from specdec.drafters import Mixed, NGramDrafter, Sampled, SmallModelDrafter, Static, TopK, adaptive, chain
from specdec.drafters.adaptive import AdaptiveSpeculation
from specdec.drafters.choosing import Load, Options, choose, keep_best, may_pay
from specdec.drafters.pruning import prune
from specdec.sequence import Sequence
from specdec.tree import DrawKind, TokenTree
from specdec.verifiers import Verifier


def flat(rows: float) -> float:
    """A forward bound by memory up to 16 rows, by arithmetic above."""
    return 0.04 * max(1.0, rows / 16)


def linear(rows: float) -> float:
    return 0.01 + 0.005 * rows


KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def model(target_s, level_s: float = 0.004, node_s: float = 2e-4) -> CostModel:
    return CostModel(TargetCost(KNOTS, tuple(map(target_s, KNOTS))), DraftCost(1e-9, level_s, node_s))


@pytest.mark.parametrize("target_s", [flat, linear])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_the_choice_is_near_the_optimum_of_all_assignments(target_s, batch: int) -> None:
    """Chains: each row may go to any depth; brute force tries them all."""
    generator = np.random.default_rng(batch)
    depth, costs = 4 if batch < 8 else 2, model(target_s)
    for _ in range(6):
        hazard_B = generator.choice([0.0, 0.2, 0.5, 0.8, 0.95], batch)
        gain_BD = np.concatenate([np.zeros((batch, 1)), np.cumprod(np.tile(hazard_B[:, None], depth), 1).cumsum(1)], 1)
        gain_BDO = gain_BD[..., None]
        levels = np.arange(depth + 1.0)
        nodes_BDO = np.broadcast_to(levels[:, None], gain_BDO.shape)
        options = Options(gain_BDO, nodes_BDO, levels, np.zeros(batch), np.full(batch, depth))
        load = Load(batch, batch, 0, 0, batch)
        found = choose(options, load, costs, margin=0.0)

        def rate(depths: tuple[int, ...], gain_BD: np.ndarray = gain_BD) -> float:
            tokens = batch + sum(gain_BD[row, d] for row, d in enumerate(depths))
            nodes = np.array(float(sum(depths)))
            draft = costs.draft_s(np.array(float(max(depths))), nodes, np.zeros(()))
            return tokens / float(costs.step_s(batch + nodes, batch, 0) + draft)

        best = max(map(rate, itertools.product(range(depth + 1), repeat=batch)))
        assert rate(tuple(found.depths_B.tolist())) >= 0.995 * best
        assert found.tokens / found.seconds == pytest.approx(found.rate)


def test_pruning_keeps_the_best_set_of_every_size() -> None:
    generator, costs = np.random.default_rng(0), model(lambda rows: 0.01 + 0.004 * rows)
    probs = np.sort(generator.random((2, 5)), 1)[:, ::-1] * [[0.9], [0.4]]
    probs[:, 0] = 0
    load, rate = Load(2, 2, 0, 0, 2), 80.0

    def value(keep: np.ndarray) -> float:
        return float(probs[keep].sum() - rate * costs.step_s(np.array(2.0 + keep.sum()), 2, 0))

    subsets = (np.array(bits).reshape(2, 5) for bits in itertools.product([False, True], repeat=10))
    best = max(value(keep) for keep in subsets)
    assert value(keep_best(probs, load, costs, rate)) == pytest.approx(best)
    assert not keep_best(probs, load, costs, 1e9).any()


def test_prompts_in_a_step_do_not_make_time_look_cheap() -> None:
    """A step of 200 prompt tokens takes long whatever is drafted; what a node costs in it is all that matters."""
    gain = np.array([0.0, 0.3]).reshape(1, 2, 1)
    options = Options(gain, gain / 0.3, np.array([0.0, 1.0]), np.zeros(1), np.array([1]))
    costs = model(lambda rows: 0.01 + 0.005 * rows, level_s=0.0, node_s=0.0)
    assert choose(options, Load(1, 1, 0, 0, 1), costs).depths_B.tolist() == [0]
    assert choose(options, Load(201, 2, 0, 200, 1), costs).depths_B.tolist() == [0]


def chain_rate(hits: list[float], target_s, level_s: float, node_s: float, depth: int) -> float:
    rows, tokens = len(hits) * (1 + depth), sum(q**i for q in hits for i in range(depth + 1))
    return tokens / (target_s(rows) + depth * level_s + depth * len(hits) * node_s)


@pytest.mark.parametrize("kind", ["fixed", "iid"])
@pytest.mark.parametrize(
    ("hits", "target_s"),
    [
        ([0.3], flat),
        ([0.8], flat),
        ([0.0] * 4, flat),
        ([0.6] * 4, flat),
        ([0.9] * 4, flat),
        ([0.9] * 16, flat),
        ([0.0], linear),
        ([0.6] * 8, linear),
        ([0.0, 0.9] * 4, flat),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_near_the_best_fixed_chain_and_never_far_below_plain(kind: str, hits: list[float], target_s) -> None:
    level_s, node_s, policy = 0.004, 2e-4, chain(6, kind)
    world = World(len(hits), lambda row, step: [hits[row]], target_s, level_s, node_s)
    speculation = AdaptiveSpeculation(policy, world.costs(), clock=lambda: world.now)
    found = world.run(speculation, policy, steps=150, skip=60)
    plain = len(hits) / target_s(len(hits))
    best = max(chain_rate(hits, target_s, level_s, node_s, depth) for depth in range(7))
    # Tokens are random: their own standard error is allowed for beside the few per cent.
    noise = 2.5 / np.sqrt(150 * len(hits))
    assert found >= (0.96 - (noise if best > plain * 1.02 else 0.0)) * best
    assert found >= 0.98 * plain
    assert speculation.counts.explored_s <= 0.011 * world.now + 4 * target_s(7 * len(hits))


def test_wide_trees_are_pruned_to_what_they_are_worth() -> None:
    """Half of the steps are easy and the drafter knows which: a fixed tree cannot tell them apart."""

    def right(row: int, step: int) -> list[float]:
        return [0.9, 0.05, 0.02, 0.01] if (step + row) % 2 else [0.25, 0.2, 0.1, 0.05]

    def run(speculation, policy) -> tuple[World, float]:
        world = World(4, right, flat, 0.001, 1e-5, told=lambda p: [x**0.5 / 2.2 for x in p])
        one = speculation(policy, world) if speculation is not Always else Always()
        return world, world.run(one, policy, steps=150, skip=80)

    policies = [TopK(16, 5, 4), TopK(8, 4, 2), chain(3), chain(2)]
    fixed = max(run(Always, policy)[1] for policy in policies)
    world, found = run(lambda policy, w: AdaptiveSpeculation(policy, w.costs(), clock=lambda: w.now), policies[0])
    assert found > 1.02 * fixed
    sizes = np.array(world.drafted[-50:])
    assert sizes.max() > 2 * sizes.min() + 1


def test_narrower_trees_are_drawn_where_nodes_are_dear() -> None:
    policy = Sampled([3, 2, 1])
    sizes = {}
    for batch in (1, 12):
        world = World(batch, lambda row, step: [0.7], linear if batch > 1 else flat, 1e-4, 1e-6)
        world.run(AdaptiveSpeculation(policy, world.costs(), clock=lambda w=world: w.now), policy, steps=60)
        sizes[batch] = np.mean(world.drafted[-20:])
    assert sizes[12] < sizes[1]


def test_a_request_that_recovers_is_found_again() -> None:
    world = World(4, lambda row, step: [0.0 if step < 80 else 0.9], flat, 0.001, 1e-5)
    policy = chain(4)
    speculation = AdaptiveSpeculation(policy, world.costs(), clock=lambda: world.now)
    world.run(speculation, policy, steps=80)
    assert np.mean(world.drafted[60:80]) < 0.2
    world.run(speculation, policy, steps=150)
    assert np.mean(world.drafted[-30:]) > 2


def test_where_nothing_pays_there_is_a_choice_every_few_steps(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(adaptive, "choose", lambda *given: calls.append(world.steps) or choose(*given))
    world, policy = World(2, lambda row, step: [0.0], linear, 0.004, 1e-4), chain(4)
    speculation = AdaptiveSpeculation(policy, world.costs(), explore=0.0, clock=lambda: world.now)
    world.run(speculation, policy, steps=400, skip=20)
    assert np.diff(calls[-10:]).tolist() == [32] * 9
    assert speculation.counts.num_rows == 840
    # Who comes or goes is chosen for at once.
    gone = world.sequences.pop()
    for batch in (world.sequences, [*world.sequences, gone]):
        world.sequences = batch
        for _ in range(3):
            world.step(speculation, policy)
        assert calls[-2:] == [world.steps - 3, world.steps - 1]


def test_drafts_that_could_not_pay_were_they_never_wrong_are_not_thought_about(monkeypatch) -> None:
    """Rows cost what tokens do: nothing is chosen or looked at, until costs turn out otherwise."""
    calls = []
    monkeypatch.setattr(adaptive, "choose", lambda *given: calls.append(world.steps) or choose(*given))
    world, policy = World(4, lambda row, step: [1.0], lambda rows: 0.001 + 0.01 * rows, 0.004, 1e-4), chain(4)
    speculation = AdaptiveSpeculation(policy, world.costs(), clock=lambda: world.now)
    world.run(speculation, policy, steps=100)
    assert not calls and not np.any(world.drafted) and not speculation.counts.explored_s
    costs = model(flat)
    for rows in KNOTS:
        for _ in range(200):
            speculation.costs.observe_step(TargetSize(rows), float(costs.step_s(np.array(float(rows)), 1, 0)))
    world.target_s = flat
    world.run(speculation, policy, steps=100)
    assert np.mean(world.drafted[-20:]) > 2


@pytest.mark.parametrize("target_s", [flat, linear])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_what_may_pay_is_told_from_what_cannot(target_s, batch: int) -> None:
    """Where every draft is right, something pays exactly where the best choice of all beats plain decoding."""
    for level_s, depth in itertools.product([0.0, 0.005, 0.02, 0.1], [1, 4]):
        costs, levels = model(target_s, level_s), np.arange(depth + 1.0)
        gain_BDO = np.tile(levels[:, None], (batch, 1, 1))
        limits_B, load = np.full(batch, depth), Load(batch, batch, 0, 0, batch)
        options = Options(gain_BDO, gain_BDO, levels, np.zeros(batch), limits_B)
        best = choose(options, load, costs)
        assert may_pay(limits_B, levels, load, costs) >= best.depths_B.any()
        plain_s = float(costs.step_s(np.array(float(batch)), batch, 0))
        assert may_pay(limits_B, levels, load, costs) == (best.rate * plain_s > 1.01 * batch)


def test_a_rest_outlasts_requests_that_come_and_go(monkeypatch) -> None:
    """Of many that run, one is new in every other step: a choice for each would cost more than it could bring."""
    calls = []
    monkeypatch.setattr(adaptive, "choose", lambda *given: calls.append(world.steps) or choose(*given))
    world, policy = World(32, lambda row, step: [0.0], linear, 0.004, 1e-4), chain(4)
    speculation = AdaptiveSpeculation(policy, world.costs(), explore=0.0, clock=lambda: world.now)
    world.run(speculation, policy, steps=60)
    calls.clear()
    spare = World(100, lambda row, step: [0.0], linear, 0.004, 1e-4).sequences
    for step in range(100):
        if step % 2:
            world.sequences = [*world.sequences[1:], spare[step]]
        world.step(speculation, policy)
    assert len(calls) < 25


def test_a_rest_ends_where_most_are_new(monkeypatch) -> None:
    """Of two requests one may be another; of both another, or of one, all has to be chosen anew."""
    calls = []
    monkeypatch.setattr(adaptive, "choose", lambda *given: calls.append(world.steps) or choose(*given))
    for before, after, is_over in [([0, 1], [0, 2], False), ([0, 1], [2, 3], True), ([0], [1], True)]:
        world, policy = World(4, lambda row, step: [0.0], linear, 0.004, 1e-4), chain(4)
        speculation, every = AdaptiveSpeculation(policy, world.costs(), explore=0.0), world.sequences
        world.sequences = [every[i] for i in before]
        world.run(speculation, policy, steps=200)
        while calls[-1] != world.steps - 1:
            world.step(speculation, policy)
        world.sequences = [every[i] for i in after]
        world.step(speculation, policy)
        assert (calls[-1] == world.steps - 1) == is_over


def test_what_is_ready_is_valued_with_what_may_be_drafted() -> None:
    """Rows that have something already are drafted for only where that brings more; brute force tries all."""
    generator, costs, depth = np.random.default_rng(0), model(lambda rows: 0.01 + 0.001 * rows), 3
    for batch in (1, 2, 3) * 4:
        hazard_B = generator.choice([0.2, 0.6, 0.9], batch)
        gain_BD = np.concatenate([np.zeros((batch, 1)), np.cumprod(np.tile(hazard_B[:, None], depth), 1).cumsum(1)], 1)
        ready_B = generator.choice([0.0, 0.5, 2.0], batch)
        levels = np.arange(depth + 1.0)
        nodes_BD = np.where(gain_BD > ready_B[:, None], levels, 2 * ready_B[:, None])
        gain_BD = np.maximum(gain_BD, ready_B[:, None])
        options = Options(
            gain_BD[..., None], nodes_BD[..., None], levels, np.full(batch, 1.0), np.full(batch, depth), 0.5
        )
        found = choose(options, Load(batch, batch, 0, 0, batch), costs, margin=0.0)

        def rate(depths: tuple[int, ...], gain_BD=gain_BD, nodes_BD=nodes_BD, batch=batch) -> float:
            rows, at = np.arange(batch), np.array(depths)
            draft = costs.draft_s(np.array(float(max(depths))), np.array(float(sum(depths))), np.zeros(()))
            seconds = float(costs.step_s(batch + nodes_BD[rows, at].sum(), batch, 0) + draft)
            return (batch + gain_BD[rows, at].sum()) / seconds

        best = max(map(rate, itertools.product(range(depth + 1), repeat=batch)))
        assert rate(tuple(found.depths_B.tolist())) >= 0.99 * best


def test_a_look_at_a_plain_step_is_a_single_one() -> None:
    """Where drafting pays in every step, plain ones cost what they are said to cost."""
    world, policy = World(1, lambda row, step: [0.95], flat, 0.001, 1e-5), chain(4)
    speculation = AdaptiveSpeculation(policy, world.costs(), explore=0.05, clock=lambda: world.now)
    world.run(speculation, policy, steps=200)
    drafted = [sizes[0] > 0 for sizes in world.drafted]
    assert 0 < drafted.count(False) < 20
    assert all(any(pair) for pair in itertools.pairwise(drafted[5:]))


def test_a_choice_holds_for_a_few_steps_of_the_same_sequences(monkeypatch) -> None:
    chosen = []
    choose = AdaptiveSpeculation._choose
    monkeypatch.setattr(
        AdaptiveSpeculation, "_choose", lambda self, *more: chosen.append(world.steps) or choose(self, *more)
    )
    monkeypatch.setattr(AdaptiveSpeculation, "_look_elsewhere", lambda self, options, load, choice, slept_B: choice)
    world, policy = World(2, lambda row, step: [0.95], flat, 0.001, 1e-5), chain(4)
    speculation = AdaptiveSpeculation(policy, world.costs(), explore=0.0, clock=lambda: world.now)
    world.run(speculation, policy, steps=10)
    assert chosen == [0, 4, 8]
    world.sequences.pop()
    world.run(speculation, policy, steps=3)
    assert chosen == [0, 4, 8, 10]
    # No deeper than there is room for.
    world.sequences[0].max_tokens = len(world.sequences[0].token_ids) + 3
    world.run(speculation, policy, steps=1)
    assert chosen == [0, 4, 8, 10] and world.drafted[-1] == [2]


def test_reading_is_an_investment() -> None:
    """A long prompt takes the time of four steps to read, which no single draft brings in: all those behind it do."""

    class Reads(World):
        token_s, num_read = 4e-4, 0

        def num_unread(self, sequence: Sequence) -> int:
            return max(len(sequence.token_ids) - self.num_read, 1)

        def propose(self, sequences, policy, noise) -> TokenTree:
            self.now += self.token_s * (len(sequences[0].token_ids) - self.num_read)
            self.num_read = len(sequences[0].token_ids)
            return super().propose(sequences, policy, noise)

    world, policy = Reads(1, lambda row, step: [0.95], flat, 0.001, 1e-5), chain(4)
    world.sequences[0].token_ids *= 400 // len(world.sequences[0].token_ids)
    world.sequences[0].num_computed = world.sequences[0].root_position
    costs = CostModel(TargetCost(KNOTS, tuple(map(flat, KNOTS))), DraftCost(1e-9, 0.001, 1e-5, world.token_s))
    world.run(AdaptiveSpeculation(policy, costs, explore=0.0, clock=lambda: world.now), policy, steps=20)
    assert world.drafted[0][0] > 0 and np.mean(world.drafted[-10:]) > 3


def test_wrong_costs_are_put_right_by_what_steps_take() -> None:
    """Calibrated as if rows were free; in truth each costs as much as the first."""
    world = World(2, lambda row, step: [0.3], lambda rows: 0.01 * rows, 1e-4, 1e-6)
    policy = chain(4)
    speculation = AdaptiveSpeculation(policy, model(lambda rows: 0.02, 1e-4, 1e-6), clock=lambda: world.now)
    found = world.run(speculation, policy, steps=100, skip=60)
    assert found > 0.95 * 2 / world.target_s(2)


def test_same_times_same_choices() -> None:
    runs = []
    for _ in range(2):
        world = World(3, lambda row, step: [0.7, 0.2], flat, 0.002, 1e-5)
        policy = TopK(8, 3, 2)
        world.run(AdaptiveSpeculation(policy, world.costs(), clock=lambda w=world: w.now), policy, steps=40)
        runs.append((world.drafted, world.now))
    assert runs[0] == runs[1]


def test_prune_renumbers_and_refuses_what_was_drawn() -> None:
    tokens, parents = torch.tensor([[9, 1, 2, 3, 4, 5]]), torch.tensor([[-1, 0, 0, 1, 2, 4]])
    tree = TokenTree.from_parents(tokens, parents, vocab_size=10)
    pruned = prune(tree, torch.tensor([[False, False, True, False, True, False]]))
    assert pruned.tree.tokens_BN.tolist() == [[9, 2, 4]] and pruned.tree.parents_BN.tolist() == [[-1, 0, 1]]
    assert pruned.origin_BN.tolist() == [[0, 2, 4]]
    with pytest.raises(ValueError, match="without its parent"):
        prune(tree, torch.tensor([[True, False, True, True, True, True]]))
    laws = torch.full((1, 3, 10), 0.1)
    drawn = TokenTree.chain(tokens[:, :3], laws, DrawKind.IID)
    with pytest.raises(ValueError, match="before it is drawn"):
        prune(drawn, torch.tensor([[True, True, False]]))


POLICIES = {
    "chain": lambda: chain(4),
    "static": lambda: Static([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]),
    "top_k": lambda: TopK(12, 4, 3),
    "chain_iid": lambda: chain(4, "iid"),
    "sampled": lambda: Sampled([3, 2, 1]),
    "mixed": lambda: Mixed([3, 2, 1]),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafter", ["ngram", "small_model"])
def test_the_text_is_that_of_plain_decoding(tiny, drafter: str, policy: str) -> None:
    """Whatever is chosen, under times that have nothing to do with any model; the accepted drafts say that much was."""
    target, draft = PagedModel(tiny(0)), PagedModel(tiny(0, noise=0.03))
    prompts = [[5, 6, 7, 8, 9, 5, 6, 7], [9, 10, 11], [3] * 23, [4, 5, 4, 5, 4]]
    params = [SamplingParams(temperature=0.7 * (i % 2), seed=i, max_new_tokens=40) for i in range(4)]
    plain = [one.token_ids for one in Engine(Verifier(target)).generate(prompts, params)]
    times = itertools.count(step=0.013)
    for target_s in (flat, linear):
        one, tree = (NGramDrafter() if drafter == "ngram" else SmallModelDrafter(draft)), POLICIES[policy]()
        speculation = AdaptiveSpeculation(tree, model(target_s), explore=0.3, clock=lambda: next(times))
        engine = Engine(Verifier(target), one, tree, prefill_chunk=7, page_size=4, speculation=speculation)
        results = engine.generate(prompts, params)
        assert [one.token_ids for one in results] == plain
        counts = speculation.counts
        # Some rows were drafted for and some were not.
        assert 0 < counts.num_drafted < counts.num_rows
        assert sum(one.metrics.num_drafted for one in results) == counts.num_nodes


def test_another_policy_is_refused(tiny) -> None:
    target = PagedModel(tiny(0))
    speculation = AdaptiveSpeculation(chain(2), model(flat))
    engine = Engine(Verifier(target), NGramDrafter(), chain(2), speculation=speculation)
    with pytest.raises(ValueError, match="another policy"):
        engine.generate([[5, 6, 5, 6]], SamplingParams(max_new_tokens=4))


def test_drafts_that_are_said_to_cost_nothing_are_not_said_to_read() -> None:
    world, policy = World(1, lambda row, step: [0.95], flat), chain(4)
    costs = CostModel(TargetCost(KNOTS, tuple(map(flat, KNOTS))), DraftCost(0.0))
    speculation = AdaptiveSpeculation(policy, costs, clock=lambda: world.now)
    world.run(speculation, policy, steps=10)
    assert speculation._payoff._owed_s == 0
