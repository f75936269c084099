"""Measure tokens per second against plain decoding and transformers' own generation: same process, weights, prompts."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specdec.config import BenchmarkConfig
from specdec.experiments.building import build, sampling_params
from specdec.experiments.contenders import (
    PLAIN,
    Contender,
    Decoded,
    SpecdecContender,
    system_config,
    transformers_contenders,
)
from specdec.experiments.prompts import check_chat, read_prompts, uses_chat, wrap
from specdec.experiments.resume import Measurements, digest
from specdec.experiments.system import load_system, load_target, plain_system, target_labels
from specdec.model import PagedModel
from specdec.provenance import device_name, provenance
from specdec.request import encode
from specdec.sampling import SamplingParams
from specdec.tracking import Tracker


def run(config: BenchmarkConfig, command: str) -> int:
    """Decodes every prompt with every system, one after another, and appends one row per system to `output`.

    Each measurement goes to raw.jsonl in `work_dir` at once; a restart with the same `work_dir` goes on from there.
    Raises ValueError for what can be seen to be wrong before a model is loaded.
    """
    if config.prompt_file is None:
        raise ValueError("prompt_file is missing: give prompt_file=FILE (.jsonl or .txt)")
    texts = wrap(read_prompts(config.prompt_file, config.prompt_field, config.limit), config.template)
    params = _check_params(config)
    check_chat(config.chat)
    systems = {overrides: system_config(overrides, config.target, config.draft) for overrides in config.systems}
    tracker: Tracker = build(config.tracking)
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    raw = Measurements(Path(config.work_dir) / "raw.jsonl")
    try:
        tracker.start({**asdict(config), "provenance": provenance(command)})
        loaded = {overrides: load_system(system) for overrides, system in systems.items()}
        target = load_target(config.target)
        chat = uses_chat(config.chat, target.tokenizer)
        prompts = [encode(target, text, chat) for text in texts]
        contenders: list[Contender] = [
            SpecdecContender(name, one.engine(target, config.engine), {"system": "specdec", **one.labels})
            for name, one in {"specdec plain": plain_system(), **loaded}.items()
        ]
        if config.transformers:
            # transformers runs the weights in their plain layout, as it does for everybody.
            theirs = load_target(replace(config.target, packed=False, self_check=False, numerics="fast"))
            contenders += transformers_contenders(theirs, config.draft, config.target)
        common = _common_labels(config, target, chat, params)
        decoded = _measure(contenders, prompts, params, raw, common)
        rows = _rows(contenders, decoded, {**common, **provenance(command), "resumed_measurements": raw.num_resumed})
        for row in rows:
            tracker.row(row)
        tracker.summary({row["name"]: row["tokens_per_s"] for row in rows})
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"measurements are in {raw.shown_path}; go on with work_dir={config.work_dir}"
        ) from None
    finally:
        raw.finish()
        tracker.finish()
    Console(markup=False, highlight=False).print(_table(rows))
    print(f"{len(rows)} rows in {tracker.shown_path}", flush=True)
    return 0


def _check_params(config: BenchmarkConfig) -> SamplingParams:
    if config.engine.max_batch_size != 1:
        raise ValueError(
            f"engine.max_batch_size={config.engine.max_batch_size}: prompts are measured one at a time, it must be 1"
        )
    params = sampling_params(config.sampling)
    greedy = SamplingParams(seed=params.seed, max_new_tokens=params.max_new_tokens, ignore_eos=params.ignore_eos)
    if params != greedy and config.transformers:
        raise ValueError(
            "against transformers the benchmark is greedy, for it draws other tokens: set transformers=false, or of sampling "
            "only max_new_tokens and ignore_eos"
        )
    return replace(params, seed=params.with_seed())


def _common_labels(config: BenchmarkConfig, target: PagedModel, chat: bool, params: SamplingParams) -> dict[str, Any]:
    return {
        "experiment": "benchmark",
        **target_labels(config.target),
        "prompts": config.prompts or Path(config.prompt_file or "").stem,
        "template": config.template,
        "chat": chat,
        "temperature": params.temperature,
        "sampling_seed": params.seed,
        "max_new_tokens": params.max_new_tokens,
        "ignore_eos": params.ignore_eos,
        "batch_size": 1,
        "dtype": str(target.dtype).removeprefix("torch."),
        "numerics": target.numerics,
        "num_threads": torch.get_num_threads(),
        "device": device_name(target.device),
    }


def _measure(
    contenders: list[Contender],
    prompts: list[list[int]],
    params: SamplingParams,
    raw: Measurements,
    common: dict[str, Any],
) -> dict[str, list[Decoded]]:
    """Every contender's measurements, in the order of the prompts."""
    decoded: dict[str, list[Decoded]] = {one.name: [] for one in contenders}
    warm: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("measurements", total=len(contenders) * len(prompts))
        for number, prompt in enumerate(prompts):
            # Nobody is always first, when the machine is cool, or always last.
            start = number % len(contenders)
            for one in contenders[start:] + contenders[:start]:
                key = digest(one.name, one.labels, prompt, common)
                found = raw.get(key)
                if found is not None:
                    run = Decoded(**found["decoded"])
                else:
                    if one.name not in warm:
                        one.decode(prompt[:64], replace(params, max_new_tokens=min(16, params.max_new_tokens)))
                        warm.add(one.name)
                    run = one.decode(prompt, params)
                    raw.put(key, name=one.name, prompt=number, decoded=asdict(run))
                decoded[one.name].append(run)
                progress.update(task, advance=1, description=one.name)
    return decoded


def _rows(
    contenders: list[Contender], decoded: dict[str, list[Decoded]], common: dict[str, Any]
) -> list[dict[str, Any]]:
    plain = {one.labels["system"]: one.name for one in contenders if one.labels["drafter"] == PLAIN}
    rows = []
    for one in contenders:
        runs, plain_runs = decoded[one.name], decoded[plain[one.labels["system"]]]
        num_tokens = sum(len(run.token_ids) for run in runs)
        tau = num_tokens / sum(run.num_target_forwards for run in runs)
        theirs = decoded.get(plain.get("transformers", ""))
        speedup = _tokens_per_s(runs) / _tokens_per_s(plain_runs)
        phases = {name: sum(run.phases[name] for run in runs) for name in runs[0].phases}
        total = sum(phases.values())
        rows.append(
            {
                "name": one.name,
                **one.labels,
                "num_prompts": len(runs),
                "new_tokens": num_tokens,
                "tau": tau,
                "tokens_per_s": _tokens_per_s(runs),
                "median_tokens_per_s": statistics.median(_tokens_per_s([run]) for run in runs),
                "plain_tokens_per_s": _tokens_per_s(plain_runs),
                "transformers_plain_tokens_per_s": None if theirs is None else _tokens_per_s(theirs),
                "speedup": speedup,
                "efficiency": speedup / tau,
                "ttft_s": statistics.fmean(run.ttft_s for run in runs),
                "same_text_as_plain": _share_equal(runs, plain_runs),
                "same_text_as_transformers": None if theirs is None else _share_equal(runs, theirs),
                **{f"{name}_share": seconds / total for name, seconds in phases.items()},
                **common,
            }
        )
    return rows


def _share_equal(runs: list[Decoded], others: list[Decoded]) -> float:
    """Share of the prompts with the same token ids."""
    return sum(run.token_ids == other.token_ids for run, other in zip(runs, others, strict=True)) / len(runs)


def _tokens_per_s(runs: list[Decoded]) -> float:
    return sum(len(run.token_ids) for run in runs) / sum(run.seconds for run in runs)


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = f"{first['target']} ({first['dtype']}), {first['num_prompts']} prompts of {first['prompts']}"
    table = Table(title=title, title_justify="left")
    for name in ("system", "policy", "tokens/s", "speedup", "tau", "same text"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            f"{row['system']} {row['drafter']}{'' if row['lossless'] else ' LOSSY'}",
            row["policy"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['tau']:.2f}",
            f"{row['same_text_as_plain']:.0%}",
        )
    return table


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["benchmark", *sys.argv[1:]]))
