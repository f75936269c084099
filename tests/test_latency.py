"""Percentiles and gaps between tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.latency import Latency, inter_token_gaps, latency, percentile


@dataclass
class Timed:
    ttft_s: float = 0.0
    emissions: list[tuple[float, int]] = field(default_factory=list)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_a_percentile_of_nothing_or_beyond_is_refused(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 6)), min_size=1, max_size=20))
def test_gaps_sum_up_to_the_time_and_count_the_tokens(steps: list[tuple[float, int]]) -> None:
    time, emissions = 0.0, []
    for wait, count in steps:
        time += wait
        emissions.append((time, count))
    gaps = inter_token_gaps(emissions)
    assert len(gaps) == sum(count for _, count in steps[1:])
    assert sum(gaps) == pytest.approx(time - emissions[0][0])


def test_tokens_of_one_step_share_its_gap() -> None:
    assert inter_token_gaps([(1.0, 1), (2.0, 4), (2.5, 1)]) == [0.25, 0.25, 0.25, 0.25, 0.5]
    assert inter_token_gaps([]) == inter_token_gaps([(3.0, 2)]) == []
    with pytest.raises(ValueError, match="backwards"):
        inter_token_gaps([(1.0, 1), (0.5, 1)])


def test_latency_goes_over_requests_and_over_tokens() -> None:
    fast = Timed(1.0, [(1.0, 1), (2.0, 2)])
    slow = Timed(3.0, [(3.0, 1), (5.0, 1)])
    found = latency([fast, slow, Timed()])
    assert found == Latency(2.0, pytest.approx(2.9), 0.5, pytest.approx(1.85), pytest.approx(1.97))
    assert latency([Timed(4.0, [(4.0, 1)])]) == Latency(4.0, 4.0, None, None, None)
    assert latency([]) == Latency(None, None, None, None, None)
