"""How often the tests of `statistics.py` raise a false alarm: counted on many independent parts of a text known to be right."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from scipy import stats

from specdec.certificates.statistics import CHI_SQUARES, MARTINGALES, MIN_TOKENS, TESTS, Alternative, Sums, evaluate

LEVELS = (0.05, 0.01)
# More parts than this tell the rate little better than longer parts make each of them alike to a real run.
MAX_GROUPS = 500
# The count of impossible tokens is 0 unless something is wrong, so it has no rate to compare with a level.
CONTINUOUS = (*MARTINGALES, *CHI_SQUARES)


def false_alarms(batches: Seq[Sums], has_cut: bool, alpha: float) -> dict[str, Any]:
    """The share of groups of batches that the tests flag at nominal levels, with 95 % intervals (Clopper and Pearson 1934).

    Batches in their order form groups of at least `group_tokens` tokens; what is left over at the end is not used. Groups
    are independent, so the count of `any_test` (each test held to the level over the number of tests, as in a row) and that
    of every single test are binomial. The tests of one group are not independent of one another: `mean_of_tests` is their
    mean rate, without an interval. `passed` is false where `any_test` alarms oftener than its level by more than chance,
    one-sided at `alpha` over the number of levels.
    """
    total = sum(one.num_tokens for one in batches)
    group_tokens = max(MIN_TOKENS, -(-total // MAX_GROUPS))
    groups, current = list[Sums](), Sums.zero()
    for one in batches:
        current += one
        if current.num_tokens >= group_tokens:
            groups.append(current)
            current = Sums.zero()
    found = [evaluate(group, 1.0, Alternative(), 0.5, has_cut) for group in groups]
    smallest = [min(test.p_value for test in outcomes) for outcomes in found]
    levels = []
    for level in LEVELS:
        family = _rate(sum(p < level / len(TESTS) for p in smallest), len(groups))
        each = {
            name: _rate(sum(outcomes[i].p_value < level for outcomes in found), len(groups))
            for i, name in enumerate(TESTS)
        }
        excess = float(stats.binom.sf(family["count"] - 1, len(groups), level))
        levels.append(
            {
                "nominal": level,
                "any_test": {**family, "excess_p": excess},
                "mean_of_tests": sum(each[name]["count"] for name in CONTINUOUS)
                / max(len(groups) * len(CONTINUOUS), 1),
                "tests": each,
                "passed": excess >= alpha / len(LEVELS),
            }
        )
    return {
        "num_groups": len(groups),
        "group_tokens": group_tokens,
        "levels": levels,
        "passed": all(level["passed"] for level in levels),
    }


def _rate(count: int, trials: int) -> dict[str, Any]:
    """A count, the observed rate, and the interval that holds the true one in at least 95 of 100 cases."""
    low = float(stats.beta.ppf(0.025, count, trials - count + 1)) if count else 0.0
    high = float(stats.beta.ppf(0.975, count + 1, trials - count)) if count < trials else 1.0
    return {"count": count, "rate": count / trials if trials else None, "low": low, "high": high}
