"""Statistics of emitted tokens against the laws they should have been drawn from, fixed before any token is seen.

Under the null hypothesis token t is drawn from law t given everything before it. Then f(law, token) minus its conditional
mean is a martingale difference for every f fixed beforehand, and the randomised probability integral transform is uniform
given the past. The place where a text stops is a stopping time, so neither is spoilt by end tokens or stop strings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from specdec.certificates.scores import MIN_LOG_PROB, SCORES, Steps

NUM_BINS, NUM_CELLS = 20, 8
LAGS = (1, 2, 3, 4)
MARTINGALES = (*SCORES, *(f"pit_lag_{lag}" for lag in LAGS))
CHI_SQUARES = ("pit_by_rank", "pit_by_id", "pit_pairs")
TESTS = (*MARTINGALES, *CHI_SQUARES, "impossible")
# Largest possible increment of each martingale, and how far from normal its sum may be (Berry-Esseen ratio).
_BOUNDS = [-MIN_LOG_PROB, *[1.0] * (len(SCORES) - 1), *[0.25] * len(LAGS)]
_MAX_RATIO = 0.1
# A cut (top-k, top-p, min-p) falls elsewhere for an ulp in the logits, and a token on it then looks impossible. This share
# of the tokens is allowed for that: some ten times the rounding of a float32 sum of probabilities, not a measurement.
CUT_ROUNDING = 1e-5
# Below this many tokens the expected counts of the pair grid are too small for its chi-square law.
MIN_TOKENS = 2 * 10 * NUM_CELLS**2


@dataclass(frozen=True)
class Sums:
    """Sums over tokens, all that the tests need; two of them add up, and they go through JSON unchanged."""

    num_tokens: int
    num_impossible: int
    increments_F: Tensor
    variances_F: Tensor
    thirds_F: Tensor
    argmax_drifts_F: Tensor
    temperature_drifts_F: Tensor
    bins_2K: Tensor
    pairs_GG: Tensor

    @staticmethod
    def zero() -> Sums:
        none = torch.zeros(len(MARTINGALES), dtype=torch.float64)
        bins, pairs = torch.zeros(2, NUM_BINS).double(), torch.zeros(NUM_CELLS, NUM_CELLS).double()
        return Sums(0, 0, none, none, none, none, none, bins, pairs)

    @staticmethod
    def of_text(steps: list[Steps], filler: float) -> Sums:
        """The sums of one text from its first to its last token.

        Pairs do not overlap. A text that stops after an odd number of tokens stops because of its last one, so leaving
        that out would favour others: the uniform number `filler`, drawn for this text, completes the pair.
        """
        pit_R2 = torch.cat([one.pit_R2 for one in steps]).cpu()
        centred_R = pit_R2[:, 0] - 0.5
        lagged = [(centred_R[:-lag], centred_R[lag:]) for lag in LAGS]
        increments = [(before * after).sum() for before, after in lagged]
        # A number is uniform given those before it: variance 1/12, absolute third moment 1/32.
        variances = [before.square().sum() / 12 for before, _ in lagged]
        thirds = [before.abs().pow(3).sum() / 32 for before, _ in lagged]
        none = torch.zeros(len(LAGS), dtype=torch.float64)

        def total(name: str, rest: Tensor) -> Tensor:
            return torch.cat([torch.stack([getattr(one, name).sum(0).cpu() for one in steps]).sum(0), rest])

        ranks = pit_R2[:, 0]
        pairs = torch.cat([ranks, ranks.new_full((len(ranks) % 2,), filler)]).view(-1, 2)
        cells = (pairs * NUM_CELLS).long()
        bins = (pit_R2 * NUM_BINS).long()
        return Sums(
            len(pit_R2),
            sum(int(one.impossible_R.sum()) for one in steps),
            total("increments_RF", torch.stack(increments)),
            total("variances_RF", torch.stack(variances)),
            total("thirds_RF", torch.stack(thirds)),
            total("argmax_drifts_RF", none),
            total("temperature_drifts_RF", none),
            torch.stack([torch.bincount(column, minlength=NUM_BINS) for column in bins.T]).double(),
            torch.bincount(cells[:, 0] * NUM_CELLS + cells[:, 1], minlength=NUM_CELLS**2).view(NUM_CELLS, -1).double(),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Sums)))

    def to_json(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in fields(Sums)}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}

    @staticmethod
    def from_json(row: dict[str, Any]) -> Sums:
        values: dict[str, Any] = {
            name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
            for name, value in row.items()
        }
        return Sums(**values)


@dataclass(frozen=True)
class Alternative:
    """A stated wrong law: a share `argmax` of the tokens replaced by the likeliest, or a `temperature` off by this share."""

    argmax: float = 0.01
    temperature: float = 0.03


@dataclass(frozen=True)
class Outcome:
    """A test's statistic, p-value and, for martingales, the tokens after which each alternative is found."""

    name: str
    statistic: float
    p_value: float
    tokens_needed: dict[str, int | None]


def evaluate(sums: Sums, threshold: float, alternative: Alternative, power: float, has_cut: bool) -> list[Outcome]:
    """Every test of `TESTS`; `tokens_needed` holds at this threshold and power, from the variances that were observed.

    Two-sided z for the martingales (martingale central limit theorem, Brown 1971), once their sums are near normal by the
    Berry-Esseen ratio; before, Freedman's inequality (1975), which finds less but holds at any length. Pearson's chi-square
    for the transforms. Without a cut in the law no token is impossible; with one, `CUT_ROUNDING` of them may seem so.
    """
    results = []
    for i, name in enumerate(MARTINGALES):
        total, variance = float(sums.increments_F[i]), float(sums.variances_F[i])
        needed = {
            "argmax": alternative.argmax * float(sums.argmax_drifts_F[i]),
            "temperature": (1 / (1 + alternative.temperature) - 1) * float(sums.temperature_drifts_F[i]),
        }
        z = total / math.sqrt(variance) if variance > 0 else 0.0 if abs(total) < 1e-9 else math.inf
        results.append(
            Outcome(
                name,
                z,
                _two_sided(total, variance, float(sums.thirds_F[i]), _BOUNDS[i]),
                {
                    key: _tokens_needed(drift, variance, sums.num_tokens, threshold, power)
                    for key, drift in needed.items()
                },
            )
        )
    for name, counts in zip(CHI_SQUARES, (*sums.bins_2K, sums.pairs_GG.flatten()), strict=True):
        statistic, p_value = stats.chisquare(counts.numpy())
        results.append(Outcome(name, float(statistic), float(p_value), {}))
    rate = CUT_ROUNDING if has_cut else 0.0
    p_value = float(stats.binom.sf(sums.num_impossible - 1, sums.num_tokens, rate))
    return [*results, Outcome("impossible", float(sums.num_impossible), p_value, {})]


def _two_sided(total: float, variance: float, third: float, bound: float) -> float:
    if third < _MAX_RATIO * variance**1.5:
        return float(2 * stats.norm.sf(abs(total) / math.sqrt(variance)))
    if abs(total) < 1e-9:
        return 1.0
    return min(1.0, 2 * math.exp(-(total**2) / (2 * (variance + bound * abs(total) / 3))))


def _tokens_needed(drift: float, variance: float, num_tokens: int, threshold: float, power: float) -> int | None:
    """Tokens until the mean shifts by enough standard errors; drift and variance are sums over `num_tokens`."""
    if drift == 0 or variance == 0:
        return None
    distance = float(stats.norm.isf(threshold / 2) - stats.norm.isf(power))
    return math.ceil(distance**2 * variance * num_tokens / drift**2)
