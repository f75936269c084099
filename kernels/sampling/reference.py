"""Eager sampling: laws as the CPU computes them, and draws by integers, which no order of summation can change."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.sampling.keys import RowKeys, mix


def laws_reference(
    scores_RV: Tensor, temperature_R1: Tensor, top_k_R1: Tensor | None, top_p_R1: Tensor | None, min_p_R1: Tensor | None
) -> Tensor:
    """Laws [R, V] of the scores' type from parameters of the same type; None where a parameter is off in every row."""
    warped = scores_RV / torch.where(temperature_R1 > 0, temperature_R1, 1)
    if top_k_R1 is not None:
        k = top_k_R1.clamp(1, scores_RV.shape[1]).long()
        kth = warped.topk(int(k.max())).values.gather(1, k - 1)
        warped = warped.masked_fill((warped < kth) & (top_k_R1 > 0), -torch.inf)
    probs = warped.softmax(-1)
    if top_p_R1 is not None or min_p_R1 is not None:
        dropped = torch.zeros_like(probs, dtype=torch.bool)
        if top_p_R1 is not None:
            dropped |= probs < top_p_cut(probs, top_p_R1)
        if min_p_R1 is not None:
            dropped |= probs < min_p_R1 * probs.amax(-1, keepdim=True)
        # A second softmax instead of a division: a row that drops nothing keeps its very bits, whoever is beside it.
        probs = warped.masked_fill(dropped, -torch.inf).softmax(-1)
    is_greedy = temperature_R1 == 0
    return torch.where(is_greedy, one_hot(scores_RV), probs) if bool(is_greedy.any()) else probs


def one_hot(scores_RV: Tensor) -> Tensor:
    """All mass on the largest score, the first of equal ones."""
    return torch.zeros_like(scores_RV).scatter_(1, scores_RV.argmax(-1, keepdim=True), 1.0)


def top_p_cut(probs_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """The smallest probability that stays: tokens stay while the mass of the likelier ones is below top_p."""
    size = probs_RV.shape[-1]
    # A full sort of the vocabulary costs milliseconds; the mass almost always lies in the first thousand tokens.
    for width in (1024, size):
        ordered = probs_RV.topk(min(width, size)).values
        before = torch.nn.functional.pad(ordered.cumsum(-1)[:, :-1], (1, 0))
        if width >= size or bool(((before[:, -1:] >= top_p_R1) | (top_p_R1 >= 1)).all()):
            break
    kept = (before < top_p_R1).sum(-1, keepdim=True).clamp_min(1)
    cut = ordered.gather(1, kept - 1)
    return torch.where(top_p_R1 < 1, cut, 0)


def draw_reference(probs_RV: Tensor, keys: RowKeys) -> Tensor:
    """See `draw`."""
    return gumbel_max(probs_RV, keys) if keys.is_gumbel else invert_integers(probs_RV, keys.bits())


def gumbel_max(probs_RV: Tensor, keys: RowKeys) -> Tensor:
    """argmax of log p + g, g hashed per token."""
    # That is argmin of e / p with e exponential; only tokens with mass need a number.
    at, token = (probs_RV > 0).nonzero(as_tuple=True)
    bits = mix(keys.states()[at] + token) >> 11 & ((1 << 53) - 1)
    # Between the grid points of 53 bits, so that the logarithm is of neither 0 nor 1.
    exponential = -((bits.double() + 0.5) * 2.0**-53).log()
    times = torch.full(probs_RV.shape, torch.inf, dtype=torch.float64, device=probs_RV.device)
    return times.index_put((at, token), exponential / probs_RV[at, token].double()).argmin(-1)


def invert_integers(weights_RV: Tensor, bits_R: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds bits / 2**53 of all weight; token 0 where there is none.

    Weights are rounded down to integers, the total to some 60 bits: sums of integers are exact in any order, so a parallel
    sum serves, and a token of weight zero adds nothing and is never the first to exceed.
    """
    weights = weights_RV.double()
    # Scaled by powers of two alone: once by the largest weight, then by the total.
    exponent = integer_bits(weights.shape[1]) - (_exponent(weights.amax(-1)) + 1)
    coarse = _integers(weights, exponent).sum(-1)
    exponent = exponent + 60 - _exponent(coarse.double()).clamp_min(0)
    cumulative = _integers(weights, exponent).cumsum(-1)
    total = cumulative[:, -1]
    reached = cumulative <= _scaled(total, bits_R)[:, None]
    return torch.where(total > 0, reached.sum(-1), 0)


def integer_bits(size: int) -> int:
    """So many bits may one of `size` integers have whose sum must fit into 62."""
    return 62 - max(size - 1, 1).bit_length()


def _integers(weights_RV: Tensor, exponent_R: Tensor) -> Tensor:
    scale = ((exponent_R.clamp(-1000, 1000) + 1023) << 52).view(torch.float64)
    return torch.where(weights_RV > 0, weights_RV * scale[:, None], 0).long()


def _exponent(values_R: Tensor) -> Tensor:
    """floor(log2) of normal float64 values."""
    return ((values_R.view(torch.int64) >> 52) & 0x7FF) - 1023


def _scaled(total_R: Tensor, bits_R: Tensor) -> Tensor:
    """total * bits >> 53, the product having up to 115 bits: by halves, each part below 2**63."""
    high, low = total_R >> 31, total_R & ((1 << 31) - 1)
    upper, lower = bits_R >> 27, bits_R & ((1 << 27) - 1)
    middle = upper * low + ((lower * high) << 4) + ((lower * low) >> 27)
    return ((upper * high) << 5) + (middle >> 26)
