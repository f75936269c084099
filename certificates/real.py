"""Real models: what an engine emits, tested against the target's own laws by statistics of known power."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specdec.certificates.alarms import false_alarms
from specdec.certificates.forcing import TeacherForcing
from specdec.certificates.kept import Kept, derived_seed, fingerprint, progress_bar
from specdec.certificates.scores import ScoredLaws, Steps, uniforms
from specdec.certificates.statistics import MIN_TOKENS, TESTS, Alternative, Outcome, Sums, evaluate
from specdec.engine import Engine
from specdec.model import PagedModel
from specdec.sampling import SamplingParams


@dataclass(frozen=True)
class Subject:
    """An engine under test; `labels` are the fields of its row that say what it is, and tell it from other subjects."""

    engine: Engine
    labels: Mapping[str, Any]


def run(
    target: PagedModel,
    subjects: Seq[Subject],
    prompts: Seq[Seq[int]],
    params: Seq[SamplingParams],
    num_tokens: int,
    work_dir: str | Path,
    *,
    alpha: float = 1e-3,
    power: float = 0.9,
    alternative: Alternative | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """Generates at least `num_tokens` tokens per subject and sampling parameters and tests them; one row for each pair.

    `alpha` is the probability that exact subjects are flagged at all: each test of each row is held to alpha divided by
    the number of all tests (Bonferroni). `prompts` are token ids, taken in turn, every request with a seed of its own.
    `target` teacher-forces; it may be another copy of the engines' model, `dtype` is that of its laws. Batches go to
    emitted.jsonl in `work_dir` with their sums as they end: a later run with the same arguments, or more tokens, goes on
    from there and gives the rows that an uninterrupted run gives. A row of plain decoding has `false_alarms`, see there; an
    excess of them fails the row as well, with a probability of `alpha` of its own over all rows.
    Raises ValueError for temperature 0 (one-hot laws have no statistics: see `referee`), for a missing seed, for too few
    tokens and for subjects with the same labels.
    """
    if num_tokens < MIN_TOKENS:
        raise ValueError(f"num_tokens={num_tokens}: the statistics need at least {MIN_TOKENS}")
    if not prompts or not subjects or not params:
        raise ValueError("prompts, subjects and params must hold at least one each")
    for one in params:
        if one.temperature == 0:
            raise ValueError("temperature 0 leaves no chance to test; compare greedy texts with the referee")
        if one.seed is None:
            raise ValueError("statistics that can be resumed need a seed: set it in the sampling parameters")
    pairs = [(subject, one) for subject in subjects for one in params]
    keys = [_key(target, subject, one, prompts, dtype) for subject, one in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError("two subjects have the same labels and sampling parameters")
    threshold = alpha / (len(TESTS) * len(pairs))
    emitted = Kept(Path(work_dir) / "emitted.jsonl")
    forcing = TeacherForcing(target)
    rows = []
    try:
        with progress_bar() as progress:
            task = progress.add_task("tokens", total=num_tokens * len(pairs))
            for (subject, one), key in zip(pairs, keys, strict=True):
                batches, sums, num_requests, made_by = list[Sums](), Sums.zero(), 0, set[str]()
                while sums.num_tokens < num_tokens:
                    batch = emitted.get(key, len(batches))
                    if batch is None:
                        fresh = _batch(forcing, subject.engine, prompts, one, key, len(batches), dtype)
                        batch = emitted.put(key, len(batches), fresh)
                    made_by.add(batch["revision"])
                    batches.append(Sums.from_json(batch["sums"]))
                    sums += batches[-1]
                    num_requests += len(batch["requests"])
                    progress.update(task, advance=batches[-1].num_tokens)
                tests = evaluate(sums, threshold, alternative or Alternative(), power, _has_cut(one))
                row = {
                    **subject.labels,
                    **sampling_labels(one),
                    "num_tokens": sums.num_tokens,
                    "num_requests": num_requests,
                    "num_impossible": sums.num_impossible,
                    "revisions": sorted(made_by),
                    "alpha": alpha,
                    "threshold": threshold,
                    "smallest_p": min(test.p_value for test in tests),
                    "power": power,
                    "alternative": asdict(alternative or Alternative()),
                    "tokens_needed": {
                        name: _least(test.tokens_needed.get(name) for test in tests)
                        for name in ("argmax", "temperature")
                    },
                    "tests": [_test_row(test, threshold) for test in tests],
                    "passed": all(test.p_value >= threshold for test in tests),
                }
                if subject.engine.drafter is None:
                    row["false_alarms"] = false_alarms(batches, _has_cut(one), alpha / len(pairs))
                    row["passed"] = row["passed"] and row["false_alarms"]["passed"]
                rows.append(row)
    finally:
        emitted.finish()
    return rows


def text_sums(
    forcing: TeacherForcing,
    prompt: Seq[int],
    output: Seq[int],
    params: SamplingParams,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Sums:
    """The sums of one emitted text under the target's processed laws; `seed` spreads the tokens over their intervals."""
    device, size = forcing.model.device, forcing.model.vocab_size
    text = torch.tensor([*prompt, *output], device=device)
    steps: list[Steps] = []
    for first, _, laws_TV in forcing.laws(prompt, output, params, dtype):
        count, at = len(laws_TV), len(prompt) + first
        seen_TV = torch.zeros(count, size, dtype=torch.bool, device=device)
        seen_TV[:, text[:at]] = True
        for t in range(1, count):
            seen_TV[t:, text[at + t - 1]] = True
        scored = ScoredLaws(laws_TV, text[at - 1 : at + count - 1], seen_TV)
        spread = uniforms(seed, range(first, first + count)).to(device)
        steps.append(scored.steps(torch.arange(count, device=device), text[at : at + count], spread))
    filler = float(uniforms(seed, range(len(output), len(output) + 1)))
    return Sums.of_text(steps, filler)


def _batch(
    forcing: TeacherForcing,
    engine: Engine,
    prompts: Seq[Seq[int]],
    params: SamplingParams,
    key: str,
    number: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Requests number * batch size, ... of a subject: generated together, always with the same batch mates."""
    size = engine.max_batch_size
    indices = range(number * size, (number + 1) * size)
    each = [replace(params, seed=derived_seed(key, index, "request")) for index in indices]
    results = engine.generate([prompts[index % len(prompts)] for index in indices], each)
    total, requests = Sums.zero(), []
    for index, result in zip(indices, results, strict=True):
        spread = derived_seed(key, index, "spread")
        total += text_sums(forcing, result.prompt_token_ids, result.token_ids, params, spread, dtype)
        requests.append(
            {
                "prompt": index % len(prompts),
                "seed": result.seed,
                "token_ids": result.token_ids,
                "finish_reason": result.finish_reason,
            }
        )
    return {"requests": requests, "sums": total.to_json()}


def _key(
    target: PagedModel, subject: Subject, params: SamplingParams, prompts: Seq[Seq[int]], dtype: torch.dtype
) -> str:
    texts = [list(prompt) for prompt in prompts]
    what = [target.name, str(target.dtype), str(dtype), dict(subject.labels), subject.engine.max_batch_size]
    return fingerprint(*what, asdict(params), texts)


def sampling_labels(params: SamplingParams) -> dict[str, Any]:
    """The temperature, and whatever else shapes the law."""
    values, defaults = asdict(params), asdict(SamplingParams())
    # JSON has no infinity: a token that is forbidden gets the lowest number there is.
    values["logit_bias"] = {token: max(bias, -sys.float_info.max) for token, bias in params.logit_bias.items()}
    shaping = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    return {"temperature": params.temperature} | {k: values[k] for k in shaping if values[k] != defaults[k]}


def _test_row(test: Outcome, threshold: float) -> dict[str, Any]:
    # A score that the law leaves no chance and that differs all the same: JSON has no infinity.
    statistic = min(max(test.statistic, -sys.float_info.max), sys.float_info.max)
    return {**asdict(test), "statistic": statistic, "passed": test.p_value >= threshold}


def _has_cut(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _least(values: Iterator[int | None]) -> int | None:
    return min((value for value in values if value is not None), default=None)
