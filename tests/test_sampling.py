"""From logits to probabilities: transformers' own processors are the reference, one by one and all together."""

import math
import random
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.interfaces import TargetLaws
from specdec.kernels.sampling.reference import top_p_cut
from specdec.sampling import (
    BatchSampling,
    ModelLaws,
    SamplingParams,
    drafted_paths,
    log_confidence,
    token_logprobs,
)
from specdec.tree import TokenTree

VOCABS = (11, 300, 3000)
PROMPT, OUTPUT = [3, 7, 7, 1, 9], [2, 7, 2, 2, 10]


def _logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


class _OutputPenalties:
    """Presence and frequency penalty as OpenAI defines them: logit - count * frequency - (count > 0) * presence."""

    def __init__(self, params: SamplingParams, output: Seq[int]) -> None:
        self.params, self.output = params, Counter(output)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for token, count in self.output.items():
            scores[:, token] -= count * self.params.frequency_penalty + self.params.presence_penalty
        return scores


def _reference(logits_V: Tensor, params: SamplingParams, prompt: Seq[int] = (), output: Seq[int] = ()) -> Tensor:
    """The law [V] that transformers would sample from."""
    steps: list[Any] = []
    if params.logit_bias:
        steps.append(SequenceBiasLogitsProcessor({(t,): float(b) for t, b in params.logit_bias.items()}))
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    steps.append(_OutputPenalties(params, output))
    if params.temperature not in (0, 1):
        steps.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    input_ids = torch.tensor([[*prompt, *output]], dtype=torch.int64)
    scores = LogitsProcessorList(steps)(input_ids, logits_V[None])[0]
    if params.temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(), len(scores)).to(scores.dtype)
    return scores.softmax(-1)


def _law(
    logits_RV: Tensor,
    params: SamplingParams,
    prompt: Seq[int] = (),
    output: Seq[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Ours: every row of `logits_RV` under one request."""
    sampling = BatchSampling([params], [prompt], [output], logits_RV.shape[1])
    return sampling.probabilities(logits_RV, torch.zeros(len(logits_RV), dtype=torch.int64), dtype=dtype)


def _assert_same_law(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual > 0, expected > 0), "the supports differ"
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual.sum(-1), torch.ones_like(actual.sum(-1)))


ALONE = {
    "nothing": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.01},
    "greedy": {"temperature": 0.0},
    "top_k-1": {"top_k": 1},
    "top_k-5": {"top_k": 5},
    "top_k-beyond-the-vocabulary": {"top_k": 10_000},
    "top_p": {"top_p": 0.9},
    "top_p-tiny": {"top_p": 1e-6},
    # Much closer to 1, single tail tokens weigh no more than float32's rounding of the mass in front of them.
    "top_p-almost-1": {"top_p": 0.998},
    "min_p": {"min_p": 0.05},
    "min_p-1": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.3},
    "repetition-reward": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 0.7},
    "frequency": {"frequency_penalty": -0.4},
    "logit_bias": {"logit_bias": {0: 4.5, 10: -3.0, 7: 1.25}},
    "banned": {"logit_bias": {0: -math.inf, 7: -math.inf}},
}
EVERYTHING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "logit_bias": {0: 2.0, 9: -1.5, 2: 3.0},
}
TOGETHER = {
    "all": EVERYTHING,
    "all-but-top_k": EVERYTHING | {"top_k": 0},
    "all-greedy": EVERYTHING | {"temperature": 0.0},
    "top_k-top_p": {"top_k": 6, "top_p": 0.7},
    "top_p-min_p": {"top_p": 0.7, "min_p": 0.1},
    "bias-of-penalised": {"repetition_penalty": 1.5, "logit_bias": {7: -8.0, 2: 8.0}},
}


@pytest.mark.parametrize("scale", [3.0, 0.02], ids=["peaked", "flat"])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("name", [*ALONE, *TOGETHER])
def test_equals_transformers(name: str, vocab: int, scale: float) -> None:
    params = SamplingParams(**{"temperature": 1.0, **(ALONE | TOGETHER)[name]})
    logits = _logits(6, vocab, seed=vocab, scale=scale)
    expected = torch.stack([_reference(row, params, PROMPT, OUTPUT) for row in logits])
    _assert_same_law(_law(logits, params, PROMPT, OUTPUT), expected)


def test_the_top_p_shortcut_is_taken_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    topk = Tensor.topk

    def spy(self: Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        widths.append(k)
        return topk(self, k, *args, **kwargs)

    monkeypatch.setattr(Tensor, "topk", spy)
    peaked, flat = _logits(2, 3000), _logits(2, 3000, scale=0.02)
    nucleus = SamplingParams(temperature=1.0, top_p=0.9)
    _law(peaked, nucleus)
    assert widths == [1024]
    _law(flat, nucleus)
    assert widths == [1024, 1024, 3000]
    # Neighbours without top-p must not cost the full sort.
    sampling = BatchSampling([nucleus, SamplingParams()], [[], []], [[], []], 3000)
    sampling.probabilities(peaked, torch.tensor([0, 1]))
    assert widths[3:] == [1024]


@pytest.mark.parametrize(
    "name", ["nothing", "hot", "top_k-5", "top_p", "min_p", "repetition", "frequency", "logit_bias", "all"]
)
def test_float64_laws(name: str) -> None:
    params = SamplingParams(**{"temperature": 1.0, **(ALONE | TOGETHER)[name]})
    logits = _logits(4, 300, seed=5)
    law = _law(logits, params, PROMPT, OUTPUT, torch.float64)
    assert law.dtype == torch.float64
    expected = torch.stack([_reference(row, params, PROMPT, OUTPUT) for row in logits.double()])
    assert torch.equal(law > 0, expected > 0)
    torch.testing.assert_close(law, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_processed_in_float32(dtype: torch.dtype) -> None:
    logits = _logits(4, 300).to(dtype)
    params = SamplingParams(**EVERYTHING)
    law = _law(logits, params, PROMPT, OUTPUT)
    assert law.dtype == torch.float32
    torch.testing.assert_close(law, _law(logits.float(), params, PROMPT, OUTPUT), rtol=0, atol=0)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(**EVERYTHING)], ids=["greedy", "all"])
def test_logits_are_left_alone(params: SamplingParams) -> None:
    logits = _logits(4, 300)
    before = logits.clone()
    _law(logits, params, PROMPT, OUTPUT)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.5, 0.0, 2.0]])
    prompt, output = [0, 1], [2, 2, 1]

    def scores(**params: float) -> list[float]:
        law = _law(logits, SamplingParams(temperature=1.0, **params), prompt, output, torch.float64)  # type: ignore[arg-type]
        # Token 4 never occurs, so its logit is untouched and anchors the others.
        return (law.log() - law.log()[:, 4:] + 2.0)[0].tolist()

    assert scores(repetition_penalty=2.0) == pytest.approx([0.5, -2.0, 0.25, 0.0, 2.0])
    # The prompt counts for the repetition penalty only.
    assert scores(presence_penalty=0.5) == pytest.approx([1.0, -1.5, 0.0, 0.0, 2.0])
    assert scores(frequency_penalty=0.5) == pytest.approx([1.0, -1.5, -0.5, 0.0, 2.0])
    every = scores(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    assert every == pytest.approx([0.5, -2.75, -0.75, 0.0, 2.0])


def _tied_logits() -> Tensor:
    return torch.randint(-3, 4, (50, 40), generator=torch.Generator().manual_seed(3)).float()


@pytest.mark.parametrize("params", [{"top_k": 7}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8}], ids=str)
def test_ties_at_a_cut_stay_together(params: dict[str, Any]) -> None:
    logits = _tied_logits()
    law = _law(logits, SamplingParams(temperature=1.0, **params))
    for row, probs in zip(logits, law, strict=True):
        kept, dropped = row[probs > 0], row[probs == 0]
        assert len(dropped) and kept.min() > dropped.max()
        if list(params) == ["top_k"]:
            assert len(kept) >= 7 > int((kept > kept.min()).sum())
        if list(params) == ["top_p"]:
            plain = row.softmax(-1)
            assert plain[row >= kept.min()].sum() >= 0.5 > plain[row > kept.min()].sum()
    # So the order of the tokens has no say.
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(_law(logits[:, order], SamplingParams(temperature=1.0, **params)), law[:, order])


def test_top_p_stops_at_exactly_enough_mass() -> None:
    probs = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
    for top_p, cut in ((0.25, 0.5), (0.5, 0.5), (0.5 + 1e-6, 0.25), (0.75, 0.25), (0.75 + 1e-6, 0.125), (1.0, 0.0)):
        assert float(top_p_cut(probs, torch.tensor([[top_p]]))) == cut


def test_greedy_is_the_one_hot_law_of_the_processed_logits() -> None:
    logits = _logits(20, 300)
    law = _law(logits, SamplingParams())
    assert torch.equal(law, torch.nn.functional.one_hot(logits.argmax(-1), 300).float())
    # One token in spite of a tie, and never one that top-k or top-p alone would let in beside it.
    tied = torch.zeros(3, 8)
    assert _law(tied, SamplingParams()).sum(-1).tolist() == [1.0] * 3
    best = int(logits[0].argmax())
    banned = _law(logits[:1], SamplingParams(logit_bias={best: -math.inf}))
    assert int(banned.argmax()) == int(logits[0].topk(2).indices[1])
    assert _law(logits[:1], SamplingParams(repetition_penalty=1e3), [best]).argmax() != best


def _params_of_all_sorts() -> list[SamplingParams]:
    sorts = [SamplingParams(**{"temperature": 1.0, **params}) for params in (ALONE | TOGETHER).values()]
    random.Random(0).shuffle(sorts)
    return sorts


def _histories(count: int, vocab: int) -> tuple[list[list[int]], list[list[int]]]:
    rng = random.Random(1)
    draw = lambda most: [rng.randrange(vocab) for _ in range(rng.randint(0, most))]  # noqa: E731
    return [draw(12) for _ in range(count)], [draw(6) for _ in range(count)]


@pytest.mark.parametrize("scale", [3.0, 0.02], ids=["peaked", "flat"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_rows_do_not_notice_each_other(vocab: int, scale: float) -> None:
    params = _params_of_all_sorts()
    prompts, outputs = _histories(len(params), vocab)
    sampling = BatchSampling(params, prompts, outputs, vocab)
    rows = torch.tensor([*range(len(params)), 0, 5, 5])
    logits = _logits(len(rows), vocab, seed=9, scale=scale)
    together = sampling.probabilities(logits, rows)
    for r, b in enumerate(rows.tolist()):
        # To the bit: the same request must draw the same token beside anybody.
        alone = _law(logits[r : r + 1], params[b], prompts[b], outputs[b])[0]
        torch.testing.assert_close(together[r], alone, rtol=0, atol=0)


# Laws at tree nodes.


def _trees(vocab: int) -> TokenTree:
    return TokenTree.from_paths(
        [2, 7, 0, 4],
        [[[7, 7, 3], [7, 5], [1]], [], [[7, 2, 7, 2], [0, 0, 0]], [[9, 3], [3, 9], [3, 3]]],
        vocab,
    )


def _setting(params: Seq[SamplingParams], vocab: int = 12) -> tuple[Tensor, TokenTree, BatchSampling]:
    tree = _trees(vocab)
    prompts, outputs = [[1, 2], [7], [], [4, 4, 3]], [[2], [], [7, 0], [3, 9, 4]]
    logits = _logits(int(tree.num_nodes_B.sum()), vocab, seed=2)
    return logits, tree, BatchSampling(params, prompts, outputs, vocab)


SETTINGS = {
    "penalties": [SamplingParams(**EVERYTHING | {"top_k": 0, "top_p": 1.0, "min_p": 0.0})] * 4,
    "greedy": [SamplingParams()] * 4,
    "greedy-with-penalties": [SamplingParams(repetition_penalty=3.0, frequency_penalty=2.0)] * 4,
    "mixed": [
        SamplingParams(temperature=0.7, frequency_penalty=0.8),
        SamplingParams(presence_penalty=1.5, repetition_penalty=1.5),
        SamplingParams(**EVERYTHING),
        SamplingParams(temperature=1.0, top_p=0.8),
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETTINGS)
def test_laws_at_a_node_count_its_drafted_ancestors(name: str, dtype: torch.dtype) -> None:
    params = SETTINGS[name]
    logits, tree, sampling = _setting(params)
    prompts, outputs = [[1, 2], [7], [], [4, 4, 3]], [[2], [], [7, 0], [3, 9, 4]]
    laws = ModelLaws(logits, tree, sampling, dtype)
    assert isinstance(laws, TargetLaws)
    every, first = laws.all(), 0
    assert every.dtype == dtype and every.shape == (4, tree.max_nodes, 12)
    for b, count in enumerate(tree.num_nodes_B.tolist()):
        for node in range(count):
            # The same request had it committed the path already, its root a token of the history as before.
            path = [int(tree.tokens_BN[b, n]) for n in tree.path(node, b)[1:]]
            row = logits[first + node][None]
            committed = _law(row, params[b], prompts[b], [*outputs[b], *path], dtype)[0]
            torch.testing.assert_close(every[b, node], committed, rtol=0, atol=0)
            nodes = torch.zeros(4, dtype=torch.int64)
            nodes[b] = node
            torch.testing.assert_close(laws.at(nodes)[b], committed, rtol=0, atol=0)
        assert bool((every[b, count:] == 0).all())
        first += count


@pytest.mark.parametrize("name", SETTINGS)
def test_laws_asked_for_again_equal_fresh_ones(name: str) -> None:
    logits, tree, sampling = _setting(SETTINGS[name])
    laws, rng = ModelLaws(logits, tree, sampling), random.Random(2)
    nodes = torch.zeros(4, dtype=torch.int64)
    given: list[tuple[Tensor, Tensor]] = []
    for step in range(30):
        for b in range(4):
            if step == 10 or rng.random() < 0.4:
                nodes[b] = rng.randrange(int(tree.num_nodes_B[b]))
        got = laws.at(nodes)  # `nodes` changes in place afterwards, as a rule's cursor may
        torch.testing.assert_close(got, ModelLaws(logits, tree, sampling).at(nodes), rtol=0, atol=0)
        given.append((got, got.clone()))
    assert all(torch.equal(law, then) for law, then in given), "a law handed out earlier was overwritten"


def test_rows_are_computed_when_asked_for() -> None:
    logits, tree, sampling = _setting(SETTINGS["mixed"])
    asked: list[int] = []
    probabilities = sampling.probabilities

    def spy(logits_RV: Tensor, *args: Any) -> Tensor:
        asked.append(len(logits_RV))
        return probabilities(logits_RV, *args)

    sampling.probabilities = spy  # type: ignore[method-assign]
    laws = ModelLaws(logits, tree, sampling)
    for nodes in ([0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 2, 0]):
        laws.at(torch.tensor(nodes))
    assert asked == [4, 2, 1]


def test_bare_roots_have_laws() -> None:
    logits, params = _logits(3, 12), SamplingParams(temperature=1.0, frequency_penalty=0.5)
    sampling = BatchSampling([params] * 3, [[]] * 3, [[1], [2, 2], []], 12)
    laws = ModelLaws(logits, TokenTree.roots(torch.tensor([1, 2, 0])), sampling)
    expected = torch.stack(
        [_reference(row, params, [], out) for row, out in zip(logits, [[1], [2, 2], []], strict=True)]
    )
    torch.testing.assert_close(laws.at(torch.zeros(3, dtype=torch.int64)), expected)
    torch.testing.assert_close(laws.all()[:, 0], expected)


def test_drafted_paths_leave_out_the_root_and_other_branches() -> None:
    tree = _trees(12)
    rows, nodes = torch.tensor([0, 0, 2, 1]), torch.tensor([3, 0, 7, 0])
    paths = drafted_paths(tree, rows, nodes)
    assert [[token for token in path if token >= 0] for path in paths.tolist()] == [
        [7, 7, 3],
        [],
        [0, 0, 0],
        [],
    ]
    assert bool(tree.ancestors_BNN[:, 0, 0].all()), "the tree's own ancestors were written to"


# What is refused.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-0.1, math.inf, math.nan, 1e-40)],
        ("top_k", -1),
        *[("top_p", value) for value in (0.0, -0.5, 1.01, math.nan)],
        *[("min_p", value) for value in (-0.01, 1.01, math.nan)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, math.nan)],
        *[("presence_penalty", value) for value in (math.inf, math.nan)],
        *[("frequency_penalty", value) for value in (-math.inf, math.nan)],
        *[("logit_bias", value) for value in ({-1: 1.0}, {3: math.nan}, {3: math.inf})],
        *[("max_new_tokens", value) for value in (0, -5)],
        *[("stop", value) for value in ("", ("a", ""))],
        ("logprobs", -1),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})
    shown = (value,) if name == "stop" and isinstance(value, str) else value
    assert str(caught.value).startswith(f"{name}={shown!r} is out of range")


def test_bounds_themselves_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=1, logit_bias={0: -math.inf}, max_new_tokens=1, logprobs=0)
    assert SamplingParams(stop="end").stop == ("end",)


@pytest.mark.parametrize("token", [12, 999])
def test_bias_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=rf"token {token}; the vocabulary has 12"):
        BatchSampling([SamplingParams(), SamplingParams(logit_bias={11: 1.0, token: 1.0})], [[], []], [[], []], 12)


def test_seeds_are_kept_or_drawn() -> None:
    params = SamplingParams(seed=5)
    assert params.with_seed() == 5
    drawn = {replace(params, seed=None).with_seed() for _ in range(5)}
    assert len(drawn) == 5 and all(0 <= seed < 1 << 63 for seed in drawn)
    assert SamplingParams(seed=0).with_seed() == 0


# Log-probabilities.


def test_token_logprobs() -> None:
    logits = _logits(3, 20)
    expected = logits.log_softmax(-1)
    got = token_logprobs(logits, [4, 0, 19], 5)
    for row, (token, (value, best)) in enumerate(zip([4, 0, 19], got, strict=True)):
        assert value == float(expected[row, token])
        order = expected[row].argsort(descending=True)[:5].tolist()
        assert list(best) == order, "most likely first"
        assert list(best.values()) == [float(expected[row, token]) for token in order]
    assert [best for _, best in token_logprobs(logits, [1, 1, 1], 0)] == [{}] * 3
    assert [len(best) for _, best in token_logprobs(logits, [1, 1, 1], 50)] == [20] * 3


def test_confidences_are_float32_log_probabilities_over_the_last_axis() -> None:
    logits = _logits(6, 20).reshape(2, 3, 20)
    torch.testing.assert_close(
        log_confidence(logits.bfloat16()), logits.bfloat16().float().log_softmax(-1), rtol=0, atol=0
    )
