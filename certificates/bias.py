"""The bias of LOSSY rules on real text: how far the law of what they emit is from the target's, per emitted token."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.certificates.kept import Kept, derived_seed, fingerprint, progress_bar
from specdec.certificates.real import Subject, sampling_labels
from specdec.drafters import Coupled
from specdec.engine import Engine
from specdec.interfaces import Acceptance, AcceptanceRule, Noise, TargetLaws
from specdec.noise import CounterNoise
from specdec.sampling import SamplingParams
from specdec.tree import DrawKind, TokenTree, TreeSpec
from specdec.verifiers import Threshold, Typical

# Rules that accept a path without chance, given the tree, and draw the token behind it from the target's own law there.
MEASURABLE = (Typical, Threshold)


def bias(
    subjects: Seq[Subject],
    prompts: Seq[Seq[int]],
    params: Seq[SamplingParams],
    num_tokens: int,
    work_dir: str | Path,
) -> list[dict[str, Any]]:
    """Generates at least `num_tokens` tokens per subject and parameters; a row for each pair with the KL divergence of the
    emitted law from the target's, in nats per 1,000 tokens, and the mean total variation of the next token's law.

    Given the tree, such a rule accepts a path without chance and draws one more token from the target's law p. So an
    accepted token's law is a point mass, at a divergence of -log p(token) and a total variation of 1 - p(token) from the
    target's, and the extra token is at none: both are known exactly at every token (Rao-Blackwell), and only the mean over
    texts is an estimate. Its standard error is that of a ratio, texts of one prompt in one cluster. Where a tree follows
    from the text, as with FIXED draws, that is the divergence of the texts' laws (`estimate` exact); where trees are drawn,
    it is that of the law of texts and trees together, which by the data processing inequality is an upper bound.

    Batches go to biased.jsonl in `work_dir` as they end; a later run goes on from there. Raises ValueError for a rule that is
    not one of `MEASURABLE`, for temperature 0 and for a missing seed.
    """
    for subject in subjects:
        rule = _rule(subject.engine)
        if not isinstance(rule, MEASURABLE):
            names = ", ".join(one.name for one in MEASURABLE)
            raise ValueError(f"rule {rule.name}: the bias on text is known for the rules {names}")
    if any(one.temperature == 0 or one.seed is None for one in params):
        raise ValueError("the bias of a law needs a temperature > 0, and a seed to be resumed with")
    pairs = [(subject, one) for subject in subjects for one in params]
    kept = Kept(Path(work_dir) / "biased.jsonl")
    rows = []
    try:
        with progress_bar() as progress:
            task = progress.add_task("tokens of lossy rules", total=num_tokens * len(pairs))
            for subject, one in pairs:
                key = fingerprint(
                    subject.engine.target.name,
                    str(subject.engine.target.dtype),
                    dict(subject.labels),
                    subject.engine.max_batch_size,
                    asdict(one),
                    [list(prompt) for prompt in prompts],
                )
                texts, made_by = list[dict[str, Any]](), set[str]()
                count = number = 0
                while count < num_tokens:
                    batch = kept.get(key, number)
                    if batch is None:
                        batch = kept.put(key, number, {"texts": _texts(subject.engine, prompts, one, key, number)})
                    made_by.add(batch["revision"])
                    texts += batch["texts"]
                    new = sum(text["num_tokens"] for text in batch["texts"])
                    count, number = count + new, number + 1
                    progress.update(task, advance=new)
                measured = {**_measured(subject.engine, texts), "revisions": sorted(made_by)}
                rows.append({**subject.labels, **sampling_labels(one), **measured})
    finally:
        kept.finish()
    return rows


class Witness:
    """Stands where a lossy rule stands and notes, per request, the target's probability of every token that the rule emitted
    without chance, and None for each that was drawn from the target's own law. Requests are told apart by their seeds."""

    lossless = False

    def __init__(self, rule: AcceptanceRule) -> None:
        self.rule, self.name = rule, rule.name
        self.probs: dict[int, list[float | None]] = defaultdict(list)

    def accepts(self, spec: TreeSpec) -> str | None:
        return self.rule.accepts(spec)

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        assert isinstance(noise, CounterNoise), "requests are told apart by the seeds of their noise"
        once = _Once(laws)
        verdict = self.rule(tree, once, noise)
        parents_BK, nodes_BK = verdict.path_BK[:, :-1].clamp_min(0), verdict.path_BK[:, 1:].clamp_min(0)
        rows_B1 = torch.arange(tree.batch_size, device=tree.device)[:, None]
        laws_BNV = once.all()
        probs_BK = laws_BNV[rows_B1, parents_BK, tree.tokens_BN.gather(1, nodes_BK)].double()
        counts = verdict.num_accepted_B.tolist()
        for seed, count, probs in zip(noise.seeds_B.tolist(), counts, probs_BK.tolist(), strict=True):
            self.probs[seed] += [*probs[:count], None]
        return verdict


class _Once:
    """Laws that are computed once, however often they are asked for."""

    def __init__(self, laws: TargetLaws) -> None:
        self._laws = laws
        self._all: Tensor | None = None

    def at(self, nodes_B: Tensor) -> Tensor:
        return self._laws.at(nodes_B)

    def all(self) -> Tensor:
        if self._all is None:
            self._all = self._laws.all()
        return self._all


def _texts(
    engine: Engine, prompts: Seq[Seq[int]], params: SamplingParams, key: str, number: int
) -> list[dict[str, Any]]:
    """Requests number * batch size, ...: what each of their texts costs."""
    size = engine.max_batch_size
    indices = range(number * size, (number + 1) * size)
    each = [replace(params, seed=derived_seed(key, index, "request")) for index in indices]
    with _witnessed(engine) as witness:
        results = engine.generate([prompts[index % len(prompts)] for index in indices], each)
    texts = []
    for index, result in zip(indices, results, strict=True):
        # What ends a text cuts inside an accepted span.
        noted = witness.probs[result.seed][: len(result.token_ids)]
        assert len(noted) == len(result.token_ids), "every emitted token went through the rule"
        probs = [prob for prob in noted if prob is not None]
        texts.append(
            {
                "prompt": index % len(prompts),
                "seed": result.seed,
                "num_tokens": len(noted),
                "num_accepted": len(probs),
                "kl": math.fsum(-math.log(p) for p in probs),
                "total_variation": math.fsum(1 - p for p in probs),
            }
        )
    return texts


@contextmanager
def _witnessed(engine: Engine) -> Iterator[Witness]:
    """The engine with a witness in the place of its rule."""
    verifier: Any = engine.verifier
    rule = verifier.rule
    verifier.rule = witness = Witness(rule)
    try:
        yield witness
    finally:
        verifier.rule = rule


def _measured(engine: Engine, texts: list[dict[str, Any]]) -> dict[str, Any]:
    policy = engine.policy
    # The coupled policy looks at noise, which no text tells.
    is_fixed = policy is None or (policy.spec.kinds <= {DrawKind.FIXED} and not isinstance(policy, Coupled))
    kl, kl_stderr = _rate(texts, "kl")
    variation, variation_stderr = _rate(texts, "total_variation")
    return {
        "num_tokens": sum(text["num_tokens"] for text in texts),
        "num_requests": len(texts),
        "num_prompts": len({text["prompt"] for text in texts}),
        "accepted_share": _rate(texts, "num_accepted")[0],
        "kl_per_1k": 1e3 * kl,
        "kl_per_1k_stderr": None if kl_stderr is None else 1e3 * kl_stderr,
        "total_variation_per_token": variation,
        "total_variation_per_token_stderr": variation_stderr,
        "estimate": "exact" if is_fixed else "upper bound",
    }


def _rate(texts: list[dict[str, Any]], name: str) -> tuple[float, float | None]:
    """Sum over tokens, and its standard error by the linearised ratio over clusters, the prompts; None for one prompt."""
    total: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for text in texts:
        total[text["prompt"]][0] += text[name]
        total[text["prompt"]][1] += text["num_tokens"]
    count = sum(tokens for _, tokens in total.values())
    mean = math.fsum(value for value, _ in total.values()) / count
    if len(total) == 1:
        return mean, None
    squares = math.fsum((value - mean * tokens) ** 2 for value, tokens in total.values())
    return mean, math.sqrt(len(total) / (len(total) - 1) * squares) / count


def _rule(engine: Engine) -> AcceptanceRule:
    return engine.verifier.rule  # type: ignore[attr-defined]
