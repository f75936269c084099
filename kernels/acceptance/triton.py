"""Acceptance in Triton: one program walks one tree."""

# Triton reads the annotations of its kernels, so these have none.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.acceptance.trees import AcceptedPath, Coins, SampledTrees
from specdec.kernels.sampling.reference import integer_bits
from specdec.kernels.sampling.triton import bits_of, block_size, hashed, invert


def follow_triton(tokens_BN: Tensor, parents_BN: Tensor, drawn_T: Tensor, first_B: Tensor) -> AcceptedPath:
    """See `follow`."""
    out = _empty(tokens_BN)
    batch, nodes = tokens_BN.shape
    if batch:
        with torch.cuda.device_of(tokens_BN):
            _follow_kernel[(batch,)](
                tokens_BN.contiguous(),
                parents_BN.contiguous(),
                drawn_T.contiguous(),
                first_B.contiguous(),
                out.path_BN,
                out.num_accepted_B,
                out.next_token_B,
                nodes,
                BLOCK_N=triton.next_power_of_2(nodes),
                num_warps=1,
            )
    return out


def rejection_triton(trees: SampledTrees, laws_TV: Tensor, first_B: Tensor, coins: Coins) -> AcceptedPath:
    """See `rejection`."""
    out = _empty(trees.tokens_BN)
    if len(first_B):
        arguments = _arguments(trees, laws_TV.contiguous(), first_B, coins, out)
        with torch.cuda.device_of(laws_TV):
            _rejection_kernel[(len(first_B),)](*arguments, **_constants(trees, laws_TV, coins))
    return out


def traversal_triton(trees: SampledTrees, laws_TV: Tensor, first_B: Tensor, coins: Coins) -> AcceptedPath:
    """See `traversal`."""
    out = _empty(trees.tokens_BN)
    if len(first_B):
        # The kernel uses the laws up.
        laws = torch.empty(laws_TV.shape, dtype=laws_TV.dtype, device=laws_TV.device).copy_(laws_TV)
        with torch.cuda.device_of(laws):
            _traversal_kernel[(len(first_B),)](
                *_arguments(trees, laws, first_B, coins, out), **_constants(trees, laws, coins)
            )
    return out


def _empty(tokens_BN: Tensor) -> AcceptedPath:
    count_B, token_B = torch.empty(2, len(tokens_BN), dtype=torch.int64, device=tokens_BN.device)
    return AcceptedPath(torch.empty(tokens_BN.shape, dtype=torch.int64, device=tokens_BN.device), count_B, token_B)


def _arguments(
    trees: SampledTrees, laws_TV: Tensor, first_B: Tensor, coins: Coins, out: AcceptedPath
) -> tuple[Any, ...]:
    integers = trees.tokens_BN, trees.parents_BN, trees.num_nodes_B, trees.draws_BM, trees.kinds_BM, first_B
    drafted = laws_TV if trees.laws_BNV is None else trees.laws_BNV.contiguous()
    return (
        *(one.contiguous() for one in integers),
        laws_TV,
        drafted,
        coins.seeds_B.contiguous(),
        coins.rounds_B.contiguous(),
        out.path_BN,
        out.num_accepted_B,
        out.next_token_B,
        trees.tokens_BN.shape[1],
        trees.draws_BM.shape[1],
    )


def _constants(trees: SampledTrees, laws_TV: Tensor, coins: Coins) -> dict[str, Any]:
    nodes, draws, size = trees.tokens_BN.shape[1], trees.draws_BM.shape[1], laws_TV.shape[1]
    return {
        "ACCEPT": coins.accept,
        "RESIDUAL": coins.residual,
        "HAS_LAWS": trees.laws_BNV is not None,
        "BLOCK_N": triton.next_power_of_2(nodes),
        "BLOCK_M": triton.next_power_of_2(max(draws, 1)),
        "SIZE": size,
        "BLOCK": block_size(size),
        "BITS": integer_bits(size),
        "num_warps": 8 if size > 2048 else 4,
        # a * b - c is rounded twice, as it is elsewhere.
        "enable_fp_fusion": False,
    }


@triton.jit
def _follow_kernel(
    tokens,
    parents,
    drawn,
    first_rows,
    paths,
    counts,
    extra,
    num_nodes,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    token_N = tl.load(tokens + b * num_nodes + n, mask=n < num_nodes, other=-1)
    parent_N = tl.load(parents + b * num_nodes + n, mask=n < num_nodes, other=-1)
    first = tl.load(first_rows + b)
    path_N = tl.where(n == 0, 0, -1).to(tl.int64)
    node, count = b * 0, b * 0
    token = tl.load(drawn + first)
    child = tl.min(tl.where((parent_N == node) & (token_N == token), n, BLOCK_N), 0)
    while child < BLOCK_N:
        node = child
        count += 1
        path_N = tl.where(n == count, node, path_N)
        token = tl.load(drawn + first + node)
        child = tl.min(tl.where((parent_N == node) & (token_N == token), n, BLOCK_N), 0)
    tl.store(paths + b * num_nodes + n, path_N, mask=n < num_nodes)
    tl.store(counts + b, count)
    tl.store(extra + b, token)


@triton.jit
def _uniform(seed, PURPOSE: tl.constexpr, counter, index):
    """A float64 in [0, 1), as the host's."""
    return bits_of(hashed(seed, PURPOSE, counter), index).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _at(values, index, wanted):
    """The one of a few values that has this index."""
    return tl.sum(tl.where(index == wanted, values, 0), 0)


@triton.jit
def _rejection_kernel(
    tokens,
    parents,
    sizes,
    draws,
    kinds,
    first_rows,
    laws,
    drafted,
    seeds,
    rounds,
    paths,
    counts,
    extra,
    num_nodes,
    num_draws,
    ACCEPT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_LAWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    draw_M = tl.load(draws + b * num_draws + m, mask=m < num_draws, other=-1)
    kind_M = tl.load(kinds + b * num_draws + m, mask=m < num_draws, other=0)
    seed, counter = tl.load(seeds + b), tl.load(rounds + b)
    last = tl.load(sizes + b) - 1
    p_rows = laws + tl.load(first_rows + b) * SIZE
    q_rows = drafted
    if HAS_LAWS:
        q_rows = drafted + b * num_nodes * SIZE
    depth, token, minus = b * 0, b * 0, b * 0
    while (depth < last) & (minus == 0):
        token = tl.load(tokens + b * num_nodes + depth + 1)
        p = tl.load(p_rows + depth * SIZE + token)
        q = p * 0 + 1
        kind = b * 0
        if HAS_LAWS:
            kind = tl.sum(tl.where(draw_M == depth + 1, kind_M, 0), 0)
            if kind > 0:
                q = tl.load(q_rows + depth * SIZE + token).to(p.dtype)
        ratio = tl.minimum(tl.div_rn(p, q), 1.0)
        if _uniform(seed, ACCEPT, counter, depth) < ratio.to(tl.float64):
            depth += 1
        else:
            minus = tl.where(kind > 0, minus + 1, minus + 2)
    bits = bits_of(hashed(seed, RESIDUAL, counter), depth)
    drawn = invert(p_rows + depth * SIZE, q_rows + depth * SIZE, minus, token, bits, SIZE, BLOCK, BITS)
    tl.store(paths + b * num_nodes + n, tl.where(n <= depth, n, -1), mask=n < num_nodes)
    tl.store(counts + b, depth)
    tl.store(extra + b, drawn)


@triton.jit
def _draft(q_row, at, kind, token, whole, tokens, draws, kinds, parents, node, draw, SIZE: tl.constexpr):
    """A draw's law of the tokens `at`, given the siblings before it, whose mass is taken out and `whole` what stays."""
    q = tl.load(q_row + at, mask=(at < SIZE) & (kind > 0), other=0.0).to(tl.float32)
    if whole > 0:
        earlier = draw * 0
        while earlier < draw:
            reached = tl.load(draws + earlier)
            if reached >= 0:
                is_gone = (tl.load(parents + reached) == node) & (tl.load(kinds + earlier) == 2)
                q = tl.where(is_gone & (at == tl.load(tokens + reached)), 0.0, q)
            earlier += 1
        q = tl.div_rn(q, whole)
    return tl.where(kind > 0, q, tl.where(at == token, 1.0, 0.0))


@triton.jit
def _traversal_kernel(
    tokens,
    parents,
    sizes,
    draws,
    kinds,
    first_rows,
    laws,
    drafted,
    seeds,
    rounds,
    paths,
    counts,
    extra,
    num_nodes,
    num_draws,
    ACCEPT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_LAWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    span = tl.arange(0, BLOCK)
    tokens += b * num_nodes
    parents += b * num_nodes
    draws += b * num_draws
    kinds += b * num_draws
    p_rows = laws + tl.load(first_rows + b) * SIZE
    q_rows = drafted
    if HAS_LAWS:
        q_rows = drafted + b * num_nodes * SIZE
    seed, counter = tl.load(seeds + b), tl.load(rounds + b)
    parent_N = tl.load(parents + n, mask=n < num_nodes, other=-1)
    draw_M = tl.load(draws + m, mask=m < num_draws, other=-1)
    kind_M = tl.load(kinds + m, mask=m < num_draws, other=0)
    over_M = tl.load(parents + tl.maximum(draw_M, 0), mask=(m < num_draws) & (draw_M >= 0), other=-1)

    # Per node its weight, the draw it was reached by, and the first draw that its own next child may be.
    weight_N = (n * 0 + 1).to(tl.float32)
    via_N, place_N = n * 0 - 1, n * 0
    node, goes_on = b * 0, b * 0 + 1
    while goes_on > 0:
        place = _at(place_N, n, node)
        draw = tl.min(tl.where((over_M == node) & (m >= place), m, BLOCK_M), 0)
        descends = draw < BLOCK_M
        fails = b * 0
        if descends:
            place_N = tl.where(n == node, draw + 1, place_N)
        elif node == 0:
            # The root needs no coin: its weight stays one.
            goes_on = goes_on * 0
        else:
            if _uniform(seed, ACCEPT, counter, node) < _at(weight_N, n, node).to(tl.float64):
                goes_on = goes_on * 0
            else:
                fails = fails + 1
                draw = _at(via_N, n, node)
                node = _at(parent_N, n, node)
        if goes_on > 0:
            # A draw of a child of `node`, to be tried or given up.
            child = _at(draw_M, m, draw)
            token = tl.load(tokens + child)
            weight = _at(weight_N, n, node)
            p_row, q_row = p_rows + node * SIZE, q_rows
            kind = b * 0
            if HAS_LAWS:
                kind = _at(kind_M, m, draw)
                q_row = q_rows + node * SIZE
            whole = 0.0
            is_earlier = (over_M == node) & (m < draw) & (kind_M == 2)
            if (kind == 2) & (tl.sum(is_earlier.to(tl.int64), 0) > 0):
                mass = weight.to(tl.float64) * 0
                for start in range(0, SIZE, BLOCK):
                    q = _draft(
                        q_row,
                        start + span,
                        kind,
                        token,
                        weight * 0 + 1,
                        tokens,
                        draws,
                        kinds,
                        parents,
                        node,
                        draw,
                        SIZE,
                    )
                    mass += tl.sum(q.to(tl.float64), 0)
                # Nothing left but for rounding: the law as it was.
                whole = mass.to(tl.float32)
            reached = weight * 0
            if fails == 0:
                p = tl.load(p_row + token)
                q = p * 0 + 1
                if kind > 0:
                    q = tl.load(q_row + token).to(tl.float32)
                    if whole > 0:
                        q = tl.div_rn(q, whole)
                reached = tl.minimum(tl.div_rn(weight * p, q), 1.0)
            if reached > 0:
                weight_N = tl.where(n == child, reached, weight_N)
                via_N = tl.where(n == child, draw, via_N)
                node = child
            else:
                mass = weight.to(tl.float64) * 0
                for start in range(0, SIZE, BLOCK):
                    at = start + span
                    p = tl.load(p_row + at, mask=at < SIZE, other=0.0)
                    q = _draft(q_row, at, kind, token, whole, tokens, draws, kinds, parents, node, draw, SIZE)
                    mass += tl.sum(tl.maximum(weight * p - q, 0.0).to(tl.float64), 0)
                left = mass.to(tl.float32)
                # Not left + 1 - weight, which rounds a small mass away.
                all_of_it = left + (1 - weight)
                updated = tl.where(all_of_it > 0, tl.div_rn(left, tl.maximum(all_of_it, 1.1754943508222875e-38)), 1.0)
                weight_N = tl.where(n == node, updated, weight_N)
                if left > 0:
                    for start in range(0, SIZE, BLOCK):
                        at = start + span
                        p = tl.load(p_row + at, mask=at < SIZE, other=0.0)
                        q = _draft(q_row, at, kind, token, whole, tokens, draws, kinds, parents, node, draw, SIZE)
                        tl.store(p_row + at, tl.div_rn(tl.maximum(weight * p - q, 0.0), left), mask=at < SIZE)
                    # Other threads of this program read what these have written.
                    tl.debug_barrier()

    bits = bits_of(hashed(seed, RESIDUAL, counter), node)
    drawn = invert(p_rows + node * SIZE, p_rows, 0, 0, bits, SIZE, BLOCK, BITS)
    on_N = n * 0
    at_node = node
    while at_node >= 0:
        on_N = tl.where(n == at_node, 1, on_N)
        at_node = _at(parent_N, n, at_node)
    # Nodes of the path in order, since parents come before children; behind them all others as padding.
    count = tl.sum(on_N, 0)
    place_N = tl.where(on_N > 0, tl.cumsum(on_N, 0) - 1, count + n - tl.cumsum(on_N, 0))
    tl.store(paths + b * num_nodes + place_N, tl.where(on_N > 0, n, -1), mask=n < num_nodes)
    tl.store(counts + b, count - 1)
    tl.store(extra + b, drawn)
