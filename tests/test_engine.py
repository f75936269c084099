"""The engine: what ends a request, what it streams, what it refuses, and that it gives everything back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import NGramDrafter, SmallModelDrafter, TopK, chain
from specdec.interfaces import Commit
from specdec.pages import OutOfPages
from specdec.sampling import log_confidence
from specdec.tree import TokenTree
from specdec.verifiers import Follow, Rejection, Verifier

PROMPT = [40, 41, 42, 43, 40, 41, 42]


@pytest.fixture(scope="module")
def target(tiny, tokenizer) -> PagedModel:
    return PagedModel(tiny(0, vocab_size=len(tokenizer)), tokenizer, name="target")


@pytest.fixture(scope="module")
def draft(tiny, tokenizer) -> PagedModel:
    return PagedModel(tiny(0, vocab_size=len(tokenizer)), tokenizer, name="draft")


def engines(target: PagedModel, draft: PagedModel, **options: object) -> list[Engine]:
    """Plain decoding, and a drafter that is always right: every span is accepted whole."""
    return [
        Engine(Verifier(target), **options),
        Engine(Verifier(target), SmallModelDrafter(draft), chain(6), **options),
    ]


def test_stop_token_cuts_inside_an_accepted_span(target, draft) -> None:
    plain, speculative = engines(target, draft)
    whole = plain.generate([PROMPT], SamplingParams(max_new_tokens=30, ignore_eos=True))[0].token_ids
    for cut in range(1, 20):
        stop = whole[cut]
        params = SamplingParams(max_new_tokens=30, ignore_eos=True, stop_token_ids=(stop,))
        for engine in (plain, speculative):
            result = engine.generate([PROMPT], params)[0]
            assert result.token_ids == whole[: whole.index(stop) + 1]
            assert result.finish_reason == "stop"
            engine.check()


@pytest.mark.parametrize("length", range(1, 12))
def test_length_limit_cuts_inside_an_accepted_span(target, draft, length: int) -> None:
    for engine in engines(target, draft):
        result = engine.generate([PROMPT], SamplingParams(max_new_tokens=length, ignore_eos=True))[0]
        assert len(result.token_ids) == length and result.finish_reason == "length"


def test_stop_string_across_tokens_ends_text_and_stream_before_it(target, draft) -> None:
    plain, speculative = engines(target, draft)
    params = SamplingParams(temperature=1.5, seed=1, max_new_tokens=40, ignore_eos=True)
    whole = plain.generate([PROMPT], params)[0]
    text = "".join(token.text for token in plain.stream([PROMPT], params))
    assert text == whole.text == target.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    cuts = [text[at : at + 2] for at in range(4, len(text) - 2) if "\ufffd" not in text[at : at + 2]]
    assert len(cuts) > 3
    for stop in cuts:
        stopped = SamplingParams(temperature=1.5, seed=1, max_new_tokens=40, ignore_eos=True, stop=("never", stop))
        for engine in (plain, speculative):
            tokens = list(engine.stream([PROMPT], stopped))
            result = tokens[-1].result
            assert result.finish_reason == "stop"
            assert result.text == text[: text.index(stop)]
            assert "".join(token.text for token in tokens) == result.text
            assert result.token_ids == whole.token_ids[: len(result.token_ids)]
            assert stop in target.tokenizer.decode(result.token_ids, skip_special_tokens=True)


def test_stream_of_a_batch_carries_every_token_once(target) -> None:
    engine = Engine(Verifier(target), NGramDrafter(), TopK(8, 4, 2), max_batch_size=3)
    prompts = [PROMPT, PROMPT[:3], [50, 51] * 4, [60]]
    tokens = list(engine.stream(prompts, SamplingParams(max_new_tokens=12, ignore_eos=True)))
    for index in range(4):
        mine = [token for token in tokens if token.index == index]
        assert [token.token_id for token in mine] == mine[-1].result.token_ids
        assert all(token.result is None for token in mine[:-1])


def test_leaving_a_stream_early_gives_everything_back(target, draft) -> None:
    _, engine = engines(target, draft)
    stream = engine.stream([PROMPT, PROMPT], SamplingParams(max_new_tokens=30))
    next(stream)
    assert engine.pool.num_free < engine.pool.num_pages
    stream.close()
    engine.check()
    assert not engine.drafter._states


def test_logprobs_are_those_of_the_plain_model(tiny, target, draft) -> None:
    params = SamplingParams(max_new_tokens=9, temperature=0.5, seed=3, logprobs=3, ignore_eos=True)
    reference = tiny(0, vocab_size=target.vocab_size)
    plain, speculative = (engine.generate([PROMPT], params)[0] for engine in engines(target, draft))
    assert plain.token_ids == speculative.token_ids
    ids = torch.tensor([PROMPT + plain.token_ids])
    with torch.no_grad():
        want = log_confidence(reference(ids).logits[0, len(PROMPT) - 1 : -1])
    for result in (plain, speculative):
        assert len(result.logprobs) == 9
        for row, token, (value, top) in zip(want, result.token_ids, result.logprobs, strict=True):
            assert value == pytest.approx(float(row[token]), abs=1e-4)
            assert list(top) == row.topk(3).indices.tolist()
            assert list(top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_tokens_carry_the_logprobs_of_their_result(target, draft) -> None:
    for engine in engines(target, draft):
        for logprobs in (None, 0, 2):
            params = SamplingParams(max_new_tokens=9, stop_token_ids=(9,), logprobs=logprobs, ignore_eos=True)
            tokens = list(engine.stream([PROMPT], params))
            result = tokens[-1].result
            if logprobs is None:
                assert result.logprobs is None and {(one.logprob, one.top_logprobs) for one in tokens} == {(None, None)}
            else:
                assert [(one.logprob, one.top_logprobs) for one in tokens] == result.logprobs


def test_seed_is_drawn_and_reported(target) -> None:
    engine = Engine(Verifier(target))
    params = SamplingParams(temperature=1.0, max_new_tokens=12, ignore_eos=True)
    first, second = engine.generate([PROMPT, PROMPT], params)
    assert first.seed != second.seed and first.token_ids != second.token_ids
    again = engine.generate(
        [PROMPT], SamplingParams(temperature=1.0, max_new_tokens=12, ignore_eos=True, seed=first.seed)
    )
    assert again[0].token_ids == first.token_ids


def test_chat_wraps_text_in_the_template(target, tokenizer) -> None:
    result = Engine(Verifier(target)).generate(["hé"], SamplingParams(max_new_tokens=1), chat=True)[0]
    assert result.prompt == "hé"
    assert result.prompt_token_ids == [1, *tokenizer("hé", add_special_tokens=False)["input_ids"], 2]


def test_bounded_pages_split_the_batch_and_refuse_what_never_fits(target, draft) -> None:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    want = [r.token_ids for r in Engine(Verifier(target)).generate([PROMPT] * 4, params)]
    for engine in engines(target, draft, num_pages=12, page_size=4):
        assert [r.token_ids for r in engine.generate([PROMPT] * 4, params)] == want
        assert engine.pool.num_pages == 12
        with pytest.raises(OutOfPages, match="12"):
            engine.generate([PROMPT, list(range(3, 60))], params)
        engine.check()


def test_refusals_name_value_and_remedy(target, tiny) -> None:
    engine = Engine(Verifier(target))
    cases = [
        (["x"] * 2, [SamplingParams()], "1 sampling parameters for 2 prompts"),
        ([[]], None, "has no tokens"),
        ([[5, 999]], None, "token 999 is outside target's vocabulary of 259"),
        ([[5] * 300], None, "has 300 tokens; target takes at most 256"),
        ([[5]], SamplingParams(logit_bias={1000: 1.0}), "token 1000"),
    ]
    for prompts, params, message in cases:
        with pytest.raises(ValueError, match=message):
            engine.generate(prompts, params)
    bare = Engine(Verifier(PagedModel(tiny(0), name="bare")))
    with pytest.raises(ValueError, match="without a tokenizer"):
        bare.generate(["text"])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        bare.generate([[5]], SamplingParams(stop=("x",)))
    with pytest.raises(ValueError, match="give both"):
        Engine(Verifier(target), NGramDrafter())
    with pytest.raises(ValueError, match=r"rule rejection is not exact.*branch"):
        Engine(Verifier(target, Rejection()), NGramDrafter(), TopK(8, 3, 2))


def test_a_lossy_rule_needs_to_be_allowed(target) -> None:
    class Careless(Follow):
        name, lossless = "careless", False

    with pytest.raises(ValueError, match=r"careless is LOSSY.*allow_lossy=true"):
        Verifier(target, Careless())
    assert Verifier(target, Careless(), allow_lossy=True).rule.name == "careless"


def test_times_and_counts_add_up(target, draft) -> None:
    _, engine = engines(target, draft)
    results = engine.generate([PROMPT, PROMPT[:4]], SamplingParams(max_new_tokens=25, ignore_eos=True))
    for result in results:
        metrics = result.metrics
        assert metrics.num_new_tokens == 25 == len(result.token_ids)
        assert metrics.tau == 25 / metrics.num_target_forwards
        assert all(a <= d for a, d in zip(metrics.accepted_by_depth, metrics.drafted_by_depth, strict=True))
        assert 0 < metrics.ttft_s <= metrics.total_s
    assert engine.times.num_steps >= results[0].metrics.num_target_forwards
    assert 0 < engine.times.overhead < 1


class Recorder:
    """A drafter that proposes roots alone and keeps what it observes."""

    feature_layers = (0, 1, 2)

    def __init__(self) -> None:
        self.commits: list[Commit] = []
        self.forgotten: list[int] = []

    def bind(self, target: PagedModel, pool: object) -> None:
        self.target = target

    def observe(self, commits: list[Commit]) -> None:
        self.commits += commits

    def propose(self, sequences, policy, noise) -> TokenTree:
        # The right continuation once, a wrong one beside it, so that paths and their features are not trivial.
        right = {tuple(ids[:n]): ids[n : n + 2] for ids in self.known for n in range(len(ids))}
        rows = [([96, 95], right[tuple(one.token_ids)]) for one in sequences]
        return TokenTree.from_paths([one.root for one in sequences], rows, self.target.vocab_size)

    def forget(self, sequence_ids: list[int]) -> None:
        self.forgotten += sequence_ids


@pytest.mark.parametrize("ends_at", [None, 5, 6, 7])
def test_observed_tokens_and_features_are_those_of_the_final_text(tiny, ends_at: int | None) -> None:
    """Up to its last token, which may have been cut out of an accepted span (some of these places are inside of one)."""
    target, reference = PagedModel(tiny(4)), tiny(4)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14]]
    params = SamplingParams(max_new_tokens=14, ignore_eos=True)
    results = Engine(Verifier(target)).generate(prompts, params)
    if ends_at is not None:
        params = replace(params, stop_token_ids=(results[0].token_ids[ends_at],))
    whole = [p + r.token_ids for p, r in zip(prompts, results, strict=True)]
    plain = [p + r.token_ids for p, r in zip(prompts, Engine(Verifier(target)).generate(prompts, params), strict=True)]
    recorder = Recorder()
    recorder.known = whole
    engine = Engine(Verifier(target), recorder, TopK(6, 2, 2), prefill_chunk=3)
    results = engine.generate(prompts, params)
    assert [r.prompt_token_ids + r.token_ids for r in results] == plain
    assert sorted(recorder.forgotten) == [0, 1, 2] and (ends_at is not None or results[0].metrics.tau > 2)
    for i, ids in enumerate(plain):
        with torch.no_grad():
            states = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states
        mine = [commit for commit in recorder.commits if commit.sequence_id == i]
        end = 0
        for commit in mine:
            assert commit.start == end
            end += len(commit.token_ids)
            assert commit.token_ids == ids[commit.start : end] and commit.next_token == ids[end]
            for layer in recorder.feature_layers:
                torch.testing.assert_close(commit.hidden[layer], states[layer][0, commit.start : end])
        assert end == len(ids) - 1
