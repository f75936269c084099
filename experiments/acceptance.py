"""Compare acceptance lengths of all rules on the same drafts, along the target's own texts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.cli import explain
from specdec.config import AcceptanceConfig, PolicyConfig, compose, to_typed
from specdec.engine import Engine
from specdec.experiments.acceptance_report import acceptance_picture, acceptance_table
from specdec.experiments.building import build, describe, sampling_params
from specdec.experiments.estimates import clustered_mean
from specdec.experiments.jury import Jury, chosen_rules
from specdec.experiments.prompts import check_chat, read_prompts, uses_chat, wrap
from specdec.experiments.replay import Replay
from specdec.experiments.resume import Measurements, digest
from specdec.experiments.system import check_draft, drafter_label, load_target, plain_system, target_name
from specdec.interfaces import TreePolicy
from specdec.model import PagedModel
from specdec.provenance import device_name, provenance
from specdec.request import encode
from specdec.sampling import SamplingParams
from specdec.tracking import Tracker

# What the experiment varies by itself, and the key that says how.
VARIED = {
    "drafter/policy=": "policies",
    "drafter.policy.": "policies",
    "rule=": "rules",
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
    tracker: Tracker = build(config.tracking)
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    raw = Measurements(Path(config.work_dir) / "raw.jsonl")
    try:
        tracker.start({**asdict(config), "provenance": provenance(command)})
        drafter = build(config.drafter)
        target = load_target(config.target)
        chat = uses_chat(config.chat, target.tokenizer)
        prompts = [encode(target, text, chat) for text in texts]
        plain = plain_system().engine(target, config.engine)
        replay = Replay(target, drafter, config.engine.page_size, config.engine.prefill_chunk)
        visitor = _Visitor(plain, replay, policies, juries, params, config.stride, config.num_repeats)
        common = _common_labels(config, target, chat, params)
        visits = _visit_all(visitor, prompts, config.temperatures, raw, common)
        rows = _rows(visitor, visits, {**common, **provenance(command)})
        for row in rows:
            tracker.row(row)
        tracker.summary({f"{row['policy']} {row['rule']} {row['temperature']:g}": row["tau"] for row in rows})
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"visits are in {raw.shown_path}; go on with work_dir={config.work_dir}") from None
    finally:
        raw.finish()
        tracker.finish()
    picture = tracker.path.with_suffix(".png")
    acceptance_picture(rows, picture)
    Console(markup=False, highlight=False).print(acceptance_table(rows))
    print(f"{len(rows)} rows in {tracker.shown_path}, picture in {picture.name} beside it", flush=True)
    return 0


def policy_config(overrides: str) -> PolicyConfig:
    """The policy that an item of `policies` describes. Raises ValueError for what it must not hold."""
    words = shlex.split(overrides)
    for word in words:
        if not word.startswith(("drafter/policy=", "drafter.policy.")):
            raise ValueError(f"policies: {word} is no part of a policy; give drafter/policy=NAME drafter.policy.KEY=VALUE")
    try:
        return to_typed(compose("contender", words)).drafter.policy
    except Exception as error:
        raise ValueError(f"policies: {explain(error, ['contender', *words])}") from error


@dataclass
class Visit:
    """One text and what was seen along it: per policy the nodes of each tree, per policy and rule each tree's mean tau."""

    output: list[int]
    roots: list[int]
    num_nodes: dict[str, list[int]] = field(default_factory=dict)
    taus: dict[str, dict[str, list[float]]] = field(default_factory=dict)


@dataclass
class _Visitor:
    """Writes the target's text behind a prompt, then goes along it."""

    plain: Engine
    replay: Replay
    policies: dict[str, TreePolicy]
    juries: dict[str, Jury]
    params: SamplingParams
    stride: int
    num_repeats: int

    def visit(self, prompt: list[int], temperature: float, on_root: Callable[[int, int], None]) -> Visit:
        params = replace(self.params, temperature=temperature, seed=self._seed("text", prompt))
        output = self.plain.generate([prompt], params)[0].token_ids
        # The first drafted tree grows from the first new token; none grows from the last.
        places = len(output) - 1
        start = self._seed("start", prompt) % max(min(self.stride, places), 1)
        roots = [len(prompt) + place for place in range(start, places, self.stride)]
        visit = Visit(
            output,
            roots,
            {label: [] for label in self.policies},
            {label: {rule.name: [] for rule in jury.rules} for label, jury in self.juries.items()},
        )
        seeds = [self._seed("accept", prompt, repeat) for repeat in range(self.num_repeats)]
        for scene in self.replay.scenes(prompt, output, roots, params, self._seed("draft", prompt), self.policies):
            on_root(roots.index(scene.root) + 1, len(roots))
            visit.num_nodes[scene.policy].append(int(scene.tree.num_nodes_B[0]))
            for name, tau in self.juries[scene.policy].taus(scene, seeds).items():
                visit.taus[scene.policy][name].append(tau)
        return visit

    def _seed(self, purpose: str, prompt: list[int], index: int = 0) -> int:
        """Prompts are clusters: nothing may tie them together, so each has seeds of its own."""
        return int(digest(self.params.seed, purpose, prompt, index), 16)


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
        "target": target_name(config.target),
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
        "device": device_name(target.device),
    }


def _visit_all(
    visitor: _Visitor, prompts: list[list[int]], temperatures: list[float], raw: Measurements, common: dict[str, Any]
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


def _rows(visitor: _Visitor, visits: dict[float, list[Visit]], common: dict[str, Any]) -> list[dict[str, Any]]:
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
