"""Measure tokens per second against plain decoding, transformers and other systems: same weights, prompts and threads."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specdec.config import BenchmarkConfig, PeerConfig, peer_configs
from specdec.experiments.benchmark_report import benchmark_picture, benchmark_table
from specdec.experiments.benchmark_rows import benchmark_rows
from specdec.experiments.benchmark_session import Session
from specdec.experiments.building import build, sampling_params
from specdec.experiments.contenders import (
    Contender,
    own_contender,
    own_name,
    system_config,
    their_contender,
    their_names,
)
from specdec.experiments.handover import export_folder, export_gguf
from specdec.experiments.peer_contenders import PeerContender, PeerJob, peer_contenders, present
from specdec.experiments.prompts import uses_chat
from specdec.experiments.resume import Measurements
from specdec.experiments.system import load_target, model_name, rule_and_policy, target_labels
from specdec.experiments.workload import Texts, read_mixture
from specdec.garbage import set_aside
from specdec.loading import load_model
from specdec.model import PagedModel
from specdec.provenance import device_name, provenance
from specdec.request import encode
from specdec.sampling import SamplingParams
from specdec.tracking import Tracker


def run(config: BenchmarkConfig, command: str) -> int:
    """Decodes every prompt with every system, in turns, and appends a row per system and batch size to `output`.

    Each measurement goes to raw.jsonl in `work_dir` at once; a restart with the same `work_dir` goes on from there. The picture
    lies beside `output`. Raises ValueError for what can be seen to be wrong before a model is loaded.
    """
    sets = read_mixture(config.mixture, config, config.prompts)
    peers = present(peer_configs(config.peers))
    params = _check(config, peers)
    tracker: Tracker = build(config.tracking)
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    raw = Measurements(Path(config.work_dir) / "raw.jsonl")
    try:
        with ExitStack() as stack:
            tracker.start({**asdict(config), "provenance": provenance(command)})
            target = load_target(config.target)
            prompts = [
                encode(target, text, uses_chat(one.chat, target.tokenizer)) for one in sets for text in one.texts
            ]
            # Others run the weights in their plain layout, as they do for everybody.
            plain = replace(config.target, packed=False, self_check=False, numerics="fast")
            theirs = load_target(plain) if config.transformers or peers else None
            own = {own_name(one): partial(own_contender, one, config) for one in (None, *config.systems)}
            names = their_names(config) if config.transformers else []
            others = {name: partial(their_contender, name, config) for name in names}
            contenders: list[Contender] = [build_one(target) for build_one in own.values()]
            contenders += [build_one(theirs) for build_one in others.values()]
            if theirs is not None:
                contenders += _start_peers(peers, config, theirs, prompts, params, stack)
            common = _common_labels(config, sets, target, params)
            session = Session(contenders, prompts, params, config.batch_sizes, config.num_repeats, raw, common)
            set_aside()
            found = session.measure()
        memory = session.peaks({**own, **others}) if config.memory else {}
        end = {"num_prompts": len(prompts), **provenance(command), "resumed_measurements": raw.num_resumed}
        rows = benchmark_rows(found, memory, {**common, **end})
        for row in rows:
            tracker.row(row)
        tracker.summary({f"{row['name']}, batch {row['batch_size']}": row["tokens_per_s"] for row in rows})
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"measurements are in {raw.shown_path}; go on with work_dir={config.work_dir}"
        ) from None
    finally:
        raw.finish()
        tracker.finish()
    picture = tracker.path.with_suffix(".png")
    benchmark_picture(rows, picture)
    Console(markup=False, highlight=False).print(benchmark_table(rows))
    print(f"{len(rows)} rows in {tracker.shown_path}, picture in {picture.name} beside it", flush=True)
    return 0


def _check(config: BenchmarkConfig, peers: dict[str, PeerConfig]) -> SamplingParams:
    for overrides in config.systems:
        rule_and_policy(system_config(overrides, config.target, config.draft))
    if config.engine.max_batch_size != 1:
        raise ValueError(
            f"engine.max_batch_size={config.engine.max_batch_size}: how many prompts are decoded at once is batch_sizes; "
            f"leave it 1"
        )
    sizes = list(config.batch_sizes)
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"batch_sizes={sizes} must be one or more numbers >= 1, each once")
    if config.num_repeats < 1:
        raise ValueError(f"num_repeats={config.num_repeats} must be >= 1")
    if uneven := [one for one in config.mixture if one.weight != 1]:
        raise ValueError(
            f"mixture: weight={uneven[0].weight} has no meaning here, every prompt is decoded: leave it out"
        )
    params = sampling_params(config.sampling)
    greedy = SamplingParams(seed=params.seed, max_new_tokens=params.max_new_tokens, ignore_eos=params.ignore_eos)
    if params != greedy and (config.transformers or peers):
        raise ValueError(
            "against transformers and peers the benchmark is greedy, for they draw other tokens: set transformers=false and no "
            "peers, or of sampling only max_new_tokens and ignore_eos"
        )
    return replace(params, seed=params.with_seed())


def _start_peers(
    peers: dict[str, PeerConfig],
    config: BenchmarkConfig,
    theirs: PagedModel,
    prompts: list[list[int]],
    params: SamplingParams,
    stack: ExitStack,
) -> list[PeerContender]:
    """Hands the model over in the formats that are read, then starts a worker per mode."""
    folder = Path(config.work_dir) / "handover"
    formats = {peer.model_format for peer in peers.values()}
    targets = {}
    if "folder" in formats:
        targets["folder"] = export_folder(theirs, folder / "target")
    if "gguf" in formats:
        targets["gguf"] = export_gguf(config.target, folder / "target.gguf")
    draft = None
    if peers and config.draft is not None:
        draft_model = load_model(
            config.draft, dtype=config.target.dtype, self_check=False, packed=False, numerics="fast"
        )
        draft = export_folder(draft_model, folder / "draft")
    job = PeerJob(
        targets=targets,
        draft=draft,
        draft_name=None if config.draft is None else model_name(config.draft),
        dtype=str(theirs.dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
        # A few more for what is drafted behind the last token.
        max_length=max(len(prompt) for prompt in prompts) + params.max_new_tokens + 64,
        max_batch_size=max(config.batch_sizes),
        eos_token_ids=sorted(theirs.eos_token_ids),
    )
    return peer_contenders(peers, job, Path(config.work_dir), stack)


def _common_labels(
    config: BenchmarkConfig, sets: list[Texts], target: PagedModel, params: SamplingParams
) -> dict[str, Any]:
    templates = {one.name: asked.template for one, asked in zip(sets, config.mixture, strict=False)}
    chats = {uses_chat(one.chat, target.tokenizer) for one in sets}
    return {
        "experiment": "benchmark",
        **target_labels(config.target),
        "prompts": "+".join(one.name for one in sets),
        "template": templates or config.template,
        "chat": chats.pop() if len(chats) == 1 else "mixed",
        "temperature": params.temperature,
        "sampling_seed": params.seed,
        "max_new_tokens": params.max_new_tokens,
        "ignore_eos": params.ignore_eos,
        "dtype": str(target.dtype).removeprefix("torch."),
        "numerics": target.numerics,
        "num_threads": torch.get_num_threads(),
        "device": device_name(target.device),
    }


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["benchmark", *sys.argv[1:]]))
