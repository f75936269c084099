"""What is learnt of a single request: little where requests hardly differ, enough where they do."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.acceptance_stats import CONFIDENT, Offset, shifted_one


def promised(variance: float, log_odds: float, num_requests: int = 60, num_drafts: int = 30) -> tuple[list, list]:
    """Drafts of requests that are right with these log-odds, where all requests together are known to be right half of the
    time: what was promised of each draft, and whether it was right."""
    generator, promises, hits = np.random.default_rng(0), [], []
    for _ in range(num_requests):
        offset = Offset(variance)
        for _ in range(num_drafts):
            promise = shifted_one(0.5, offset.value)
            is_hit = bool(generator.random() < shifted_one(0.5, log_odds))
            offset.observe(is_hit - promise)
            promises.append(promise)
            hits.append(is_hit)
    return promises, hits


def test_luck_is_not_taken_for_merit() -> None:
    """Whatever is verified is chosen by what was promised of it, so a promise that luck has raised is paid for each time."""
    excess = {}
    for variance in (CONFIDENT, 1.0):
        promises, hits = (np.array(one) for one in promised(variance, 0.0))
        chosen = promises > 0.55
        excess[variance] = chosen.mean() * (promises[chosen] - hits[chosen]).mean()
    assert 0 <= 4 * excess[CONFIDENT] < excess[1.0]


@pytest.mark.parametrize("log_odds", [-2.0, 2.0])
def test_a_request_that_does_differ_is_told_from_the_others(log_odds: float) -> None:
    promises, _ = promised(CONFIDENT, log_odds, num_drafts=120)
    last = np.array(promises).reshape(60, 120)[:, -1].mean()
    assert (last - 0.5) / (shifted_one(0.5, log_odds) - 0.5) > 0.6
