"""How often drafted tokens turn out right: counted online over all requests, with an offset for each request."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from specdec.cost import Array

Ints = NDArray[np.int64]
# Below and above, a probability says no more than that something is hopeless or certain.
_LIMIT, _EDGE = 5.0, 1e-4
# How much requests differ (variance of `Offset`) where nodes are told apart by the drafter's confidence.
CONFIDENT = 0.1


class NodeRates:
    """How often a FIXED node is right where its parent is, by depth and by the drafter's confidence in it.

    Each bin counts on its own (histogram calibration: Zadrozny and Elkan 2001), starting from the confidence it stands for
    at depth 1 and from the level above it further down. Nodes of unknown confidence (NaN) are told apart by their rank
    among their siblings. Old counts fade, so that a bin's rate is that of its last `memory` nodes.
    """

    NUM_DEPTHS, NUM_BINS = 4, 12
    _BY_RANK = (0.6, 0.2, 0.1, 0.05)

    def __init__(self, strength: float = 6.0, memory: float = 1000.0) -> None:
        self._strength, self._memory = strength, memory
        centers = sigmoid(np.linspace(-_LIMIT, _LIMIT, self.NUM_BINS)).tolist()
        self._prior_C: list[float] = [*centers, *self._BY_RANK]
        self._width = len(self._prior_C)
        # Host lists: a step touches a few cells, for which arrays cost more than they save.
        self._hits, self._trials = ([0.0] * (self.NUM_DEPTHS * self._width) for _ in range(2))
        self._rates = self._prior_C * self.NUM_DEPTHS

    def cells(self, depth_BN: Ints, confidence_BN: Array | None, parents_BN: Ints) -> Ints:
        """Where each node [B, N] is counted; anything at roots and padding. No confidence: that of every node is unknown."""
        bins = np.full(depth_BN.shape, np.nan)
        if confidence_BN is not None:
            known = logit(confidence_BN)
            bins = np.rint((np.clip(known, -_LIMIT, _LIMIT) + _LIMIT) / (2 * _LIMIT) * (self.NUM_BINS - 1))
        unknown = np.isnan(bins)
        if unknown[depth_BN > 0].any():
            same = parents_BN[:, :, None] == parents_BN[:, None, :]
            rank = np.minimum(np.tril(same, -1).sum(2), len(self._BY_RANK) - 1)
            bins = np.where(unknown, self.NUM_BINS + rank, bins)
        level = np.clip(depth_BN - 1, 0, self.NUM_DEPTHS - 1)
        return level * self._width + np.nan_to_num(bins).astype(np.int64)

    def cell(self, depth: int, confidence: float) -> int:
        """Where one node behind the root is counted whose confidence is known."""
        return (min(depth, self.NUM_DEPTHS) - 1) * self._width + _bin(confidence, self.NUM_BINS)

    def rates(self, cells_BN: Ints) -> Array:
        """The estimated probability [B, N]."""
        return np.array(self._rates)[cells_BN]

    def rate(self, cell: int) -> float:
        return self._rates[cell]

    def observe(self, cells_R: Seq[int], is_hit_R: Seq[bool]) -> None:
        """Nodes whose parents were right, and whether they were."""
        for cell, is_hit in zip(cells_R, is_hit_R, strict=True):
            self._trials[cell] += 1
            self._hits[cell] += is_hit
        for cell in set(cells_R):
            keep = self._memory / max(self._trials[cell], self._memory)
            self._hits[cell] *= keep
            self._trials[cell] *= keep
        for column in {cell % self._width for cell in cells_R}:
            mean = self._prior_C[column]
            for at in range(column, len(self._rates), self._width):
                mean = (self._hits[at] + self._strength * mean) / (self._trials[at] + self._strength)
                self._rates[at] = mean


class DrawRates:
    """How often one of the `width` drawn children of an accepted node is accepted, by depth and width.

    Widths that were never tried are taken to draw independently, 1 - (1 - a)^width (Leviathan et al. 2023, section 3.1, is
    width 1); depths that were not, to be like the level above. Old counts fade as in `NodeRates`.
    """

    def __init__(self, max_depth: int, max_width: int, strength: float = 6.0, memory: float = 500.0) -> None:
        self._strength, self._memory = strength, memory
        self._hits_DW, self._trials_DW = np.zeros((2, max_depth, max_width + 1))
        self._prior = 0.6

    def rates(self) -> Array:
        """The estimated probability [D, W] at depth d + 1 for width w; widths from 1 on."""
        widths_W = np.arange(self._hits_DW.shape[1])
        # What a single draw would have given, had the draws of each tried width been independent.
        raw_DW = np.minimum(self._hits_DW / np.maximum(self._trials_DW, 1e-9), 1 - 1e-6)
        each_DW = self._trials_DW * (1 - (1 - raw_DW) ** (1 / np.maximum(widths_W, 1)))
        single, rows = self._prior, []
        for each, trials, hits_W, trials_W in zip(
            each_DW.sum(1), self._trials_DW.sum(1), self._hits_DW, self._trials_DW, strict=True
        ):
            single = (self._strength * single + each) / (self._strength + trials)
            prior_W = 1 - (1 - single) ** widths_W
            rows.append((hits_W + self._strength * prior_W) / (trials_W + self._strength))
        return np.stack(rows)

    def observe(self, depth: int, width: int, num_trials: float, num_hits: float) -> None:
        """Of `num_trials` accepted nodes at `depth` with `width` drawn children each, `num_hits` had one accepted."""
        self._trials_DW[depth, width] += num_trials
        self._hits_DW[depth, width] += num_hits
        _fade(self._hits_DW, self._trials_DW, self._memory)


class Offset:
    """How much better or worse a request's drafts do than all requests' together, in log-odds.

    Moved along the gradient of the logistic likelihood, in large steps while little is known, and drawn to zero: the prior
    that all requests share. `variance` is how much requests differ. Where the drafter's confidence tells most of that, it is
    likeliest `CONFIDENT` (EAGLE-3 and n-gram on HumanEval, GSM8K, chat and repetitions), and 1 takes luck for merit.
    """

    _LEAST_STEP, _TO_ZERO = 0.1, 0.998

    def __init__(self, variance: float = 1.0) -> None:
        self.value, self._variance, self._num_seen = 0.0, variance, 0

    def observe(self, surprise: float) -> None:
        """One accepted node's children: how many of them were right less how many were expected to be."""
        step = max(
            self._variance / (1 + self._variance * self._num_seen / 5), min(self._LEAST_STEP, self._variance / 2)
        )
        self.value = min(max(self._TO_ZERO * self.value + step * surprise, -_LIMIT), _LIMIT)
        self._num_seen += 1


@functools.lru_cache(maxsize=4096)
def _bin(confidence: float, num_bins: int) -> int:
    inside = min(max(confidence, _EDGE), 1 - _EDGE)
    known = min(max(math.log(inside / (1 - inside)), -_LIMIT), _LIMIT)
    return round((known + _LIMIT) / (2 * _LIMIT) * (num_bins - 1))


def shifted_one(prob: float, offset: float) -> float:
    """`shifted` for a single node."""
    inside = min(max(prob, _EDGE), 1 - _EDGE)
    return 1 / (1 + (1 - inside) / inside * math.exp(-offset))


def shifted(probs: Array, offsets: Array) -> Array:
    """Probabilities moved by offsets in log-odds; 0 and 1 stay short of themselves."""
    return sigmoid(logit(probs) + offsets)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def logit(probs: Array) -> Array:
    inside = np.clip(probs, _EDGE, 1 - _EDGE)
    return np.log(inside / (1 - inside))


def _fade(hits: Array, trials: Array, memory: float) -> None:
    keep = memory / np.maximum(trials, memory)
    hits *= keep
    trials *= keep
