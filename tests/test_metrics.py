"""What requests and engines say of themselves: gaps between tokens, and how often drafts were right by depth."""

from __future__ import annotations

import pytest

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import SmallModelDrafter, chain
from specdec.metrics import EngineMetrics, RequestMetrics
from specdec.verifiers import Verifier


def test_gaps_of_a_request_are_spread_over_the_tokens_of_a_step() -> None:
    metrics = RequestMetrics(submit_s=0.5, emissions=[(1.0, 1), (2.0, 4), (2.5, 1)])
    # Four gaps of 0.25 and one of 0.5.
    found = (metrics.itl_p50_s, metrics.itl_p95_s, metrics.itl_p99_s)
    assert found == (0.25, pytest.approx(0.45), pytest.approx(0.49)) and metrics.ttft_s == 0.5


@pytest.mark.parametrize("emissions", [[], [(1.0, 3)]])
def test_without_a_second_emission_there_is_no_gap(emissions: list[tuple[float, int]]) -> None:
    metrics = RequestMetrics(emissions=emissions)
    assert (metrics.itl_p50_s, metrics.itl_p95_s, metrics.itl_p99_s) == (None, None, None)


def test_acceptance_is_of_the_trees_that_came_so_deep() -> None:
    metrics = RequestMetrics()
    assert metrics.acceptance_by_depth == []
    for depth, accepted in ((3, 2), (1, 1), (0, 0), (3, 0)):
        metrics.count_tree(depth, accepted, depth + 1)
    assert metrics.acceptance_by_depth == [2 / 3, 1 / 2, 0.0]


def test_an_engine_adds_up_its_requests_and_leaves_what_was_read_alone() -> None:
    shallow = RequestMetrics(drafted_by_depth=[2], accepted_by_depth=[1], num_new_tokens=3, num_target_forwards=2)
    deep = RequestMetrics(drafted_by_depth=[4, 2], accepted_by_depth=[2, 1], num_new_tokens=7, num_target_forwards=4)
    metrics = EngineMetrics(1)
    assert metrics.tau is None
    metrics.count_ended(shallow)
    read = metrics.drafted_by_depth
    metrics.count_ended(deep)
    assert (metrics.drafted_by_depth, metrics.accepted_by_depth) == ([6, 2], [3, 1])
    assert metrics.acceptance_by_depth == [0.5, 0.5] and metrics.tau == 10 / 6
    assert read == [2] == shallow.drafted_by_depth and deep.drafted_by_depth == [4, 2]


def test_only_requests_that_have_ended_count(tiny) -> None:  # type: ignore[no-untyped-def]
    target, draft = PagedModel(tiny(0)), PagedModel(tiny(0))
    engine = Engine(Verifier(target), SmallModelDrafter(draft), chain(3))
    handles = [engine.submit([5 + i, 6, 7], SamplingParams(max_new_tokens=9, ignore_eos=True)) for i in range(2)]
    for _ in range(2):
        engine.step()
    assert handles[0].metrics.drafted_by_depth and engine.metrics.drafted_by_depth == [] and engine.metrics.tau is None
    handles[0].cancel()
    assert engine.metrics.drafted_by_depth == handles[0].metrics.drafted_by_depth
    tokens = list(handles[1])
    one, other = (handle.metrics for handle in handles)
    assert len(tokens) == 9 and engine.is_idle
    pairs = zip(one.accepted_by_depth, other.accepted_by_depth, strict=True)
    # The draft model is the target itself.
    assert engine.metrics.accepted_by_depth == [a + b for a, b in pairs] == engine.metrics.drafted_by_depth
    assert engine.metrics.acceptance_by_depth == [1.0, 1.0, 1.0]
    assert engine.metrics.tau == (one.num_new_tokens + 9) / (one.num_target_forwards + other.num_target_forwards)
