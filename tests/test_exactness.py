"""Same seed, same tokens: whatever drafts, the output is what plain decoding emits."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import Mixed, NGramDrafter, Sampled, SmallModelDrafter, Static, TopK, chain
from specdec.verifiers import Verifier

POLICIES = {
    "chain": lambda: chain(4),
    "static": lambda: Static([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]]),
    "top_k": lambda: TopK(total=12, depth=4, k=3),
    "chain_iid": lambda: chain(4, "iid"),
    "sampled": lambda: Sampled([3, 2, 1]),
    "without_replacement": lambda: Sampled([3, 2], "without_replacement"),
    "mixed": lambda: Mixed([3, 2, 1]),
}
SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=40),
    "0.7": SamplingParams(temperature=0.7, seed=5, max_new_tokens=40),
    "top_p": SamplingParams(temperature=1.0, top_p=0.9, seed=6, max_new_tokens=40),
    "everything": SamplingParams(
        temperature=0.9,
        top_k=30,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={7: 2.0, 2: -1.0},
        seed=7,
        max_new_tokens=40,
        stop_token_ids=(11, 12),
    ),
    "greedy_penalised": SamplingParams(repetition_penalty=1.3, logit_bias={2: -100.0}, max_new_tokens=40),
}
PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7], [9, 10, 11], [3] * 23, [4, 5, 4, 5, 4]]


@pytest.fixture(scope="module")
def pair(tiny) -> tuple[PagedModel, PagedModel]:
    return PagedModel(tiny(0), name="target"), PagedModel(tiny(0, noise=0.03), name="draft")


@pytest.fixture(scope="module")
def plain(pair) -> dict[str, list[list[int]]]:
    engine = Engine(Verifier(pair[0]), max_batch_size=1)
    return {name: [r.token_ids for r in engine.generate(PROMPTS, params)] for name, params in SAMPLING.items()}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafter", ["ngram", "small_model"])
def test_speculative_equals_plain(pair, plain, drafter: str, policy: str) -> None:
    target, draft = pair
    accepted = 0
    for name, batch in itertools.product(SAMPLING, (1, 4)):
        one = NGramDrafter() if drafter == "ngram" else SmallModelDrafter(draft)
        # A chunk shorter than the prompts mixes prompt chunks and trees in one forward; small pages break runs of slots.
        engine = Engine(Verifier(target), one, POLICIES[policy](), max_batch_size=batch, prefill_chunk=7, page_size=4)
        results = engine.generate(PROMPTS, SAMPLING[name])
        assert [r.token_ids for r in results] == plain[name], f"{name}, batch {batch}"
        engine.check()
        accepted += sum(sum(r.metrics.accepted_by_depth) for r in results)
    # Without accepted drafts the equality would say nothing about commits.
    assert accepted > (20 if drafter == "ngram" else 200)


def test_plain_equals_transformers(tiny) -> None:
    reference, target = tiny(3), PagedModel(tiny(3))
    results = Engine(Verifier(target), max_batch_size=3, page_size=4).generate(
        PROMPTS, SamplingParams(max_new_tokens=50)
    )
    for prompt, result in zip(PROMPTS, results, strict=True):
        out = reference.generate(torch.tensor([prompt]), max_new_tokens=50, do_sample=False)
        assert result.token_ids == out[0, len(prompt) :].tolist()


def test_result_does_not_depend_on_batch_mates_pages_or_chunks(pair) -> None:
    target, draft = pair
    params = [SamplingParams(temperature=0.8, seed=i, max_new_tokens=10 + 7 * i) for i in range(4)]
    alone = [Engine(Verifier(target)).generate([p], [s])[0].token_ids for p, s in zip(PROMPTS, params, strict=True)]
    for chunk, page, batch in [(1, 1, 4), (5, 3, 2), (512, 16, 3)]:
        engine = Engine(
            Verifier(target),
            SmallModelDrafter(draft),
            TopK(8, 3, 2),
            prefill_chunk=chunk,
            page_size=page,
            max_batch_size=batch,
        )
        assert [r.token_ids for r in engine.generate(PROMPTS, params)] == alone


@pytest.mark.parametrize("architecture", ["gpt2", "mistral", "qwen3_moe"])
def test_other_architectures_up_to_their_last_position(tiny, architecture: str) -> None:
    extra = {
        "gpt2": {"max_position_embeddings": 40},
        "mistral": {"sliding_window": 6, "max_position_embeddings": 40},
        "qwen3_moe": {"max_position_embeddings": 40, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
    }[architecture]
    target, draft = (PagedModel(tiny(1, noise, architecture, **extra)) for noise in (0.0, 0.02))
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    plain = Engine(Verifier(target)).generate(PROMPTS, params)
    engine = Engine(Verifier(target), SmallModelDrafter(draft), TopK(10, 4, 3), page_size=4)
    results = engine.generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    # Forty positions can be computed, and the token behind the last one emitted.
    assert [len(r.prompt_token_ids) + len(r.token_ids) for r in results] == [41] * 4


def test_draft_model_with_fewer_positions_than_the_target(tiny) -> None:
    target = PagedModel(tiny(1, architecture="gpt2", max_position_embeddings=60))
    draft = PagedModel(tiny(1, architecture="gpt2", max_position_embeddings=30))
    params = SamplingParams(max_new_tokens=50, ignore_eos=True)
    plain = Engine(Verifier(target)).generate(PROMPTS, params)
    results = Engine(Verifier(target), SmallModelDrafter(draft), chain(4)).generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]


def test_a_draft_model_equal_to_its_target_is_always_accepted(tiny) -> None:
    target = PagedModel(tiny(2))
    draft = PagedModel(copy.deepcopy(target.model))
    engine = Engine(Verifier(target), SmallModelDrafter(draft), chain(4))
    result = engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=41, ignore_eos=True))[0]
    # The prompt's forward emits one token, eight trees emit five each.
    assert result.metrics.num_target_forwards == 9
    assert result.metrics.accepted_by_depth == [8, 8, 8, 8]
