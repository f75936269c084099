"""What one load cost, the medians over its repetitions, and the rows they make."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

from specdec.experiments.driving import Served
from specdec.latency import latency


@dataclass(frozen=True)
class Point:
    """How hard a server is pressed: so many users who wait for their answers, or so many requests per second."""

    kind: str
    value: float

    @property
    def label(self) -> str:
        return f"{self.kind} {self.value:g}"


@dataclass(frozen=True)
class LoadRun:
    """One contender under one load, once. `seconds` is from the load's begin to its last token; `latencies` and `cost` are
    fields of a row; `token_ids` the answers by request."""

    seconds: float
    num_tokens: int
    latencies: dict[str, float | None]
    cost: dict[str, Any]
    token_ids: dict[str, list[int]]

    @staticmethod
    def of(served: Seq[Served], cost: dict[str, Any]) -> LoadRun:
        """Raises ValueError where nothing was served."""
        if not served:
            raise ValueError("no request came before duration_s was over: raise it, or the rate")
        return LoadRun(
            max(one.emissions[-1][0] for one in served),
            sum(len(one.token_ids) for one in served),
            asdict(latency(served)),
            cost,
            {str(one.index): one.token_ids for one in served},
        )

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def num_requests(self) -> int:
        return len(self.token_ids)


def load_row(runs: Seq[LoadRun], plain: Seq[LoadRun] | None, reference: Mapping[str, list[int]]) -> dict[str, Any]:
    """The medians over a contender's runs of one load, beside those of `plain` runs of the same load where there are any.

    A request differs where any run's tokens are not those of `reference`; requests that it lacks are not compared.
    """
    speed = statistics.median(run.tokens_per_s for run in runs)
    row: dict[str, Any] = {
        "num_requests": round(statistics.median(run.num_requests for run in runs)),
        "num_repeats": len(runs),
        "new_tokens": round(statistics.median(run.num_tokens for run in runs)),
        "tokens_per_s": speed,
        "tokens_per_s_runs": [run.tokens_per_s for run in runs],
        "requests_per_s": statistics.median(run.num_requests / run.seconds for run in runs),
        **_medians([run.latencies for run in runs]),
        **_medians([run.cost for run in runs]),
        **same_texts(runs, reference),
    }
    if plain is not None:
        plain_speed = statistics.median(run.tokens_per_s for run in plain)
        row |= {"plain_tokens_per_s": plain_speed, "speedup": speed / plain_speed}
        if row.get("tau"):
            row["efficiency"] = row["speedup"] / row["tau"]
    return row


def same_texts(runs: Seq[LoadRun], reference: Mapping[str, list[int]]) -> dict[str, Any]:
    """`num_compared` requests, `num_differing` of them, and the first few of these by number."""
    compared = {index for run in runs for index in run.token_ids if index in reference}
    differing = {i for run in runs for i in compared if run.token_ids.get(i, reference[i]) != reference[i]}
    return {
        "num_compared": len(compared),
        "num_differing": len(differing),
        "differing": sorted(map(int, differing))[:10],
    }


def crossover(points: Seq[tuple[float, float]]) -> float | None:
    """Where a curve of (load, speedup) falls below 1 for good: interpolated; None where it ends above, or is never above.

    Points are in the order of their loads.
    """
    for (left, before), (right, after) in reversed(list(itertools.pairwise(points))):
        if after >= 1:
            return None
        if before >= 1:
            return left + (right - left) * (before - 1) / (before - after)
    return None


def _medians(runs: Seq[Mapping[str, Any]]) -> dict[str, Any]:
    """Key by key, over the runs that know it; counts stay whole, and lists go place by place over those that are so long."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        values = [run[key] for run in runs if run.get(key) is not None]
        if not values:
            found[key] = None
        elif isinstance(values[0], list):
            places = itertools.zip_longest(*values)
            found[key] = [statistics.median(one for one in place if one is not None) for place in places]
        elif all(isinstance(one, int) for one in values):
            found[key] = round(statistics.median(values))
        else:
            found[key] = statistics.median(values)
    return found
