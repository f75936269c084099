"""Tree policies against their definitions: which nodes, in what order, and what the drafter ran for them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specdec.certificates.worlds import KINDS, TableRound, World
from specdec.drafters import Mixed, Sampled, Static, TopK, chain
from specdec.drafters.growth import FixedPolicy, Grown
from specdec.interfaces import TreePolicy
from specdec.noise import CounterNoise, Key
from specdec.tree import DrawKind, TokenTree

Path = tuple[int, ...]
BUSHY = [[0], [1], [2], [0, 0], [0, 2], [2, 1], [0, 2, 0]]


class LoggedNoise(CounterNoise):
    """Production noise that notes per row, under its key, every token it draws."""

    def __init__(self, batch: int, seed: int = 0) -> None:
        super().__init__(range(seed, seed + batch), [0] * batch, [0] * batch)
        self.drawn: list[dict[int, int]] = [{} for _ in range(batch)]

    def categorical(self, probs_BV: Tensor, key: Key, rows: Tensor) -> Tensor:
        tokens = super().categorical(probs_BV, key, rows)
        indices = key.index.tolist() if isinstance(key.index, Tensor) else [key.index] * len(rows)  # type: ignore[union-attr]
        for row, index, token in zip(rows.tolist(), indices, tokens.tolist(), strict=True):
            assert index not in self.drawn[row]
            self.drawn[row][index] = token
        return tokens


def grow(
    policy: TreePolicy, world: World, limits: Seq[int], kinds: Seq[int] | None = None, noise: LoggedNoise | None = None
) -> tuple[Grown, TableRound]:
    """Grows from the empty context; checks what holds for every policy: limits, bounds, and whom the drafter ran."""
    batch = len(limits)
    rows = torch.tensor(kinds if kinds is not None else [row % len(world.kinds) for row in range(batch)])
    draft = TableRound(world, rows, torch.zeros(batch, dtype=torch.int64), limits)
    grown = policy.grow(draft, noise or LoggedNoise(batch))  # type: ignore[attr-defined]
    tree = grown.tree
    assert tree.tokens_BN[:, 0].tolist() == draft.roots_B.tolist()
    assert tree.max_nodes <= policy.max_nodes and draft.states_BX.shape[1] <= policy.max_expanded
    assert int(tree.depth_BN.max()) <= policy.max_depth
    for row, limit in enumerate(limits):
        assert int(tree.depth_BN[row].max()) <= limit
        paths, numbers = token_paths(tree, row), grown.expanded_BN[row].tolist()
        assert numbers[0] == (0 if limit else -1)
        inner = set(tree.parents_BN[row].tolist())
        for node, path in enumerate(paths):
            assert numbers[node] >= 0 or node not in inner, "a node with children was never run"
            if numbers[node] >= 0:
                assert len(path) < limit, "a drafter may skip nodes that nothing can follow"
                assert int(draft.states_BX[row, numbers[node]]) == world.walk(path), "another node was run"
        assert all(number == -1 for number in numbers[len(paths) :])
    return grown, draft


def token_paths(tree: TokenTree, row: int) -> list[Path]:
    """The drafted tokens that lead to each node of a row, in node order."""
    tokens = tree.tokens_BN[row]
    return [tuple(tokens[tree.path(node, row)[1:]].tolist()) for node in range(int(tree.num_nodes_B[row]))]


def scored_world(vocab: int, depth: int, seed: int, steps: int | None = None) -> World:
    """One kind of draft laws: random ones, or multiples of 1 / `steps`, which make many ties."""
    world = World.tree(vocab, depth, seed).select("independent")
    if steps is None:
        return world
    draws = torch.randint(vocab, (*world.draft_KCV.shape[:2], steps), generator=torch.Generator().manual_seed(seed))
    laws = torch.nn.functional.one_hot(draws, vocab).sum(2).double() / steps
    return replace(world, draft_KCV=laws)


def ranked(world: World, path: Path) -> list[tuple[int, float]]:
    """Tokens behind a path with their log-probabilities, likeliest first, impossible ones left out."""
    law = world.draft_KCV[0, world.walk(path)].tolist()
    return [(token, math.log(law[token])) for token in sorted(range(len(law)), key=lambda t: -law[t]) if law[token] > 0]


def eagle2(world: World, total: int, depth: int, k: int) -> set[Path]:
    """Expansion and reranking as the paper states them; right where no two scores are equal."""
    score: dict[Path, float] = {(): 0.0}
    level: list[Path] = [()]
    for _ in range(depth):
        children = []
        for path in level:
            for token, logprob in ranked(world, path)[:k]:
                score[(*path, token)] = score[path] + logprob
                children.append((*path, token))
        level = sorted(children, key=lambda path: -score[path])[:k]
    del score[()]
    return {(), *sorted(score, key=lambda path: -score[path])[: total - 1]}


@pytest.mark.parametrize("seed", range(6))
def test_top_k_is_eagle_2(seed: int) -> None:
    rng = random.Random(seed)
    vocab = rng.choice((3, 4))
    world = scored_world(vocab, 5, seed)
    for _ in range(8):
        total, depth, k = rng.randint(2, 24), rng.randint(1, 4), rng.randint(1, vocab + 2)
        limits = [rng.randint(0, 4) for _ in range(3)]
        grown, _ = grow(TopK(total, depth, k), world, limits)
        for row, limit in enumerate(limits):
            paths = token_paths(grown.tree, row)
            assert len(set(paths)) == len(paths)
            assert set(paths) == eagle2(world, total, min(depth, limit), k), (total, depth, k, limits)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_top_k_with_ties_is_one_of_the_best_trees(steps: int, seed: int) -> None:
    """With equal scores several trees are right: every level expands k best ones, and the best ones of all are kept.

    One step makes every law one-hot: a child then scores exactly what its parent does.
    """
    rng = random.Random(seed)
    world = scored_world(3, 5, seed, steps)
    for _ in range(8):
        total, depth, k = rng.randint(2, 16), rng.randint(1, 4), rng.randint(1, 4)
        limits = [rng.randint(0, 4) for _ in range(3)]
        grown, draft = grow(TopK(total, depth, k), world, limits)
        for row, limit in enumerate(limits):
            run = set(zip(draft.depths_X, draft.states_BX[row].tolist(), strict=True))
            score: dict[Path, float] = {}
            level: dict[Path, float] = {(): 0.0}
            for d in range(min(depth, limit)):
                expanded = {path: value for path, value in level.items() if (d, world.walk(path)) in run}
                if not expanded:
                    # Left out, for nothing below can be among the best.
                    kept = best(score.values(), total - 1)
                    assert len(kept) == total - 1 and max(level.values()) <= kept[-1]
                    break
                assert best(expanded.values(), k) == best(level.values(), k)
                level = {
                    (*path, token): value + logprob
                    for path, value in expanded.items()
                    for token, logprob in ranked(world, path)[:k]
                }
                score |= level
            kept = token_paths(grown.tree, row)[1:]
            assert sorted((score[path] for path in kept), reverse=True) == best(score.values(), total - 1)


def test_levels_that_cannot_be_kept_are_not_run() -> None:
    world = scored_world(3, 5, 0)
    flat = replace(world, draft_KCV=torch.full_like(world.draft_KCV, 1 / 3))
    grown, draft = grow(TopK(total=3, depth=5, k=2), flat, [5])
    assert max(draft.depths_X) == 0 and grown.tree.num_nodes_B.tolist() == [3]


def best(scores: Seq[float], count: int) -> list[float]:
    return sorted(scores, reverse=True)[:count]


def test_top_k_keeps_a_certain_path_whole() -> None:
    """Log-probability 0 all the way down: parents come first although their children score the same."""
    world = scored_world(3, 6, 0, steps=1)
    for total in range(2, 8):
        grown, _ = grow(TopK(total, depth=5, k=3), world, [5, 2])
        lengths = [sorted(len(path) for path in token_paths(grown.tree, row)) for row in (0, 1)]
        assert lengths == [list(range(min(total, 6))), list(range(min(total, 3)))]


def test_top_k_bounds() -> None:
    assert (TopK(16, 5, 4).max_nodes, TopK(16, 5, 4).max_expanded, TopK(16, 5, 4).max_depth) == (16, 17, 5)
    assert TopK(1000, 3, 2).max_nodes == 1 + 2 + 4 + 4
    assert TopK(1000, 1, 5).max_nodes == 6 and TopK(1000, 1, 5).max_expanded == 1
    assert TopK(9, 4, 1).spec.is_chain and TopK(9, 4, 1).max_nodes == 5 and not TopK(9, 4, 2).spec.is_chain
    # The bounds are reached.
    grown, draft = grow(TopK(1000, 3, 2), World.tree(3, 4).select("flat"), [3])
    assert grown.tree.max_nodes == 11 and draft.states_BX.shape[1] == TopK(1000, 3, 2).max_expanded == 5


@pytest.mark.parametrize("choices", [BUSHY, BUSHY[::-1], [[1], [1, 1]], [[0]], [[0] * d for d in (1, 2, 3)]])
def test_static_takes_the_ranks_it_is_told(choices: list[list[int]]) -> None:
    world = World.tree(3, 5).select("independent")
    policy = Static(choices)
    limits = [3, 0, 1, 2, 3]
    grown, draft = grow(policy, world, limits)
    for row, limit in enumerate(limits):
        wanted = [()]
        for ranks in sorted((tuple(ranks) for ranks in choices if len(ranks) <= limit), key=lambda r: (len(r), r)):
            path: Path = ()
            for rank in ranks:
                path = (*path, ranked(world, path)[rank][0])
            wanted.append(path)
        assert token_paths(grown.tree, row) == wanted
    assert (grown.tree.max_nodes, draft.states_BX.shape[1]) == (policy.max_nodes, policy.max_expanded)
    assert policy.spec.is_chain == all(rank == 0 for ranks in choices for rank in ranks)
    assert not grown.tree.spec.is_sampled and grown.tree.draft_laws_BNV is None


def test_static_grows_no_deeper_than_somebody_can_use() -> None:
    grown, draft = grow(Static(BUSHY), World.tree(3, 2).select("independent"), [1, 0])
    assert grown.tree.num_nodes_B.tolist() == [4, 1] and draft.states_BX.shape[1] == 1


SAMPLED: dict[str, Sampled] = {
    "iid": Sampled([3, 2, 1]),
    "without": Sampled([3, 2, 1], "without_replacement"),
    "without_all": Sampled([5, 2], "without_replacement"),
    "mixed": Mixed([3, 2, 1]),
    "mixed_all": Mixed([5, 2, 2]),
}


@pytest.mark.parametrize("policy", SAMPLED)
def test_sampled_children(policy: str) -> None:
    """Number, order, kind and law of every node's draws, for laws with and without zeros and depths of all rows."""
    grown_by = SAMPLED[policy]
    world = World.tree(4, 5)
    limits = [limit for limit in range(grown_by.max_depth + 1) for _ in KINDS]
    kinds = [kind for _ in range(grown_by.max_depth + 1) for kind in range(len(KINDS))]
    for seed in (0, 1000):
        noise = LoggedNoise(len(limits), seed)
        grown, _ = grow(grown_by, world, limits, kinds, noise)
        tree = grown.tree
        assert tree.adapted and tree.draft_laws_BNV is not None
        for row, (kind, limit) in enumerate(zip(kinds, limits, strict=True)):
            paths = token_paths(tree, row)
            drawn = zip(tree.draws_BM[row].tolist(), tree.kinds_BM[row].tolist(), strict=True)
            draws = [(node, k) for node, k in drawn if node > 0]
            # All draws of the row in the order of their keys are its stochastic draws in the order of the tree.
            tokens = [int(tree.tokens_BN[row, node]) for node, k in draws if k != DrawKind.FIXED]
            assert tokens == [token for _, token in sorted(noise.drawn[row].items())]
            for node, path in enumerate(paths):
                q = world.draft_KCV[kind, world.walk(path)]
                children = [(int(tree.tokens_BN[row, n]), k) for n, k in draws if int(tree.parents_BN[row, n]) == node]
                width = grown_by._branching[len(path)] if len(path) < limit else 0
                check_children(policy, q, tree.draft_laws_BNV[row, node], children, width)


def check_children(policy: str, q: Tensor, recorded: Tensor, children: list[tuple[int, int]], width: int) -> None:
    support = int((q > 0).sum())
    if not width or not support:
        assert not children
        return
    tokens, kinds = [token for token, _ in children], [kind for _, kind in children]
    if policy == "iid":
        assert kinds == [DrawKind.IID] * width and torch.equal(recorded, q)
    elif policy.startswith("without"):
        assert kinds == [DrawKind.WITHOUT_REPLACEMENT] * min(width, support) and torch.equal(recorded, q)
        assert len(set(tokens)) == len(tokens)
    else:
        top = q.topk(min(width - 1, len(q)))
        fixed = [token for token, p in zip(top.indices.tolist(), top.values.tolist(), strict=True) if p > 0]
        rest = q.clone()
        rest[fixed] = 0
        num_drawn = int(rest.sum() > 0)
        assert kinds == [DrawKind.IID] * num_drawn + [DrawKind.FIXED] * len(fixed)
        assert tokens[num_drawn:] == fixed and len(set(tokens)) == len(tokens)
        if num_drawn:
            torch.testing.assert_close(recorded, rest / rest.sum())


def test_duplicates_are_one_node_with_several_draws() -> None:
    world = World.tree(2, 3).select("independent")
    grown, _ = grow(Sampled([4, 1]), world, [2] * 20)
    tree = grown.tree
    for row in range(20):
        children = (tree.parents_BN[row] == 0).nonzero()[:, 0].tolist()
        hits = [tree.draws_BM[row].tolist().count(node) for node in children]
        assert sum(hits) == 4 and len(children) <= 2
    assert int((tree.depth_BN == 1).sum(1).min()) == 1


@pytest.mark.parametrize("policy", SAMPLED)
def test_rows_do_not_depend_on_their_batch_mates(policy: str) -> None:
    world, limits = World.tree(4, 5), [3, 1, 2, 0, 3]
    noise = LoggedNoise(len(limits))
    kinds = [KINDS.index("independent"), KINDS.index("silent_draft"), 0, 1, KINDS.index("zeros")]
    together, _ = grow(SAMPLED[policy], world, limits, kinds, noise)
    for row, limit in enumerate(limits):
        own = LoggedNoise(1, seed=row)
        alone, _ = grow(SAMPLED[policy], world, [limit], [kinds[row]], own)
        assert token_paths(alone.tree, 0) == token_paths(together.tree, row)
        assert own.drawn[0] == noise.drawn[row]


def test_sampled_bounds_and_specs() -> None:
    for policy in SAMPLED.values():
        widths = list(itertools.accumulate(policy._branching, lambda a, b: a * b, initial=1))
        assert (policy.max_depth, policy.max_nodes) == (len(widths) - 1, sum(widths))
        assert policy.max_expanded == sum(widths[:-1]) and not policy.spec.is_chain
    assert Sampled([2, 1]).spec.kinds == {DrawKind.IID}
    assert Sampled([2], "without_replacement").spec.kinds == {DrawKind.WITHOUT_REPLACEMENT}
    assert Mixed([2, 1]).spec.kinds == {DrawKind.IID, DrawKind.FIXED}
    # One child per node leaves no place for a FIXED sibling.
    assert Mixed([1, 1]).spec.kinds == {DrawKind.IID} and Mixed([1, 1]).spec.is_chain
    assert chain(3).spec.is_chain and not chain(3).spec.is_sampled and chain(3, "iid").spec.is_chain


@pytest.mark.parametrize(
    "policy", [Static(BUSHY), TopK(6, 3, 2), TopK(12, 3, 6), *SAMPLED.values(), chain(2), chain(2, "iid")]
)
def test_trees_are_what_the_policy_says(policy: TreePolicy) -> None:
    """The promise by which rules judge a policy covers every tree it grows."""
    world = World.tree(4, 5)
    for limits in ([3] * 11, [0] * 11, [0, 1, 2] * 4):
        grown, _ = grow(policy, world, limits)
        spec = grown.tree.spec
        assert spec.kinds <= policy.spec.kinds and spec.adapted == policy.spec.adapted
        assert spec.is_chain or not policy.spec.is_chain
        assert spec.has_laws or not spec.is_sampled


def test_ready_made_paths_are_admitted_by_shape() -> None:
    assert [Static(BUSHY).admits(ranks, 1) for ranks in ((0,), (2,), (0, 2, 0), (1, 0), (3,))] == [True] * 3 + [
        False
    ] * 2
    top = TopK(total=4, depth=2, k=2)
    assert (
        top.admits((1, 1), 3) and not top.admits((0,), 4) and not top.admits((0, 0, 0), 1) and not top.admits((2,), 1)
    )
    drawn = Sampled([3, 1])
    assert drawn.admits((2, 0), 100) and not drawn.admits((3,), 1) and not drawn.admits((0, 1), 1)
    assert not drawn.admits((0, 0, 0), 1)
    with pytest.raises(NotImplementedError):
        FixedPolicy().admits((0,), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(total=1), "total=1"),
        (lambda: TopK(depth=0), "depth=0"),
        (lambda: TopK(k=0), "k=0"),
        (lambda: Static([]), "choices is empty"),
        (lambda: Static([[]]), r"choice \[\]"),
        (lambda: Static([[0], [1, 0]]), r"choice \[1, 0\] needs .* its parent \[1\]"),
        (lambda: Static([[0], [0, -1]]), r"choice \[0, -1\] needs non-negative ranks"),
        (lambda: Sampled([]), r"branching=\[\]"),
        (lambda: Sampled([2, 0]), r"branching=\[2, 0\]"),
        (lambda: Sampled([2], "fixed"), "kind='fixed' is not a way to draw; choose one of iid, without_replacement"),
        (lambda: Mixed([]), r"branching=\[\]"),
        (lambda: Mixed([2, 0]), r"branching=\[2, 0\]"),
        (lambda: chain(0), "depth=0"),
        (lambda: chain(-1, "iid"), "depth=-1"),
        (lambda: chain(2, "top"), "kind='top'"),
        (lambda: grow(Static([[0], [4]]), World.tree(4, 2), [1]), "rank 4, the vocabulary has 4 tokens"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
