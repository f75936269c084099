"""Scores of tokens under the laws they should have been drawn from: what the statistics add up, with its exact moments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.noise import CounterNoise, RoundKey

SCORES = ("log_prob", "prob", "argmax", "half_vocabulary", "half_vocabulary_after_token", "seen_before")
# Log-probabilities are cut here, so that increments are bounded; rarer tokens are too few to matter to a mean.
MIN_LOG_PROB = -12.0


@dataclass(frozen=True)
class Steps:
    """What R consecutive tokens of one text add: martingale increments [R, F] with conditional variances and absolute
    third moments, drifts under the two stated alternatives, and transforms `pit_R2` (by rank, by id)."""

    increments_RF: Tensor
    variances_RF: Tensor
    thirds_RF: Tensor
    argmax_drifts_RF: Tensor
    temperature_drifts_RF: Tensor
    pit_R2: Tensor
    impossible_R: Tensor


class ScoredLaws:
    """Every score of every token under T laws, and its exact conditional moments.

    `previous_T` is the token before each, `seen_TV` marks the tokens of prompt and text so far. The scores are the
    log-probability, the probability, whether the token is the likeliest, whether it is in a fixed half of the vocabulary,
    in a half that changes with the token before it, and whether it was seen before. Float64 throughout.
    """

    def __init__(self, laws_TV: Tensor, previous_T: Tensor, seen_TV: Tensor) -> None:
        p = laws_TV.double()
        # As `Noise.categorical` does: rounding leaves the total of a float32 law near 1.
        p = p / p.sum(-1, keepdim=True)
        size, device = p.shape[1], p.device
        half_V = _half(size, device)
        ids = torch.arange(size, device=device)
        log_p = p.clamp_min(torch.finfo(torch.float64).tiny).log()
        best_T1 = p.argmax(-1, keepdim=True)
        scores = [
            log_p.clamp_min(MIN_LOG_PROB),
            p,
            (ids == best_T1).double(),
            half_V.expand_as(p),
            half_V[(ids + 7919 * (previous_T[:, None] + 1)) % size],
            seen_TV.double(),
        ]
        self.scores_FTV = torch.stack(scores)
        self.laws_TV = p
        means_FT = (self.scores_FTV * p).sum(-1)
        centred_FTV = self.scores_FTV - means_FT[..., None]
        self.means_TF = means_FT.T
        self.variances_TF = (centred_FTV.square() * p).sum(-1).T
        self.thirds_TF = (centred_FTV.abs() ** 3 * p).sum(-1).T
        self.argmax_drifts_TF = centred_FTV.gather(2, best_T1.expand(len(scores), -1, 1)).squeeze(2).T
        self.temperature_drifts_TF = (centred_FTV * p * log_p).sum(-1).T
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        by_rank = torch.zeros_like(p).scatter_(1, order, ordered.cumsum(-1) - ordered)
        self.below_TV2 = torch.stack([by_rank, p.cumsum(-1) - p], -1)

    def steps(self, rows_R: Tensor, tokens_R: Tensor, uniforms_R: Tensor) -> Steps:
        """What tokens drawn from the laws `rows_R` add; `uniforms_R` spreads each over its own interval."""
        p = self.laws_TV[rows_R, tokens_R]
        pit = self.below_TV2[rows_R, tokens_R] + (uniforms_R * p)[:, None]
        increments = self.scores_FTV[:, rows_R, tokens_R].T - self.means_TF[rows_R]
        return Steps(
            increments,
            self.variances_TF[rows_R],
            self.thirds_TF[rows_R],
            self.argmax_drifts_TF[rows_R],
            self.temperature_drifts_TF[rows_R],
            pit.clamp(0, math.nextafter(1, 0)),
            p == 0,
        )


def uniforms(seed: int, positions: range) -> Tensor:
    """One uniform number per position, from a seed that serves nothing else."""
    noise = CounterNoise([seed] * len(positions), [0] * len(positions), [0] * len(positions))
    return noise.uniform(RoundKey("accept", torch.tensor(list(positions))), torch.arange(len(positions)))


def _half(size: int, device: torch.device) -> Tensor:
    """A fixed pseudo-random half of the vocabulary: 1 inside, 0 outside."""
    return (uniforms(0x5EED, range(size)) < 0.5).double().to(device)
