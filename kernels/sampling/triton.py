"""Laws and tokens from rows of logits in Triton, one program per row."""

# Triton reads the annotations of its kernels, so these have none.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.sampling.keys import RowKeys
from specdec.kernels.sampling.reference import integer_bits

if TYPE_CHECKING:
    from specdec.kernels.sampling.api import RowParams

MAX_BLOCK = 2048


def block_size(size: int) -> int:
    """Tokens that a program takes at a time."""
    return min(MAX_BLOCK, triton.next_power_of_2(size))


def laws_triton(scores_RV: Tensor, params: RowParams) -> Tensor:
    """See `laws`."""
    out = torch.empty(scores_RV.shape, dtype=torch.float32, device=scores_RV.device)
    if len(out):
        # Written by the very code that draws, so that a draw is one from this law.
        with torch.cuda.device_of(out):
            _rows_kernel[(len(out),)](
                *_row_arguments(scores_RV, params),
                out,
                out.stride(0),
                *(scores_RV,) * 4,
                0,
                PURPOSE=0,
                HAS_INDICES=False,
                WANTS="laws",
                **_constants(scores_RV),
            )
    return out


def sample_triton(scores_RV: Tensor, params: RowParams, keys: RowKeys) -> Tensor:
    """See `sample`."""
    out = torch.empty(len(scores_RV), dtype=torch.int64, device=scores_RV.device)
    if len(out):
        with torch.cuda.device_of(out):
            _rows_kernel[(len(out),)](
                *_row_arguments(scores_RV, params),
                scores_RV,
                0,
                out,
                *_key_arguments(keys),
                PURPOSE=keys.purpose,
                HAS_INDICES=isinstance(keys.index, Tensor),
                WANTS="race" if keys.is_gumbel else "token",
                **_constants(scores_RV),
            )
    return out


def draw_triton(probs_RV: Tensor, keys: RowKeys) -> Tensor:
    """See `draw`."""
    probs_RV = probs_RV if probs_RV.stride(1) == 1 else probs_RV.contiguous()
    out = torch.empty(len(probs_RV), dtype=torch.int64, device=probs_RV.device)
    if len(out):
        with torch.cuda.device_of(out):
            _draw_kernel[(len(out),)](
                probs_RV,
                probs_RV.stride(0),
                out,
                *_key_arguments(keys),
                PURPOSE=keys.purpose,
                HAS_INDICES=isinstance(keys.index, Tensor),
                IS_RACE=keys.is_gumbel,
                **_constants(probs_RV),
            )
    return out


def _row_arguments(scores_RV: Tensor, params: RowParams) -> tuple[Any, ...]:
    scores = scores_RV if scores_RV.stride(1) == 1 else scores_RV.contiguous()
    columns = params.temperature_R, params.top_k_R, params.top_p_R, params.min_p_R
    return scores, scores.stride(0), *(column.contiguous() for column in columns)


def _key_arguments(keys: RowKeys) -> tuple[Any, ...]:
    indices, index = (keys.index.contiguous(), 0) if isinstance(keys.index, Tensor) else (keys.seeds_R, keys.index)
    return keys.seeds_R.contiguous(), keys.counters_R.contiguous(), indices, index


def _constants(rows_RV: Tensor) -> dict[str, Any]:
    size = rows_RV.shape[1]
    return {"SIZE": size, "BLOCK": block_size(size), "BITS": integer_bits(size), "num_warps": 8 if size > 2048 else 4}


@triton.jit
def mix(state):
    """SplitMix64's finaliser on uint64, as in `keys.py`."""
    state = state + 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def hashed(seed, purpose, counter):
    """The state that an index is added to."""
    state = mix(mix(seed.to(tl.uint64)) + purpose)
    return mix(state ^ counter.to(tl.uint64))


@triton.jit
def bits_of(state, index):
    """53 random bits."""
    return mix(state + index.to(tl.uint64)) >> 11


@triton.jit
def exponent_of(value):
    """floor(log2) of a normal float64."""
    return ((value.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023


@triton.jit
def integers(weights, exponent):
    """weights * 2**exponent rounded down; whatever is not above zero, NaN included, is zero."""
    bounded = tl.minimum(tl.maximum(exponent, -1000), 1000)
    scale = ((bounded + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(weights > 0, weights.to(tl.float64) * scale, 0.0).to(tl.int64)


@triton.jit
def target_of(total, bits):
    """total * bits >> 53."""
    whole = total.to(tl.uint64)
    return ((tl.umulhi(whole, bits) << 11) | ((whole * bits) >> 53)).to(tl.int64)


@triton.jit
def _warped(row, at, size, temperature):
    score = tl.load(row + at, mask=at < size, other=float("-inf")).to(tl.float32)
    score = tl.div_rn(score, temperature)
    # Minus zero equals zero, and so must their bits.
    return tl.where(score == 0, 0.0, score)


@triton.jit
def _ordered(score):
    """Integers in the order of the floats, from 0 on."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0, bits + 0x80000000, -1 - bits)


@triton.jit
def _kept(row, at, size, temperature, top, kth, cut, min_p):
    """exp(score - top) of the tokens that no cut removes, else zero."""
    score = _warped(row, at, size, temperature)
    weight = tl.exp(score - top)
    keeps = (at < size) & (_ordered(score) >= kth) & (weight >= min_p) & (weight > 0)
    return tl.where(keeps & (weight.to(tl.int32, bitcast=True).to(tl.int64) >= cut), weight, 0.0)


@triton.jit(do_not_specialize=["index"])
def _rows_kernel(
    scores,
    score_stride,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    laws,
    law_stride,
    tokens,
    seeds,
    counters,
    indices,
    index,
    PURPOSE: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    WANTS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = scores + r * score_stride
    span = tl.arange(0, BLOCK)
    temperature = tl.load(temperatures + r)
    if temperature == 0:
        best = float("-inf")
        token = r * 0
        for start in range(0, SIZE, BLOCK):
            at = start + span
            score = tl.load(row + at, mask=at < SIZE, other=float("-inf")).to(tl.float32)
            largest = tl.max(score, 0)
            if largest > best:
                best = largest
                token = tl.min(tl.where(score == largest, at, SIZE), 0).to(tl.int64)
        if WANTS == "laws":
            for start in range(0, SIZE, BLOCK):
                at = start + span
                tl.store(laws + r * law_stride + at, tl.where(at == token, 1.0, 0.0), mask=at < SIZE)
        else:
            tl.store(tokens + r, token)
    else:
        top = float("-inf")
        for start in range(0, SIZE, BLOCK):
            top = tl.maximum(top, tl.max(_warped(row, start + span, SIZE, temperature), 0))

        # The k-th largest score, bit by bit: the largest bound that k scores reach.
        top_k = tl.load(top_ks + r)
        kth = top_k * 0
        if top_k > 0:
            wanted = tl.minimum(top_k, SIZE)
            step = kth + 0x80000000
            for _ in range(32):
                count = kth * 0
                for start in range(0, SIZE, BLOCK):
                    at = start + span
                    reaches = _ordered(_warped(row, at, SIZE, temperature)) >= kth + step
                    count += tl.sum((reaches & (at < SIZE)).to(tl.int64), 0)
                kth = tl.where(count >= wanted, kth + step, kth)
                step = step >> 1

        # The largest bound above which lies top-p of the mass, in the same way.
        top_p = tl.load(top_ps + r)
        cut = top_k * 0
        if top_p < 1:
            mass = top_k * 0
            for start in range(0, SIZE, BLOCK):
                weight = _kept(row, start + span, SIZE, temperature, top, kth, cut, 0.0)
                mass += tl.sum(integers(weight, cut + BITS - 1), 0)
            wanted_mass = top_p.to(tl.float64) * mass.to(tl.float64)
            step = cut + 0x20000000
            for _ in range(30):
                mass = top_k * 0
                for start in range(0, SIZE, BLOCK):
                    weight = _kept(row, start + span, SIZE, temperature, top, kth, cut + step, 0.0)
                    mass += tl.sum(integers(weight, step * 0 + BITS - 1), 0)
                cut = tl.where(mass.to(tl.float64) >= wanted_mass, cut + step, cut)
                step = step >> 1

        min_p = tl.load(min_ps + r)
        exponent = cut * 0 + BITS - 1
        total = cut * 0
        for start in range(0, SIZE, BLOCK):
            weight = _kept(row, start + span, SIZE, temperature, top, kth, cut, min_p)
            total += tl.sum(integers(weight, exponent), 0)
        exponent += 60 - tl.maximum(exponent_of(total.to(tl.float64)), 0)
        total = cut * 0
        for start in range(0, SIZE, BLOCK):
            weight = _kept(row, start + span, SIZE, temperature, top, kth, cut, min_p)
            total += tl.sum(integers(weight, exponent), 0)

        if WANTS == "laws":
            whole = tl.maximum(total, 1).to(tl.float64)
            for start in range(0, SIZE, BLOCK):
                at = start + span
                weight = _kept(row, at, SIZE, temperature, top, kth, cut, min_p)
                law = (integers(weight, exponent).to(tl.float64) / whole).to(tl.float32)
                tl.store(laws + r * law_stride + at, law, mask=at < SIZE)
        else:
            state = hashed(tl.load(seeds + r), PURPOSE, tl.load(counters + r))
            if WANTS == "race":
                least = total.to(tl.float64) * 0 + float("inf")
                token = r * 0
                for start in range(0, SIZE, BLOCK):
                    at = start + span
                    weight = _kept(row, at, SIZE, temperature, top, kth, cut, min_p)
                    time = race_time(state, at, weight)
                    first = tl.min(time, 0)
                    if first < least:
                        least = first
                        token = tl.min(tl.where(time == first, at, SIZE), 0).to(tl.int64)
                tl.store(tokens + r, token)
            else:
                number = index
                if HAS_INDICES:
                    number = tl.load(indices + r)
                goal = target_of(total, bits_of(state, number))
                passed = cut * 0
                before = cut * 0
                for start in range(0, SIZE, BLOCK):
                    at = start + span
                    weight = integers(_kept(row, at, SIZE, temperature, top, kth, cut, min_p), exponent)
                    reached = (before + tl.cumsum(weight, 0) <= goal) & (at < SIZE)
                    passed += tl.sum(reached.to(tl.int64), 0)
                    before += tl.sum(weight, 0)
                tl.store(tokens + r, tl.where(total > 0, passed, 0))


@triton.jit
def race_time(state, at, weight):
    """When each token arrives, an exponential over its weight; never, without weight."""
    bits = bits_of(state, at.to(tl.int64)).to(tl.int64)
    exponential = -tl.log((bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16)
    return tl.where(weight > 0, exponential / tl.where(weight > 0, weight, 1.0).to(tl.float64), float("inf"))


@triton.jit
def rest(p_row, q_row, at, size, minus, token):
    """Weights of tokens `at`: p, what it has over q (`minus` 1), or what it has over a law of `token` alone (`minus` 2)."""
    p = tl.load(p_row + at, mask=at < size, other=0.0)
    q = tl.load(q_row + at, mask=(at < size) & (minus == 1), other=0.0).to(p.dtype)
    return tl.maximum(tl.where((minus == 2) & (at == token), p - 1, p - q), 0.0)


@triton.jit
def invert(p_row, q_row, minus, token, bits, SIZE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """The token that `bits` draw from the weights of `rest`, or from p where these are all zero; 0 where p is, too."""
    span = tl.arange(0, BLOCK)
    largest = bits.to(tl.float64) * 0
    for start in range(0, SIZE, BLOCK):
        weight = rest(p_row, q_row, start + span, SIZE, minus, token)
        largest = tl.maximum(largest, tl.max(weight.to(tl.float64), 0))
    # Laws that are equal leave nothing over but for rounding, and then either law is right.
    minus = tl.where(largest > 0, minus, 0)
    if largest == 0:
        for start in range(0, SIZE, BLOCK):
            weight = rest(p_row, q_row, start + span, SIZE, minus, token)
            largest = tl.maximum(largest, tl.max(weight.to(tl.float64), 0))
    exponent = BITS - 1 - exponent_of(largest)
    total = exponent * 0
    for start in range(0, SIZE, BLOCK):
        total += tl.sum(integers(rest(p_row, q_row, start + span, SIZE, minus, token), exponent), 0)
    exponent += 60 - tl.maximum(exponent_of(total.to(tl.float64)), 0)
    total = exponent * 0
    for start in range(0, SIZE, BLOCK):
        total += tl.sum(integers(rest(p_row, q_row, start + span, SIZE, minus, token), exponent), 0)
    goal = target_of(total, bits)
    passed = exponent * 0
    before = exponent * 0
    for start in range(0, SIZE, BLOCK):
        at = start + span
        weight = integers(rest(p_row, q_row, at, SIZE, minus, token), exponent)
        reached = (before + tl.cumsum(weight, 0) <= goal) & (at < SIZE)
        passed += tl.sum(reached.to(tl.int64), 0)
        before += tl.sum(weight, 0)
    return tl.where(total > 0, passed, 0)


@triton.jit(do_not_specialize=["index"])
def _draw_kernel(
    probs,
    stride,
    tokens,
    seeds,
    counters,
    indices,
    index,
    PURPOSE: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    IS_RACE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = probs + r * stride
    state = hashed(tl.load(seeds + r), PURPOSE, tl.load(counters + r))
    if IS_RACE:
        least = state.to(tl.float64) * 0 + float("inf")
        token = r * 0
        for start in range(0, SIZE, BLOCK):
            at = start + tl.arange(0, BLOCK)
            time = race_time(state, at, tl.load(row + at, mask=at < SIZE, other=0.0))
            first = tl.min(time, 0)
            if first < least:
                least = first
                token = tl.min(tl.where(time == first, at, SIZE), 0).to(tl.int64)
        tl.store(tokens + r, token)
    else:
        number = index
        if HAS_INDICES:
            number = tl.load(indices + r)
        drawn = invert(row, row, 0, 0, bits_of(state, number), SIZE, BLOCK, BITS)
        tl.store(tokens + r, drawn)
