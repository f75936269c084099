"""The numerics referee: tells what rounding did to a speculative text from what an algorithm did wrong.

Plain and speculative decoding of one seed may part where two tokens are all but equal, because a forward over one token and
one over many round differently. A model of the same weights in higher precision judges each such place, on the same prefix.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence as Seq
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from specdec.certificates.forcing import TeacherForcing
from specdec.certificates.judging import Judged, judge_text
from specdec.certificates.kept import Kept, derived_seed, fingerprint, progress_bar
from specdec.certificates.real import Subject, sampling_labels
from specdec.engine import Engine
from specdec.model import PagedModel
from specdec.packing import PackedLinear
from specdec.sampling import SamplingParams

# A divergence is a near-tie up to this multiple of the measured noise.
MULTIPLE = 4.0


def upcast(model: PagedModel, dtype: torch.dtype = torch.float32) -> PagedModel:
    """A copy of a model with the very same weights in a wider dtype. Raises ValueError where these cannot be read back."""
    if _is_packed(model):
        raise ValueError(f"{model.name} has packed weights, which cannot be read back: load it with packed=False")
    return PagedModel(copy.deepcopy(model.model).to(dtype), model.tokenizer, f"{model.name} in {_name(dtype)}")


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
    work_dir: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Decodes `prompts` plainly and with every subject from the same seeds; one row per subject on where they part.

    At every position of a subject's text, not only up to the first divergence, plain decoding (`target`, one token per
    forward) decides again on the text's own prefix. Where it decides otherwise, `judge`, the same weights in a wider dtype,
    says how far from chosen each of the two tokens is: the gap to its likeliest one in processed log-probability when
    greedy, the distance of the drawn uniform number from the token's interval otherwise. A *near-tie* lies within
    `multiple` times the noise: the largest error of that quantity in `target`'s logits, computed in two shapes (one token
    and `wide_chunk` tokens per forward), at that position or in the root mean square of all, whichever is larger.
    Everything else is a *true divergence*; one makes the row fail. `target` may be packed, as users run it: the noise is then
    that of the packed product. Batches go to judged.jsonl in `work_dir` as they end, and a later run goes on from there.
    Raises ValueError where a subject's rule draws otherwise than plain decoding, so that its texts may differ rightly, where
    the judge is no more precise than the target, and for a work_dir without a seed.
    """
    if torch.finfo(judge.dtype).eps >= torch.finfo(target.dtype).eps:
        raise ValueError(f"the referee's dtype {_name(judge.dtype)} must be wider than {_name(target.dtype)}")
    for subject in subjects:
        rule = subject.engine.verifier.rule  # type: ignore[attr-defined]
        if params.temperature > 0 and rule.name != "follow":
            raise ValueError(
                f"rule {rule.name} draws otherwise than plain decoding at temperature {params.temperature}"
            )
    if work_dir is not None and params.seed is None:
        raise ValueError("work that can be resumed needs a seed: set it in the sampling parameters")
    base = params.with_seed()
    each = [replace(params, seed=derived_seed(base, i)) for i in range(len(prompts))]
    models = [TeacherForcing(target, 1), TeacherForcing(target, wide_chunk), TeacherForcing(judge, wide_chunk)]
    common = [
        target.name,
        _name(target.dtype),
        _is_packed(target),
        _name(judge.dtype),
        wide_chunk,
        asdict(params),
        base,
    ]
    common += [dict(plain.labels), plain.engine.max_batch_size]
    kept = Kept(None if work_dir is None else Path(work_dir) / "judged.jsonl")
    rows = []
    try:
        with progress_bar() as progress:
            task = progress.add_task("texts judged", total=len(prompts) * len(subjects))
            wanted: list[list[int]] = []
            for number, indices in enumerate(_batches(plain.engine, len(prompts))):
                # A piece depends on its own prompts alone: more prompts later leave it as it is.
                mine = [list(prompts[i]) for i in indices]
                key = fingerprint("plain", *common, mine)
                piece = kept.get(key, number)
                if piece is None:
                    results = plain.engine.generate(mine, [each[i] for i in indices])
                    piece = kept.put(key, number, {"texts": [result.token_ids for result in results]})
                wanted += piece["texts"]
            for subject in subjects:
                judged, made_by = list[Judged](), set[str]()
                for number, indices in enumerate(_batches(subject.engine, len(prompts))):
                    mine = [list(prompts[i]) for i in indices]
                    size = subject.engine.max_batch_size
                    key = fingerprint(
                        "judged", *common, dict(subject.labels), size, mine, wanted[indices[0] : indices[-1] + 1]
                    )
                    piece = kept.get(key, number)
                    if piece is None:
                        results = subject.engine.generate(mine, [each[i] for i in indices])
                        fresh = [
                            judge_text(models, result.prompt_token_ids, result.token_ids, wanted[i], each[i])
                            for i, result in zip(indices, results, strict=True)
                        ]
                        piece = kept.put(key, number, {"judged": [one.to_json() for one in fresh]})
                    made_by.add(piece["revision"])
                    judged += [Judged.from_json(one) for one in piece["judged"]]
                    progress.update(task, advance=len(indices))
                rows.append(
                    {**subject.labels, **_row(judged, target, judge, params, multiple), "revisions": sorted(made_by)}
                )
    finally:
        kept.finish()
    return rows


def _row(
    judged: list[Judged], target: PagedModel, judge: PagedModel, params: SamplingParams, multiple: float
) -> dict[str, Any]:
    """A subject's counts over all texts."""
    noise_N = torch.cat([one.noise_T for one in judged])
    typical = float(noise_N.square().mean().sqrt())
    places = [{"prompt": i, **place} for i, one in enumerate(judged) for place in _divergences(one, multiple, typical)]
    num_tokens, num_ties = len(noise_N), sum(place["near_tie"] for place in places)
    num_others = sum(int((torch.tensor(one.text) != one.referee_T).sum()) for one in judged)
    return {
        **sampling_labels(params),
        "dtype": _name(target.dtype),
        "packed": _is_packed(target),
        "referee_dtype": _name(judge.dtype),
        "num_tokens": num_tokens,
        "num_prompts": len(judged),
        "num_prompts_equal": sum(one.first is None for one in judged),
        "noise_rms": typical,
        "noise_max": float(noise_N.max()),
        "noise_of": "log-probability gap" if params.temperature == 0 else "cumulative probability",
        "multiple": multiple,
        "near_ties": num_ties,
        "near_ties_per_10k": 1e4 * num_ties / num_tokens,
        "true_divergences": len(places) - num_ties,
        "true_divergences_per_10k": 1e4 * (len(places) - num_ties) / num_tokens,
        "differs_from_referee_per_10k": 1e4 * num_others / num_tokens,
        "divergences": places,
        "passed": num_ties == len(places),
    }


def _divergences(judged: Judged, multiple: float, typical: float) -> list[dict[str, Any]]:
    """The places where a text's token is not plain decoding's, each with its label."""
    text, tolerance_T = judged.text, multiple * judged.noise_T.clamp_min(typical)
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


def _batches(engine: Engine, count: int) -> list[range]:
    """The indices of `count` prompts as the engine takes them together."""
    size = engine.max_batch_size
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _is_packed(model: PagedModel) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.model.modules())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
