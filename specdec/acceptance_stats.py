"""How often drafted tokens turn out right: counted online over all requests, with an offset for each request."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below and above, a probability says no more than that something is hopeless or certain.
_LIMIT = 5.0


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
        centers = torch.linspace(-_LIMIT, _LIMIT, self.NUM_BINS, dtype=torch.float64).sigmoid()
        self._prior_C = torch.cat([centers, torch.tensor(self._BY_RANK, dtype=torch.float64)])
        self._hits_DC, self._trials_DC = torch.zeros(2, self.NUM_DEPTHS, len(self._prior_C), dtype=torch.float64)

    def cells(self, depth_BN: Tensor, confidence_BN: Tensor, parents_BN: Tensor) -> Tensor:
        """Where each node [B, N] is counted; anything at roots and padding."""
        known = torch.logit(confidence_BN.double(), eps=1e-6).clamp(-_LIMIT, _LIMIT)
        bins = ((known + _LIMIT) / (2 * _LIMIT) * (self.NUM_BINS - 1)).round()
        same = parents_BN[:, :, None] == parents_BN[:, None, :]
        rank = same.tril(-1).sum(2).clamp_max(len(self._BY_RANK) - 1)
        column = torch.where(bins.isnan(), self.NUM_BINS + rank, bins.nan_to_num().long())
        return (depth_BN - 1).clamp(0, self.NUM_DEPTHS - 1) * len(self._prior_C) + column

    def rates(self, cells_BN: Tensor) -> Tensor:
        """The estimated probability [B, N], float64."""
        mean_C, table = self._prior_C, []
        for hits_C, trials_C in zip(self._hits_DC, self._trials_DC, strict=True):
            mean_C = (hits_C + self._strength * mean_C) / (trials_C + self._strength)
            table.append(mean_C)
        return torch.cat(table)[cells_BN]

    def observe(self, cells_R: Tensor, is_hit_R: Tensor) -> None:
        """Nodes whose parents were right, and whether they were."""
        flat = cells_R.flatten()
        self._trials_DC.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float64))
        self._hits_DC.view(-1).index_add_(0, flat, is_hit_R.flatten().double())
        _fade(self._hits_DC, self._trials_DC, self._memory)


class DrawRates:
    """How often one of the `width` drawn children of an accepted node is accepted, by depth and width.

    Widths that were never tried are taken to draw independently, 1 - (1 - a)^width (Leviathan et al. 2023, section 3.1, is
    width 1); depths that were not, to be like the level above. Old counts fade as in `NodeRates`.
    """

    def __init__(self, max_depth: int, max_width: int, strength: float = 6.0, memory: float = 500.0) -> None:
        self._strength, self._memory = strength, memory
        self._hits_DW, self._trials_DW = torch.zeros(2, max_depth, max_width + 1, dtype=torch.float64)
        self._prior = 0.6

    def rates(self) -> Tensor:
        """The estimated probability [D, W] at depth d + 1 for width w; widths from 1 on."""
        widths_W = torch.arange(self._hits_DW.shape[1], dtype=torch.float64)
        single, rows = self._prior, []
        for hits_W, trials_W in zip(self._hits_DW, self._trials_DW, strict=True):
            # What a single draw would have given, had the draws of each tried width been independent.
            raw_W = (hits_W / trials_W.clamp_min(1e-9)).clamp(0, 1 - 1e-6)
            each_W = 1 - (1 - raw_W) ** (1 / widths_W.clamp_min(1))
            weight = float(trials_W.sum())
            single = (self._strength * single + float((trials_W * each_W).sum())) / (self._strength + weight)
            prior_W = 1 - (1 - single) ** widths_W
            rows.append((hits_W + self._strength * prior_W) / (trials_W + self._strength))
        return torch.stack(rows)

    def observe(self, depth: int, width: int, num_trials: float, num_hits: float) -> None:
        """Of `num_trials` accepted nodes at `depth` with `width` drawn children each, `num_hits` had one accepted."""
        self._trials_DW[depth, width] += num_trials
        self._hits_DW[depth, width] += num_hits
        _fade(self._hits_DW, self._trials_DW, self._memory)


class Offset:
    """How much better or worse a request's drafts do than all requests' together, in log-odds.

    Moved along the gradient of the logistic likelihood, in large steps while little is known, and drawn to zero: the prior
    that all requests share.
    """

    _SMALLEST, _TO_ZERO = 0.1, 0.998

    def __init__(self) -> None:
        self.value, self._num_seen = 0.0, 0

    def observe(self, surprise: float) -> None:
        """One accepted node's children: how many of them were right less how many were expected to be."""
        step = max(1 / (1 + self._num_seen / 5), self._SMALLEST)
        self.value = min(max(self._TO_ZERO * self.value + step * surprise, -_LIMIT), _LIMIT)
        self._num_seen += 1


def shifted(probs: Tensor, offsets: Tensor) -> Tensor:
    """Probabilities moved by offsets in log-odds; 0 and 1 stay short of themselves."""
    return (torch.logit(probs, eps=1e-4) + offsets).sigmoid()


def _fade(hits: Tensor, trials: Tensor, memory: float) -> None:
    keep = (memory / trials.clamp_min(memory)).clamp_max(1)
    hits *= keep
    trials *= keep


def geometric(high: float, low: float, count: int) -> Tensor:
    """`count` numbers from `high` down to `low`, float64, each the same factor below the one before."""
    return torch.linspace(math.log(high), math.log(low), count, dtype=torch.float64).exp()
