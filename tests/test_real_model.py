"""The embedded real model: speculative text is plain text, and plain text is transformers' own, token for token."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import NGramDrafter, SmallModelDrafter, Static, TopK, chain
from specdec.loading import embedded_model_path
from specdec.verifiers import Verifier

pytestmark = pytest.mark.real_model

PROMPTS = [
    "Repeat after me, three times: the quick brown fox jumps over the lazy dog.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List the days of the week, then list them again in reverse.",
    "What is 12 + 30? Answer with the number, then explain.",
]
POLICIES = {
    "chain": lambda: chain(4),
    "static": lambda: Static([[0], [1], [0, 0], [0, 1], [0, 0, 0], [0, 0, 0, 0]]),
    "top_k": lambda: TopK(total=12, depth=4, k=3),
}
SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=12, stop=("Tuesday", "return")),
    "0.7": SamplingParams(temperature=0.7, seed=1, max_new_tokens=12, repetition_penalty=1.1),
    "top_p": SamplingParams(temperature=1.0, top_p=0.9, seed=2, max_new_tokens=12, logit_bias={42: 1.5}),
}


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    # Beside other workers of one run a second thread waits more than it helps.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target() -> PagedModel:
    try:
        path = embedded_model_path()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    return PagedModel.load(path, dtype="float32")


@pytest.fixture(scope="module")
def draft() -> PagedModel:
    """The same weights in bfloat16: a draft model that is right most of the time, and not always."""
    return PagedModel.load(embedded_model_path(), dtype="bfloat16")


@pytest.fixture(scope="module")
def plain(target: PagedModel) -> dict[str, list[tuple[list[int], str]]]:
    engine = Engine(Verifier(target), max_batch_size=1)
    return {
        name: [(r.token_ids, r.text) for r in engine.generate(PROMPTS, params, chat=True)]
        for name, params in SAMPLING.items()
    }


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafter", ["ngram", "small_model"])
def test_speculative_equals_plain(target, draft, plain, drafter: str, policy: str, batch: int) -> None:
    one = NGramDrafter() if drafter == "ngram" else SmallModelDrafter(draft)
    engine = Engine(Verifier(target), one, POLICIES[policy](), max_batch_size=batch, prefill_chunk=32)
    accepted = 0
    # One at a time costs four times as much as together, and two prompts say what four do.
    prompts = PROMPTS[:2] if batch == 1 else PROMPTS
    for name, params in SAMPLING.items():
        results = engine.generate(prompts, params, chat=True)
        assert [(r.token_ids, r.text) for r in results] == plain[name][: len(prompts)], name
        accepted += sum(sum(r.metrics.accepted_by_depth) for r in results)
    assert accepted >= 5
    engine.check()


def test_plain_equals_transformers(target) -> None:
    engine = Engine(Verifier(target))
    for prompt, result in zip(
        PROMPTS, engine.generate(PROMPTS, SamplingParams(max_new_tokens=32), chat=True), strict=True
    ):
        ids = torch.tensor([result.prompt_token_ids])
        target.model.set_attn_implementation("sdpa")
        try:
            out = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        finally:
            target.model.set_attn_implementation("specdec_paged")
        assert result.token_ids == out[0, ids.shape[1] :].tolist(), prompt
