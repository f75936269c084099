"""What steps cost here: trees beside a single token, drafts level by level, and the way to the first token."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from rich.console import Console

from specdec.config import CostsConfig
from specdec.experiments.building import build, describe
from specdec.experiments.cost_measures import draft_seconds, forward_costs
from specdec.experiments.cost_report import costs_picture, costs_table
from specdec.experiments.startup import startup_seconds
from specdec.experiments.system import load_system, load_target, rule_and_policy, target_labels
from specdec.garbage import set_aside
from specdec.provenance import device_name, provenance
from specdec.tracking import Tracker


def run(config: CostsConfig, command: str) -> int:
    """Measures, appends a row per size to `output` and draws them beside it.

    Raises ValueError for what can be seen to be wrong before a model is loaded.
    """
    sizes = [*config.contexts, *config.num_nodes]
    if not config.contexts or not config.num_nodes or min(sizes) < 1 or config.repeats < 1:
        raise ValueError(
            f"contexts={list(config.contexts)}, num_nodes={list(config.num_nodes)} and repeats={config.repeats} must be >= 1"
        )
    rule_and_policy(config)
    tracker: Tracker = build(config.tracking)
    try:
        rows = _Costs(config, command, tracker).rows()
    finally:
        tracker.finish()
    picture = tracker.path.with_suffix(".png")
    costs_picture(rows, picture)
    Console(markup=False, highlight=False).print(costs_table(rows))
    print(f"{len(rows)} rows in {tracker.shown_path}, picture in {picture.name} beside it", flush=True)
    return 0


class _Costs:
    """One run; rows are written as they come."""

    def __init__(self, config: CostsConfig, command: str, tracker: Tracker) -> None:
        self._config, self._tracker = config, tracker
        self._rows: list[dict[str, Any]] = []
        self._console = Console(stderr=True)
        self._start = startup_seconds(config) if config.startup else []
        self._system = load_system(config)
        self._target = load_target(config.target)
        set_aside()
        self._common = {
            "experiment": "costs",
            "system": "specdec",
            **target_labels(config.target),
            "dtype": str(self._target.dtype).removeprefix("torch."),
            "numerics": self._target.numerics,
            "batch_size": 1,
            "device": device_name(self._target.device),
            **provenance(command),
        }

    def rows(self) -> list[dict[str, Any]]:
        for one in self._start:
            self._row(measure="startup", **one)
        longest = self._target.max_positions or 1 << 30
        for context in self._config.contexts:
            counts = [count for count in self._config.num_nodes if context + count <= longest]
            if not counts:
                self._console.print(f"context {context} is longer than {self._target.name} takes: left out")
                continue
            with self._console.status(f"context {context}"):
                self._measure(context, counts)
        return self._rows

    def _measure(self, context: int, counts: list[int]) -> None:
        found = forward_costs(self._target, context, counts, self._config.repeats, self._config.engine.cuda_graphs)
        for one in found:
            self._row(measure="forward", context=context, **one, ratio=one["seconds"] / found[0]["seconds"])
        drafter, policy = self._system.drafter, self._system.policy
        if drafter is None or policy is None:
            return
        engine = self._system.engine(self._target, replace(self._config.engine, speculation="fixed", max_batch_size=1))
        for level, seconds in enumerate(draft_seconds(engine, context, self._config.repeats), 1):
            self._row(
                measure="draft",
                context=context,
                drafter=self._system.labels["drafter"],
                policy=describe(getattr(self._config.drafter, "policy", None)),
                num_levels=level,
                seconds=seconds,
                ratio=seconds / found[0]["seconds"],
            )

    def _row(self, **fields: Any) -> None:
        self._rows.append({**fields, **self._common})
        self._tracker.row(self._rows[-1])


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["costs", *sys.argv[1:]]))
