"""The numerics referee: tells what rounding did to a speculative text from what an algorithm did wrong.

Plain and speculative decoding of one seed may part where two tokens are all but equal, because a forward over one token and
one over many round differently. A model of the same weights in higher precision judges each such place, on the same prefix.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec.certificates.forcing import TeacherForcing, processed
from specdec.certificates.kept import derived_seed
from specdec.certificates.real import Subject
from specdec.model import PagedModel
from specdec.noise import CounterNoise, PositionKey
from specdec.packing import PackedLinear
from specdec.sampling import SamplingParams

# A divergence is a near-tie up to this multiple of the measured noise.
MULTIPLE = 4.0
# Likeliest tokens whose logits' noise is measured: those between which a greedy decision can fall.
NUM_CANDIDATES = 32


def upcast(model: PagedModel, dtype: torch.dtype = torch.float32) -> PagedModel:
    """A copy of a model with the very same weights in a wider dtype. Raises ValueError where these cannot be read back."""
    if any(isinstance(module, PackedLinear) for module in model.model.modules()):
        raise ValueError(f"{model.name} has packed weights, which cannot be read back: load it with packed=False")
    return PagedModel(copy.deepcopy(model.model).to(dtype), model.tokenizer, f"{model.name} in {_name(dtype)}")


@dataclass(frozen=True)
class Judged:
    """One text's positions: the tokens that plain decoding and the referee choose on the same prefix, how far from being
    chosen by the referee the worse of the text's and plain decoding's token is, and the noise of that distance.

    `first` is where the text parts from the one that plain decoding wrote, None where it does not.
    """

    plain_T: Tensor
    referee_T: Tensor
    distance_T: Tensor
    noise_T: Tensor
    first: int | None


def referee(
    target: PagedModel,
    judge: PagedModel,
    plain: Subject,
    subjects: Seq[Subject],
    prompts: Seq[Seq[int]],
    params: SamplingParams,
    *,
    multiple: float = MULTIPLE,
    wide_chunk: int = 16,
) -> list[dict[str, Any]]:
    """Decodes `prompts` plainly and with every subject from the same seeds; one row per subject on where they part.

    At every position of a subject's text, not only up to the first divergence, plain decoding (`target`, one token per
    forward) decides again on the text's own prefix. Where it decides otherwise, `judge`, the same weights in a wider dtype,
    says how far from chosen each of the two tokens is: the gap to its likeliest one in processed log-probability when
    greedy, the distance of the drawn uniform number from the token's interval otherwise. A *near-tie* lies within
    `multiple` times the noise: the largest error of that quantity in `target`'s logits, computed in two shapes (one token
    and `wide_chunk` tokens per forward), at that position or in the root mean square of all, whichever is larger.
    Everything else is a *true divergence*; one makes the row fail. Raises ValueError where a subject's rule draws otherwise
    than plain decoding, so that its texts may differ rightly, or where the judge is no more precise than the target.
    """
    if torch.finfo(judge.dtype).eps >= torch.finfo(target.dtype).eps:
        raise ValueError(f"the referee's dtype {_name(judge.dtype)} must be wider than {_name(target.dtype)}")
    for subject in subjects:
        rule = subject.engine.verifier.rule  # type: ignore[attr-defined]
        if params.temperature > 0 and rule.name != "follow":
            raise ValueError(
                f"rule {rule.name} draws otherwise than plain decoding at temperature {params.temperature}"
            )
    base = params.with_seed()
    each = [replace(params, seed=derived_seed(base, i)) for i in range(len(prompts))]
    wanted = plain.engine.generate(prompts, each)
    models = [TeacherForcing(target, 1), TeacherForcing(target, wide_chunk), TeacherForcing(judge, wide_chunk)]
    rows = []
    for subject in subjects:
        results = subject.engine.generate(prompts, each)
        judged = [
            _judge(models, result.prompt_token_ids, result.token_ids, other.token_ids, one)
            for result, other, one in zip(results, wanted, each, strict=True)
        ]
        noise_N = torch.cat([one.noise_T for one in judged])
        typical = float(noise_N.square().mean().sqrt())
        places = [
            {"prompt": i, **place}
            for i, (result, one) in enumerate(zip(results, judged, strict=True))
            for place in _divergences(result.token_ids, one, multiple, typical)
        ]
        num_tokens, num_ties = len(noise_N), sum(place["near_tie"] for place in places)
        others = [torch.tensor(result.token_ids) != one.referee_T for result, one in zip(results, judged, strict=True)]
        rows.append(
            {
                **subject.labels,
                "temperature": params.temperature,
                "dtype": _name(target.dtype),
                "referee_dtype": _name(judge.dtype),
                "num_tokens": num_tokens,
                "num_prompts": len(prompts),
                "num_prompts_equal": sum(one.first is None for one in judged),
                "noise_rms": typical,
                "noise_max": float(noise_N.max()),
                "noise_of": "log-probability gap" if params.temperature == 0 else "cumulative probability",
                "multiple": multiple,
                "near_ties": num_ties,
                "near_ties_per_10k": 1e4 * num_ties / num_tokens,
                "true_divergences": len(places) - num_ties,
                "true_divergences_per_10k": 1e4 * (len(places) - num_ties) / num_tokens,
                "differs_from_referee_per_10k": 1e4 * int(torch.cat(others).sum()) / num_tokens,
                "divergences": places,
                "passed": num_ties == len(places),
            }
        )
    return rows


def _divergences(text: list[int], judged: Judged, multiple: float, typical: float) -> list[dict[str, Any]]:
    """The places where a text's token is not plain decoding's, each with its label."""
    tolerance_T = multiple * judged.noise_T.clamp_min(typical)
    parts = torch.tensor(text) != judged.plain_T
    places: list[dict[str, Any]] = []
    for t in parts.nonzero().flatten().tolist():
        # Forbidden tokens are infinitely far, which JSON cannot say.
        distance, tolerance = min(float(judged.distance_T[t]), sys.float_info.max), float(tolerance_T[t])
        places.append({"distance": distance, "tolerance": tolerance, "near_tie": distance <= tolerance})
        places[-1] |= {"position": t, "token": text[t], "plain_token": int(judged.plain_T[t])}
    if judged.first is not None and not (judged.first < len(text) and parts[judged.first]):
        # Equal as far as both go, and one goes on: what ends a text is no matter of rounding.
        places.append({"distance": None, "tolerance": None, "near_tie": False, "position": judged.first})
        places[-1] |= {"token": None, "plain_token": None}
    return [{**place, "is_first": place["position"] == judged.first} for place in places]


def _judge(
    models: list[TeacherForcing], prompt: list[int], output: list[int], wanted: list[int], params: SamplingParams
) -> Judged:
    """Every position of one text, decided by plain decoding and by the referee on the same prefix."""
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
    return Judged(plain_N, referee_N, distance_N, noise_N, first)


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
