"""The numerics referee: rounding is told from faults, and no fault hides behind rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import StopsAfter

from specdec import Engine, PagedModel, SamplingParams
from specdec.certificates.forcing import TeacherForcing
from specdec.certificates.real import Subject
from specdec.certificates.referee import referee, upcast
from specdec.drafters import NGramDrafter, SmallModelDrafter, Static, TopK, chain
from specdec.loading import embedded_model_path
from specdec.packing import can_pack
from specdec.sampling import ModelLaws
from specdec.verifiers import Rejection, Verifier

PROMPTS = [[40 + i, 41, 42, 43, 40 + i, 41, 30 - i] for i in range(8)]
GREEDY = SamplingParams(max_new_tokens=48, seed=3, ignore_eos=True)
PENALISED = replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.2, logit_bias={5: -float("inf"), 6: 1.0})
WARM = replace(GREEDY, temperature=0.9)
NUCLEUS = replace(GREEDY, temperature=1.1, top_p=0.9, top_k=50)
SAMPLING = {"greedy": GREEDY, "penalised": PENALISED, "warm": WARM, "nucleus": NUCLEUS}


def model(tiny, dtype: torch.dtype, **options: object) -> PagedModel:
    return PagedModel(tiny(0, **options).to(dtype), name="target")


def subjects(target: PagedModel, tiny, **options: object) -> list[Subject]:
    draft = PagedModel(tiny(0, noise=0.05, **options).to(target.dtype), name="draft")
    return [
        Subject(Engine(Verifier(target), NGramDrafter(), TopK(8, 4, 2)), {"drafter": "ngram"}),
        Subject(Engine(Verifier(target), SmallModelDrafter(draft), Static([[0], [1], [0, 0], [0, 1]])), {"tree": True}),
    ]


def plain(target: PagedModel, batch: int = 1) -> Subject:
    return Subject(Engine(Verifier(target), max_batch_size=batch), {})


@pytest.mark.parametrize("params", SAMPLING.values(), ids=SAMPLING)
def test_float32_does_not_diverge(tiny, params: SamplingParams) -> None:
    target = model(tiny, torch.float32)
    for row in referee(target, upcast(target, torch.float64), plain(target), subjects(target, tiny), PROMPTS, params):
        assert row["passed"] and row["near_ties"] == row["true_divergences"] == 0 and not row["divergences"]
        assert row["num_prompts_equal"] == row["num_prompts"] == 8 and row["num_tokens"] == 8 * 48
        assert row["noise_rms"] < 1e-4 and row["differs_from_referee_per_10k"] < 30


@pytest.mark.parametrize("params", SAMPLING.values(), ids=SAMPLING)
def test_bfloat16_diverges_at_near_ties_only(tiny, params: SamplingParams) -> None:
    # A flat law has many ties; the wider the layers, the more their sums depend on the shape.
    size = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 499}
    target = model(tiny, torch.bfloat16, **size)
    judge = upcast(target)
    assert torch.equal(next(judge.model.parameters()), next(target.model.parameters()).float())
    prompts = PROMPTS[:6]
    rows = referee(target, judge, plain(target, 6), subjects(target, tiny, **size), prompts, params)
    for row in rows:
        assert row["passed"], [place for place in row["divergences"] if not place["near_tie"]]
        assert row["dtype"] == "bfloat16" and row["referee_dtype"] == "float32"
        assert row["noise_rms"] > 1e-4
        firsts = {place["prompt"] for place in row["divergences"] if place["is_first"]}
        assert len(firsts) == row["num_prompts"] - row["num_prompts_equal"]
        json.dumps(row, allow_nan=False)
    # Rounding alone does change tokens: what is judged here is there.
    assert any(row["differs_from_referee_per_10k"] > 0 for row in rows)


class BlindToDraftedTokens(ModelLaws):
    """Penalties with the root's history at every node."""

    def _laws(self, rows_R, nodes_R):  # type: ignore[no-untyped-def]
        return self.sampling.probabilities(self.logits_TV[self.first_B[rows_R] + nodes_R], rows_R, None, self.dtype)


class ShiftedPositions(PagedModel):
    """Every drafted node one position too far."""

    def forward(self, segments, cache, wanted_rows=None, hidden_layers=()):  # type: ignore[no-untyped-def]
        wrong = [
            segment if segment.tail_mask_QM is None else replace(segment, positions_Q=segment.positions_Q + 1)
            for segment in segments
        ]
        return super().forward(wrong, cache, wanted_rows, hidden_layers)


class OtherKeys(Engine):
    """Other random numbers than plain decoding's."""

    def generate(self, prompts, params=None, *, chat=False):  # type: ignore[no-untyped-def]
        return super().generate(prompts, [replace(one, seed=one.seed + 1) for one in params], chat=chat)


class GoesOn(Engine):
    """One token more than was asked for."""

    def generate(self, prompts, params=None, *, chat=False):  # type: ignore[no-untyped-def]
        longer = [replace(one, max_new_tokens=one.max_new_tokens + 1) for one in params]
        return super().generate(prompts, longer, chat=chat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["penalties", "positions", "keys", "length"])
def test_faults_are_true_divergences(tiny, fault: str, dtype: torch.dtype) -> None:
    target = model(tiny, dtype)
    draft = PagedModel(tiny(0, noise=0.05).to(dtype), name="draft")
    drafted = (SmallModelDrafter(draft), chain(4))
    if fault == "positions":
        engine = Engine(Verifier(ShiftedPositions(tiny(0).to(dtype), name="wrong")), *drafted)
    elif fault == "length":
        engine = GoesOn(Verifier(target), *drafted)
    else:
        engine = (OtherKeys if fault == "keys" else Engine)(Verifier(target), *drafted)
    # A favoured token that its own count drives out again: drafted twice in a row, history decides.
    favoured = replace(GREEDY, frequency_penalty=2.0, logit_bias={7: 8.0, 9: 8.0})
    params = {"penalties": favoured, "keys": WARM}.get(fault, GREEDY)
    wrong = BlindToDraftedTokens if fault == "penalties" else ModelLaws
    judge = upcast(target, torch.float64)
    with patch("specdec.verifiers.verifier.ModelLaws", wrong):
        (row,) = referee(target, judge, plain(target), [Subject(engine, {})], PROMPTS, params)
    assert not row["passed"] and row["true_divergences"] >= 1
    assert row["num_prompts_equal"] < row["num_prompts"]
    if fault == "length":
        assert all(place["token"] is None for place in row["divergences"] if not place["near_tie"])
    # The same engine without the fault passes, with the same judge.
    right = Engine(Verifier(target), SmallModelDrafter(draft), chain(4))
    (row,) = referee(target, judge, plain(target), [Subject(right, {})], PROMPTS, params)
    assert row["passed"], row["divergences"]


def test_counting_goes_on_behind_the_first_divergence(tiny) -> None:
    """A text that is wrong everywhere is counted everywhere, on its own prefix."""
    target = model(tiny, torch.float32)

    class Wrong(Engine):
        def generate(self, prompts, params=None, *, chat=False):  # type: ignore[no-untyped-def]
            return super().generate(prompts, [replace(one, logit_bias={9: 50.0}) for one in params], chat=chat)

    engine = Wrong(Verifier(target))
    (row,) = referee(target, upcast(target, torch.float64), plain(target), [Subject(engine, {})], PROMPTS, GREEDY)
    right = [result.token_ids for result in engine.generate(PROMPTS, [GREEDY] * 8)]
    forcing, expected = TeacherForcing(target, 1), 0
    for prompt, text in zip(PROMPTS, right, strict=True):
        assert text == [9] * 48
        expected += sum(int(logits.argmax()) != 9 for logits in forcing.logits([*prompt, *text], len(prompt)))
    assert row["true_divergences"] == expected > 100


def test_what_cannot_be_judged_is_refused(tiny) -> None:
    target = model(tiny, torch.float32)
    with pytest.raises(ValueError, match="seed"):
        referee(
            target, upcast(target, torch.float64), plain(target), [], PROMPTS, replace(GREEDY, seed=None), work_dir="."
        )
    with pytest.raises(ValueError, match="wider"):
        referee(target, target, plain(target), [], PROMPTS, GREEDY)
    draft = PagedModel(tiny(1), name="draft")
    one = Subject(Engine(Verifier(target, Rejection()), SmallModelDrafter(draft), chain(2, "iid")), {})
    with pytest.raises(ValueError, match="draws otherwise"):
        referee(target, upcast(target, torch.float64), plain(target), [one], PROMPTS, WARM)
    (row,) = referee(target, upcast(target, torch.float64), plain(target), [one], PROMPTS, GREEDY)
    assert row["passed"]


def test_a_packed_target_is_judged_by_an_unpacked_copy(tiny) -> None:
    size = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 199}
    target, judge = model(tiny, torch.bfloat16, **size), upcast(model(tiny, torch.bfloat16, **size))
    target.pack()
    (row,) = referee(target, judge, plain(target), subjects(target, tiny, **size)[:1], PROMPTS[:3], GREEDY)
    assert row["passed"], row["divergences"]
    assert row["packed"] == can_pack(target.device, target.dtype) and row["noise_rms"] > 1e-4


def test_resumed_equals_uninterrupted(tiny, tmp_path: Path) -> None:
    target = model(tiny, torch.bfloat16)
    judge, short = upcast(target), replace(NUCLEUS, max_new_tokens=16)

    def judged(folder: str, batches: int, count: int = 8) -> list[dict[str, object]]:
        plainly, drafted = (
            StopsAfter(Verifier(target), max_batch_size=3),
            StopsAfter(Verifier(target), NGramDrafter(), TopK(8, 4, 2), max_batch_size=2),
        )
        drafted.batches, plainly.batches = batches, 3 if batches else 0
        prompts, folder = PROMPTS[:count], tmp_path / folder
        return referee(target, judge, Subject(plainly, {}), [Subject(drafted, {})], prompts, short, work_dir=folder)

    whole = judged("whole", 4)
    with pytest.raises(KeyboardInterrupt):
        judged("parts", 2)
    # The process died while it wrote.
    file = tmp_path / "parts" / "judged.jsonl"
    file.write_text(file.read_text()[:-100])
    assert judged("parts", 4) == whole
    # Nothing is generated again, and a start with fewer prompts is no loss.
    assert judged("parts", 0) == whole
    judged("more", 3, count=6)
    assert judged("more", 1) == whole


@pytest.mark.real_model
def test_smollm2_in_bfloat16_diverges_at_near_ties_only() -> None:
    try:
        path = embedded_model_path()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    target = PagedModel.load(path, dtype="bfloat16", packed=False)
    packed = PagedModel.load(path, dtype="bfloat16")
    if any(type(module).__name__ == "PackedLinear" for module in packed.model.modules()):
        with pytest.raises(ValueError, match="packed=False"):
            upcast(packed)
    engine = Engine(Verifier(target), NGramDrafter(), TopK(8, 4, 2))
    texts = ["Count from one to ten, twice: one two three four five six seven eight nine ten. one two", "The sky is"]
    prompts = [target.tokenizer(text)["input_ids"] for text in texts]
    params = SamplingParams(max_new_tokens=24, seed=1)
    (row,) = referee(target, upcast(target), plain(target), [Subject(engine, {})], prompts, params)
    assert row["passed"], row["divergences"]
    assert 1e-3 < row["noise_rms"] < 1
