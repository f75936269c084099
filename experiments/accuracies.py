"""Measure how often a drafter's r-th guess is right at each depth, and write the best static tree for each node budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec.config import AccuraciesConfig, NGramConfig, UnionConfig
from specdec.drafters.accuracies import RankAccuracies, measure_accuracies
from specdec.drafters.choices import best_choices, expected_length
from specdec.drafters.training.records import RecordSet, write_json
from specdec.experiments.building import build
from specdec.experiments.resume import Measurements, digest
from specdec.experiments.system import check_draft, drafter_label, load_target, target_labels
from specdec.experiments.train_setup import data_folders
from specdec.provenance import provenance


def run(config: AccuraciesConfig, command: str) -> int:
    """Counts along the held-out records and writes `static-N.json` for every N of `totals` into `folder`.

    Each batch's counts go to raw.jsonl there at once, and the same command goes on from them. Raises ValueError for what
    can be seen to be wrong before the target is loaded.
    """
    _check(config)
    data = RecordSet(data_folders(config), "held_out")
    texts, firsts = _texts(data, config.limit)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = Measurements(folder / "raw.jsonl")
    labels = {**target_labels(config.target), "drafter": drafter_label(config.drafter), "data": data.fingerprint}
    try:
        drafter, target = build(config.drafter), load_target(config.target)
        found: RankAccuracies | None = None
        console = Console(stderr=True)
        batches = range(0, len(texts), config.batch_size)
        for at in track(batches, "records", console=console, disable=not console.is_terminal):
            part = slice(at, at + config.batch_size)
            key = digest(labels, config.draft, texts[part], firsts[part], config.depth, config.num_ranks, config.stride)
            held = raw.get(key)
            counted = (
                measure_accuracies(
                    drafter, target, texts[part], config.depth, config.num_ranks, config.stride, firsts[part]
                )
                if held is None
                else RankAccuracies(held["hits"], held["counts"])
            )
            if held is None:
                raw.put(key, hits=counted.hits, counts=counted.counts)
            found = counted if found is None else found + counted
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"counts are in {config.folder}; the same command goes on from there") from None
    finally:
        raw.finish()
    assert found is not None
    trees = _write(folder, found, config.totals, {**labels, "num_records": len(texts), **provenance(command)})
    _report(found, trees)
    print(f"trees in {config.folder}: drafter/policy=static drafter.policy.choices={folder}/static-N.json", flush=True)
    return 0


def _check(config: AccuraciesConfig) -> None:
    if isinstance(config.drafter, (NGramConfig, UnionConfig)) or not hasattr(config.drafter, "policy"):
        raise ValueError(f"drafter={config.drafter.label} has no network that ranks tokens: choose another drafter")
    check_draft(config.drafter)
    for name in ("depth", "num_ranks", "stride", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be >= 1")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit={config.limit} must be >= 1")
    if not config.totals or min(config.totals) < 2:
        raise ValueError(f"totals={config.totals} must name budgets of at least 2 nodes, the root included")


def _texts(data: RecordSet, limit: int | None) -> tuple[list[list[int]], list[int]]:
    """Token ids of the first `limit` records, and where the part to be learnt begins: its first token is the first root."""
    texts, firsts = [], []
    for record in data:
        learnt = record.loss_mask_T.nonzero()
        first = max(int(learnt[0]) if len(learnt) else len(record.token_ids_T), 1)
        if first + 1 < len(record.token_ids_T):
            texts.append(record.token_ids_T.tolist())
            firsts.append(first)
        if len(texts) == limit:
            break
    if not texts:
        raise ValueError(f"{data.name} holds out no record with an answer to draft: make more data, or raise held_out")
    return texts, firsts


def _write(
    folder: Path, found: RankAccuracies, totals: list[int], labels: dict[str, Any]
) -> dict[int, tuple[int, float]]:
    """Writes a file per budget; nodes, the root included, and expected accepted drafts of each tree."""
    trees = {}
    for total in totals:
        choices = best_choices(found.rates, total)
        length = expected_length(found.rates, choices)
        trees[total] = len(choices) + 1, length
        content = {"choices": choices, "total": total, "expected_accepted": length, "accuracies": found.rates}
        write_json(folder / f"static-{total}.json", {**content, "counts": found.counts, **labels})
    return trees


def _report(found: RankAccuracies, trees: dict[int, tuple[int, float]]) -> None:
    rates = Table(title="how often the r-th guess is right", title_justify="left")
    rates.add_column("depth", justify="right")
    for rank in range(len(found.rates[0])):
        rates.add_column(str(rank + 1), justify="right")
    for depth, row in enumerate(found.rates):
        rates.add_row(str(depth + 1), *(f"{rate:.3f}" for rate in row))
    best = Table(title="best static trees", title_justify="left")
    for column in ("budget", "nodes", "expected accepted"):
        best.add_column(column, justify="right")
    for total, (nodes, length) in trees.items():
        best.add_row(str(total), str(nodes), f"{length:.3f}")
    console = Console(markup=False, highlight=False)
    console.print(rates)
    console.print(best)


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["accuracies", *sys.argv[1:]]))
