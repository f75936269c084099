"""Tree attention by tiles of positions: a token's result depends on its own path alone, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from specdec.kernels.tree_attention.api import SequencePlan

# Positions per tile. Larger ones are fewer to merge, but every node of a tree copies the last one of its path.
TILE = 64
# ATen's flash kernel takes queries in blocks of 32 and gives a row the same bits in every block, unless it is alone there
# or there are so many rows (64) that keys are repacked.
BLOCK, MAX_ROWS = 32, 48
# Up to this many tiles, copying all keys costs less than a second call.
FEW_TILES = 8


@dataclass(frozen=True)
class PathTiles:
    """Where the keys of every query's path lie, in the order of positions; j counts tiles, t the positions of one.

    The first `num_full` tiles lie whole before the tree, so all queries read them alike. Behind them `own_slots_Xjt` names
    each query's own keys (X is 1 where all share them, as in a prompt). Biases are 0 or -inf; the rows R are a group's heads
    of one query after another, or 1 for all alike. `is_empty_jR` marks tiles of which a row sees nothing.
    """

    num_full: int
    own_slots_Xjt: Tensor
    full_bias_j1Rt: Tensor
    own_bias_Y1Rt: Tensor
    is_empty_jR: Tensor | None


def path_tiles(part: SequencePlan, window: int | None, heads_per_group: int, dtype: torch.dtype) -> PathTiles:
    """Lays one sequence's keys out in tiles."""
    queries, seen, positions_M = part.num_queries, part.visible_len, part.tail_positions_M
    positions_Q = positions_M[len(positions_M) - queries :]
    mask_QM = part.tail_mask_QM
    if bool((positions_M.diff() == 1).all()):
        # Each deeper than the one before: a chain, which everybody sees up to himself.
        mask_QM = None
    num_tiles = int(positions_M.max()) // TILE + 1
    num_full = 0 if mask_QM is None and num_tiles <= FEW_TILES else seen // TILE
    begin, end = num_full * TILE, num_tiles * TILE
    slots_K = part.slots
    if slots_K is None:
        assert part.first_slot is not None
        slots_K = torch.arange(part.first_slot, part.first_slot + part.num_keys, device=positions_M.device)
    # What lies behind a path's end is hidden; a slot that has been written keeps what is multiplied there finite.
    if mask_QM is None:
        slots_XT = pad(slots_K[begin:], (0, end - len(slots_K)), value=int(slots_K[-1]))[None]
    else:
        slots_XT = slots_K[-1].expand(queries, end - begin).clone()
        slots_XT[:, : seen - begin] = slots_K[begin:seen]
        rows, nodes = mask_QM.nonzero(as_tuple=True)
        slots_XT[rows, positions_M[nodes] - begin] = slots_K[seen + nodes]
    behind_QT = positions_Q[:, None] - torch.arange(end, device=positions_M.device)
    sees_QT = behind_QT >= 0 if window is None else (behind_QT >= 0) & (behind_QT < window)
    sees_jQt = sees_QT.unflatten(1, (-1, TILE)).transpose(0, 1)
    bias_jQt = torch.where(sees_jQt, 0.0, -torch.inf).to(dtype)
    full_bias = bias_jQt.new_zeros(1, 1, 1, TILE)
    if window is not None and num_full:
        full_bias = bias_jQt[:num_full].repeat_interleave(heads_per_group, 1)[:, None]
    own_jQt = bias_jQt[num_full:]
    if mask_QM is None:
        own_bias = own_jQt.repeat_interleave(heads_per_group, 1)[:, None]
    else:
        own_bias = own_jQt.transpose(0, 1).reshape(-1, 1, 1, TILE)
    is_empty_jQ = ~sees_jQt.any(-1)
    is_empty = is_empty_jQ.repeat_interleave(heads_per_group, 1) if bool(is_empty_jQ.any()) else None
    return PathTiles(num_full, slots_XT.unflatten(1, (-1, TILE)), full_bias, own_bias, is_empty)


def tree_attention_invariant(
    query_THE: Tensor,
    key_cache_SGE: Tensor,
    value_cache_SGE: Tensor,
    sequences: list[SequencePlan],
    scaling: float,
    window: int | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """See `tree_attention`: bfloat16 on the CPU. A token gets the bits that it gets when decoded alone, whatever tree, chunk,
    batch or pages are around it.

    Every tile is a product of its own, of fixed length, in the order of positions along the path; a row's tiles are added
    one after another, and a tile that it does not reach adds an exact zero.
    """
    outs = []
    groups, heads, size = key_cache_SGE.shape[1], query_THE.shape[1], query_THE.shape[2]
    for part in sequences:
        queries, tiles = part.num_queries, part.tiles(window, heads // groups, query_THE.dtype)
        query_QGgE = query_THE[part.row : part.row + queries].reshape(queries, groups, -1, size)
        query_1GRE = query_QGgE.transpose(0, 1).reshape(1, groups, -1, size)
        slots = tiles.own_slots_Xjt.view(-1)
        key_YGtE, value_YGtE = (_tiled(cache.index_select(0, slots)) for cache in (key_cache_SGE, value_cache_SGE))
        if tiles.own_slots_Xjt.shape[0] == 1:
            out_jGRE, lse_jGR = _attend(query_1GRE, key_YGtE, value_YGtE, tiles.own_bias_Y1Rt, scaling)
        else:
            out_jGRE, lse_jGR = _own(query_QGgE, key_YGtE, value_YGtE, tiles, scaling)
        if tiles.num_full:
            count = tiles.num_full * TILE
            key_jGtE, value_jGtE = (_first(cache, part, count) for cache in (key_cache_SGE, value_cache_SGE))
            out, lse = _attend(query_1GRE, key_jGtE, value_jGtE, tiles.full_bias_j1Rt, scaling)
            out_jGRE, lse_jGR = torch.cat([out, out_jGRE]), torch.cat([lse, lse_jGR])
        if tiles.is_empty_jR is not None:
            lse_jGR = lse_jGR.masked_fill(tiles.is_empty_jR[:, None], -torch.inf)
        out_GRE = _merge(out_jGRE, lse_jGR, sinks_H)
        outs.append(out_GRE.view(groups, queries, -1, out_GRE.shape[-1]).transpose(0, 1).reshape(queries, heads, -1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _first(cache_SGE: Tensor, part: SequencePlan, count: int) -> Tensor:
    """A sequence's first `count` keys or values, in tiles: [j, G, t, E]."""
    if part.first_slot is None:
        assert part.slots is not None
        return _tiled(cache_SGE.index_select(0, part.slots[:count]))
    return _tiled(cache_SGE[part.first_slot : part.first_slot + count])


def _tiled(states_TGE: Tensor) -> Tensor:
    return states_TGE.view(-1, TILE, *states_TGE.shape[1:]).transpose(1, 2)


def _own(
    query_QGgE: Tensor, key_YGtE: Tensor, value_YGtE: Tensor, tiles: PathTiles, scaling: float
) -> tuple[Tensor, Tensor]:
    """Tiles of which every query has its own: results [j, G, R, E] and log-sums [j, G, R]."""
    queries, count = tiles.own_slots_Xjt.shape[:2]
    query_YGgE = query_QGgE if count == 1 else query_QGgE.repeat_interleave(count, 0)
    out, lse = _attend(query_YGgE, key_YGtE, value_YGtE, tiles.own_bias_Y1Rt, scaling)
    out_jGRE = out.view(queries, count, *out.shape[1:]).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return out_jGRE, lse.reshape(queries, count, *lse.shape[1:]).permute(1, 2, 0, 3).flatten(2, 3)


def _attend(
    query_YGRE: Tensor, key_YGtE: Tensor, value_YGtE: Tensor, bias_Y1Rt: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """A product per tile: results [Y, G, R, E] and log-sums [Y, G, R]; queries and bias may be one for all tiles.

    There always is a bias, because the kernel sums in another order without one.
    """
    rows = query_YGRE.shape[2]
    query_YGRE = query_YGRE.expand(len(key_YGtE), -1, -1, -1)
    if rows == 1:
        # Twice in memory: a stride of zero makes the product another one.
        out, lse = _flash(query_YGRE.repeat(1, 1, 2, 1), key_YGtE, value_YGtE, bias_Y1Rt, scaling)
        return out[:, :, :1], lse[:, :, :1]
    if rows <= MAX_ROWS and rows != BLOCK + 1:
        return _flash(query_YGRE, key_YGtE, value_YGtE, bias_Y1Rt, scaling)
    pieces = -(-rows // BLOCK)
    biases = [bias_Y1Rt] * pieces if bias_Y1Rt.shape[2] == 1 else bias_Y1Rt.tensor_split(pieces, 2)
    queries = query_YGRE.tensor_split(pieces, 2)
    outs, sums = zip(
        *(_flash(query, key_YGtE, value_YGtE, bias, scaling) for query, bias in zip(queries, biases, strict=True)),
        strict=True,
    )
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _flash(
    query_YGRE: Tensor, key_YGtE: Tensor, value_YGtE: Tensor, bias_Y1Rt: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_YGRE, key_YGtE, value_YGtE, attn_mask=bias_Y1Rt, scale=scaling
    )
    return out, lse


def _merge(out_jGRE: Tensor, lse_jGR: Tensor, sinks_H: Tensor | None) -> Tensor:
    """One softmax out of each tile's own; sums run over the tiles in order, so zeros at the end change no bit."""
    if len(out_jGRE) == 1 and sinks_H is None:
        return out_jGRE[0]
    if sinks_H is not None:
        groups, rows = lse_jGR.shape[1:]
        sinks_Gg = sinks_H.to(lse_jGR.dtype).view(groups, -1)
        lse_jGR = torch.cat([sinks_Gg.repeat(1, rows // sinks_Gg.shape[1])[None], lse_jGR])
    # Not torch.softmax, which computes the rows at the end of its vectors with another exp.
    weight_jGR = (lse_jGR - lse_jGR.amax(0)).exp_()
    weight_jGR /= _sum_in_order(weight_jGR)
    if sinks_H is not None:
        weight_jGR = weight_jGR[1:]
    return _sum_in_order(out_jGRE * weight_jGR[..., None]).to(out_jGRE.dtype)


def _sum_in_order(terms_jX: Tensor) -> Tensor:
    """The sum over j in one fixed order, eight by eight: torch.sum takes another order for other numbers of columns."""
    sums_gX = terms_jX[::8].clone()
    for i in range(1, min(8, len(terms_jX))):
        every_eighth = terms_jX[i::8]
        sums_gX[: len(every_eighth)] += every_eighth
    total = sums_gX[0]
    for group in sums_gX[1:]:
        total += group
    return total
