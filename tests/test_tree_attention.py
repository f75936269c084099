"""Tree attention over scattered slots against an attention written out in Python floats."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from conftest import serves_invariant
from torch import Tensor

from specdec.kernels.tree_attention import AttentionPlan, SequencePlan, invariant, tree_attention


@dataclass
class Case:
    """A packed forward: `sees[t]` lists the slots that query t attends to, nearest property of a plan to check."""

    query_THE: Tensor
    keys_SGE: Tensor
    values_SGE: Tensor
    plan: AttentionPlan
    positions: list[int]
    sees: list[list[tuple[int, int]]]


# Query heads, kv heads, key size, value size.
SHAPES = [(1, 1, 8, 8), (6, 3, 5, 5), (7, 1, 16, 3), (4, 4, 3, 9), (8, 2, 13, 7)]
# Queries, whole tail (None: the queries, causal), visible keys.
PARTS = [(1, 1, 0), (1, None, 12), (9, 9, 5), (3, 11, 7), (6, None, 4), (2, 5, 0)]


def make_case(
    shape: tuple[int, int, int, int],
    parts: list[tuple[int, int | None, int]],
    contiguous: bool,
    dtype: torch.dtype,
    seed: int = 0,
) -> Case:
    """Random queries over slots of which all unreferenced ones hold NaN."""
    heads, groups, key_size, value_size = shape
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_slots = 3 + sum(visible + (tail or queries) + 2 for queries, tail, visible in parts)
    free, plans, slots, positions, sees, row = list(range(num_slots)), [], [], [], [], 0
    for queries, tail_len, visible in parts:
        tail = queries if tail_len is None else tail_len
        num_keys = visible + tail
        if contiguous:
            first = free[2]
            own, free = free[2 : 2 + num_keys], free[2 + num_keys :]
        else:
            own = draw.sample(free, num_keys)
            free = [slot for slot in free if slot not in own]
        parents = [draw.randrange(-1, node) for node in range(tail)]
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        if tail_len is None:
            seen, depths = [[j <= i for j in range(tail)] for i in range(tail)], list(range(tail))
        else:
            seen = [[False] * tail for _ in range(tail)]
            for node in range(tail):
                at = node
                while at >= 0:
                    seen[node][at] = True
                    at = parents[at]
        where = [*range(visible), *(visible + depth for depth in depths)]
        for query in range(tail - queries, tail):
            positions.append(visible + depths[query])
            keys = [*range(visible), *(visible + j for j in range(tail) if seen[query][j])]
            sees.append([(own[key], where[key]) for key in keys])
        mask = None if tail_len is None else torch.tensor(seen[tail - queries :])
        at_slots = None if contiguous else torch.tensor(own)
        plans.append(
            SequencePlan(
                row, queries, visible, mask, torch.tensor(where[visible:]), first if contiguous else None, at_slots
            )
        )
        slots += own[num_keys - queries :]
        row += queries
    used = torch.tensor(sorted({slot for seen_slots in sees for slot, _ in seen_slots}))
    keys_SGE = torch.full((num_slots, groups, key_size), torch.nan, dtype=dtype)
    values_SGE = torch.full((num_slots, groups, value_size), torch.nan, dtype=dtype)
    # Tail slots that this query must not see, but another does, hold numbers; all others poison whoever reads them.
    for part in plans:
        own_slots = (
            part.slots if part.slots is not None else torch.arange(part.first_slot, part.first_slot + part.num_keys)
        )
        used = torch.cat([used, own_slots]).unique()
    keys_SGE[used] = torch.randn(len(used), groups, key_size, generator=generator, dtype=dtype)
    values_SGE[used] = torch.randn(len(used), groups, value_size, generator=generator, dtype=dtype)
    query_THE = torch.randn(row, heads, key_size, generator=generator, dtype=dtype)
    return Case(query_THE, keys_SGE, values_SGE, AttentionPlan(torch.tensor(slots), None, plans), positions, sees)


def naive_attention(
    case: Case, scaling: float, window: int | None = None, softcap: float | None = None, sinks_H: Tensor | None = None
) -> Tensor:
    """One query, one head, one key at a time, in Python floats."""
    heads, groups = case.query_THE.shape[1], case.keys_SGE.shape[1]
    out = torch.zeros(len(case.sees), heads, case.values_SGE.shape[2], dtype=torch.float64)
    for t, seen in enumerate(case.sees):
        near = [slot for slot, position in seen if window is None or case.positions[t] - position < window]
        for head in range(heads):
            group = head * groups // heads
            query = case.query_THE[t, head].tolist()
            scores = [
                scaling * sum(q * k for q, k in zip(query, case.keys_SGE[s, group].tolist(), strict=True)) for s in near
            ]
            if softcap is not None:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            weights = [math.exp(score) for score in scores]
            total = sum(weights) + (0.0 if sinks_H is None else math.exp(float(sinks_H[head])))
            for slot, weight in zip(near, weights, strict=True):
                out[t, head] += weight / total * case.values_SGE[slot, group].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_sequences_in_one_forward(shape, contiguous, dtype):
    case = make_case(shape, PARTS, contiguous, dtype)
    found = tree_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan, scaling=0.3)
    torch.testing.assert_close(found, naive_attention(case, 0.3).to(dtype))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_one_sequence(part, contiguous):
    case = make_case((6, 3, 5, 4), [part], contiguous, torch.float32, seed=1)
    found = tree_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan, scaling=0.7)
    torch.testing.assert_close(found, naive_attention(case, 0.7).float())


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 4},
        {"window": 10},
        {"window": 1000},
        {"softcap": 1.5},
        {"sinks_H": torch.linspace(-2, 3, 8)},
        {"window": 4, "softcap": 0.7, "sinks_H": torch.linspace(2, -3, 8)},
        {"softcap": 3.0, "sinks_H": torch.zeros(8)},
        {"window": 3, "sinks_H": torch.full((8,), 4.0)},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_caps_and_sinks(options, contiguous, dtype):
    case = make_case((8, 2, 13, 7), PARTS, contiguous, dtype, seed=2)
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    found = tree_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan, scaling=1.1, **options)
    torch.testing.assert_close(found, naive_attention(case, 1.1, **options).to(dtype))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks_H": torch.ones(4)}], ids=str)
def test_half_precision_is_near(options):
    case = make_case((4, 2, 16, 16), PARTS, False, torch.bfloat16, seed=3)
    options = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in options.items()}
    found = tree_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan, scaling=0.25, **options)
    assert found.dtype == torch.bfloat16
    # Weights are rounded to 8 bits before they meet values of order one, which may cancel: the error is absolute.
    torch.testing.assert_close(found, naive_attention(case, 0.25, **options).bfloat16(), rtol=0.016, atol=2**-6)


def test_large_scores_do_not_overflow():
    case = make_case((2, 1, 8, 8), PARTS, False, torch.float32, seed=4)
    case.keys_SGE.mul_(100)
    for options in ({}, {"sinks_H": torch.tensor([500.0, -500.0])}, {"softcap": 1e4}):
        out = tree_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan, scaling=10.0, **options)
        assert bool(out.isfinite().all())


def test_masks_of_one_plan_do_not_mix_between_windows():
    """Layers of one forward share a plan and differ in their windows."""
    case = make_case((2, 2, 4, 4), PARTS, True, torch.float32, seed=5)
    for window in (3, None, 5, 3, 10_000, None):
        found = tree_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan, scaling=1.0, window=window)
        torch.testing.assert_close(found, naive_attention(case, 1.0, window).float())


def test_shapes_that_do_not_fit_are_refused():
    case = make_case((4, 2, 4, 4), [(2, None, 3)], True, torch.float32)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 kv heads"):
        tree_attention(case.query_THE[:, :3], case.keys_SGE, case.values_SGE, case.plan, scaling=1.0)
    with pytest.raises(ValueError, match="1 query rows"):
        tree_attention(case.query_THE[:1], case.keys_SGE, case.values_SGE, case.plan, scaling=1.0)


INVARIANT = [(1, 1, 0), (1, None, 150), (9, 9, 61), (3, 11, 64), (70, None, 63), (2, 5, 0), (40, 40, 130)]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"window": 70}, {"sinks_H": torch.linspace(-2, 3, 6)}, {"window": 3, "sinks_H": torch.ones(6)}],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("shape", [(6, 2, 16, 16), (6, 6, 24, 24), (6, 1, 64, 64)])
def test_invariant_attention_is_near(shape, options, contiguous):
    case = make_case(shape, INVARIANT, contiguous, torch.bfloat16, seed=6)
    arguments = case.query_THE, case.keys_SGE, case.values_SGE, case.plan
    found = tree_attention(*arguments, scaling=0.25, is_invariant=True, **options)
    # Each tile's result is rounded to 8 bits before they are merged: the error is absolute.
    torch.testing.assert_close(found, naive_attention(case, 0.25, **options).bfloat16(), rtol=0.016, atol=2**-6)


@pytest.mark.skipif(not serves_invariant(), reason="this CPU's bfloat16 products are not invariant")
@pytest.mark.parametrize("shape", [(9, 3, 64, 64), (4, 2, 8, 8), (6, 6, 24, 24), (5, 1, 80, 80)])
@pytest.mark.parametrize("visible", [0, 50, 63, 64, 300, 520, 1100])
def test_invariant_attention_gives_a_node_the_bits_of_its_path_alone(shape, visible):
    """A tree's nodes, a chunk's tokens, and each of them by itself, with its path's keys in a row."""
    options = {"scaling": 0.2, "is_invariant": True}
    for queries, parts in ((14, [(14, 14, visible)]), (37, [(37, None, visible)])):
        case = make_case(shape, parts, False, torch.bfloat16, seed=visible + queries)
        # Outliers, as real keys have them: they bring out differences that rounding mostly hides.
        case.keys_SGE.mul_(torch.linspace(-2, 2, shape[2]).exp().bfloat16())
        together = tree_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan, **options)
        for t, seen in enumerate(case.sees):
            slots = torch.tensor([slot for slot, _ in seen])
            alone = SequencePlan(0, 1, len(slots) - 1, None, torch.tensor([len(slots) - 1]), 0, None)
            plan = AttentionPlan(torch.tensor([len(slots) - 1]), 0, [alone])
            keys, values = case.keys_SGE[slots], case.values_SGE[slots]
            found = tree_attention(case.query_THE[t : t + 1], keys, values, plan, **options)
            assert torch.equal(found[0], together[t]), f"query {t} of {queries}, {len(slots)} keys"


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 16, 17, 40, 70])
def test_tiles_are_summed_alike_for_any_number_of_columns(count):
    """In bfloat16 a change of order shows once in many thousand numbers, here in float32 at once."""
    terms = torch.rand(count, 480, generator=torch.Generator().manual_seed(count))
    wanted = invariant._sum_in_order(terms)
    torch.testing.assert_close(wanted, terms.sum(0))
    for columns in (1, 9, 33, 144):
        assert torch.equal(invariant._sum_in_order(terms[:, :columns].contiguous()), wanted[:columns])
        assert torch.equal(invariant._sum_in_order(terms[:, :columns].t().contiguous().t()), wanted[:columns])
    for more in (1, 7, 12):
        assert torch.equal(invariant._sum_in_order(torch.cat([terms, torch.zeros(more, 480)])), wanted)


def test_invariant_attention_refuses_what_it_does_not_do():
    case = make_case((4, 2, 4, 4), [(2, None, 3)], True, torch.float32)
    arguments = case.query_THE, case.keys_SGE, case.values_SGE, case.plan
    with pytest.raises(ValueError, match=r"bfloat16 on the CPU without softcap, not torch.float32 on cpu$"):
        tree_attention(*arguments, scaling=1.0, is_invariant=True)
    case = make_case((4, 2, 4, 4), [(2, None, 3)], True, torch.bfloat16)
    arguments = case.query_THE, case.keys_SGE, case.values_SGE, case.plan
    with pytest.raises(ValueError, match=r"softcap 2.0"):
        tree_attention(*arguments, scaling=1.0, is_invariant=True, softcap=2.0)
    case = make_case((4, 2, 4, 6), [(2, None, 3)], True, torch.bfloat16)
    with pytest.raises(ValueError, match="keys and values of one size, not 4 and 6"):
        tree_attention(case.query_THE, case.keys_SGE, case.values_SGE, case.plan, scaling=1.0, is_invariant=True)
