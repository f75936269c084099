"""Serve arriving requests under rising load: throughput and latency of plain, fixed and adaptive speculation."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from dataclasses import asdict, replace
from typing import Any

import torch

from specdec.config import LoadConfig
from specdec.experiments.campaign import campaign
from specdec.experiments.driving import TurnClock, WallClock
from specdec.experiments.load_contenders import (
    ADAPTIVE,
    CONTINUOUS,
    FIXED,
    PLAIN,
    STATIC,
    LoadContender,
    build_contenders,
    check_contenders,
    contender_names,
)
from specdec.experiments.load_report import load_picture, load_tables
from specdec.experiments.load_rows import LoadRun, Point, load_row
from specdec.experiments.load_session import Session
from specdec.experiments.system import drafter_label, load_system, load_target, rule_and_policy, target_labels
from specdec.experiments.workload import LoadRequest, Workload
from specdec.garbage import set_aside
from specdec.live import LiveView
from specdec.model import PagedModel
from specdec.provenance import device_name, provenance
from specdec.sampling import SamplingParams


def run(config: LoadConfig, command: str) -> int:
    """Serves the same requests with every contender at every point of the sweep and appends a row for each to `output`.

    Each load goes to raw.jsonl in `work_dir` at once; a restart with the same `work_dir` goes on from there. The picture
    lies beside `output`. Raises ValueError for what can be seen to be wrong before a model is loaded.
    """
    points, workload = _check(config)
    with campaign(config, command, "loads") as work:
        drafts = bool({FIXED, ADAPTIVE} & set(config.contenders))
        system = load_system(config) if drafts else None
        target = load_target(config.target)
        requests = workload.requests(target, config.num_requests)
        # transformers runs the weights in their plain layout, as it does for everybody.
        plainly = replace(config.target, packed=False, self_check=False, numerics="fast")
        theirs = load_target(plainly) if {STATIC, CONTINUOUS} & set(config.contenders) else None
        clock = TurnClock(WallClock()) if config.take_turns else WallClock()
        longest = max(len(one.prompt) + one.params.max_new_tokens for one in requests)
        ignore_eos = requests[0].params.ignore_eos
        built = build_contenders(config, system, target, theirs, longest, ignore_eos, clock)
        contenders = contender_names(built)
        common = _common_labels(config, target, workload, requests)
        session = Session(contenders, requests, work.raw, common, clock, config.seed, config.duration_s)
        set_aside()
        with LiveView() as view:
            runs = session.serve_all(points, config.num_repeats, view)
        end = {**provenance(command), "resumed_measurements": work.raw.num_resumed}
        rows = _rows(contenders, points, runs, {**common, **end})
        for row in rows:
            work.tracker.row(row)
        work.tracker.summary({f"{row['name']} {row['load']}": row["tokens_per_s"] for row in rows})
    work.tell(rows, load_picture, load_tables)
    return 0


def _check(config: LoadConfig) -> tuple[list[Point], Workload]:
    points = [Point("concurrency", one) for one in config.concurrencies]
    points += [Point("rate", one) for one in config.rates]
    if not points or any(point.value <= 0 for point in points):
        raise ValueError(
            f"concurrencies={list(config.concurrencies)} and rates={list(config.rates)} must name at least one load, each > 0"
        )
    if config.num_requests < 1 or config.num_repeats < 1:
        raise ValueError(f"num_requests={config.num_requests} and num_repeats={config.num_repeats} must be >= 1")
    if config.duration_s is not None and config.duration_s <= 0:
        raise ValueError(f"duration_s={config.duration_s} must be > 0, or null")
    if config.take_turns and (config.rates or CONTINUOUS in config.contenders):
        raise ValueError(
            f"take_turns=true with rates={list(config.rates)} and contenders={list(config.contenders)}: turns are for "
            f"concurrencies, and {CONTINUOUS} has a thread of its own that nobody can stop meanwhile"
        )
    check_contenders(config)
    if {FIXED, ADAPTIVE} & set(config.contenders):
        rule_and_policy(config)
    return points, Workload.read(config, config.mixture)


def _common_labels(
    config: LoadConfig, target: PagedModel, workload: Workload, requests: Seq[LoadRequest]
) -> dict[str, Any]:
    usual, params = SamplingParams(), workload.params
    changed = {
        name: value for name, value in asdict(params).items() if value != getattr(usual, name) and name != "seed"
    }
    return {
        "experiment": "load",
        **target_labels(config.target),
        "drafter_asked": drafter_label(config.drafter),
        "prompts": "+".join(one.name for one in workload.sets),
        "mixture": {one.name: one.weight for one in workload.sets},
        "prompt_length": asdict(config.prompt_length),
        "output_length": asdict(config.output_length),
        "prefix_tokens": config.prefix_tokens,
        "prefix_share": config.prefix_share,
        "temperature": params.temperature,
        "sampling": changed,
        "seed": params.seed,
        "load_seed": config.seed,
        "num_asked": len(requests),
        "duration_s": config.duration_s,
        # Rows of all experiments say `batch_size`.
        **dict.fromkeys(("batch_size", "max_batch_size"), config.engine.max_batch_size),
        "prefill_chunk": config.engine.prefill_chunk,
        "page_size": config.engine.page_size,
        "num_pages": config.engine.num_pages,
        "take_turns": config.take_turns,
        "dtype": str(target.dtype).removeprefix("torch."),
        "numerics": target.numerics,
        "num_threads": torch.get_num_threads(),
        "device": device_name(target.device),
    }


def _rows(
    contenders: dict[str, LoadContender],
    points: Seq[Point],
    runs: dict[tuple[str, Point], list[LoadRun]],
    common: dict[str, Any],
) -> list[dict[str, Any]]:
    """By point, then by contender. The reference of all texts is the first plain run of the first point."""
    plain = {one.share_prefixes: name for name, one in contenders.items() if one.name == PLAIN}
    reference = runs[next(iter(plain.values())), points[0]][0].token_ids
    rows = []
    for point in points:
        for name, one in contenders.items():
            beside = plain.get(one.share_prefixes, next(iter(plain.values())))
            rows.append(
                {
                    "name": name,
                    "contender": one.name,
                    **one.labels,
                    "load": point.label,
                    "concurrency": point.value if point.kind == "concurrency" else None,
                    "rate": point.value if point.kind == "rate" else None,
                    "share_prefixes": one.share_prefixes,
                    **load_row(runs[name, point], runs[beside, point], reference),
                    **common,
                }
            )
    return rows


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["load", *sys.argv[1:]]))
