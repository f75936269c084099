"""The bias of lossy rules on text: exact where enumeration gives the true value, and refused where nothing is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import StopsAfter

from specdec import Engine, PagedModel, SamplingParams
from specdec.certificates.bias import _texts, bias
from specdec.certificates.processes import engine_laws, toy_engine
from specdec.certificates.real import Subject
from specdec.certificates.worlds import World
from specdec.drafters import Coupled, NGramDrafter, SmallModelDrafter, Static, TopK, chain
from specdec.drafters.growth import GrowingPolicy
from specdec.verifiers import Follow, Threshold, Typical, Verifier

WORLD = World.tree(3, 7).select("close", "independent", "zeros")
PARAMS = SamplingParams(temperature=1.0, seed=4, max_new_tokens=4, stop_token_ids=(2,))
PROMPTS = [[0], [1, 1], [2, 0]]
BUSH = Static([[0], [1], [0, 0], [0, 0, 0]])


def divergence(
    rule: Threshold | Typical, policy: GrowingPolicy
) -> tuple[float, dict[tuple[int, tuple[int, ...]], float]]:
    """KL of whole texts, in nats per token of the emitted law, over all prompts; and per prompt and text its log-ratio."""
    laws = engine_laws(WORLD, rule, policy, [(prompt,) for prompt in PROMPTS], PARAMS)
    ratios, kl, length = {}, 0.0, 0.0
    for number, (prompt, law) in enumerate(zip(PROMPTS, laws, strict=True)):
        wanted = WORLD.stopped_law(prompt[0], WORLD.walk(prompt[1:]), 4, {2})
        for ((tokens, _),), prob in law.items():
            ratios[number, tokens] = math.log(prob / wanted[tokens])
            kl += prob * ratios[number, tokens]
            length += prob * len(tokens)
    return kl / length, ratios


@pytest.mark.parametrize("rule", [Threshold(0.2), Typical(0.3, 0.6)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("policy", [chain(2), BUSH], ids=["chain", "bush"])
def test_bias_of_fixed_trees_is_that_of_the_enumerated_law(rule, policy, tmp_path: Path) -> None:
    true_kl, ratios = divergence(rule, policy)
    assert true_kl > 0.02
    engine = toy_engine(WORLD, rule, policy)
    engine.max_batch_size = 300
    for text, result in zip(_texts(engine, PROMPTS, PARAMS, "key", 0), _results(engine), strict=True):
        # Not only on average: what a text costs is its own log-ratio of emitted and target law.
        assert text["kl"] == pytest.approx(ratios[text["prompt"], tuple(result.token_ids)], abs=1e-5)
    (row,) = bias([Subject(engine, {"rule": rule.name})], PROMPTS, [PARAMS], 6000, tmp_path)
    assert row["estimate"] == "exact" and row["num_tokens"] >= 6000 and row["num_prompts"] == 3
    # Texts of one prompt are many here, so what is left of chance is far below the spread between prompts.
    assert row["kl_per_1k"] == pytest.approx(1e3 * true_kl, rel=0.05)
    assert 0 < row["total_variation_per_token"] < row["accepted_share"] < 1


def _results(engine: Engine):  # type: ignore[no-untyped-def]
    from specdec.certificates.kept import derived_seed

    each = [replace(PARAMS, seed=derived_seed("key", index, "request")) for index in range(300)]
    return engine.generate([PROMPTS[index % 3] for index in range(300)], each)


@pytest.mark.parametrize("policy", [chain(2, "iid"), Coupled(4, 2, 2)], ids=["iid", "coupled"])
def test_drawn_trees_give_an_upper_bound(policy, tmp_path: Path) -> None:
    rule = Threshold(0.2)
    true_kl, _ = divergence(rule, policy)
    engine = toy_engine(WORLD, rule, policy)
    engine.max_batch_size = 300
    (row,) = bias([Subject(engine, {})], PROMPTS, [PARAMS], 6000, tmp_path)
    assert row["estimate"] == "upper bound" and row["kl_per_1k"] > 1e3 * true_kl > 5


def test_standard_errors_are_those_of_independent_prompts(tiny, tmp_path: Path) -> None:
    """Over many runs, each with prompts of its own, estimates scatter as their standard errors say."""
    target = PagedModel(tiny(0), name="target")
    engine = Engine(Verifier(target, Threshold(0.05), True), NGramDrafter(), TopK(6, 3, 2), max_batch_size=16)
    params = SamplingParams(temperature=0.7, seed=1, max_new_tokens=12)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for run in range(16):
        prompts = torch.randint(3, 30, (16, 8), generator=generator).tolist()
        rows += bias([Subject(engine, {"run": run})], prompts, [params], 16, tmp_path)
    means = torch.tensor([row["kl_per_1k"] for row in rows])
    typical = torch.tensor([row["kl_per_1k_stderr"] for row in rows]).square().mean().sqrt()
    assert 0.5 < means.std() / typical < 2


def test_resumed_equals_uninterrupted(tiny, tmp_path: Path) -> None:
    target, draft = PagedModel(tiny(0), name="target"), PagedModel(tiny(0, noise=0.1), name="draft")
    params = SamplingParams(temperature=0.9, seed=1, max_new_tokens=12)
    prompts = [[5, 6, 7], [8, 9]]

    def subject(batches: int) -> Subject:
        one = StopsAfter(Verifier(target, Typical(), True), SmallModelDrafter(draft), chain(3), max_batch_size=4)
        one.batches = batches
        return Subject(one, {"name": "typical"})

    whole = bias([subject(100)], prompts, [params], 120, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        bias([subject(2)], prompts, [params], 120, tmp_path / "parts")
    assert bias([subject(100)], prompts, [params], 120, tmp_path / "parts") == whole
    assert bias([subject(0)], prompts, [params], 120, tmp_path / "parts") == whole
    # The rule is its own again.
    one = subject(1).engine
    _texts(one, prompts, params, "key", 0)
    assert isinstance(one.verifier.rule, Typical)


def test_what_cannot_be_measured_is_refused(tiny, tmp_path: Path) -> None:
    target = PagedModel(tiny(0), name="target")
    lossless = Subject(Engine(Verifier(target, Follow()), NGramDrafter(), TopK(4, 2, 2)), {})
    lossy = Subject(Engine(Verifier(target, Typical(), True), NGramDrafter(), TopK(4, 2, 2)), {})
    with pytest.raises(ValueError, match="rule follow"):
        bias([lossless], PROMPTS, [PARAMS], 10, tmp_path)
    for params in (replace(PARAMS, temperature=0.0), replace(PARAMS, seed=None)):
        with pytest.raises(ValueError, match="temperature > 0"):
            bias([lossy], PROMPTS, [params], 10, tmp_path)
