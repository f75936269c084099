"""The statistics of emitted tokens: their false alarms, their power, and what they find in engines that are wrong."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import StopsAfter
from torch import Tensor

from specdec import Engine, PagedModel, SamplingParams
from specdec.certificates.alarms import false_alarms
from specdec.certificates.forcing import TeacherForcing
from specdec.certificates.real import Subject, run, text_sums
from specdec.certificates.scores import SCORES, ScoredLaws, uniforms
from specdec.certificates.statistics import (
    CHI_SQUARES,
    MARTINGALES,
    MIN_TOKENS,
    TESTS,
    Alternative,
    Outcome,
    Sums,
    evaluate,
)
from specdec.drafters import NGramDrafter, SmallModelDrafter, TopK, chain
from specdec.verifiers import Rejection, Verifier

PROMPTS = [[40, 41, 42, 43, 40, 41], [7, 8], [20, 30, 20, 30, 20]]
WARM = SamplingParams(temperature=1.0, seed=5, max_new_tokens=40)
SHAPED = SamplingParams(
    temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3, seed=6, max_new_tokens=40
)


@pytest.fixture(scope="module")
def target(tiny) -> PagedModel:
    return PagedModel(tiny(0), name="target")


@pytest.fixture(scope="module")
def draft(tiny) -> PagedModel:
    return PagedModel(tiny(0, noise=0.1), name="draft")


def rejection(target: PagedModel, draft: PagedModel, kind: str = "iid") -> Engine:
    return Engine(Verifier(target, Rejection()), SmallModelDrafter(draft), chain(4, kind), max_batch_size=32)


def failed(row: dict[str, object]) -> list[str]:
    return [test["name"] for test in row["tests"] if not test["passed"]]


# Synthetic laws: sharp, flat, long-tailed, and one with a cut.
def laws(size: int, count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([0.5, 1.0, 2.0, 3.0]).repeat(count // 4)[:, None]
    probs = (scales * torch.randn(count, size, generator=generator)).softmax(-1).double()
    return torch.where(probs < probs.topk(size // 2).values[:, -1:], 0, probs)


def scored(probs: Tensor) -> ScoredLaws:
    seen = torch.rand(probs.shape, generator=torch.Generator().manual_seed(2)) < 0.2
    return ScoredLaws(probs, torch.arange(len(probs)), seen)


def simulate(
    truth: ScoredLaws, drawn_from: Tensor, num_runs: int, num_tokens: int, level: float = 0.05
) -> list[list[Outcome]]:
    """Independent runs of texts of 50 tokens each, drawn from `drawn_from` and tested against `truth`."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(len(drawn_from), (num_runs, num_tokens), generator=generator)
    tokens = torch.empty_like(rows)
    cumulative = drawn_from.cumsum(-1)
    for row in range(len(drawn_from)):
        here = rows == row
        u = torch.rand(int(here.sum()), generator=generator, dtype=torch.float64) * cumulative[row, -1]
        tokens[here] = torch.searchsorted(cumulative[row], u, right=True)
    spread = torch.rand(rows.shape, generator=generator, dtype=torch.float64)
    outcomes = []
    for one, token, u in zip(rows, tokens, spread, strict=True):
        total = Sums.zero()
        for text in torch.arange(num_tokens).split(num_tokens // 2):
            total += Sums.of_text([truth.steps(one[text], token[text], u[text])], 0.5)
        outcomes.append(evaluate(total, level, Alternative(), 0.9, has_cut=True))
    return outcomes


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


@pytest.mark.parametrize(("size", "num_runs", "num_tokens"), [(97, 1500, 2000), (49152, 400, 4000)])
def test_false_alarms_come_as_often_as_stated(size: int, num_runs: int, num_tokens: int) -> None:
    truth = scored(laws(size))
    outcomes = simulate(truth, truth.laws_TV, num_runs, num_tokens)
    for i, name in enumerate(TESTS[:-1]):
        for level in (0.05, 0.01):
            rate = share([one[i].p_value < level for one in outcomes])
            # Four standard errors of a share that is as stated.
            allowed = 4 * (level * (1 - level) / num_runs) ** 0.5
            assert abs(rate - level) < allowed + (0.2 * level), (name, level, rate)
    # Bonferroni: any alarm at all, at a family level of 5 %.
    family = share([min(test.p_value for test in one) < 0.05 / len(TESTS) for one in outcomes])
    assert 0.005 < family < 0.05 + 4 * (0.05 / num_runs) ** 0.5


@pytest.mark.parametrize("kind", ["argmax", "temperature"])
def test_power_is_as_predicted(kind: str) -> None:
    truth = scored(laws(97))
    stated = Alternative(argmax=0.05, temperature=0.1)
    if kind == "argmax":
        wrong = torch.nn.functional.one_hot(truth.laws_TV.argmax(-1), 97) * 0.05 + truth.laws_TV * 0.95
    else:
        wrong = truth.laws_TV ** (1 / 1.1)
        wrong = wrong / wrong.sum(-1, keepdim=True)
    level, name = 0.001, "argmax" if kind == "argmax" else "log_prob"
    pilot = Sums.zero()
    rows = torch.arange(8).repeat(250)
    tokens = torch.multinomial(truth.laws_TV, 250, True, generator=torch.Generator().manual_seed(0)).T.flatten()
    pilot += Sums.of_text([truth.steps(rows, tokens, uniforms(1, range(2000)))], 0.5)
    (predicted,) = (one.tokens_needed[kind] for one in evaluate(pilot, level, stated, 0.9, True) if one.name == name)
    assert predicted is not None and predicted > 500
    predicted += predicted % 2
    found = simulate(truth, wrong, 300, predicted)
    rate = share([one[TESTS.index(name)].p_value < level for one in found])
    assert 0.8 < rate < 0.97, (predicted, rate)
    # A quarter of the tokens do not do: the prediction is no empty upper bound.
    fewer = simulate(truth, wrong, 300, predicted // 8 * 2)
    assert share([one[TESTS.index(name)].p_value < level for one in fewer]) < 0.4


def test_moments_are_those_of_the_law() -> None:
    probs = laws(11, 4)
    truth = scored(probs)
    every = torch.arange(11)
    for row in range(4):
        steps = truth.steps(torch.full((11,), row), every, torch.zeros(11).double())
        p = probs[row] / probs[row].sum()
        assert torch.allclose((p[:, None] * steps.increments_RF).sum(0), torch.zeros(len(SCORES)).double(), atol=1e-14)
        assert torch.allclose((p[:, None] * steps.increments_RF**2).sum(0), steps.variances_RF[0], atol=1e-14)
        for column in steps.pit_R2.T:
            # The intervals [F(x-), F(x-) + p(x)) tile [0, 1).
            order = column[p > 0].argsort()
            assert torch.allclose(column[p > 0][order], (p[p > 0][order].cumsum(0) - p[p > 0][order]), atol=1e-14)
        assert torch.equal(steps.impossible_R, p == 0)


def test_places_in_the_law_do_not_depend_on_how_they_are_found() -> None:
    truth = scored(laws(97).round(decimals=3))
    rows, tokens = torch.arange(8), torch.randint(97, (8,), generator=torch.Generator().manual_seed(7))
    spread = torch.rand(8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    one_each = truth.steps(rows, tokens, spread).pit_R2
    from_table = truth.steps(rows.repeat(2), tokens.repeat(2), spread.repeat(2)).pit_R2
    assert torch.allclose(one_each.repeat(2, 1), from_table, atol=1e-14)


def test_temperature_drift_is_the_derivative() -> None:
    truth = scored(laws(11, 4))
    wrong = truth.laws_TV ** (1 + 1e-6)
    wrong = wrong / wrong.sum(-1, keepdim=True)
    rows, tokens = (grid.flatten() for grid in torch.meshgrid(torch.arange(4), torch.arange(11), indexing="ij"))
    scores_TVF = truth.scores(rows, tokens).view(4, 11, -1)
    shift = (scores_TVF * (wrong - truth.laws_TV)[..., None]).sum(1) / 1e-6
    assert torch.allclose(shift, truth.temperature_drifts_TF, atol=1e-4)


def test_dependence_that_each_token_alone_hides_is_found() -> None:
    """Every token follows its law, yet copies the uniform number of the one before it half of the time."""
    truth = scored(laws(97))
    generator = torch.Generator().manual_seed(4)
    u = torch.rand(6000, generator=generator, dtype=torch.float64)
    for i in range(1, 6000, 2):
        if i % 4 == 1:
            u[i] = u[i - 1]
    order = truth.laws_TV.argsort(dim=-1, descending=True)
    rows = torch.randint(8, (6000,), generator=generator)
    cumulative = truth.laws_TV.gather(1, order).cumsum(-1)
    ranks = torch.searchsorted(cumulative[rows], u[:, None] * cumulative[rows, -1:], right=True)
    tokens = order[rows].gather(1, ranks).squeeze(1)
    spread = torch.rand(6000, generator=generator, dtype=torch.float64)
    total = Sums.of_text([truth.steps(rows, tokens, spread)], 0.5)
    bad = {one.name for one in evaluate(total, 1e-4, Alternative(), 0.9, True) if one.p_value < 1e-4}
    assert bad == {"pit_lag_1", "pit_pairs"}


def test_stopping_does_not_bias() -> None:
    """Texts end at a token of a third of the mass: most have odd lengths, and every statistic stays calm."""
    probs = laws(97)[:1]
    probs = torch.cat([probs[:, :96] * 2 / 3 / probs[:, :96].sum(), torch.tensor([[1 / 3]])], 1)
    truth = scored(probs)
    tokens = torch.multinomial(probs[0], 20000, True, generator=torch.Generator().manual_seed(0))
    ends = [0, *((tokens == 96).nonzero().squeeze(1) + 1).tolist()]
    total = Sums.zero()
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        spread = uniforms(100 + i, range(b - a + 1))
        steps = truth.steps(torch.zeros(b - a, dtype=torch.int64), tokens[a:b], spread[:-1])
        total += Sums.of_text([steps], float(spread[-1]))
    assert all(one.p_value > 1e-3 for one in evaluate(total, 1e-3, Alternative(), 0.9, True))


@pytest.mark.parametrize("has_cut", [True, False])
def test_impossible_tokens_fail(has_cut: bool) -> None:
    sums = replace(Sums.zero(), num_tokens=5000, num_impossible=5, bins_2K=torch.ones(2, 20), pairs_GG=torch.ones(8, 8))
    assert evaluate(sums, 1e-4, Alternative(), 0.9, has_cut)[-1].p_value < 1e-7


def test_sums_survive_json() -> None:
    truth = scored(laws(97))
    rows = torch.arange(8).repeat(5)
    sums = Sums.of_text([truth.steps(rows, rows * 3, uniforms(1, range(40)))], 0.25)
    again = Sums.from_json(json.loads(json.dumps(sums.to_json())))
    assert again.to_json() == sums.to_json()
    assert again.pairs_GG.sum() == 20 and again.bins_2K.sum() == 80


@pytest.mark.parametrize("params", [WARM, SHAPED], ids=["warm", "shaped"])
def test_forced_laws_are_those_that_decoding_draws_from(target, params: SamplingParams) -> None:
    """Redrawing every token from its forced law with the request's own noise gives the text back."""
    from specdec.noise import CounterNoise, PositionKey

    for result in Engine(Verifier(target)).generate(PROMPTS, params):
        start = len(result.prompt_token_ids)
        redrawn = []
        for first, _, laws_TV in TeacherForcing(target, chunk=7, prefill_chunk=2).laws(
            result.prompt_token_ids, result.token_ids, params
        ):
            rows = torch.arange(len(laws_TV))
            noise = CounterNoise([result.seed] * len(rows), [0] * len(rows), (start - 1 + first + rows).tolist())
            redrawn += noise.categorical(laws_TV, PositionKey(0), rows).tolist()
        assert redrawn == result.token_ids


def test_sums_do_not_depend_on_the_chunk(target) -> None:
    (result,) = Engine(Verifier(target)).generate(PROMPTS[:1], replace(SHAPED, ignore_eos=True))
    sums = [
        text_sums(TeacherForcing(target, chunk), PROMPTS[0], result.token_ids, SHAPED, 1, torch.float64)
        for chunk in (1, 7, 64)
    ]
    for one in sums[1:]:
        assert one.num_tokens == sums[0].num_tokens == 40
        for name in ("increments_F", "variances_F"):
            torch.testing.assert_close(getattr(one, name), getattr(sums[0], name), rtol=1e-4, atol=1e-4)


def test_exact_engines_pass(target, draft, tmp_path: Path) -> None:
    subjects = [
        Subject(Engine(Verifier(target), max_batch_size=32), {"drafter": "plain"}),
        Subject(rejection(target, draft), {"drafter": "small_model", "rule": "rejection"}),
        Subject(Engine(Verifier(target), NGramDrafter(), TopK(8, 4, 2), max_batch_size=32), {"drafter": "ngram"}),
    ]
    rows = run(target, subjects, PROMPTS, [WARM, SHAPED], 3000, tmp_path)
    assert [row["drafter"] for row in rows] == ["plain"] * 2 + ["small_model"] * 2 + ["ngram"] * 2
    for row in rows:
        assert row["passed"], failed(row)
        assert row["num_tokens"] >= 3000 and row["threshold"] == 1e-3 / (6 * len(TESTS))
        assert [test["name"] for test in row["tests"]] == [*MARTINGALES, *CHI_SQUARES, "impossible"]
    assert rows[1]["repetition_penalty"] == 1.2 and "top_k" not in rows[0]
    json.dumps(rows)


class WrongParams(Engine):
    """Generates with other sampling parameters than it was asked for."""

    change: dict[str, float]

    def generate(self, prompts, params=None, *, chat=False):  # type: ignore[no-untyped-def]
        return super().generate(prompts, [replace(one, **self.change) for one in params], chat=chat)


@pytest.mark.parametrize(
    ("change", "params"),
    [
        ({"repetition_penalty": 1.0}, SHAPED),
        ({"presence_penalty": 0.0}, SHAPED),
        ({"top_k": 60, "top_p": 1.0}, SHAPED),
        ({"logit_bias": {11: 2.5}}, WARM),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_sampling_is_found(target, tmp_path: Path, change: dict, params: SamplingParams) -> None:
    engine = WrongParams(Verifier(target), max_batch_size=32)
    engine.change = change
    (row,) = run(target, [Subject(engine, {})], PROMPTS, [params], 6000, tmp_path)
    assert not row["passed"]


def test_a_law_that_leaves_no_chance_is_tested_too(target, tmp_path: Path) -> None:
    sure = replace(WARM, top_k=1)
    right, wrong = Engine(Verifier(target), max_batch_size=32), WrongParams(Verifier(target), max_batch_size=32)
    wrong.change = {"top_k": 0}
    subjects = [Subject(right, {"name": "right"}), Subject(wrong, {"name": "wrong"})]
    rows = run(target, subjects, PROMPTS, [sure], MIN_TOKENS, tmp_path)
    assert [row["passed"] for row in rows] == [True, False] and rows[1]["num_impossible"] > 100
    json.dumps(rows, allow_nan=False)


def test_a_temperature_off_by_3_percent_is_found_with_the_predicted_tokens(target, tmp_path: Path) -> None:
    plain = Subject(Engine(Verifier(target), max_batch_size=32), {"name": "plain"})
    (pilot,) = run(target, [plain], PROMPTS, [WARM], MIN_TOKENS, tmp_path, power=0.99)
    assert pilot["passed"] and pilot["alternative"]["temperature"] == 0.03
    engine = WrongParams(Verifier(target), max_batch_size=64)
    engine.change = {"temperature": 1.03}
    (row,) = run(
        target, [Subject(engine, {"name": "wrong"})], PROMPTS, [WARM], pilot["tokens_needed"]["temperature"], tmp_path
    )
    assert "log_prob" in failed(row)


def test_a_rejected_token_drawn_again_from_p_is_found(target, draft, tmp_path: Path) -> None:
    with patch("specdec.verifiers.rejection._residual", lambda target_RV, draft_RV: target_RV):
        (row,) = run(target, [Subject(rejection(target, draft), {})], PROMPTS, [WARM], 6000, tmp_path)
    assert not row["passed"]
    (right,) = run(target, [Subject(rejection(target, draft), {"right": True})], PROMPTS, [WARM], 6000, tmp_path)
    assert right["passed"], failed(right)


def test_resumed_equals_uninterrupted(target, draft, tmp_path: Path) -> None:
    def subject(batches: int) -> Subject:
        one = StopsAfter(Verifier(target, Rejection()), SmallModelDrafter(draft), chain(3, "iid"), max_batch_size=16)
        one.batches = batches
        return Subject(one, {"name": "rejection"})

    whole = run(target, [subject(100)], PROMPTS, [WARM], 2500, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(target, [subject(2)], PROMPTS, [WARM], 2500, tmp_path / "parts")
    file = tmp_path / "parts" / "emitted.jsonl"
    assert len(file.read_text().splitlines()) == 2
    # The process died while it wrote.
    file.write_text(file.read_text()[:-100])
    assert run(target, [subject(100)], PROMPTS, [WARM], 2500, tmp_path / "parts") == whole
    # Nothing is generated again, and more tokens go on from there.
    assert run(target, [subject(0)], PROMPTS, [WARM], 2500, tmp_path / "parts") == whole
    (more,) = run(target, [subject(100)], PROMPTS, [WARM], 3500, tmp_path / "parts")
    assert more["num_tokens"] >= 3500 and len(more["revisions"]) == 1
    # Batches that other code has made are told.
    file.write_text(re.sub(r'"revision": "[^"]*"', '"revision": "before"', file.read_text(), count=1))
    (mixed,) = run(target, [subject(0)], PROMPTS, [WARM], 2500, tmp_path / "parts")
    assert set(mixed["revisions"]) == {"before", *more["revisions"]}


def test_what_cannot_be_tested_is_refused(target, tmp_path: Path) -> None:
    subject = Subject(Engine(Verifier(target)), {})
    for params, tokens, subjects, message in [
        (SamplingParams(seed=1), 5000, [subject], "temperature 0"),
        (SamplingParams(temperature=1.0), 5000, [subject], "seed"),
        (WARM, 10, [subject], "at least"),
        (WARM, 5000, [subject, subject], "same labels"),
        (WARM, 5000, [], "at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(target, subjects, PROMPTS, [params], tokens, tmp_path)


def test_false_alarms_on_plain_decoding_are_counted(target, draft, tmp_path: Path) -> None:
    subjects = [
        Subject(Engine(Verifier(target), max_batch_size=32), {"drafter": "plain"}),
        Subject(rejection(target, draft), {"drafter": "small_model"}),
    ]
    plain, drafted = run(target, subjects, PROMPTS, [WARM], 2 * MIN_TOKENS, tmp_path)
    assert "false_alarms" not in drafted and plain["passed"] and plain["smallest_p"] > plain["threshold"]
    found = plain["false_alarms"]
    assert found["passed"] and found["num_groups"] * found["group_tokens"] <= plain["num_tokens"]
    assert [level["nominal"] for level in found["levels"]] == [0.05, 0.01]
    json.dumps(plain, allow_nan=False)


def test_false_alarms_come_as_often_as_stated_and_an_excess_fails() -> None:
    truth = scored(laws(97))

    def batches(drawn_from: Tensor) -> list[Sums]:
        generator = torch.Generator().manual_seed(5)
        sums = []
        for number in range(300):
            rows = torch.randint(8, (MIN_TOKENS,), generator=generator)
            tokens = torch.multinomial(drawn_from[rows], 1, generator=generator)[:, 0]
            sums.append(Sums.of_text([truth.steps(rows, tokens, uniforms(number, range(MIN_TOKENS)))], 0.5))
        return sums

    right = false_alarms(batches(truth.laws_TV), True, 1e-3)
    assert right["passed"] and (right["num_groups"], right["group_tokens"]) == (300, MIN_TOKENS)
    for level in right["levels"]:
        family = level["any_test"]
        assert family["low"] <= family["rate"] <= family["high"] and family["low"] <= level["nominal"]
        # Two standard errors of one test's rate; the mean over the tests is nearer.
        nominal = level["nominal"]
        assert abs(level["mean_of_tests"] - nominal) < 2 * (nominal * (1 - nominal) / 300) ** 0.5
    sharper = truth.laws_TV**1.05
    assert not false_alarms(batches(sharper / sharper.sum(-1, keepdim=True)), True, 1e-3)["passed"]
