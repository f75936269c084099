"""Scores of tokens under the laws they should have been drawn from: what the statistics add up, with its exact moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

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
        self.laws_TV = p = p / p.sum(-1, keepdim=True)
        size, device = p.shape[1], p.device
        self._seen_TV, self._half_V = seen_TV, _half(size, device)
        self._shift_T = 7919 * (previous_T + 1) % size
        self._best_T = p.argmax(-1)
        log_p = p.clamp_min(torch.finfo(torch.float64).tiny).log()
        self._p_log_p_TV = p * log_p
        twice = self._half_V.repeat(2)
        # A product with a view of each row's own half is several times faster than a mask for every row.
        halves = [twice[shift : shift + size] for shift in self._shift_T.tolist()]
        moments = [
            self._graded(log_p.clamp_min(MIN_LOG_PROB)),
            self._graded(p),
            self._marked(lambda law_TV: law_TV.gather(1, self._best_T[:, None])[:, 0], torch.ones_like(p[:, 0])),
            self._marked(lambda law_TV: law_TV @ self._half_V, self._half_V[self._best_T]),
            self._marked(
                lambda law_TV: torch.stack([law_V @ half_V for law_V, half_V in zip(law_TV, halves, strict=True)]),
                self._half_V[(self._best_T + self._shift_T) % size],
            ),
            self._marked(
                lambda law_TV: (law_TV * seen_TV).sum(-1), seen_TV.gather(1, self._best_T[:, None])[:, 0].double()
            ),
        ]
        columns = [torch.stack(column, 1) for column in zip(*moments, strict=True)]
        self.means_TF, self.variances_TF, self.thirds_TF, self.argmax_drifts_TF, self.temperature_drifts_TF = columns

    def scores(self, rows_R: Tensor, tokens_R: Tensor) -> Tensor:
        """The scores [R, F] of tokens under the laws `rows_R`."""
        p = self.laws_TV[rows_R, tokens_R]
        columns = [
            p.clamp_min(torch.finfo(torch.float64).tiny).log().clamp_min(MIN_LOG_PROB),
            p,
            (tokens_R == self._best_T[rows_R]).double(),
            self._half_V[tokens_R],
            self._half_V[(tokens_R + self._shift_T[rows_R]) % self.laws_TV.shape[1]],
            self._seen_TV[rows_R, tokens_R].double(),
        ]
        return torch.stack(columns, 1)

    def steps(self, rows_R: Tensor, tokens_R: Tensor, uniforms_R: Tensor) -> Steps:
        """What tokens drawn from the laws `rows_R` add; `uniforms_R` spreads each over its own interval."""
        p = self.laws_TV[rows_R, tokens_R]
        pit = self._below(rows_R, tokens_R) + (uniforms_R * p)[:, None]
        return Steps(
            self.scores(rows_R, tokens_R) - self.means_TF[rows_R],
            self.variances_TF[rows_R],
            self.thirds_TF[rows_R],
            self.argmax_drifts_TF[rows_R],
            self.temperature_drifts_TF[rows_R],
            pit.clamp(0, math.nextafter(1, 0)),
            p == 0,
        )

    def _graded(self, scores_TV: Tensor) -> list[Tensor]:
        """Mean, variance, absolute third moment and drifts of a score that takes many values."""
        mean_T1 = (self.laws_TV * scores_TV).sum(-1, keepdim=True)
        centred_TV = scores_TV - mean_T1
        weighted_TV = self.laws_TV * centred_TV.square()
        return [
            mean_T1[:, 0],
            weighted_TV.sum(-1),
            (weighted_TV * centred_TV.abs()).sum(-1),
            centred_TV.gather(1, self._best_T[:, None])[:, 0],
            (self._p_log_p_TV * centred_TV).sum(-1),
        ]

    def _marked(self, inside: Callable[[Tensor], Tensor], best_T: Tensor) -> list[Tensor]:
        """The same of a score that is 1 for some tokens and 0 else; `inside` sums rows over these, `best_T` is the score of
        the likeliest."""
        m = inside(self.laws_TV).clamp(0, 1)
        variance = m * (1 - m)
        drift = inside(self._p_log_p_TV) - m * self._p_log_p_TV.sum(-1)
        return [m, variance, variance * (m.square() + (1 - m).square()), best_T - m, drift]

    def _below(self, rows_R: Tensor, tokens_R: Tensor) -> Tensor:
        """The mass [R, 2] before each token: ordered by probability, the likeliest and then the lower id first, and by id."""
        if len(rows_R) > len(self.laws_TV):
            return self._below_TV2[rows_R, tokens_R]
        # One token per law: two sums cost far less than a sort.
        law_RV, token_R1 = self.laws_TV[rows_R], tokens_R[:, None]
        p_R1 = law_RV.gather(1, token_R1)
        is_lower_RV = torch.arange(law_RV.shape[1], device=law_RV.device) < token_R1
        is_before_RV = (law_RV > p_R1) | ((law_RV == p_R1) & is_lower_RV)
        return torch.stack([(law_RV * is_before_RV).sum(-1), (law_RV * is_lower_RV).sum(-1)], -1)

    @cached_property
    def _below_TV2(self) -> Tensor:
        p = self.laws_TV
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        by_rank = torch.zeros_like(p).scatter_(1, order, ordered.cumsum(-1) - ordered)
        return torch.stack([by_rank, p.cumsum(-1) - p], -1)


def uniforms(seed: int, positions: range) -> Tensor:
    """One uniform number per position, from a seed that serves nothing else."""
    noise = CounterNoise([seed] * len(positions), [0] * len(positions), [0] * len(positions))
    return noise.uniform(RoundKey("accept", torch.tensor(list(positions))), torch.arange(len(positions)))


@lru_cache(maxsize=4)
def _half(size: int, device: torch.device) -> Tensor:
    """A fixed pseudo-random half of the vocabulary: 1 inside, 0 outside."""
    return (uniforms(0x5EED, range(size)) < 0.5).double().to(device)
