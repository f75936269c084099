"""What the measurements of a benchmark come to: a row per contender and batch size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from specdec.experiments.benchmark_session import Runs
from specdec.experiments.bootstrap import LEVEL, interval
from specdec.experiments.contenders import PLAIN, Decoded
from specdec.experiments.report import first_difference

Row = dict[str, Any]


def benchmark_rows(
    found: Seq[Runs], memory: Mapping[tuple[str, int], Mapping[str, int | None]], common: Row
) -> list[Row]:
    """Speed, tau, and how texts compare with the plain decoding of the same system; `memory` by contender and batch size.

    Intervals are bootstrapped over batches of prompts; that of a speedup draws the same batches for both.
    """
    plain = {(one.contender.labels["system"], one.batch_size): one for one in found if _is_plain(one)}
    return [
        _row(
            one,
            plain[one.contender.labels["system"], one.batch_size],
            plain.get(("transformers", one.batch_size)),
            memory.get((one.contender.name, one.batch_size), {}),
            common,
        )
        for one in found
    ]


def _row(one: Runs, plain: Runs, theirs: Runs | None, memory: Mapping[str, int | None], common: Row) -> Row:
    runs, count = one.all, len(one.batches)
    num_tokens = sum(run.num_tokens for run in runs)
    forwards = [run.num_target_forwards for run in runs if run.num_target_forwards is not None]
    tau = num_tokens / sum(forwards) if len(forwards) == len(runs) else None
    speeds = [_speed(batch) for batch in one.batches]
    speedup = _speed(runs) / _speed(plain.all)
    phases = {name: sum(run.phases[name] for run in runs) for name in runs[0].phases}
    total = sum(phases.values())
    peaks = [run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None]
    median = interval(lambda drawn: statistics.median(speeds[i] for i in drawn), count)
    ratio = interval(lambda drawn: _drawn(one, drawn) / _drawn(plain, drawn), count)
    return {
        "name": one.contender.name,
        **one.contender.labels,
        "num_repeats": len(one.batches[0]),
        "new_tokens": num_tokens,
        "tau": tau,
        "tokens_per_s": _speed(runs),
        "median_tokens_per_s": statistics.median(speeds),
        "median_tokens_per_s_interval": None if median is None else [median.low, median.high],
        "plain_tokens_per_s": _speed(plain.all),
        "transformers_plain_tokens_per_s": None if theirs is None else _speed(theirs.all),
        "speedup": speedup,
        "speedup_interval": None if ratio is None else [ratio.low, ratio.high],
        "interval_level": LEVEL,
        "efficiency": None if tau is None else speedup / tau,
        "ttft_s": statistics.fmean(run.ttft_s for run in runs),
        "same_text_as_plain": _share_equal(one, plain),
        "same_prefix_as_plain": _share_of_prefix(one, plain),
        "same_text_as_transformers": None if theirs is None else _share_equal(one, theirs),
        "same_prefix_as_transformers": None if theirs is None else _share_of_prefix(one, theirs),
        **{f"{name}_share": seconds / total for name, seconds in phases.items()},
        "peak_memory_bytes": max(peaks, default=None),
        **memory,
        **common,
        "batch_size": one.batch_size,
        "versions": {**common["versions"], **one.contender.versions},
    }


def _is_plain(one: Runs) -> bool:
    return one.contender.labels["drafter"] == PLAIN


def _speed(runs: Seq[Decoded]) -> float:
    """Tokens per second."""
    return sum(run.num_tokens for run in runs) / sum(run.seconds for run in runs)


def _drawn(one: Runs, drawn: list[int]) -> float:
    return _speed([run for i in drawn for run in one.batches[i]])


def _texts(one: Runs, other: Runs) -> list[tuple[list[int], list[int]]]:
    """Both outputs of every prompt, repetition by repetition."""
    return [
        pair
        for mine, theirs in zip(one.all, other.all, strict=True)
        for pair in zip(mine.outputs, theirs.outputs, strict=True)
    ]


def _share_equal(one: Runs, other: Runs) -> float:
    """Share of the texts with the same token ids."""
    return statistics.fmean(mine == theirs for mine, theirs in _texts(one, other))


def _share_of_prefix(one: Runs, other: Runs) -> float:
    """Mean share of the other text that comes before the first difference."""
    pairs = _texts(one, other)
    return statistics.fmean(first_difference(mine, theirs) / max(len(mine), len(theirs), 1) for mine, theirs in pairs)
