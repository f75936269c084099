"""Say where an EAGLE head's drafts end: at tokens it does not know, at the tree's depth or leaves, or at wrong guesses."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec.config import EagleDrafterConfig, LimitsConfig
from specdec.drafters.eagle import EagleDrafter
from specdec.experiments.acceptance import policy_config
from specdec.experiments.building import build, describe, sampling_params
from specdec.experiments.endings import Endings, Recorder
from specdec.experiments.measurement import Measurement
from specdec.experiments.prompts import check_chat, read_prompts, uses_chat, wrap
from specdec.experiments.system import System, check_draft, drafter_label, load_target, plain_system, target_labels
from specdec.interfaces import TreePolicy
from specdec.metrics import StepTimes
from specdec.model import PagedModel
from specdec.provenance import device_name, provenance
from specdec.request import Result, encode
from specdec.sampling import SamplingParams
from specdec.tracking import Tracker


def run(config: LimitsConfig, command: str) -> int:
    """Decodes every prompt plainly and under every policy, greedily, and appends a row per policy to `output`.

    Raises ValueError for what can be seen to be wrong before a model is loaded.
    """
    params = _check(config)
    texts = wrap(read_prompts(config.prompt_file or "", config.prompt_field, config.limit), config.template)
    chosen = [policy_config(overrides) for overrides in config.policies]
    policies: dict[str, TreePolicy] = {describe(one): build(one) for one in chosen}
    tracker: Tracker = build(config.tracking)
    try:
        drafter: EagleDrafter = build(config.drafter)
        target = load_target(config.target)
        chat = uses_chat(config.chat, target.tokenizer)
        prompts = [encode(target, text, chat) for text in texts]
        plain_engine = plain_system().engine(target, config.engine)
        plain = [plain_engine.generate([prompt], params)[0] for prompt in prompts]
        common = _common_labels(config, target, chat, params, len(prompts))
        rows: list[dict[str, Any]] = []
        console = Console(stderr=True)
        for label, policy in track(policies.items(), "policies", console=console, disable=not console.is_terminal):
            found = _decode(config, drafter, policy, target, prompts, params, plain)
            rows.append({**common, "policy": label, "num_nodes": policy.max_nodes, **found, **provenance(command)})
            tracker.row(rows[-1])
        tracker.summary({row["policy"]: row["tau"] for row in rows})
    finally:
        tracker.finish()
    Console(markup=False, highlight=False).print(_table(rows))
    print(f"{len(rows)} rows in {tracker.shown_path}", flush=True)
    return 0


def _check(config: LimitsConfig) -> SamplingParams:
    if not isinstance(config.drafter, EagleDrafterConfig) or config.drafter.draft_vocab_size is not None:
        raise ValueError(
            f"drafter={config.drafter.label}: this is for an EAGLE head as it was trained: drafter=eagle draft=PATH"
        )
    check_draft(config.drafter)
    if config.prompt_file is None:
        raise ValueError("prompt_file is missing: give prompt_file=FILE (.jsonl or .txt)")
    check_chat(config.chat)
    if not config.policies:
        raise ValueError("policies must name at least one")
    params = sampling_params(config.sampling)
    if params != SamplingParams(seed=params.seed, max_new_tokens=params.max_new_tokens, ignore_eos=params.ignore_eos):
        raise ValueError(
            "the target's own text is the greedy one here: of sampling give only max_new_tokens and ignore_eos"
        )
    return params


def _decode(
    config: LimitsConfig,
    drafter: EagleDrafter,
    policy: TreePolicy,
    target: PagedModel,
    prompts: Seq[list[int]],
    params: SamplingParams,
    plain: Seq[Result],
) -> dict[str, Any]:
    recorder, total = Recorder(), Measurement()
    engine = System(drafter, policy, recorder, {}).engine(target, config.engine)
    assert target.tokenizer is not None
    texts = [str(target.tokenizer.decode([token])) for token in range(target.vocab_size)]
    ids_R = drafter.head.draft_to_target_R
    endings = Endings(texts, None if ids_R is None else frozenset(ids_R.tolist()), policy.max_depth)
    same = 0
    for prompt, other in zip(prompts, plain, strict=True):
        result = engine.generate([prompt], params)[0]
        same += result.token_ids == other.token_ids
        total.add([result], StepTimes())
        endings.add(result.token_ids, recorder.taken())
    return {
        "new_tokens": total.num_tokens,
        "num_target_forwards": total.num_target_forwards,
        "tau": total.tau,
        "same_text_as_plain": same / len(prompts),
        "drafted_by_depth": total.drafted_by_depth,
        "accepted_by_depth": total.accepted_by_depth,
        **endings.fields(total.num_target_forwards),
    }


def _common_labels(
    config: LimitsConfig, target: PagedModel, chat: bool, params: SamplingParams, num_prompts: int
) -> dict[str, Any]:
    return {
        "experiment": "limits",
        "system": "specdec",
        **target_labels(config.target),
        "drafter": drafter_label(config.drafter),
        "rule": Recorder.name,
        "lossless": Recorder.lossless,
        "prompts": config.prompts or Path(config.prompt_file or "").stem,
        "num_prompts": num_prompts,
        "template": config.template,
        "chat": chat,
        "temperature": params.temperature,
        "max_new_tokens": params.max_new_tokens,
        "batch_size": 1,
        "dtype": str(target.dtype).removeprefix("torch."),
        "numerics": target.numerics,
        "num_threads": torch.get_num_threads(),
        "device": device_name(target.device),
    }


def _table(rows: Seq[dict[str, Any]]) -> Table:
    table = Table(title=f"where drafts end, {rows[0]['prompts']}, per 100 target forwards", title_justify="left")
    reasons = list(rows[0]["ends"])
    for column in ("policy", "tau", "tau, all covered", *reasons):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        shares = [f"{100 * row['ends'][reason] / row['num_target_forwards']:.0f}" for reason in reasons]
        table.add_row(row["policy"], f"{row['tau']:.3f}", f"{row['tau_if_covered']:.3f}", *shares)
    return table


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["limits", *sys.argv[1:]]))
