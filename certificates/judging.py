"""One text's positions, decided by plain decoding and by a judge in higher precision on the same prefix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from specdec.certificates.forcing import TeacherForcing, processed
from specdec.noise import CounterNoise, PositionKey
from specdec.sampling import SamplingParams

# Likeliest tokens whose logits' noise is measured: those between which a greedy decision can fall.
NUM_CANDIDATES = 32


@dataclass(frozen=True)
class Judged:
    """One text's positions: the tokens that plain decoding and the referee choose on the same prefix, how far from being
    chosen by the referee the worse of the text's and plain decoding's token is, and the noise of that distance.

    `first` is where the text parts from the one that plain decoding wrote, None where it does not.
    """

    text: list[int]
    plain_T: Tensor
    referee_T: Tensor
    distance_T: Tensor
    noise_T: Tensor
    first: int | None

    def to_json(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in fields(Judged)}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}

    @staticmethod
    def from_json(row: dict[str, Any]) -> Judged:
        tokens = {name: torch.tensor(row[name]) for name in ("plain_T", "referee_T")}
        numbers = {name: torch.tensor(row[name], dtype=torch.float64) for name in ("distance_T", "noise_T")}
        return Judged(text=row["text"], first=row["first"], **tokens, **numbers)


def judge_text(
    models: Seq[TeacherForcing], prompt: list[int], output: list[int], wanted: list[int], params: SamplingParams
) -> Judged:
    """Every position of `output`, beside which plain decoding wrote `wanted`.

    `models` are the target with one token per forward, the target with several, and the judge with as many.
    """
    shape = params if params.temperature > 0 else replace(params, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    common = next((t for t, (a, b) in enumerate(zip(output, wanted, strict=False)) if a != b), None)
    first = common if common is not None or len(output) == len(wanted) else min(len(output), len(wanted))
    narrow, wide, exact = (forcing.laws(prompt, output, params) for forcing in models)
    parts = []
    for (at, logits_TV, _), (_, judge_TV, judge_laws_TV) in zip(wide, exact, strict=True):
        ones = list(itertools.islice(narrow, len(logits_TV)))
        tokens = torch.tensor(output[at : at + len(logits_TV)])
        plain_T = torch.cat([_decide(law, len(prompt) + t, params) for t, _, law in ones])
        if common is not None and 0 <= common - at < len(tokens):
            # Batch mates may have made the plain engine round otherwise than one token per forward does: up to here the
            # prefix is its own, so its token is the one to be judged.
            plain_T[common - at] = wanted[common]
        lows = [torch.cat([logits for _, logits, _ in ones]), logits_TV]
        laws = [processed(logits, prompt, output, at, shape, torch.float64).cpu() for logits in (*lows, judge_TV)]
        pair_T2 = torch.stack([tokens, plain_T], 1)
        if params.temperature == 0:
            distance_T, noise_T = _gaps(laws[2], laws[:2], pair_T2)
        else:
            root = len(prompt) + at
            u_T = _noise(root, len(tokens), params, "cpu").uniform(PositionKey(0), torch.arange(len(tokens)))
            distance_T, noise_T = _misses(laws[2], laws[:2], pair_T2, u_T)
        parts.append((plain_T, _decide(judge_laws_TV, len(prompt) + at, params), distance_T, noise_T))
    plain_N, referee_N, distance_N, noise_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return Judged(output, plain_N, referee_N, distance_N, noise_N, first)


def _gaps(exact_TV: Tensor, lows: list[Tensor], pair_T2: Tensor) -> tuple[Tensor, Tensor]:
    """How far below the likeliest token's log-probability the pair's lower one is, and the error of such gaps."""
    best = exact_TV.topk(min(NUM_CANDIDATES, exact_TV.shape[1])).indices

    def gaps(laws_TV: Tensor, tokens_Tk: Tensor) -> Tensor:
        scores = laws_TV.log()
        return scores.gather(1, best[:, :1]) - scores.gather(1, tokens_Tk)

    exact = gaps(exact_TV, best)
    errors = torch.stack([(gaps(low, best) - exact).abs() for low in lows])
    # A token that a logit bias forbids is infinitely far in every dtype.
    return gaps(exact_TV, pair_T2).amax(1), errors.nan_to_num(nan=0.0).amax((0, 2))


def _misses(exact_TV: Tensor, lows: list[Tensor], pair_T2: Tensor, u_T: Tensor) -> tuple[Tensor, Tensor]:
    """How far the uniform number lies outside the interval of the pair's farther token, and the error of intervals' ends."""

    def cumulative(laws_TV: Tensor) -> Tensor:
        sums = laws_TV.cumsum(-1)
        return sums / sums[:, -1:]

    exact = cumulative(exact_TV)
    ends = exact.gather(1, pair_T2)
    starts = ends - exact_TV.gather(1, pair_T2) / exact_TV.sum(-1, keepdim=True)
    misses = torch.maximum(starts - u_T[:, None], u_T[:, None] - ends).clamp_min(0)
    errors = torch.stack([(cumulative(low) - exact).abs().amax(-1) for low in lows])
    return misses.amax(1), errors.amax(0)


def _decide(laws_TV: Tensor, first_position: int, params: SamplingParams) -> Tensor:
    """The tokens that the rule `follow`, hence plain decoding, draws at consecutive positions."""
    rows = torch.arange(len(laws_TV), device=laws_TV.device)
    noise = _noise(first_position, len(laws_TV), params, laws_TV.device)
    return noise.categorical(laws_TV, PositionKey(0), rows).cpu()


def _noise(first_position: int, count: int, params: SamplingParams, device: torch.device | str) -> CounterNoise:
    # The root is the token before the one that is drawn.
    roots = range(first_position - 1, first_position - 1 + count)
    return CounterNoise([params.with_seed()] * count, [0] * count, roots, device)
