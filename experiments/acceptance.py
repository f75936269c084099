"""Compare acceptance lengths of all rules on the same drafts, along the target's own texts."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.cli import explain
from specdec.config import AcceptanceConfig, PolicyConfig, compose, to_typed
from specdec.experiments.acceptance_report import acceptance_picture, acceptance_tables
from specdec.experiments.building import build, describe, sampling_params
from specdec.experiments.campaign import campaign
from specdec.experiments.estimates import clustered_mean
from specdec.experiments.jury import Jury, chosen_rules
from specdec.experiments.prompts import check_chat, read_prompts, uses_chat, wrap
from specdec.experiments.replay import Replay
from specdec.experiments.resume import Measurements, digest
from specdec.experiments.system import check_draft, drafter_label, load_target, plain_system, target_labels
from specdec.experiments.visits import Visit, Visitor
from specdec.interfaces import TreePolicy
from specdec.model import PagedModel
from specdec.provenance import device_name, provenance
from specdec.request import encode
from specdec.sampling import SamplingParams

# What the experiment varies by itself, and the key that says how.
VARIED = {
    "drafter/policy=": "policies",
    "drafter.policy.": "policies",
    "sampling.temperature=": "temperatures",
}


def run(config: AcceptanceConfig, command: str) -> int:
    """Visits every prompt's text at every temperature and appends a row per temperature, policy and rule to `output`.

    Each visit goes to raw.jsonl in `work_dir` at once; a restart with the same `work_dir` goes on from there. The picture
    lies beside `output`. Raises ValueError for what can be seen to be wrong before a model is loaded.
    """
    params = _check(config, command)
    texts = wrap(read_prompts(config.prompt_file or "", config.prompt_field, config.limit), config.template)
    rules = chosen_rules(config.rules, config.allow_lossy)
    policies: dict[str, TreePolicy] = {}
    for overrides in config.policies:
        chosen = policy_config(overrides)
        policies[describe(chosen)] = build(chosen)
    juries = {label: Jury(label, policy, rules) for label, policy in policies.items()}
    with campaign(config, command, "visits") as work:
        drafter = build(config.drafter)
        target = load_target(config.target)
        chat = uses_chat(config.chat, target.tokenizer)
        prompts = [encode(target, text, chat) for text in texts]
        plain = plain_system().engine(target, config.engine)
        replay = Replay(target, drafter, config.engine.page_size, config.engine.prefill_chunk)
        visitor = Visitor(plain, replay, policies, juries, params, config.stride, config.num_repeats)
        common = _common_labels(config, target, chat, params)
        visits = _visit_all(visitor, prompts, config.temperatures, work.raw, common)
        rows = _rows(visitor, visits, {**common, **provenance(command)})
        for row in rows:
            work.tracker.row(row)
        work.tracker.summary({f"{row['policy']} {row['rule']} {row['temperature']:g}": row["tau"] for row in rows})
    work.tell(rows, acceptance_picture, acceptance_tables)
    return 0


def policy_config(overrides: str) -> PolicyConfig:
    """The policy that an item of `policies` describes. Raises ValueError for what it must not hold."""
    words = shlex.split(overrides)
    for word in words:
        if not word.startswith(("drafter/policy=", "drafter.policy.")):
            raise ValueError(
                f"policies: {word} is no part of a policy; give drafter/policy=NAME drafter.policy.KEY=VALUE"
            )
    try:
        return to_typed(compose("contender", words)).drafter.policy
    except Exception as error:
        raise ValueError(f"policies: {explain(error, ['contender', *words])}") from error


def _check(config: AcceptanceConfig, command: str) -> SamplingParams:
    for word in shlex.split(command):
        for key, ours in VARIED.items():
            if word.startswith(key):
                raise ValueError(f"{word}: this experiment goes through several; give {ours}=[...]")
    if config.prompt_file is None:
        raise ValueError("prompt_file is missing: give prompt_file=FILE (.jsonl or .txt)")
    if not hasattr(config.drafter, "policy"):
        raise ValueError("drafter=none drafts nothing: choose another drafter")
    check_draft(config.drafter)
    check_chat(config.chat)
    if config.stride < 1 or config.num_repeats < 1:
        raise ValueError(f"stride={config.stride} and num_repeats={config.num_repeats} must be >= 1")
    if not config.policies or not config.temperatures:
        raise ValueError("policies and temperatures must each name at least one")
    params = sampling_params(config.sampling)
    if params.max_new_tokens < 2:
        raise ValueError(f"sampling.max_new_tokens={params.max_new_tokens} leaves no room for drafts: it must be >= 2")
    for temperature in config.temperatures:
        replace(params, temperature=temperature)
    return replace(params, seed=params.with_seed())


def _common_labels(config: AcceptanceConfig, target: PagedModel, chat: bool, params: SamplingParams) -> dict[str, Any]:
    usual, own = SamplingParams(), ("temperature", "seed", "max_new_tokens")
    changed = {one.name: getattr(params, one.name) for one in fields(params) if one.name not in own}
    return {
        "experiment": "acceptance",
        "system": "specdec",
        **target_labels(config.target),
        "drafter": drafter_label(config.drafter),
        "prompts": config.prompts or Path(config.prompt_file or "").stem,
        "template": config.template,
        "chat": chat,
        "sampling": {name: value for name, value in changed.items() if value != getattr(usual, name)},
        "seed": params.seed,
        "max_new_tokens": params.max_new_tokens,
        "stride": config.stride,
        "num_repeats": config.num_repeats,
        "batch_size": 1,
        "dtype": str(target.dtype).removeprefix("torch."),
        "numerics": target.numerics,
        "num_threads": torch.get_num_threads(),
        "device": device_name(target.device),
    }


def _visit_all(
    visitor: Visitor, prompts: list[list[int]], temperatures: list[float], raw: Measurements, common: dict[str, Any]
) -> dict[float, list[Visit]]:
    """Per temperature a visit of every prompt's text, in the order of the prompts."""
    rules = {label: [rule.name for rule in jury.rules] for label, jury in visitor.juries.items()}
    visits: dict[float, list[Visit]] = {temperature: [] for temperature in temperatures}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("texts", total=len(prompts) * len(visits))

        def show(root: int, num_roots: int) -> None:
            progress.update(task, description=f"text, context {root} of {num_roots}")

        for number, prompt in enumerate(prompts):
            for temperature, done in visits.items():
                key = digest(common, temperature, prompt, list(rules.items()))
                found = raw.get(key)
                visit = visitor.visit(prompt, temperature, show) if found is None else Visit(**found["visit"])
                if found is None:
                    raw.put(key, temperature=temperature, prompt=number, visit=asdict(visit))
                done.append(visit)
                progress.advance(task)
    return visits


def _rows(visitor: Visitor, visits: dict[float, list[Visit]], common: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for temperature, texts in visits.items():
        if not any(text.roots for text in texts):
            raise ValueError(f"at temperature {temperature:g} every text ends with its first token: nothing to draft")
        for label, jury in visitor.juries.items():
            for rule in jury.rules:
                taus = [text.taus[label][rule.name] for text in texts]
                tau = clustered_mean(taus)
                row = {
                    "policy": label,
                    "rule": rule.name,
                    "lossless": rule.lossless,
                    "num_nodes": visitor.policies[label].max_nodes,
                    "mean_num_nodes": clustered_mean([text.num_nodes[label] for text in texts]).mean,
                    "temperature": temperature,
                    "tau": tau.mean,
                    "tau_stderr": tau.stderr,
                    "reference_rule": jury.reference,
                    "difference": None,
                    "difference_stderr": None,
                    "num_prompts": sum(bool(text.roots) for text in texts),
                    "num_contexts": sum(len(text.roots) for text in texts),
                }
                if jury.reference is not None:
                    others = [text.taus[label][jury.reference] for text in texts]
                    difference = clustered_mean(
                        [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(taus, others, strict=True)]
                    )
                    row |= {"difference": difference.mean, "difference_stderr": difference.stderr}
                rows.append({**common, **row})
    return rows


if __name__ == "__main__":
    from specdec.cli import main

    sys.exit(main(["acceptance", *sys.argv[1:]]))
